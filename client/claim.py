"""One process a directory: a lock that the system lets go when its holder dies, however it dies."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from federation.errors import UserError


@contextmanager
def claim(
    directory: Path, what: str, *, wait_s: float = 0.0, is_wanted: Callable[[], bool] = lambda: True
) -> Iterator[None]:
    """Hold a directory for the time of a block; it is made, for its owner only.

    Args:
        directory: What no other process may use meanwhile.
        what: Who works there, for the lock's name and the message: "daemon", "trainer".
        wait_s: How long another holder is waited for: one that was told to leave may finish first.
        is_wanted: Asked while waiting; when it says no, the wait is over.

    Raises:
        UserError: Another process holds it.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_s
    with (directory / f"{what}.lock").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() >= deadline or not is_wanted():
                    raise UserError(
                        f"another {what} works in {directory}: end it, or give each site a state "
                        "directory of its own"
                    ) from None
                time.sleep(0.1)
        yield
