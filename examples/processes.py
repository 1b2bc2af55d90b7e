"""How the examples start programs: found beside this Python, calling nowhere, ending with us."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
    # Waiting threads sleep instead of spinning: seven times faster where something else runs too.
    "OMP_WAIT_POLICY": "PASSIVE",
}

STARTED_FOR = "FEDGE_STARTED_FOR"
"""Variable of everything that an example starts, and of what that starts: the directory that it
works in. So what a kill of the example left behind is found, whoever its parent is by then."""

_PR_SET_PDEATHSIG = 1
# Looked up here: between fork and exec no lock may be taken, and the loader takes one.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def end_with_parent() -> None:
    """Ask Linux to send SIGTERM to this process when its parent dies, `kill -9` included."""
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a command: nothing calls home, and our own programs are found."""
    here = str(Path(sys.executable).parent)
    path = f"{here}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, **ENVIRONMENT, **extra, "PATH": path}


def end_trees(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask processes and all that they started to end, and make them after 10 s."""
    running = [process for process in processes if process.poll() is None]
    tree = []
    for process in running:
        with contextlib.suppress(psutil.NoSuchProcess):
            member = psutil.Process(process.pid)
            tree += [member, *member.children(recursive=True)]
    _end(tree)
    for process in running:
        process.wait()


def end_left_behind(directory: Path) -> int:
    """End what an example started for ``directory`` in a life that was killed; return how many.

    The caller has made sure that no other example works there.
    """
    wanted = str(directory.resolve())
    found = []
    for process in psutil.process_iter():
        # Another user's process, or one that is gone by now, does not say its variables.
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(STARTED_FOR) == wanted:
                found.append(process)
    _end(found)
    return len(found)


def _end(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=10)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=10)


def free_ports(count: int) -> list[int]:
    """Return ports on loopback that nobody listens on, all different."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
