"""A run's event log as one summary: for `federation status`, and for reports.

The log is read from its first line to its last and folded into rows, one a round and one a site.
It may end anywhere, the run may still be going on, and it may have been resumed: what a killed
server had begun of a round does not count beside the repetition, but its bytes did travel.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from federation import events
from federation.metrics import mean_of


@dataclass
class _Round:
    """What is known of one round so far."""

    attempt: int = 1
    asked: set[str] = field(default_factory=set)
    updates: dict[tuple[str, int], events.UpdateReceived] = field(default_factory=dict)
    """By site and by how many rounds late: a site may send a late one and this round's."""
    failed: set[str] = field(default_factory=set)
    late: set[tuple[str, int]] = field(default_factory=set)
    """Site, and the round that its update was made for."""
    bytes_down: int = 0
    bytes_up: int = 0
    is_lost: bool = False
    """Its secure sum was: no update is in its adapter."""

    @property
    def delivered(self) -> set[str]:
        """The sites whose update of this very round arrived."""
        return {site for site, rounds_late in self.updates if not rounds_late}

    def begun_again(self) -> "_Round":
        """Return the round as a resumed server repeats it: only the bytes are kept."""
        return _Round(bytes_down=self.bytes_down, bytes_up=self.bytes_up)


@dataclass
class _Site:
    """What is known of one site so far."""

    site: str
    name: str = ""
    num_asked: int = 0
    num_updates: int = 0
    num_failed: int = 0
    num_late: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    last_round: int = 0
    """The last round whose adapter it is known to have trained; 0 = none yet."""
    last_loss: float | None = None


@dataclass
class _Run:
    """The fold of a log: `_take` adds one event."""

    summary: dict[str, Any]
    rounds: dict[int, _Round] = field(default_factory=dict)
    sites: dict[str, _Site] = field(default_factory=dict)

    def round(self, number: int) -> _Round:
        return self.rounds.setdefault(number, _Round())

    def site(self, name: str) -> _Site:
        return self.sites.setdefault(name, _Site(name))


