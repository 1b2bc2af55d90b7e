"""The ClientApp that a run carries to a site: one message in, one update out.

At a site that has a trainer (`trainer` in its node config: the path of a socket) this is a shim:
one question over the socket, one answer back, and nothing else is within its reach. In simulation,
and at a site without a trainer, it trains here: what a site does with a message is in
`client.round`. Nothing heavy is imported at the top: a stock SuperNode starts a process for every
message. Where Flower keeps the process (simulation), the model stays loaded between messages.

What a reply may hold: the update and, of a count, a mean loss and seconds, those that the run asks
for. Errors carry our own sentences, which never quote a record; of any other exception only the
type leaves the site.
"""

import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

from flwr.app import (
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp

from client.reasons import code_and_reason
from client.round import answer_round, read_request
from client.settings import TrainingSettings
from client.site import Site, find_site
from client.trainer_link import LinkError, ask_again, request_head
from federation.errors import FedgeError
from federation.grid_sites import (
    ADAPTER,
    RESULT,
    ROUND,
    SIMULATION,
    SITE,
    TRAINING,
    bytes_of,
    record_of,
)

app = ClientApp()


@app.train()  # type: ignore[untyped-decorator]
def train(message: Message, context: Context) -> Message:
    """Train the received adapter on the site's records and send it back."""
    own: list[str] = []
    try:
        if context.node_config.get("trainer"):
            return _ask_trainer(message, Path(str(context.node_config["trainer"])))
        site = find_site(
            context.node_config,
            message.content.get(SIMULATION, context.run_config),
            node_id=context.node_id,
            environment=os.environ,
        )
        own = [str(path) for path in (site.data, site.base_model, site.state)]
        return _train(message, site)
    except Exception as error:
        if not isinstance(error, FedgeError):
            traceback.print_tb(error.__traceback__, file=sys.stderr)
        return Message(Error(*code_and_reason(error, own)), reply_to=message)


def _ask_trainer(message: Message, socket: Path) -> Message:
    """Let the site's trainer answer; no bundle is named: only a resident node knows which it is."""
    head = request_head(dict(message.content[ROUND]), dict(message.content[TRAINING]), "")
    answer = ask_again(socket, head, bytes_of(message.content[ADAPTER][ADAPTER]))
    if answer.code != 0:
        return Message(Error(answer.code, str(answer.head.get("reason", ""))), reply_to=message)
    return _reply(message, answer.update, dict(answer.head["metrics"]), str(answer.head["site"]))


def _train(message: Message, site: Site) -> Message:
    from federation.settings import load_settings

    started = time.perf_counter()
    settings = load_settings(
        TrainingSettings, dict(message.content[TRAINING]), "the run's training settings"
    )
    if "stage" in message.content[ROUND]:
        raise LinkError(
            "the run asks for a secure sum, which only a site's trainer answers: start `client "
            "daemon`, or name its socket with --node-config 'trainer=…'"
        )
    request = read_request(message.content[ROUND])
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "adapter"
        path.write_bytes(bytes_of(message.content[ADAPTER][ADAPTER]))
        answer = answer_round(path, site, settings, request)
    measured = {
        "num-examples": answer.num_examples,
        "train_loss": answer.train_loss,
        "seconds": time.perf_counter() - started,
    }
    metrics = {name: value for name, value in measured.items() if name in request.metrics}
    return _reply(message, answer.update, metrics, site.name)


def _reply(message: Message, update: bytes, metrics: dict[str, float], name: str) -> Message:
    records = {
        ADAPTER: record_of(update),
        RESULT: MetricRecord(metrics),
        SITE: ConfigRecord({"name": name}),
    }
    return Message(RecordDict(records), reply_to=message)
