"""What a site can tell of its coordinator before it is admitted: way, certificate, clock.

One request without a signature goes out: the answer of a SuperLink behind its proxy is 401, and
carries a date. Nothing is registered or activated by it.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from client.check import Check, Level, first_problem, ok, skipped
from federation.errors import UserError

PATH = "/v1/fleet/pull-messages"
"""Where a site asks for work."""
TIMEOUT_S = 10.0
SOON_DAYS = 30
"""A certificate that ends earlier should be renewed now."""
MAX_AHEAD_S, MAX_BEHIND_S = 5.0, 300.0
"""What a SuperLink takes of a site's clock (SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE in flwr
1.41)."""


@dataclass(frozen=True)
class Certificate:
    """One certificate, as far as it can be wrong."""

    subject: str
    not_before: datetime
    not_after: datetime
    is_authority: bool


@dataclass(frozen=True)
class Answer:
    """What came back, as far as the way went."""

    error: str = ""
    """Why there was no connection."""
    tls_error: str = ""
    """Why there was no trust."""
    certificate_end: datetime | None = None
    status: int = 0
    """Of HTTP; 0 = none."""
    ahead_s: float | None = None
    """How far this machine's clock is ahead of theirs, to about a second; None = not said."""


def read_certificates(path: Path) -> tuple[Certificate, ...]:
    """Return the certificates of a PEM file.

    Raises:
        OSError: It cannot be read.
        UserError: It holds none, or one that is damaged.
    """
    from cryptography import x509

    try:
        return tuple(
            Certificate(
                certificate.subject.rfc4514_string(),
                certificate.not_valid_before_utc,
                certificate.not_valid_after_utc,
                _is_authority(certificate.extensions),
            )
            for certificate in x509.load_pem_x509_certificates(path.read_bytes())
        )
    except ValueError:
        raise UserError(
            f"{path.name} holds no certificate in PEM (-----BEGIN CERTIFICATE-----)"
        ) from None


