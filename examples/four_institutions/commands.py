"""Runs the demo's commands as a user would type them: printed, timed, watched, and resumable.

A command that was run to its end is not run again, so a demo that was killed goes on where it
stopped; what it cost the first time is kept in `commands.jsonl`. Two lanes of one thread each use
two cores better than one lane of two threads: small matrices spend a second thread on waiting.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.markup import escape

from federation.atomic import write_atomically
from federation.errors import FedgeError

sys.path.insert(0, str(Path(__file__).parents[1]))  # what the examples share
from processes import STARTED_FOR, end_with_parent, environment


class CommandError(FedgeError):
    """A command of the demo failed; its own message is above."""


@dataclass(frozen=True)
class Job:
    """A command that may run beside others."""

    command: Sequence[str]
    output: Path | None = None
    """What it makes in one step; removed before the command is run again."""
    after: str | None = None
    """The job whose output it needs; that one must stand before it."""


@dataclass(frozen=True)
class Finished:
    """What one command cost, and the JSON object it printed (empty when it prints none)."""

    name: str
    command: list[str]
    seconds: float
    peak_bytes: int
    """Largest resident set of any process of the demo while it ran."""
    elapsed_s: float
    """Wall time of the demo when it was done, over all the times the demo was started."""
    output: dict[str, Any]
    total_peak_bytes: int = 0
    """Largest sum of the resident sets of all its processes at one moment. What they share (the
    libraries) is counted once for each, so it is an upper bound; looked at every 0.2 s."""


class Commands:
    """Runs commands in the repository's environment and remembers those that are done."""

    def __init__(self, record: Path, console: Console) -> None:
        """Keep what is done in ``record`` (JSONL), and print commands to ``console``."""
        self.record = record
        self.console = console
        self.finished: dict[str, Finished] = {}
        if record.is_file():
            lines = record.read_text(encoding="utf-8").split("\n")[
                :-1
            ]  # a torn last line is not done
            write_atomically(record, "".join(f"{line}\n" for line in lines))
            for line in lines:
                done = Finished(**json.loads(line))
                self.finished[done.name] = done
        self._lock = threading.Lock()
        self._started = time.monotonic() - self.elapsed_s

    @property
    def elapsed_s(self) -> float:
        """Wall time spent when the last command was done; time lost to a kill is not in it."""
        return max((done.elapsed_s for done in self.finished.values()), default=0.0)

    @property
    def peak_bytes(self) -> int:
        """Largest resident set of any process of any command."""
        return max((done.peak_bytes for done in self.finished.values()), default=0)

    @property
    def total_peak_bytes(self) -> int:
        """Largest sum of the resident sets of the processes of any command."""
        return max((done.total_peak_bytes for done in self.finished.values()), default=0)

    def is_done(self, name: str, command: Sequence[str]) -> bool:
        """Tell whether this very command was run to its end before."""
        return name in self.finished and self.finished[name].command == list(command)

    def run(
        self,
        name: str,
        command: Sequence[str],
        *,
        threads: int | None = None,
        output: Path | None = None,
    ) -> Finished:
        """Run one command, unless it is done; print it as a user would type it.

        Args:
            name: What it is called in the record.
            command: Program and arguments; what it prints is one JSON object, or nothing.
            threads: OpenMP threads it may use; default: all cores.
            output: What it makes in one step; removed first when the command is not done.

        Raises:
            CommandError: It ended with another code than 0.
        """
        typed = shlex.join(command)
        self.console.print(f"[bold cyan]$[/bold cyan] {escape(typed)}", soft_wrap=True)

        def action() -> dict[str, Any]:
            if output is not None:
                shutil.rmtree(output, ignore_errors=True)
            variables = {
                "OMP_NUM_THREADS": str(threads or os.cpu_count() or 1),
                STARTED_FOR: str(self.record.parent.resolve()),
            }
            printed = run_to_end(command, environment(variables), typed=typed)
            return json.loads(printed) if printed.lstrip().startswith("{") else {}

        return self.perform(name, command, action)

    def perform(
        self, name: str, command: Sequence[str], action: Callable[[], dict[str, Any]]
    ) -> Finished:
        """Do what a command stands for, unless it is done; what is raised is not remembered.

        Args:
            name: What it is called in the record.
            command: By which it is known again: the same name with another command is not done.
            action: Does it, and returns what is remembered as its output.
        """
        if self.is_done(name, command):
            self.console.print(f"  [dim]{name}: done before[/dim]")
            return self.finished[name]
        started = time.monotonic()
        with PeakMemory() as peak:
            output = action()
        done = Finished(
            name,
            list(command),
            round(time.monotonic() - started, 1),
            peak.num_bytes,
            round(time.monotonic() - self._started, 1),
            output,
            peak.total_bytes,
        )
        self.console.print(f"  [dim]{name}: {done.seconds:.0f} s[/dim]")
        self._remember(done)
        return done

    def run_in_lanes(self, jobs: Mapping[str, Job]) -> None:
        """Run commands two at a time, in their order, each with half of the cores."""
        threads = max(1, (os.cpu_count() or 2) // 2)
        futures: dict[str, Future[Finished]] = {}

        def run(name: str, job: Job) -> Finished:
            if job.after:
                futures[job.after].result()
            return self.run(name, job.command, threads=threads, output=job.output)

        with ThreadPoolExecutor(max_workers=2) as lanes:
            for name, job in jobs.items():
                futures[name] = lanes.submit(run, name, job)
            for future in futures.values():
                future.result()

    def _remember(self, done: Finished) -> None:
        """Note that a command is done, on disk before this returns."""
        with self._lock:
            self.finished[done.name] = done
            self.record.parent.mkdir(parents=True, exist_ok=True)
            with self.record.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(done)) + "\n")
                file.flush()
                os.fsync(file.fileno())


