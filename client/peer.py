"""Who is at the trainer's socket: asked of the socket itself, for its file outlives a kill."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Literal

Peer = Literal["answers", "silent", "absent", "forbidden"]
"""silent: somebody holds the socket and takes no connection, or this process can open none.
forbidden: not for this user."""
PATIENCE_S = 2.0


def peer_at(path: Path, timeout_s: float = PATIENCE_S) -> Peer:
    """Return who is at a unix socket on which a gRPC server should be.

    That a connection comes about says little: the system makes it for a process that was stopped
    too. A gRPC server greets whoever connects (HTTP/2's SETTINGS) without being asked, from
    threads that a training does not hold up; so its first byte is waited for. Nothing is sent.

    Args:
        path: Of the socket.
        timeout_s: For the connection, and again for the greeting.
    """
    try:
        made = socket.socket(socket.AF_UNIX)
    except OSError:  # no descriptor is left: that says nothing of the trainer
        return "silent"
    with made as probe:
        probe.settimeout(timeout_s)
        return _greeting(probe, path)


def _greeting(probe: socket.socket, path: Path) -> Peer:
    try:
        probe.connect(str(path.absolute()))
    except PermissionError:
        return "forbidden"
    except (TimeoutError, BlockingIOError):  # as many wait already as the system lets
        return "silent"
    except OSError:
        return "absent"
    try:
        return "answers" if probe.recv(1) else "absent"
    except TimeoutError:
        return "silent"
    except OSError:  # it ended in this moment
        return "absent"
