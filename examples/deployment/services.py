"""Programs that run side by side until a block ends: printed, logged, watched, and ended by id."""

import contextlib
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from processes import STARTED_FOR, end_trees, end_with_parent, environment
from rich.console import Console
from rich.markup import escape

from federation.errors import FedgeError


class ServiceError(FedgeError):
    """A program of the deployment failed; its log says why."""


class Services:
    """The programs of a deployment, by name."""

    def __init__(
        self,
        logs: Path,
        console: Console,
        variables: Mapping[str, str],
        started_for: Path | None = None,
    ) -> None:
        """Write one log a program into ``logs``; print commands to ``console``.

        Args:
            logs: A directory; it is made.
            console: For the reader.
            variables: Environment of every program, besides its own.
            started_for: Directory by which `processes.end_left_behind` finds the programs; None is
                that of the logs.
        """
        self.logs = logs
        self._console = console
        mark = {STARTED_FOR: str((started_for or logs).resolve())}
        self._shared = {**variables, **mark}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        logs.mkdir(parents=True, exist_ok=True)
        words = " ".join(f"{key}={shlex.quote(value)}" for key, value in variables.items())
        console.print(f"[bold cyan]$[/bold cyan] export {escape(words)}", soft_wrap=True)

    def start(self, name: str, command: Sequence[str], variables: Mapping[str, str]) -> None:
        """Start a program under a name of its own; what it prints goes to its log."""
        self._print(command, variables, " &")
        with self._log(name).open("ab") as log:
            self._processes[name] = subprocess.Popen(
                _found(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment({**self._shared, **variables}),
                preexec_fn=end_with_parent,  # noqa: PLW1509 - it makes one system call and no lock
            )

    def pid(self, name: str) -> int:
        """Return the process id of a program."""
        return self._processes[name].pid

    def wait_until(self, is_true: Callable[[], bool], what: str, timeout_s: float) -> None:
        """Ask every 0.2 s until something is true.

        Raises:
            ServiceError: A program ended meanwhile, or the time is up.
        """
        deadline = time.monotonic() + timeout_s
        while not is_true():
            self.check()
            if time.monotonic() >= deadline:
                raise ServiceError(f"{what} did not happen in {timeout_s:g} s: see {self.logs}")
            time.sleep(0.2)

    def check(self) -> None:
        """Make sure that every program still runs.

        Raises:
            ServiceError: One has ended by itself; the last lines of its log are in the message.
        """
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise ServiceError(
                    f"{name} ended with exit code {process.returncode}: {self._last_words(name)}"
                )

    def wait_for_end(self, name: str, timeout_s: float) -> tuple[int, str]:
        """Wait for a program to end by itself; return its exit code and its log."""
        code = self._processes[name].wait(timeout_s)
        del self._processes[name]
        return code, self._log(name).read_text(errors="replace")

    def drain(self, names: Sequence[str], timeout_s: float) -> None:
        """Send SIGTERM to these programs and let each end what it does.

        Raises:
            ServiceError: One ended with another code than 0, or not in ``timeout_s``.
        """
        for name in names:
            self._processes[name].terminate()
        deadline = time.monotonic() + timeout_s
        for name in names:
            try:
                code = self._processes[name].wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise ServiceError(
                    f"{name} did not end in {timeout_s:g} s: see {self.logs}"
                ) from None
            del self._processes[name]
            if code:
                raise ServiceError(f"{name} ended with exit code {code}: {self._last_words(name)}")

    def end(self, names: Sequence[str] = ()) -> None:
        """End these programs at once, or all that are left."""
        chosen = names or list(self._processes)
        end_trees([self._processes.pop(name) for name in chosen if name in self._processes])

    def call(
        self, command: Sequence[str], variables: Mapping[str, str], *, is_shown: bool = True
    ) -> dict[str, Any]:
        """Run a command to its end and return the JSON object that it printed.

        Raises:
            ServiceError: It failed, or says so itself; the message is its own.
        """
        if is_shown:
            self._print(command, variables)
        done = subprocess.run(
            _found(command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=environment({**self._shared, **variables}),
            check=False,
            preexec_fn=end_with_parent,
        )
        try:
            answer: dict[str, Any] = json.loads(done.stdout)
        except json.JSONDecodeError:
            answer = {}
        # Flower's commands say "success"; ours say it by their exit code.
        if done.returncode or not answer or not answer.get("success", True):
            said = answer.get("error-message") or done.stderr.strip() or done.stdout.strip()
            raise ServiceError(f"exit code {done.returncode} of `{shlex.join(command)}`: {said}")
        return answer

    def run(self, command: Sequence[str], variables: Mapping[str, str]) -> int:
        """Run a command to its end, its output for the reader; return the exit code.

        Raises:
            ServiceError: A program ended meanwhile.
        """
        self._print(command, variables)
        process = subprocess.Popen(
            _found(command),
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,  # standard output is for the one JSON object
            env=environment({**self._shared, **variables}),
            preexec_fn=end_with_parent,  # noqa: PLW1509 - it makes one system call and no lock
        )
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(1.0)
                self.check()
        finally:
            end_trees([process])

    def say(self, what: str, values: Mapping[str, object]) -> None:
        """Print what was done that is no command."""
        shown = ", ".join(f"{key} = {json.dumps(value)}" for key, value in values.items())
        self._console.print(f"[dim]{escape(what)} {escape(shown)}[/dim]", soft_wrap=True)

    def _print(
        self, command: Sequence[str], variables: Mapping[str, str], suffix: str = ""
    ) -> None:
        shown = [f"{key}={shlex.quote(value)}" for key, value in variables.items()]
        typed = " ".join([*shown, shlex.join(command)])
        self._console.print(f"[bold cyan]$[/bold cyan] {escape(typed)}{suffix}", soft_wrap=True)

    def _log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def _last_words(self, name: str) -> str:
        lines = self._log(name).read_text(errors="replace").split("\n")
        return " ".join(line.strip() for line in lines if line.strip())[-400:] or "it said nothing"


def _found(command: Sequence[str]) -> list[str]:
    """Return the command with our own programs, which lie beside this Python, by their path."""
    ours = Path(sys.executable).parent / command[0]
    return [str(ours) if ours.is_file() else command[0], *command[1:]]
