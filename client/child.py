"""A program that the daemon keeps running: started again when it ends, more and more slowly.

It ends with the daemon, however that ends. A program that ends again and again without having done
anything is given up, with a sentence: a wrong path does not mend itself.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

from client.process import end_with_parent
from federation.errors import FedgeError

RETRY_S = (0.5, 15.0)
"""First and longest wait before a program is started again."""


class ChildError(FedgeError):
    """A program of the site ends as soon as it is started.

    Its exit code is 2 where the program's was: then no restart helps before the user has changed
    something.
    """


class Child:
    """One program, while somebody calls ``keep_up``."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        patience_s: float,
        say: Callable[..., None],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Nothing is started yet.

        Args:
            name: For the log.
            command: Program and arguments.
            patience_s: How long it may end again and again before it is given up.
            say: Called with the name of an event and its values.
            environment: All its variables; None = those of this process.
        """
        self._environment = None if environment is None else dict(environment)
        self._name = name
        self._command = list(command)
        self._patience_s = patience_s
        self._say = say
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0
        self._wait, self._longest = RETRY_S
        self._started_at = self._next_start = 0.0
        self._failing_since: float | None = None
        self._was_right = False

    @property
    def restarts(self) -> int:
        """How often it was started again."""
        return max(0, self._starts - 1)

    @property
    def is_running(self) -> bool:
        """Whether its process is there."""
        return self._process is not None and self._process.poll() is None

    def keep_up(self) -> None:
        """Start it, or start it again when it has ended and its pause is over.

        Raises:
            ChildError: It ended once more, and ``patience_s`` are over; or with 2, and it never ran
                for so long, nor worked. What it was started with was right once else, and may be
                so again: an officer writes at the policy, a disk comes late.
        """
        now = time.monotonic()
        if self._process is not None and self._process.poll() is not None:
            self._note_end(self._process.returncode, now)
            self._process = None
        if self._process is None and now >= self._next_start:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                env=self._environment,
                preexec_fn=end_with_parent,  # noqa: PLW1509 - it makes one system call and no lock
                # Ctrl-C is for the daemon, which ends its children: told twice, a SuperNode does
                # not sign off.
                process_group=0,
            )
            self._starts += 1
            self._started_at = now
            self._say("child_started", child=self._name, pid=self._process.pid)

    def note_work(self) -> None:
        """It did something: what went wrong before counts no more."""
        self._wait = RETRY_S[0]
        self._failing_since = None
        self._was_right = True

    def end(self, wait_s: float) -> None:
        """Ask it to end, and make it after ``wait_s``."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(wait_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        self._process = None

    def _note_end(self, code: int, now: float) -> None:
        self._say("child_ended", child=self._name, code=code)
        if now - self._started_at >= self._patience_s:
            self.note_work()  # whatever ended it now, it can be started
        if self._failing_since is None or code == -signal.SIGKILL:  # killed: not its own failing
            self._failing_since = now
        is_mistake = code == 2 and not self._was_right
        if now - self._failing_since >= self._patience_s or is_mistake:
            raise _given_up(self._name, code, now - self._failing_since)
        self._next_start = now + self._wait
        self._wait = min(2 * self._wait, self._longest)


def _given_up(name: str, code: int, seconds: float) -> ChildError:
    if code == 2:
        error = ChildError(
            f"the {name} ended with exit code 2: it needs a change that only you can make, and its "
            "last line says which"
        )
        error.exit_code = 2
        return error
    return ChildError(
        f"the {name} ended with exit code {code}, and has done no work for {seconds:.0f} s: its "
        "log says why"
    )
