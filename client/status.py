"""`client status`: what a site's daemon wrote of itself, and whether it is still there."""

from __future__ import annotations

import fcntl
from dataclasses import asdict
from pathlib import Path
from typing import Any

from client.health import Status, read_status
from client.policy_file import policy_state
from client.site_settings import SiteSettings


def site_status(settings: SiteSettings) -> dict[str, Any]:
    """Return the status of a site's daemon, running or not."""
    status = read_status(settings.memory / "status.json")
    is_running = status is not None and _is_held(settings.memory / "daemon.lock")
    values = asdict(status or Status(0, node=settings.node))
    if not is_running:
        values |= {"pid": 0, "is_connected": False, "is_trainer_up": False}
    values["policy"] = policy_state(settings.policy)
    return {"name": settings.name, "is_running": is_running, **values}


def describe(status: dict[str, Any]) -> str:
    """Return a status for people."""
    if not status["is_running"]:
        return "the daemon does not run: start it with `client daemon --config site.toml`"
    doing = f"round {status['server_round']} of run {status['run'] or '-'}"
    lines = {
        "daemon": f"process {status['pid']}, {status['node']} node",
        "coordinator": "connected" if status["is_connected"] else "not connected",
        "trainer": "up" if status["is_trainer_up"] else "down",
        "now": f"answers {doing}" if status["is_busy"] else f"waits; last was {doing}",
        "answers": f"{status['num_answered']}, the last at {status['last_answer_at'] or '-'}",
        "refused": str(status["num_refused"]),
        "policy": status["policy"],
        "restarts": str(status["restarts"]),
    }
    return "\n".join(f"{name:12} {value}" for name, value in lines.items())


def _is_held(lock: Path) -> bool:
    """Return whether a process holds a lock: a process id alone may be another's by now."""
    try:
        with lock.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return lock.is_file()
    return False
