"""The sites of a run as the nodes of a Flower grid: what `federation.rounds` speaks to.

Also the names of the records in a message, which `client.client_app` and the daemon share. Nothing
heavy is imported here: Flower loads this module in every process of a run.
"""

import io
import shutil
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from federation.exchange import RoundError
from federation.metrics import count_in, number_in
from federation.sites import Reply, Request
from federation.wire import REFERENCE_MISSING

ADAPTER, TRAINING, ROUND, RESULT, SITE = "adapter", "training", "round", "result", "site"
SIMULATION = "simulation"
"""Names of the records in a message; client.client_app uses the same."""
SMALL_BYTES = 1 << 16
"""Up to this size a message travels in one object."""
_NOT_TAKEN = (
    "the SuperLink did not take the message to it: the site was unregistered meanwhile, or the run "
    "was stopped"
)


@dataclass(frozen=True)
class _Pending:
    """A message that was not answered yet."""

    empty: Reply
    """Who was asked, and for what."""
    expires: float
    """Of `time.monotonic`."""
    max_bytes: int
    """The longest update that is taken in."""


class GridSites:
    """The nodes of a Flower grid. Replies are taken in one by one, so one is in memory."""

    def __init__(self, grid: Grid, ttl_s: float) -> None:
        """Speak through ``grid``; a request and its reply expire after ``ttl_s``."""
        from federation.flower_grid import open_post

        self._grid = grid
        self._post = open_post(grid)
        self._ttl_s = ttl_s
        self._pending: dict[str, _Pending] = {}
        """By message id."""
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
        Of a secure sum only the stage that is asked last is waited for: a masked vector that comes
        later is not even downloaded.

        Raises:
            RoundError: The SuperLink does not say which of the messages it took.
        """
        records = {
            ADAPTER: record_of(request.message),
            TRAINING: ConfigRecord(_scalars(request.training)),
            ROUND: ConfigRecord(round_values(request)),
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
        ids = self._push(messages, request.server_round)
        if request.stage:
            self._pending = {
                key: value
                for key, value in self._pending.items()
                if _place(value.empty) == _place(request)
            }
        self._sent = self._next_look = time.monotonic()
        expires = self._sent + self._ttl_s
        for message_id, site in zip(ids, sites, strict=True):
            empty = Reply(site, request.server_round, request.stage, request.attempt)
            if message_id:
                self._pending[message_id] = _Pending(empty, expires, request.max_reply_bytes)
            else:
                self._refused.append(replace(empty, error=_NOT_TAKEN))

    def _push(self, messages: Sequence[Message], server_round: int) -> list[str | None]:
        from federation.flower_grid import PushError

        try:
            ids = self._post.push(messages)
        except PushError as error:
            raise RoundError(
                f"round {server_round}: {error}: look at the SuperLink (its log, its disk, the "
                "sizes that it and a proxy before it take) and resume the run when that is mended"
            ) from None
        if len(ids) != len(messages):
            raise RoundError(
                f"round {server_round}: the SuperLink answered for {len(ids)} of "
                f"{len(messages)} messages: a site is gone, or the SuperLink (or a proxy before "
                "it) refuses requests of this size (413 in this log); resume the run when that is "
                "mended"
            )
        return ids

    def receive(self) -> Reply | None:
        """Return the first reply that is there.

        After a look that found none, answers None without asking for a while; a reply that is on
        its way is tried meanwhile.
        """
        if self._refused:
            return self._refused.popleft()
        now = time.monotonic()
        self._pending = {key: value for key, value in self._pending.items() if value.expires > now}
        limits = {key: value.max_bytes for key, value in self._pending.items()}
        taken = self._post.take(limits)
        if taken is None and now >= self._next_look:
            self._post.look(limits)
            taken = self._post.take(limits)
            done = time.monotonic()
            if taken is None:
                self._next_look = done + pause_s(done - self._sent, done - now)
        if taken is None:
            return None
        empty = self._pending.pop(taken.message_id).empty
        if taken.message is None:
            return replace(empty, error=taken.reason)
        return _to_reply(empty, taken.message)


def _place(of: Request | Reply) -> tuple[int, int, str]:
    return of.server_round, of.attempt, of.stage


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


def num_at_a_time(num_objects: int) -> int:
    """Return how many objects to push or pull at the same time.

    Pieces of 5 MB go two at a time, as flwr has it. For few and small ones the requests only meet
    in the SuperLink's database and wait for each other: 38 ms each instead of 11 (2 cores, loaded).
    """
    return 1 if num_objects <= 12 else 2


def record_of(content: bytes | Path) -> ArrayRecord | ConfigRecord:
    """Return the record `ADAPTER`, which holds bytes; `bytes_of` its value gives them back.

    An array is three objects on a SuperLink, each with a request of its own at both ends, and a
    config's value is one: what is small travels as that. Of a file one copy is in memory.
    """
    size = content.stat().st_size if isinstance(content, Path) else len(content)
    if size <= SMALL_BYTES:
        value = content.read_bytes() if isinstance(content, Path) else bytes(content)
        return ConfigRecord({ADAPTER: value})
    import numpy as np

    head = io.BytesIO()
    shape = {"descr": "|u1", "fortran_order": False, "shape": (size,)}
    np.lib.format.write_array_header_1_0(head, shape)
    if isinstance(content, Path):
        with content.open("rb") as file:
            shutil.copyfileobj(file, head, 1 << 20)  # it grows in place, and getvalue does not copy
    else:
        head.write(content)
    array = Array(dtype="uint8", shape=(size,), stype="numpy.ndarray", data=head.getvalue())
    return ArrayRecord({ADAPTER: array})


def bytes_of(value: object) -> memoryview:
    """Return the content of bytes or of an array of bytes without a copy.

    Raises:
        ValueError: It is neither.
    """
    import numpy as np

    if isinstance(value, bytes):
        return memoryview(value)
    if not isinstance(value, Array):
        raise ValueError(type(value).__name__)  # noqa: TRY004 - as for an array of other content
    head = io.BytesIO(value.data)
    version = np.lib.format.read_magic(head)
    if version != (1, 0):
        raise ValueError(f"numpy format {version}")
    try:
        shape, _, dtype = np.lib.format.read_array_header_1_0(head)
    except Exception as error:  # it parses Python literals: tokenize.TokenError and more
        raise ValueError(f"numpy header ({type(error).__name__})") from None
    content = memoryview(value.data)[head.tell() :]
    if dtype != np.uint8 or len(shape) != 1 or shape[0] != len(content):
        raise ValueError(f"{dtype} of shape {shape}")
    return content


def round_values(request: Request) -> dict[str, Any]:
    """Return what a message says of its round; a table is told in dotted keys."""
    values = {
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
    if request.signature:
        values |= {"description": request.description, "signature": request.signature}
    if request.secure_sum is None:
        return values
    terms = {f"secure_sum.{name}": value for name, value in request.secure_sum.items()}
    return values | terms | {"stage": request.stage, "attempt": request.attempt}


def _to_reply(empty: Reply, message: Message) -> Reply:
    """Return ``empty`` with what the message says."""
    try:
        if message.has_error():
            # Flower makes None of an empty reason.
            reason = _printable(message.error.reason or "no reason given", 500)
            return replace(
                empty,
                error=f"error {message.error.code}: {reason}",
                lacks_reference=message.error.code == REFERENCE_MISSING,
            )
        result = message.content[RESULT]
        return replace(
            empty,
            update=bytes_of(message.content[ADAPTER][ADAPTER]),
            num_examples=count_in(result, "num-examples"),
            train_loss=number_in(result, "train_loss"),
            seconds=number_in(result, "seconds"),
            name=_printable(str(message.content[SITE]["name"]), 64),
        )
    except Exception as error:  # whatever one site sends must not end the run of the others
        return replace(empty, error=f"the reply is not an update ({type(error).__name__})")


def _printable(text: str, length: int) -> str:
    """Return what a site says as what may stand in a log: short, and no control codes."""
    return "".join(letter for letter in text[:length] if letter.isprintable())


def _scalars(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
