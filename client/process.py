"""What a process of a site asks of Linux for itself and for its children. Elsewhere: nothing.

No process of a site shall outlive the one that watches it, and none shall be read by another
process of the same user: the app of a run may be one (`node = "supernode"`).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4

# Looked up here: between fork and exec no lock may be taken, and the loader takes one.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def end_with_parent() -> None:
    """Get SIGTERM when the parent dies, `kill -9` included; for `Popen(preexec_fn=…)`."""
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def end_with(parent: int) -> None:
    """Get SIGTERM when the process ``parent`` dies, which has started this one."""
    end_with_parent()
    if _prctl is not None and os.getppid() != parent:  # it died before we asked
        os.kill(os.getpid(), signal.SIGTERM)


def keep_to_itself() -> None:
    """Let no process but root's read this one's memory, environment and open files.

    Without it any process of the same user may: by ptrace, or in /proc. It also makes no core dump,
    which would hold the records. What stays visible is the command line and the times.
    """
    if _prctl is not None:
        _prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
