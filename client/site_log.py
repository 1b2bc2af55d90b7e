"""A site's log: one JSON object a line, of names and numbers.

No text of a record, no path but a file's name. A line is one write, so that the daemon and its
trainer can share a file; rotating it is logrotate's business, or journald's where it is stderr.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

LEVELS = ("debug", "info", "warning", "error")
_LEVEL_OF = {
    "superlink_away": "warning",
    "not_activated": "warning",
    "message_lost": "warning",
    "heartbeat_failed": "warning",
    "question_failed": "warning",
    "child_ended": "warning",
    "reply_lost": "warning",
    "run_over": "warning",
    "policy_invalid": "error",
    "trainer_closed": "warning",
}
"""Level of an event; all others are "info"."""


class SiteLog:
    """Where a process of a site says what it does."""

    def __init__(self, program: str, path: Path | None = None, level: str = "info") -> None:
        """Open the log.

        Args:
            program: "daemon" or "trainer": who speaks.
            path: File that lines are added to; None = stderr.
            level: Least level that is written.
        """
        self._program = program
        self._least = LEVELS.index(level)
        self._descriptor = sys.stderr.fileno()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)

    def say(self, event: str, **values: Any) -> None:
        """Write a line."""
        level = _LEVEL_OF.get(event, "info")
        if LEVELS.index(level) < self._least:
            return
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "level": level,
            "program": self._program,
            "event": event,
            **values,
        }
        os.write(self._descriptor, json.dumps(line).encode() + b"\n")
