"""What happened in a run: typed, one JSON object a line, append-only.

The file is the record of the run for people, the report and `federation status`. Events hold
counts, digests and means only: never text, never a value of a single record.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from federation.errors import FedgeError


class EventLogError(FedgeError):
    """A line of an event log is no event that this version knows."""


@dataclass(frozen=True)
class RunStarted:
    """The settings of the run, and what it trains."""

    base_model: str
    """Digest."""
    num_rounds: int
    aggregation: str
    rank: int
    num_parameters: int
    """Of the adapter."""


@dataclass(frozen=True)
class RunResumed:
    """An interrupted run goes on; what was under way in ``server_round`` is done again."""

    server_round: int
    """The first that is run now."""


@dataclass(frozen=True)
class RoundStarted:
    """The adapter went out."""

    server_round: int
    asked: list[str]
    """The sites that it went to."""
    num_bytes: int
    """Of the message to each site that is not in ``in_full``."""
    attempt: int = 1
    """2 and more: the round was started before and too few sites answered."""
    in_full: list[str] = field(default_factory=list)
    """Sites that got the whole adapter because they do not hold the last one."""
    num_bytes_in_full: int = 0
    """Of the message to each of those."""


@dataclass(frozen=True)
class AdapterResent:
    """A site did not hold what the message stands on and was sent the whole adapter at once."""

    server_round: int
    site: str
    num_bytes: int


@dataclass(frozen=True)
class UpdateReceived:
    """A site's update arrived, was checked and is on disk."""

    server_round: int
    site: str
    name: str
    """What the site calls itself; empty when it does not say."""
    sha256: str
    num_bytes: int
    num_examples: int | None
    """None, as below: the run did not ask for it."""
    train_loss: float | None
    """Mean over the round's steps, nats a token."""
    seconds: float | None
    """That the site trained."""
    rounds_late: int = 0
    """By how many rounds the adapter that it trained is older than this round's."""


@dataclass(frozen=True)
class SiteFailed:
    """A site sent an error, a damaged update, or nothing in time."""

    server_round: int
    site: str
    reason: str


@dataclass(frozen=True)
class SiteLate:
    """An update came after its round was over."""

    server_round: int
    """In which it came."""
    site: str
    trained_round: int
    """For which it was made."""
    kept: bool
    """Folded into ``server_round``; otherwise dropped."""


@dataclass(frozen=True)
class SumOpened:
    """A secure sum was opened: the server knows the sum of the updates and none of them."""

    server_round: int
    attempt: int
    sites: list[str]
    """Whose updates are in it."""
    cohort: int
    """Sites that the terms speak of, at most."""
    threshold: int
    """Fewest sites that could have been in it."""
    total_examples: int | None
    """Of all sites together, each counted up to the terms' bound; None: they count alike."""


@dataclass(frozen=True)
class SumLost:
    """A secure sum cannot be opened or believed: the round leaves the adapter as it was."""

    server_round: int
    reason: str
    suspects: list[str] = field(default_factory=list)
    """Sites of which one or more are to blame."""
    named: list[str] = field(default_factory=list)
    """Sites at odds with most of the others: if one site alone lied, it is that one."""


@dataclass(frozen=True)
class RoundFinished:
    """The updates are averaged and the new adapter is on disk."""

    server_round: int
    num_updates: int
    train_loss: float | None
    """Mean over the sites, weighted by examples; None where the run did not ask for it."""
    aggregation_error: float
    """Largest relative error over the modules: what the rank cut, or averaging factors, lost."""
    aggregation_seconds: float
    seconds: float
    adapter: str
    """Its directory, relative to the run's."""


@dataclass(frozen=True)
class RunFinished:
    """The last round is done."""

    num_rounds: int
    seconds: float
    adapter: str


@dataclass(frozen=True)
class RunFailed:
    """The run ended without a model."""

    reason: str


Event = (
    RunStarted
    | RunResumed
    | RoundStarted
    | AdapterResent
    | UpdateReceived
    | SiteFailed
    | SiteLate
    | SumOpened
    | SumLost
    | RoundFinished
    | RunFinished
    | RunFailed
)
KINDS: dict[str, type[Event]] = {kind.__name__: kind for kind in Event.__args__}


class EventLog:
    """Appends events to a JSONL file; each is on disk before `write` returns."""

    def __init__(
        self,
        path: Path,
        listener: Callable[[Event], None] = lambda _: None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Open the log; ``listener`` hears of each event too, ``now`` is the clock.

        A torn last line that a crash left is cut off: the next event would be glued to it.
        """
        self.path = path
        self._listener = listener
        self._now = now
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            whole = path.read_bytes().rfind(b"\n") + 1
            os.truncate(path, whole)

    def write(self, event: Event) -> None:
        """Append one event."""
        line = {"time": self._now().isoformat(), "kind": type(event).__name__, **asdict(event)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._listener(event)


def read_events(path: Path) -> Iterator[tuple[datetime, Event]]:
    """Yield the events of a log with their times. A torn last line (a crash) is passed over.

    Raises:
        EventLogError: A line is damaged, or was written by a version that knows other events.
    """
    lines = path.read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
            time, kind = datetime.fromisoformat(value.pop("time")), value.pop("kind")
            event = KINDS[kind](**_renamed(kind, value))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise EventLogError(
                f"{path}, line {number} is no event that this version knows: read the log with the "
                "version of fedge that wrote it"
            ) from None
        yield time, event


def _renamed(kind: str, value: dict[str, Any]) -> dict[str, Any]:
    """Give a field of an older log its present name."""
    if kind == "RoundStarted" and "sites" in value:
        value["asked"] = value.pop("sites")
    return value
