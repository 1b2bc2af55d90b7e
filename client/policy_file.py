"""policy.toml, read anew before every judgement, so that an edit counts from the next question on.

A file that cannot be read, or allows something that no policy can, lets nobody in until it is
mended: what was allowed before it was broken does not go on. A file that is being written is not
used half: it counts once nobody has touched it for `SETTLED_S`, which the question waits for, and
the start of a trainer too. A writer that pauses for longer is not noticed: who puts another file in
its place in one step needs no such patience.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

from client.policy import Policy, parse_policy
from client.reasons import Refused
from federation.settings import SettingsError

SETTLED_S = 2.0
"""An editor that writes a file in place, and not a new one beside it, does it in much less."""
_TRIES = 30


class PolicyFile:
    """The policy of a site, as its file says it now."""

    def __init__(
        self,
        path: Path,
        say: Callable[..., None],
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Read the file once it is settled, as whoever starts the trainer left it.

        Args:
            path: Of policy.toml.
            say: Called with the name of an event and its values, for the log.
            sleep: Waits that many seconds.

        Raises:
            SettingsError: It is missing, not TOML, no policy, or written all the time.
        """
        self._path = path
        self._say = say
        self._sleep = sleep
        is_young = time.time() - _stamp(path)[0] / 1e9 < SETTLED_S
        content = self._settled() if is_young else _read(path)
        self._policy: Policy | None = parse_policy(content, str(path))
        self.digest = hashlib.sha256(content).hexdigest()
        """sha256 of the file, as sha256sum prints it; "" = it could not be read."""
        say("policy_read", digest=self.digest)

    def current(self) -> Policy:
        """Return what the file says; a change, and what is wrong with it, is in the log once.

        Raises:
            Refused: It is no policy now. What is wrong with it does not leave the site.
        """
        try:
            content = _read(self._path)
            if hashlib.sha256(content).hexdigest() != self.digest:
                content = self._settled()
        except SettingsError as error:
            self._change("", None, str(error))
        else:
            digest = hashlib.sha256(content).hexdigest()
            if digest != self.digest:
                try:
                    self._change(digest, parse_policy(content, self._path.name), "")
                except SettingsError as error:
                    self._change(digest, None, str(error))
        if self._policy is None:
            raise Refused(
                "policy",
                "this site's policy cannot be read, so it lets nobody in: its own officer must "
                "mend it",
            )
        return self._policy

    def _change(self, digest: str, policy: Policy | None, fault: str) -> None:
        is_news = digest != self.digest
        self.digest, self._policy = digest, policy
        if not is_news:
            return
        if policy is None:
            reason = fault.replace(str(self._path), self._path.name)
            self._say("policy_invalid", digest=digest, reason=reason)
        else:
            self._say("policy_read", digest=digest)

    def _settled(self) -> bytes:
        """Return the file's content once it has been left alone for a while.

        Raises:
            SettingsError: It cannot be read, or is written all the time.
        """
        for _ in range(_TRIES):
            before = _stamp(self._path)
            # Its own time may be told by another machine's clock: so it is looked at twice.
            self._sleep(SETTLED_S)
            content = _read(self._path)
            if _stamp(self._path) == before:
                return content
        raise SettingsError(
            f"{self._path.name} is written all the time: leave it alone for a while"
        )


def policy_state(path: Path) -> str:
    """Return in a few words what a site does by its policy.toml now, for `client status`.

    Who asks may be another user than the trainer's, or in another container.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        return (
            f"{path.name} cannot be read here ({error.strerror}); a trainer that cannot either "
            "refuses everything"
        )
    try:
        parse_policy(content, path.name)
    except SettingsError as error:
        return f"refuses everything: {error}"
    return f"in force, sha256 {hashlib.sha256(content).hexdigest()[:16]}…"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(
            f"{path} cannot be read ({error.strerror}): put the policy back"
        ) from None


def _stamp(path: Path) -> tuple[int, int, int, int]:
    """Return what changes when somebody writes a file or puts another in its place."""
    try:
        found = path.stat()
    except OSError as error:
        raise SettingsError(
            f"{path} cannot be read ({error.strerror}): put the policy back"
        ) from None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino
