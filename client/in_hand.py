"""What a node writes down of the message in hand, so that a crash does not lose it.

DIR/node.json    the node id of a life that did not end in order: its lease still holds
    asked.json   the message, without its content, and how far its reply has come
    trusted      which SuperLink and root_certificate there was a connection with
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from federation.atomic import write_atomically


@dataclass(frozen=True)
class InHand:
    """One message and its reply."""

    received_at: float
    """Seconds since 1970. The reply says that it was made then: the same reply has one id."""
    message: str
    """Protobuf in base64, without the content."""
    tree: str
    """The ids of its objects: protobuf in base64."""
    sessions: tuple[str, ...] = ()
    """Push sessions in which its reply was begun."""
    error: tuple[int, str] | None = None
    """Code and reason, where the reply is an error."""
    lives: int = 0
    """Lives of the node that ended with it in hand."""
    lost: int = 0
    """Trainers that ended while they were asked it."""


class Memory:
    """The directory of one node."""

    def __init__(self, directory: Path) -> None:
        """Nothing is read or written yet."""
        self._directory = directory
        self._path = directory / "asked.json"

    def keep(self, in_hand: InHand) -> None:
        """Put it on disk; it is there when this returns."""
        write_atomically(self._path, json.dumps(asdict(in_hand)))

    def in_hand(self) -> InHand | None:
        """Return what was kept last; None where there is nothing that can be read."""
        try:
            values = json.loads(self._path.read_text(encoding="utf-8"))
            sessions, error = values.pop("sessions"), values.pop("error")
            return InHand(
                **values,
                sessions=tuple(map(str, sessions)),
                error=None if error is None else (int(error[0]), str(error[1])),
            )
        except (OSError, ValueError, TypeError, LookupError, AttributeError):
            return None

    def forget(self) -> None:
        """Remove the message in hand."""
        self._path.unlink(missing_ok=True)

    def keep_node(self, node_id: int) -> None:
        """Note that a lease is held."""
        write_atomically(self._directory / "node.json", json.dumps({"node_id": node_id}))

    def node_id(self) -> int | None:
        """Return whose lease may still hold, or None."""
        try:
            text = (self._directory / "node.json").read_text(encoding="utf-8")
            return int(json.loads(text)["node_id"])
        except (OSError, ValueError, TypeError, LookupError):
            return None

    def forget_node(self) -> None:
        """Note that the lease was given back."""
        (self._directory / "node.json").unlink(missing_ok=True)

    def keep_trusted(self, digest: str) -> None:
        """Note with which settings there was a connection."""
        if not self.was_trusted(digest):
            write_atomically(self._directory / "trusted", digest)

    def was_trusted(self, digest: str) -> bool:
        """Return whether there was a connection with these settings, and none with others since."""
        try:
            return (self._directory / "trusted").read_text(encoding="utf-8") == digest
        except (OSError, ValueError):
            return False
