"""`client status`: what a site's daemon wrote of itself, and whether the two processes live."""

from __future__ import annotations

import fcntl
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from client.health import ClosedError, Status, read_status
from client.peer import peer_at
from client.policy_file import policy_state
from client.site_settings import SiteSettings


def site_status(settings: SiteSettings) -> dict[str, Any]:
    """Return the status of a site's daemon, running or not.

    The trainer is asked itself, where this user may; else the daemon's word counts.

    Raises:
        ClosedError: This user may not read the daemon's state.
        UserError: Another version wrote it.
    """
    is_running = _is_held(settings.memory / "daemon.lock")
    status = read_status(settings.memory / "status.json") if is_running else None
    values = asdict(status or Status(0, node=settings.node))
    if (peer := peer_at(settings.socket)) != "forbidden":
        values["is_trainer_up"] = peer == "answers"
    values["policy"] = policy_state(settings.policy)
    return {"name": settings.name, "is_running": is_running, **values}


def trainer_status(settings: SiteSettings) -> dict[str, Any]:
    """Return whether a site's trainer takes connections, for who sees its half only.

    Raises:
        ClosedError: This user may not ask it.
    """
    peer = peer_at(settings.socket)
    if peer == "forbidden":
        raise ClosedError(settings.socket)
    return {"name": settings.name, "is_trainer_up": peer == "answers"}


def describe(status: dict[str, Any]) -> str:
    """Return a status for people."""
    if not status["is_running"]:
        return "the daemon does not run: start it with `client daemon --config site.toml`"
    doing = f"round {status['server_round']} of run {status['run']}"
    last = f"last was {doing}" if status["run"] else "nothing was asked yet"
    lines = {
        "daemon": f"process {status['pid']}, {status['node']} node",
        "coordinator": describe_connection(status),
        "trainer": "up" if status["is_trainer_up"] else "down",
        "now": f"answers {doing}" if status["is_busy"] else f"waits; {last}",
        "answers": f"{status['num_answered']}, the last at {status['last_answer_at'] or '-'}",
        "refused": str(status["num_refused"]),
        "policy": status["policy"],
        "restarts": str(status["restarts"]),
    }
    return "\n".join(f"{name:12} {value}" for name, value in lines.items())


def describe_connection(status: Mapping[str, Any]) -> str:
    """Return what is known of the connection to the SuperLink."""
    if status["is_connected"] is None:
        runs = "runs; its log says whether it is connected"
        return f"the SuperNode {runs if status['is_supernode_up'] else 'does not run'}"
    return "connected" if status["is_connected"] else "not connected"


def _is_held(lock: Path) -> bool:
    """Return whether a process holds a lock: a process id alone may be another's by now.

    Raises:
        ClosedError: This user may not look.
    """
    try:
        with lock.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except PermissionError:
        raise ClosedError(lock) from None
    except OSError:  # there is none, nor was there ever
        return False
    return False
