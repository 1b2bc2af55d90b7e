"""What happened in a run: typed, one JSON object a line, append-only.

The file is the record of the run for people, the report and `federation status`. Events hold
counts, digests and means only: never text, never a value of a single record.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path


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
class RoundStarted:
    """The adapter went out."""

    server_round: int
    sites: list[str]
    num_bytes: int
    """Of the adapter message to each site."""


@dataclass(frozen=True)
class UpdateReceived:
    """A site's update arrived, was checked and is on disk."""

    server_round: int
    site: str
    name: str
    """What the site calls itself; empty when it does not say."""
    sha256: str
    num_bytes: int
    num_examples: int
    train_loss: float
    """Mean over the round's steps, nats a token."""
    seconds: float
    """That the site trained."""


@dataclass(frozen=True)
class SiteFailed:
    """A site sent an error, a damaged update, or nothing in time."""

    server_round: int
    site: str
    reason: str


@dataclass(frozen=True)
class RoundFinished:
    """The updates are averaged and the new adapter is on disk."""

    server_round: int
    num_updates: int
    train_loss: float
    """Mean over the sites, weighted by examples."""
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
    | RoundStarted
    | UpdateReceived
    | SiteFailed
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
        """Open the log; ``listener`` hears of each event too, ``now`` is the clock."""
        self.path = path
        self._listener = listener
        self._now = now
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, event: Event) -> None:
        """Append one event."""
        line = {"time": self._now().isoformat(), "kind": type(event).__name__, **asdict(event)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._listener(event)


def read_events(path: Path) -> Iterator[tuple[datetime, Event]]:
    """Yield the events of a log with their times. A torn last line (a crash) is passed over."""
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        value = json.loads(line)
        time, kind = datetime.fromisoformat(value.pop("time")), value.pop("kind")
        yield time, KINDS[kind](**value)