def run_to_end(command: Sequence[str], variables: Mapping[str, str], *, typed: str) -> str:
    """Run a command and return what it printed; it ends when this process does.

    Raises:
        CommandError: It ended with another code than 0.
    """
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / command[0]), *command[1:]],
        stdout=subprocess.PIPE,
        env=dict(variables),
        text=True,
        preexec_fn=end_with_parent,  # noqa: PLW1509 - it makes one system call and no lock
    )
    try:
        printed, _ = process.communicate()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if process.returncode:
        raise CommandError(f"exit code {process.returncode} of: {typed}")
    return printed


class PeakMemory:
    """Watches every process that this one started; holds the largest resident sets."""

    def __init__(self) -> None:
        """Nothing is watched before the block begins."""
        self.num_bytes = 0
        """Of one process."""
        self.total_bytes = 0
        """Of all of them at one moment, what they share counted for each."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            total = 0
            for process in psutil.Process().children(recursive=True):
                peak, now = _resident_sets(process.pid)
                self.num_bytes = max(self.num_bytes, peak)
                total += now
            self.total_bytes = max(self.total_bytes, total)
            if self._over.wait(0.2):
                return


def _resident_sets(pid: int) -> tuple[int, int]:
    """Return the peak and the present resident set of a process in bytes, as the kernel has them.

    The peak is VmHWM, which the kernel keeps exactly; (0, 0) for a process that is gone.
    """
    own = Path("/proc/self/cmdline").read_bytes()
    try:
        # Between fork and exec a child still counts this process's own memory. The name is read
        # before the memory: once it has another one, its memory is its own.
        if Path(f"/proc/{pid}/cmdline").read_bytes() == own:
            return 0, 0
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0, 0
    found = dict(re.findall(r"^(VmHWM|VmRSS):\s+(\d+) kB$", status, re.MULTILINE))
    return int(found.get("VmHWM", 0)) * 1024, int(found.get("VmRSS", 0)) * 1024
