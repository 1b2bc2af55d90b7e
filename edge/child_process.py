"""A process that we start does not outlive us, however we end.

Without it, an ONNX builder whose parent was killed (`kill -9`, out of memory) would go on writing
into the directory that the next run clears and fills.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

_PR_SET_PDEATHSIG = 1
# Looked up here: between fork and exec no lock may be taken, and the loader takes one.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def run_child(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``command`` to its end as `subprocess.run` does, in text, without input.

    On Linux the kernel sends it SIGTERM when this process dies, `kill -9` included.

    Args:
        command: Program and arguments.
        options: What else `subprocess.run` takes.
    """
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        check=False,
        preexec_fn=_end_with(os.getpid()),  # two system calls, no lock
        **options,
    )


def _end_with(parent: int) -> Callable[[], None] | None:
    prctl = _prctl
    if prctl is None:
        return None

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)

    return ask