def ask_superlink(address: str, root_certificate: Path, timeout_s: float = TIMEOUT_S) -> Answer:
    """Ask a SuperLink for work, as nobody.

    Args:
        address: HOST:PORT.
        root_certificate: PEM file of its CA.
        timeout_s: For each step of the connection.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        context = ssl.create_default_context(cafile=str(root_certificate))
    except (OSError, ssl.SSLError):
        return Answer(error="root_certificate cannot be read")
    connection = http.client.HTTPSConnection(host, int(port), timeout=timeout_s, context=context)
    with contextlib.closing(connection):
        if (failed := _connect(connection)) is not None:
            return failed
        end = _end_of(connection.sock)
        before = time.time()
        try:
            connection.request("POST", PATH, headers={"Content-Type": "application/protobuf"})
            response = connection.getresponse()
        except (OSError, http.client.HTTPException):
            return Answer(certificate_end=end)
        now = (before + time.time()) / 2
        ahead_s = _ahead(now, response.headers.get("Date"))
        return Answer(certificate_end=end, status=response.status, ahead_s=ahead_s)


def _connect(connection: http.client.HTTPSConnection) -> Answer | None:
    """Connect; return why not, or None."""
    try:
        connection.connect()
    except ssl.SSLCertVerificationError as error:
        return Answer(tls_error=error.verify_message)
    except ssl.SSLError as error:
        return Answer(tls_error=f"no TLS there ({error.reason or 'broken off'})")
    except socket.gaierror:
        return Answer(error="no name that this machine can resolve")
    except (OSError, OverflowError) as error:
        return Answer(error=getattr(error, "strerror", None) or "no answer in time")
    return None


def check_certificate(found: Sequence[Certificate] | str, now: datetime) -> Check:
    """Say whether the coordinator's CA can be trusted with.

    Args:
        found: Certificates of root_certificate, or why there are none.
        now: With a time zone.
    """
    name = "certificate"
    get = "get the CA's file from the coordinator again, and name it as root_certificate"
    if isinstance(found, str):
        return Check(name, "fail", found, get)
    first = min(found, key=lambda each: each.not_after)
    last = max(found, key=lambda each: each.not_before)
    said = f"{first.subject}, to {first.not_after:%Y-%m-%d}"
    begins = f"{last.subject} begins on {last.not_before:%Y-%m-%d %H:%M} UTC"
    ask = "ask for the CA's own certificate: a server's has to be exchanged with each renewal"
    is_soon = (first.not_after - now).days < SOON_DAYS
    are_authorities = all(each.is_authority for each in found)
    return first_problem(
        name,
        [
            (first.not_after <= now, "fail", f"{said}: it has ended", get),
            (last.not_before > now, "fail", begins, "set this machine's clock"),
            (is_soon, "warn", said, get),
            (not are_authorities, "warn", f"{said}; not only of a CA", ask),
        ],
        said,
    )


def check_superlink(address: str, answer: Answer, now: datetime) -> Check:
    """Say how far the way to the coordinator is open.

    Args:
        address: HOST:PORT, for the text.
        answer: From ``ask_superlink``.
        now: With a time zone.
    """
    name, compare = "superlink", "compare superlink and root_certificate with what was given out"
    end, tell = answer.certificate_end, "tell the coordinator"
    failed = answer.error or answer.tls_error
    if failed:
        way = "; let TCP out to it" if answer.error else ""
        return Check(name, "fail", f"{address}: {failed}", compare + way)
    if end is not None and (end - now).days < SOON_DAYS:
        return Check(name, "warn", f"{address}: its certificate ends on {end:%Y-%m-%d}", tell)
    meanings: dict[int, tuple[Level, str, str]] = {
        401: ("ok", "a SuperLink that asks for a node key", ""),
        403: ("fail", "a proxy that does not let a site's requests through", tell),
        404: ("fail", "a server, but no SuperLink", compare),
        502: ("warn", "the proxy is there, the SuperLink is not", tell),
        0: ("warn", "TLS, and then no HTTP", compare),
    }
    unknown: tuple[Level, str, str] = ("warn", "not what a SuperLink answers to a stranger", tell)
    level, meaning, fix = meanings.get(answer.status, unknown)
    return Check(name, level, f"{address}: {meaning} (HTTP {answer.status or 'none'})", fix)


def check_clock(ahead_s: float | None) -> Check:
    """Say whether the SuperLink will take requests that are signed with this machine's time."""
    if ahead_s is None:
        return skipped("clock", "the coordinator's time is not known")
    found = f"{abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} the coordinator"
    fix = "set this machine's clock (NTP); more than 5 s ahead or 300 s behind is refused"
    # A date says whole seconds: half of one is rounding, and so is a little more on a slow line.
    if ahead_s > MAX_AHEAD_S or ahead_s < -MAX_BEHIND_S:
        return Check("clock", "fail", found, fix)
    if ahead_s > MAX_AHEAD_S / 2 or ahead_s < -MAX_BEHIND_S / 2:
        return Check("clock", "warn", found, fix)
    return ok("clock", found)


def _is_authority(extensions: object) -> bool:
    from cryptography import x509

    try:
        basic = extensions.get_extension_for_class(x509.BasicConstraints)  # type: ignore[attr-defined]
    except x509.ExtensionNotFound:
        return False
    return bool(basic.value.ca)


def _end_of(peer: object) -> datetime | None:
    said = peer.getpeercert() if isinstance(peer, ssl.SSLSocket) else None
    end = (said or {}).get("notAfter")
    if not isinstance(end, str):
        return None
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(end), UTC)


def _ahead(now: float, date: str | None) -> float | None:
    if not date:
        return None
    try:
        # It says the whole second, so that the true time is half a second later on average.
        return now - parsedate_to_datetime(date).timestamp() - 0.5
    except ValueError:
        return None
