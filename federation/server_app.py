"""The ServerApp that `flwr run .` starts: Flower's grid behind the `Sites` of `rounds`.

Nothing heavy is imported here: Flower loads this module in every process of a run.
"""

import io
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from federation.errors import FedgeError
from federation.events import Event, RoundFinished, RunResumed, SiteFailed, SiteLate
from federation.exchange import LIFETIME, RoundError
from federation.rounds import run_rounds
from federation.settings import FederationSettings, load_settings
from federation.sites import Reply, Request
from federation.wire import REFERENCE_MISSING

app = ServerApp()

ADAPTER, TRAINING, ROUND, RESULT, SITE = "adapter", "training", "round", "result", "site"
SIMULATION = "simulation"
"""Names of the records in a message; client.client_app uses the same."""
_NOT_TAKEN = (
    "the SuperLink did not take the message to it: the site was unregistered meanwhile, or the run "
    "was stopped"
)


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Run a federation with the settings of the run config."""
    try:
        settings = load_settings(FederationSettings, context.run_config, "the run config")
        sites = GridSites(grid, LIFETIME * settings.round_timeout_s)
        directory = run_rounds(sites, settings, on_event=_say)
    except FedgeError as error:
        # One sentence in the run's log instead of a traceback; the run counts as failed.
        print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201
        if os.environ.get("FEDGE_DEBUG"):
            raise
        sys.exit(error.exit_code)
    print(f"adapter: {directory}", file=sys.stderr, flush=True)  # noqa: T201


def _say(event: Event) -> None:
    """Print what `flwr run --stream` should show while a run is under way."""
    match event:
        case RoundFinished():
            loss = "–" if event.train_loss is None else f"{event.train_loss:.4f}"
            line = (
                f"round {event.server_round}: {event.num_updates} updates, train loss "
                f"{loss}, {event.seconds:.1f} s"
            )
        case RunResumed():
            line = f"resumed at round {event.server_round}, with the settings of its run.json"
        case SiteLate():
            line = (
                f"round {event.server_round}: site {event.site} came late with round "
                f"{event.trained_round}: {'folded in' if event.kept else 'dropped'}"
            )
        case SiteFailed():
            line = f"round {event.server_round}: site {event.site} failed: {event.reason}"
        case _:
            return
    print(line, file=sys.stderr, flush=True)  # noqa: T201


class GridSites:
    """The nodes of a Flower grid. Replies are pulled one id at a time, so one is in memory."""

    def __init__(self, grid: Grid, ttl_s: float) -> None:
        """Speak through ``grid``; a request and its reply expire after ``ttl_s``."""
        self._grid = grid
        self._ttl_s = ttl_s
        self._pending: dict[str, tuple[str, int, float]] = {}
        """Site, round and time of expiry by message id."""
        self._refused: deque[Reply] = deque()
        """Errors in the place of replies, for sites whose message the SuperLink did not take."""
        self._sent = self._next_look = 0.0
        """When the last request went out, and before when it is no use to ask for replies."""

    def wait_for(self, count: int, timeout_s: float) -> list[str]:
        """Return the sites once there are ``count`` of them, or those there are at the timeout."""
        deadline = time.monotonic() + timeout_s
        while True:
            nodes = [str(node) for node in self._grid.get_node_ids()]
            if len(nodes) >= count or time.monotonic() >= deadline:
                return nodes
            time.sleep(0.2)

    def send(self, sites: Sequence[str], request: Request) -> None:
        """Push one message a site. All share the adapter's bytes: Flower stores them once.

        A site that was unregistered since it was drawn gets none, and `receive` brings its error.

        Raises:
            RoundError: The SuperLink does not say which of the messages it took.
        """
        records = {
            ADAPTER: ArrayRecord({ADAPTER: _byte_array(request.message)}),
            TRAINING: ConfigRecord(_scalars(request.training)),
            ROUND: ConfigRecord(
                {
                    "server_round": request.server_round,
                    "uplink": request.uplink,
                    "downlink": request.downlink,
                    "trains": request.trains,
                    "run": request.run,
                    "aggregation": request.aggregation,
                    "num_rounds": request.num_rounds,
                    "cohort": request.cohort,
                    "metrics": list(request.metrics),
                }
            ),
        }
        if request.simulation is not None:
            records[SIMULATION] = ConfigRecord(dict(request.simulation))
        messages = [
            Message(
                content=RecordDict(records),
                message_type="train",
                dst_node_id=int(site),
                group_id=str(request.server_round),
                ttl=self._ttl_s,
            )
            for site in sites
        ]
        ids = list(self._grid.push_messages(messages))
        if len(ids) != len(messages):
            raise RoundError(
                f"round {request.server_round}: the SuperLink answered for {len(ids)} of "
                f"{len(messages)} messages: a site is gone, or the SuperLink (or a proxy before "
                "it) refuses requests of this size (413 in this log); resume the run when that is "
                "mended"
            )
        self._sent = self._next_look = time.monotonic()
        expires = self._sent + self._ttl_s
        for message_id, site in zip(ids, sites, strict=True):
            if message_id:
                self._pending[message_id] = (site, request.server_round, expires)
            else:
                self._refused.append(Reply(site, request.server_round, error=_NOT_TAKEN))

    def receive(self) -> Reply | None:
        """Pull the first reply that is there; ask for one message id at a time.

        After a look at every id that found nothing, answers None without asking for a while.
        """
        if self._refused:
            return self._refused.popleft()
        now = time.monotonic()
        if now < self._next_look:
            return None
        self._pending = {key: value for key, value in self._pending.items() if value[2] > now}
        for message_id, (site, server_round, _) in self._pending.items():
            reply = self._pull(message_id, site, server_round)
            if reply is not None:
                del self._pending[message_id]
                return reply
        done = time.monotonic()
        self._next_look = done + pause_s(done - self._sent, done - now)
        return None

    def _pull(self, message_id: str, site: str, server_round: int) -> Reply | None:
        """Return the reply to one message, if it is there.

        The SuperLink looks at the heads of what a site sends, and here the bodies are read: what
        they raise is the site's. httpx says that the SuperLink is away or refuses to answer,
        OSError is this machine's, and Flower's word for a run that was stopped is no Exception.
        """
        try:
            messages = list(self._grid.pull_messages([message_id]))
        except (httpx.HTTPError, OSError):
            raise
        except Exception as error:  # whatever one site sends must not end the run of the others
            return Reply(
                site, server_round, error=f"the reply is not readable ({type(error).__name__})"
            )
        return _to_reply(site, server_round, messages[0]) if messages else None


def pause_s(waited_s: float, look_s: float) -> float:
    """Return how long to leave the SuperLink alone after a look that found no reply.

    Asking every 0.05 s would keep the SuperLink busy for as long as the sites train. 3 % of the
    time waited so far, 1 s at most, is little beside that, and beside the 3 s for which a stock
    SuperNode sleeps after a reply of its own. Where there are many sites, a look costs a call a
    site: four times as long as it took is left between two looks, up to 5 s.

    Args:
        waited_s: Since the last request went out.
        look_s: That the look took.
    """
    return max(0.05, min(0.03 * waited_s, 1.0), min(4 * look_s, 5.0))


def _byte_array(path: Path) -> Array:
    """Return a file as an array of bytes, with one copy of it in memory."""
    import numpy as np

    size = path.stat().st_size
    head = io.BytesIO()
    shape = {"descr": "|u1", "fortran_order": False, "shape": (size,)}
    np.lib.format.write_array_header_1_0(head, shape)
    with path.open("rb") as file:
        shutil.copyfileobj(file, head, 1 << 20)  # it grows in place, and getvalue does not copy
    return Array(dtype="uint8", shape=(size,), stype="numpy.ndarray", data=head.getvalue())


def bytes_of(array: Array) -> memoryview:
    """Return the content of an array of bytes without a copy.

    Raises:
        ValueError: It is no numpy array of bytes.
    """
    import numpy as np

    head = io.BytesIO(array.data)
    version = np.lib.format.read_magic(head)
    if version != (1, 0):
        raise ValueError(f"numpy format {version}")
    shape, _, dtype = np.lib.format.read_array_header_1_0(head)
    content = memoryview(array.data)[head.tell() :]
    if dtype != np.uint8 or len(shape) != 1 or shape[0] != len(content):
        raise ValueError(f"{dtype} of shape {shape}")
    return content


def _to_reply(site: str, server_round: int, message: Message) -> Reply:
    try:
        if message.has_error():
            # Flower makes None of an empty reason.
            reason = _printable(message.error.reason or "no reason given", 500)
            return Reply(
                site,
                server_round,
                error=f"error {message.error.code}: {reason}",
                lacks_reference=message.error.code == REFERENCE_MISSING,
            )
        result = message.content[RESULT]
        return Reply(
            site,
            server_round,
            update=bytes_of(message.content[ADAPTER][ADAPTER]),
            num_examples=int(result["num-examples"]) if "num-examples" in result else None,
            train_loss=float(result["train_loss"]) if "train_loss" in result else None,
            seconds=float(result["seconds"]) if "seconds" in result else None,
            name=_printable(str(message.content[SITE]["name"]), 64),
        )
    except Exception as error:  # whatever one site sends must not end the run of the others
        return Reply(
            site, server_round, error=f"the reply is not an update ({type(error).__name__})"
        )


def _printable(text: str, length: int) -> str:
    """Return what a site says as what may stand in a log: short, and no control codes."""
    return "".join(letter for letter in text[:length] if letter.isprintable())


def _scalars(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
