"""What of an error leaves a site: a number and a sentence of our own.

Of an exception that is not ours only the type leaves: its text may quote anything. Of a path only
the file's name leaves: where a site keeps its files is its own business.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from federation.errors import FedgeError
from federation.wire import REFERENCE_MISSING, MissingReferenceError

SITE_ERROR = 1001
"""Error code of a reply: the site failed; the reason says how."""
REFUSED = 1003
"""Error code of a reply: the site's policy refused; the reason names the rule."""


class Refused(FedgeError):  # noqa: N818 - a decision, not a fault
    """This site's policy does not allow what was asked."""

    def __init__(self, rule: str, reason: str) -> None:
        """Name the rule and say why in a sentence that may leave the site."""
        super().__init__(f"{rule}: {reason}")
        self.rule = rule


def code_and_reason(error: Exception, own: Sequence[str] = ()) -> tuple[int, str]:
    """Return what a reply says of an error.

    Args:
        error: What went wrong.
        own: The paths that the site was given; see `without_directories`.
    """
    if isinstance(error, Refused):
        return REFUSED, without_directories(str(error), own)
    if isinstance(error, MissingReferenceError):
        return REFERENCE_MISSING, without_directories(str(error), own)
    if isinstance(error, FedgeError):
        return SITE_ERROR, without_directories(str(error), own)
    return SITE_ERROR, f"the site failed with {type(error).__name__}; its own log shows where"


def without_directories(reason: str, own: Sequence[str] = ()) -> str:
    """Return a message with file names but not where they lie: that is the site's own business.

    Args:
        reason: What went wrong.
        own: The site's own paths, given or by default: they may be relative, or hold spaces and
            quotes, so that no pattern could tell where they end.
    """
    for path in map(Path, own):
        for directory in (path.parent, path.absolute().parent):
            if directory.name:
                reason = reason.replace(f"{directory}{os.sep}", f"…{os.sep}")
    return re.sub(r"(?:[A-Za-z]:)?[\\/](?:[^\s\\/:'\"]+[\\/])+", "…/", reason)
