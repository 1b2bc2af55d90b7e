"""One measurement, one fresh process: memory and threads of one method never mix with another's.

A benchmark is a module that starts itself again, once a method, and prints what comes back. Memory
is read from /proc, so the benchmarks run on Linux.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
"""Of the repository: where `python -m benchmarks.…` works."""


def child(module: str, *arguments: object, python: str = sys.executable) -> dict[str, Any]:
    """Run a module on one thread in a process of its own; return the JSON line it ends with.

    Raises:
        subprocess.CalledProcessError: It failed; what it said is on stderr.
    """
    done = subprocess.run(
        [python, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def bytes_after_torch_import() -> int:
    """Import torch, multiply once, and return what the process then holds: the common floor.

    The peak is counted anew from here, so that `peak_bytes` minus this is what a method takes.
    """
    import torch

    torch.set_num_threads(1)
    square = torch.randn(512, 512)
    square @ square
    forget_peak()
    return resident_bytes()


def resident_bytes() -> int:
    """Return what this process holds in memory now."""
    return status_bytes("self", "VmRSS")


def peak_bytes() -> int:
    """Return the most that this process held since `forget_peak`."""
    return status_bytes("self", "VmHWM")


def forget_peak() -> None:
    """Let the peak begin anew at what the process holds now."""
    Path("/proc/self/clear_refs").write_text("5")


def status_bytes(process: int | str, field: str) -> int:
    """Return a size of a process as Linux counts it.

    Raises:
        OSError: The process is gone, or this is not Linux.
    """
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/{process}/status has no {field}: the benchmarks run on Linux")


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU time that a call takes in all threads of this process."""
    started = time.process_time()
    work()
    return time.process_time() - started
