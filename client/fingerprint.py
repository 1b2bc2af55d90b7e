"""What a data set is called in the ledger: by its records, not by its file.

Each record becomes 16 bytes that are equal for the same text after the normalisation that
`client.cleaning` has for duplicates, so that another file name, order, case, width or white space
changes nothing, and two data sets show whether they share a record. The bytes are keyed with a
secret that stays in the site's state directory: who reads the ledger alone cannot test guesses of
a text against it. Who reads the secret too can.

What it does not see: a record of which one word was changed is another record.

Shape letters: N records.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from client.cleaning import content_digest
from client.records import Record
from federation.atomic import sync_directory
from federation.errors import UserError

SECRET = "fingerprint.key"  # noqa: S105  # the name of a file
"""File of the secret in a site's state directory."""
SECRET_BYTES = 32
RECORD_BYTES = 16


class FingerprintError(UserError):
    """The secret of a site's fingerprints is missing, damaged or readable by others."""


@dataclass(frozen=True)
class Fingerprint:
    """A data set, by what its records say."""

    digest: str
    """sha256 of ``records``, in hex: the data set's name."""
    records: bytes = field(repr=False)
    """16 bytes a record, sorted, each once."""
    key: str
    """Which secret it was made with; says nothing of the secret."""

    @property
    def num_records(self) -> int:
        """Different records."""
        return len(self.records) // RECORD_BYTES


def fingerprint(records: Iterable[Record], secret: bytes) -> Fingerprint:
    """Return the fingerprint of a data set: the same for the same texts in any order.

    Give it the records that are trained on, after cleaning: their number decides the sampling rate.
    The digests are all that is held: 16 bytes a record, three times while they are sorted.

    Args:
        records: Each is looked at once; none is kept.
        secret: From ``read_secret``.
    """
    import numpy as np

    digests = bytearray()
    for record in records:
        digests += hashlib.blake2b(
            content_digest(record), key=secret, digest_size=RECORD_BYTES
        ).digest()
    digests_N = np.frombuffer(digests, dtype=f"S{RECORD_BYTES}")
    digests_N.sort()  # in place
    is_first_N = np.append(True, digests_N[1:] != digests_N[:-1])[: len(digests_N)]
    in_order = digests_N[is_first_N].tobytes()
    return Fingerprint(hashlib.sha256(in_order).hexdigest(), in_order, key_of(secret))


def key_of(secret: bytes) -> str:
    """Return 32 hex digits that tell one secret from another."""
    return hashlib.blake2b(b"fedge: which key", key=secret, digest_size=16).hexdigest()


def share_a_record(first: bytes, second: bytes) -> bool:
    """Return whether two data sets have at least one record in common.

    Args:
        first: ``Fingerprint.records`` of the one.
        second: Of the other, made with the same secret.
    """
    import numpy as np

    few, many = sorted((first, second), key=len)
    if not few:
        return False
    few_N = np.frombuffer(few, dtype=f"S{RECORD_BYTES}")
    many_N = np.frombuffer(many, dtype=f"S{RECORD_BYTES}")
    places_N = np.searchsorted(many_N, few_N)
    return bool((many_N[np.minimum(places_N, len(many_N) - 1)] == few_N).any())


def read_secret(state: Path) -> bytes:
    """Return the secret of a site's fingerprints; the first call makes it.

    Args:
        state: The site's state directory.

    Raises:
        FingerprintError: It is damaged, or others can read it.
    """
    path = state / SECRET
    if not path.exists():
        _make_secret(path)
    if path.stat().st_mode & 0o077:
        raise FingerprintError(
            f"{path} can be read by other users of this machine: run `chmod 600` on it"
        )
    secret = path.read_bytes()
    if len(secret) != SECRET_BYTES:
        raise FingerprintError(
            f"{path} has {len(secret)} bytes, not {SECRET_BYTES}: put it back from a backup; with "
            "another one the ledger cannot tell that it knows a record"
        )
    return secret


def _make_secret(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secrets.token_bytes(SECRET_BYTES))
        file.flush()
        os.fsync(file.fileno())
    # A link, not a rename: of two processes that start at once the first one's secret stays.
    with contextlib.suppress(FileExistsError):
        os.link(new, path)
    new.unlink()
    sync_directory(path.parent)
