"""Requests to a SuperLink that may be away, and what its refusals mean.

While a SuperLink is restarted or the line is down, a site waits and asks again, with growing pauses
that are drawn so that many sites do not come back in the same moment. What a SuperLink refuses is
no matter of waiting and becomes an error of its own kind.

A certificate that is not to be trusted is a mistake in this site's files as long as none was
trusted with them. Afterwards it is the coordinator's, or the work of whoever stands between; a site
that left then would be down until a person comes. So it is waited out like a line that is down.
Nothing is sent over such a connection.
"""

from __future__ import annotations

import contextlib
import json
import random
import threading
from collections.abc import Callable
from typing import Any

import httpx

from federation.errors import FedgeError, UserError

RETRY_S = (0.2, 10.0)
"""First and longest wait before the next try."""
MAX_FAULTS = 10
"""Tries of one request that the SuperLink answers with 500: its fault, but perhaps not the next."""


class FleetError(FedgeError):
    """The SuperLink refused a request."""


class CertificateError(FleetError):
    """The SuperLink's certificate is not one to trust."""

    def __init__(self, said: str) -> None:
        """Say what is wrong, from what TLS says.

        One that has ended is the coordinator's to renew: exit code 1, so that a service is started
        again. All else is for this site's user to compare.
        """
        if "expired" in said.lower():
            super().__init__(
                "the SuperLink's certificate has ended, or root_certificate has: ask the "
                "coordinator for a new one"
            )
            return
        super().__init__(
            "the SuperLink's certificate is not signed by root_certificate, or is for "
            "another host: compare both with what the coordinator gave out"
        )
        self.exit_code = 2


class FleetKeyError(UserError):
    """The SuperLink does not take this site's key."""


class RunOverError(FedgeError):
    """The run of a message is over: nobody waits for its reply."""


class Stopped(FedgeError):  # noqa: N818 - not a fault: the node was told to leave
    """The node was told to leave while it waited for the SuperLink."""


class Superlink:
    """One SuperLink, as far as it is there or not."""

    def __init__(
        self, stop: threading.Event, say: Callable[..., None], *, was_trusted: bool = False
    ) -> None:
        """Nothing is asked yet.

        Args:
            stop: Set by whoever wants to leave; every wait ends then.
            say: Called with the name of an event and its values.
            was_trusted: Whether its certificate was one to trust in an earlier life.
        """
        self._stop = stop
        self._say = say
        self._is_trusted = was_trusted
        self._reasons: set[str] = set()

    @property
    def is_away(self) -> bool:
        """Whether the last request was not answered."""
        return bool(self._reasons)

    def call(self, method: Callable[[Any], Any], request: Any) -> Any:
        """Make a request; while the SuperLink is away, again and again.

        Raises:
            FleetKeyError: 401.
            RunOverError: 403.
            CertificateError: The SuperLink's certificate is not one to trust, and never was.
            FleetError: The SuperLink refuses the request.
            Stopped: Told to leave.
        """
        wait, longest = RETRY_S
        faults = 0
        while True:
            try:
                answer = method(request)
            except httpx.HTTPStatusError as error:
                self._is_trusted = True
                status = error.response.status_code
                faults += status == httpx.codes.INTERNAL_SERVER_ERROR
                if status < 500 or faults >= MAX_FAULTS:
                    raise _refusal(status, error.response.text) from None
                reason = f"HTTP {status}"
            except httpx.TransportError as error:
                reason = type(error).__name__
                if "certificate" in str(error).lower():
                    fault = CertificateError(str(error))
                    if not self._is_trusted:
                        raise fault from None
                    reason = str(fault)
            else:
                self._is_trusted = True
                if self.is_away:
                    self._reasons.clear()
                    self._say("superlink_back")
                return answer
            if reason not in self._reasons:
                self._reasons.add(reason)
                self._say("superlink_away", reason=reason)
            self.pause(wait * random.uniform(0.5, 1.0))  # noqa: S311 - no secret, only apart
            wait = min(2 * wait, longest)

    def pause(self, seconds: float) -> None:
        """Wait.

        Raises:
            Stopped: Told to leave.
        """
        if self._stop.wait(seconds):
            raise Stopped("the node was told to leave")


def _refusal(status: int, text: str) -> FedgeError:
    """Return what an HTTP status means that is no matter of waiting."""
    if status == httpx.codes.UNAUTHORIZED:
        return FleetKeyError(
            "the SuperLink does not accept this site's key: ask the coordinator to register its "
            "public half, and compare this machine's clock (5 minutes off is refused)"
        )
    if status == httpx.codes.FORBIDDEN:
        return RunOverError("the run is over")
    code = ""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        code = f" [{int(json.loads(text)['code'])}]"
    return FleetError(f"the SuperLink refused a request: HTTP {status}{code}")