def summarise(
    path: Path, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> dict[str, Any]:
    """Return where a run stands.

    Args:
        path: The run's event log.
        now: The clock that the time since the last event is read from.

    Returns:
        - what `events.RunStarted` holds, None where the log does not begin with one;
        - ``state``: "running", "finished" or "failed" (then with a ``reason``); a server that was
          killed says nothing, so its run looks "running" and ``idle_s`` grows;
        - ``resumed``: how often it was; ``rounds_done``: the last finished round;
        - ``rounds``: a row a finished round, whose ``train_loss`` is None where the run did not ask
          for losses, without ``seconds``, ``aggregation_seconds`` and
          ``aggregation_error`` where a kill came between its commit and its event; ``current``:
          the one under way, or None;
        - ``site_rows``: a row a site, ``rounds_behind`` counting finished rounds since the last
          one that it is known to have trained;
        - ``failures``: every SiteFailed, and SumLost with no site; ``bytes_down`` and
          ``bytes_up``: of the whole run;
        - ``last_event`` (ISO 8601) and ``idle_s``, the seconds since; None for an empty log.

    Raises:
        EventLogError: A line is damaged or of another version.
    """
    names = ("base_model", "num_rounds", "aggregation", "rank", "num_parameters")
    run = _Run(
        {
            **dict.fromkeys(names),
            "state": "running",
            "resumed": 0,
            "rounds_done": 0,
            "rounds": [],
            "failures": [],
        }
    )
    last: datetime | None = None
    for last, event in events.read_events(path):  # noqa: B007 - the time of the last is needed
        _take(run, event)
    done = run.summary["rounds_done"]
    open_rounds = [number for number in run.rounds if number > done]
    is_under_way = run.summary["state"] == "running" and open_rounds
    return run.summary | {
        "current": _row(run, max(open_rounds)) if is_under_way else None,
        "site_rows": [
            asdict(site) | {"rounds_behind": max(0, done - site.last_round)}
            for site in sorted(run.sites.values(), key=lambda site: (site.name, site.site))
        ],
        "bytes_down": sum(each.bytes_down for each in run.rounds.values()),
        "bytes_up": sum(each.bytes_up for each in run.rounds.values()),
        "last_event": last.isoformat() if last else None,
        "idle_s": max(0.0, (now() - last).total_seconds()) if last else None,
    }


def _take(run: _Run, event: events.Event) -> None:
    """Add one event to the fold."""
    match event:
        case events.RoundStarted():
            _take_start(run, event)
        case events.AdapterResent():
            run.round(event.server_round).bytes_down += event.num_bytes
            run.site(event.site).bytes_down += event.num_bytes
        case events.UpdateReceived():
            _take_update(run, event)
        case events.SiteFailed():
            _take_failure(run, event)
        case events.SiteLate():
            _take_late(run, event.server_round, event.site, event.trained_round)
        case _:
            _take_of_the_run(run, event)


def _take_of_the_run(run: _Run, event: events.Event) -> None:
    """Add an event that belongs to no single site."""
    summary = run.summary
    match event:
        case events.RunStarted():
            summary |= asdict(event)
        case events.RunResumed():
            _take_resumption(run, event.server_round)
        case events.SumLost():
            run.round(event.server_round).is_lost = True
            summary["failures"].append(asdict(event) | {"site": ""})
        case events.RoundFinished():
            row = _row(run, event.server_round) | asdict(event)
            kept = [r for r in summary["rounds"] if r["server_round"] < event.server_round]
            summary |= {"rounds": [*kept, row], "rounds_done": event.server_round}
        case events.RunFinished():
            summary |= {"state": "finished", "seconds": event.seconds}
        case events.RunFailed():
            summary |= {"state": "failed", "reason": event.reason}


def _take_resumption(run: _Run, server_round: int) -> None:
    """Bring the fold to what the run's directory holds: every round before ``server_round``.

    A kill between a round's commit and its event leaves a round that is over without a row.
    """
    summary = run.summary
    summary.pop("reason", None)
    rows = {
        number: _row_without_event(run, number)
        for number, each in run.rounds.items()
        if each.updates and number < server_round
    }
    rows |= {row["server_round"]: row for row in summary["rounds"]}
    summary |= {
        "state": "running",
        "resumed": summary["resumed"] + 1,
        "rounds": [row for number, row in sorted(rows.items()) if number < server_round],
        "rounds_done": server_round - 1,
    }
    for number, each in run.rounds.items():
        if number >= server_round:
            run.rounds[number] = each.begun_again()


def _take_start(run: _Run, event: events.RoundStarted) -> None:
    each = run.round(event.server_round)
    each.attempt = event.attempt
    each.asked |= set(event.asked)
    in_full = set(event.in_full)
    for name in event.asked:
        num_bytes = event.num_bytes_in_full if name in in_full else event.num_bytes
        each.bytes_down += num_bytes
        site = run.site(name)
        site.num_asked += 1
        site.bytes_down += num_bytes


def _take_failure(run: _Run, event: events.SiteFailed) -> None:
    run.summary["failures"].append(asdict(event))
    run.round(event.server_round).failed.add(event.site)
    run.site(event.site).num_failed += 1


def _take_update(run: _Run, event: events.UpdateReceived) -> None:
    each, site = run.round(event.server_round), run.site(event.site)
    each.updates[event.site, event.rounds_late] = event
    each.bytes_up += event.num_bytes
    site.name = event.name or site.name
    site.num_updates += 1
    site.bytes_up += event.num_bytes
    site.last_loss = event.train_loss
    if event.rounds_late:
        _take_late(run, event.server_round, event.site, event.server_round - event.rounds_late)
    else:
        site.last_round = max(site.last_round, event.server_round)


def _take_late(run: _Run, server_round: int, name: str, trained_round: int) -> None:
    """Count a late update once, whichever of its two events comes first."""
    each, site = run.round(server_round), run.site(name)
    if (name, trained_round) not in each.late:
        each.late.add((name, trained_round))
        site.num_late += 1
    site.last_round = max(site.last_round, trained_round)


def _row(run: _Run, server_round: int) -> dict[str, Any]:
    """Return a round as `summarise` shows it, finished or not."""
    each = run.round(server_round)
    return {
        "server_round": server_round,
        "attempt": each.attempt,
        "num_asked": len(each.asked),
        "num_updates": 0 if each.is_lost else len(each.updates),
        # A site that failed in a first attempt and delivered in the second did deliver.
        "num_failed": len(each.failed - each.delivered),
        "num_late": len(each.late),
        "waiting_for": sorted(each.asked - each.delivered - each.failed),
        "bytes_down": each.bytes_down,
        "bytes_up": each.bytes_up,
        "sites": [
            {"site": u.site, "name": u.name or u.site, "train_loss": u.train_loss}
            for u in each.updates.values()
        ],
    }


def _row_without_event(run: _Run, server_round: int) -> dict[str, Any]:
    """Return a finished round's row without its RoundFinished: what the updates say of it."""
    # A site's late update does not count beside its own of this round, as in the exchange.
    each = run.round(server_round)
    updates = () if each.is_lost else each.updates.values()
    by_site = {u.site: u for u in updates}.values()
    losses, num_examples = [u.train_loss for u in by_site], [u.num_examples for u in by_site]
    return _row(run, server_round) | {
        "num_updates": len(by_site),
        "train_loss": mean_of(losses, num_examples),
        "adapter": f"round-{server_round:04d}",
    }
