"""The ServerApp that `flwr run .` starts: Flower's grid behind the `Sites` of `rounds`.

Nothing heavy is imported here: Flower loads this module in every process of a run.
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from federation.errors import FedgeError
from federation.events import Event, RoundFinished, SiteFailed
from federation.rounds import Reply, Request, RoundError, run_rounds
from federation.settings import FederationSettings, load_settings

app = ServerApp()

ADAPTER, TRAINING, ROUND, RESULT, SITE = "adapter", "training", "round", "result", "site"
"""Names of the records in a message; client.client_app uses the same."""


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Run a federation with the settings of the run config."""
    try:
        settings = load_settings(FederationSettings, context.run_config, "the run config")
        sites = GridSites(grid, settings.round_timeout_s)
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
            line = (
                f"round {event.server_round}: {event.num_updates} updates, train loss "
                f"{event.train_loss:.4f}, {event.seconds:.1f} s"
            )
        case SiteFailed():
            line = f"round {event.server_round}: site {event.site} failed: {event.reason}"
        case _:
            return
    print(line, file=sys.stderr, flush=True)  # noqa: T201


class GridSites:
    """The nodes of a Flower grid. Replies are pulled one id at a time, so one is in memory."""

    def __init__(self, grid: Grid, ttl_s: float) -> None:
        """Speak through ``grid``; a request expires after ``ttl_s``."""
        self._grid = grid
        self._ttl_s = ttl_s
        self._pending: dict[str, str] = {}

    def wait_for(self, count: int, timeout_s: float) -> list[str]:
        """Return the sites once there are ``count`` of them, or those there are at the timeout."""
        deadline = time.monotonic() + timeout_s
        while True:
            nodes = [str(node) for node in self._grid.get_node_ids()]
            if len(nodes) >= count or time.monotonic() >= deadline:
                return nodes
            time.sleep(0.2)

    def send(self, sites: Sequence[str], request: Request) -> None:
        """Push one message a site. All share the adapter's bytes: Flower stores them once."""
        import numpy as np

        arrays = ArrayRecord({ADAPTER: Array(np.frombuffer(request.adapter, dtype=np.uint8))})
        training = ConfigRecord(_scalars(request.training))
        number = ConfigRecord({"server_round": request.server_round})
        messages = [
            Message(
                content=RecordDict({ADAPTER: arrays, TRAINING: training, ROUND: number}),
                message_type="train",
                dst_node_id=int(site),
                group_id=str(request.server_round),
                ttl=self._ttl_s,
            )
            for site in sites
        ]
        ids = list(self._grid.push_messages(messages))
        if any(not message_id for message_id in ids):
            raise RoundError("the SuperLink did not take every message: is it still running?")
        self._pending = dict(zip(ids, sites, strict=True))

    def receive(self) -> Reply | None:
        """Pull the first reply that is there; ask for one message id at a time."""
        for message_id, site in self._pending.items():
            for message in self._grid.pull_messages([message_id]):
                del self._pending[message_id]
                return _to_reply(site, message)
        return None


def _to_reply(site: str, message: Message) -> Reply:
    if message.has_error():
        reason = _printable(message.error.reason, 500)
        return Reply(site, None, f"error {message.error.code}: {reason}")
    try:
        result = message.content[RESULT]
        update = message.content[ADAPTER][ADAPTER].numpy().tobytes()
        return Reply(
            site,
            update,
            None,
            num_examples=int(result["num-examples"]),
            train_loss=float(result["train_loss"]),
            seconds=float(result["seconds"]),
            name=_printable(str(message.content[SITE]["name"]), 64),
        )
    except Exception as error:  # whatever one site sends must not end the run of the others
        return Reply(site, None, f"the reply is not an update ({type(error).__name__})")


def _printable(text: str, length: int) -> str:
    """Return what a site says as what may stand in a log: short, and no control codes."""
    return "".join(letter for letter in text[:length] if letter.isprintable())


def _scalars(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
