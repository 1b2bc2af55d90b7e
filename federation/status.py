"""A run's event log as one summary: for `federation status`, and for reports."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from federation import events


def summarise(path: Path) -> dict[str, Any]:
    """Return the state of a run: "running", "finished" or "failed", and a row a finished round."""
    summary: dict[str, Any] = {"state": "running", "rounds": [], "failures": [], "rounds_done": 0}
    updates: list[events.UpdateReceived] = []
    for _, event in events.read_events(path):
        match event:
            case events.RunStarted():
                summary |= asdict(event)
            case events.UpdateReceived():
                updates.append(event)
            case events.SiteFailed():
                summary["failures"].append(asdict(event))
            case events.RoundFinished():
                summary["rounds"].append(_round(event, updates, summary["failures"]))
                summary["rounds_done"] = event.server_round
            case events.RunFinished():
                summary |= {"state": "finished", "seconds": event.seconds}
            case events.RunFailed():
                summary |= {"state": "failed", "reason": event.reason}
            case events.RoundStarted():
                pass
    return summary


def _round(
    event: events.RoundFinished,
    updates: list[events.UpdateReceived],
    failures: list[dict[str, Any]],
) -> dict[str, Any]:
    own = [update for update in updates if update.server_round == event.server_round]
    return {
        **asdict(event),
        "bytes_up": sum(update.num_bytes for update in own),
        "num_failed": sum(f["server_round"] == event.server_round for f in failures),
        "sites": [
            {"site": u.site, "name": u.name or u.site, "train_loss": u.train_loss} for u in own
        ],
    }
