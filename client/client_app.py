"""The ClientApp that a run carries to a site: one message in, one update out.

Nothing heavy is imported at the top: a stock SuperNode starts a process for every message. Where
Flower keeps the process (simulation), the model stays loaded between messages. What a site does
with a message is in `client.round`.

What a reply may hold: the update, a count, a mean loss, seconds. Errors carry our own sentences,
which never quote a record; of any other exception only the type leaves the site.
"""

import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp

from client.round import RoundRequest, answer_round
from client.settings import TrainingSettings
from client.site import Site, find_site
from federation.errors import FedgeError
from federation.header import DTYPES, FACTORS
from federation.server_app import ADAPTER, RESULT, ROUND, SIMULATION, SITE, TRAINING
from federation.wire import REFERENCE_MISSING, MissingReferenceError, WireError

app = ClientApp()

SITE_ERROR = 1001
"""Error code of a reply: the site refused or failed; the reason says which."""


@app.train()  # type: ignore[untyped-decorator]
def train(message: Message, context: Context) -> Message:
    """Train the received adapter on the site's records and send it back."""
    code, own = SITE_ERROR, list[str]()
    try:
        site = find_site(
            context.node_config,
            message.content.get(SIMULATION, context.run_config),
            node_id=context.node_id,
            environment=os.environ,
        )
        own = [str(path) for path in (site.data, site.base_model, site.state)]
        return _train(message, site)
    except MissingReferenceError as error:
        code, reason = REFERENCE_MISSING, without_directories(str(error), own)
    except FedgeError as error:
        reason = without_directories(str(error), own)
    except Exception as error:
        traceback.print_tb(error.__traceback__, file=sys.stderr)
        reason = f"the site failed with {type(error).__name__}; its own log shows where"
    return Message(Error(code, reason), reply_to=message)


def without_directories(reason: str, own: Sequence[str] = ()) -> str:
    """Return a message with file names but not where they lie: that is the site's own business.

    Args:
        reason: What went wrong.
        own: The site's own paths, given or by default: they may be relative, or hold spaces and
            quotes, so that no pattern could tell where they end.
    """
    for path in map(Path, own):
        for directory in (path.parent, path.absolute().parent):
            if directory.name:
                reason = reason.replace(f"{directory}{os.sep}", f"…{os.sep}")
    return re.sub(r"(?:[A-Za-z]:)?[\\/](?:[^\s\\/:'\"]+[\\/])+", "…/", reason)


def read_request(record: Mapping[str, Any]) -> RoundRequest:
    """Return a round's request; what it does not say has the value it had before it could.

    Raises:
        WireError: A value that this version does not know.
    """
    request = RoundRequest(
        server_round=int(record["server_round"]),
        **{
            key: str(record[key])
            for key in ("uplink", "downlink", "trains", "run")
            if key in record
        },
    )
    for key, value, known in (
        ("uplink", request.uplink, DTYPES),
        ("downlink", request.downlink, DTYPES),
        ("trains", request.trains, FACTORS),
    ):
        if value not in known:
            raise WireError(
                f"the round's {key} is {value[:80]!r}, this site knows {', '.join(known)}: "
                "install the same version of fedge on both sides"
            )
    return request


def _train(message: Message, site: Site) -> Message:
    import numpy as np

    from federation.settings import load_settings

    started = time.perf_counter()
    settings = load_settings(
        TrainingSettings, dict(message.content[TRAINING]), "the run's training settings"
    )
    request = read_request(message.content[ROUND])
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "adapter"
        path.write_bytes(message.content[ADAPTER][ADAPTER].numpy().tobytes())
        answer = answer_round(path, site, settings, request, scratch=Path(scratch))
    result = MetricRecord(
        {
            "num-examples": answer.num_examples,
            "train_loss": answer.train_loss,
            "seconds": time.perf_counter() - started,
        }
    )
    arrays = ArrayRecord({ADAPTER: Array(np.frombuffer(answer.update, dtype=np.uint8))})
    content = RecordDict({ADAPTER: arrays, RESULT: result, SITE: ConfigRecord({"name": site.name})})
    return Message(content, reply_to=message)
