"""Ed25519 keys in files: the one form in which coordinators and sites keep what they sign with.

PKCS8 in PEM, unencrypted, readable by its owner alone; the public half is told as 64 hex digits.
A coordinator's key signs runs (`federation.run_signature`); a site's is its identity in secure sums
(`client.identity`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from federation.atomic import sync_directory
from federation.settings import SettingsError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


_PRIME = 2**255 - 19
_CURVE = -121665 * pow(121666, -1, _PRIME)
"""d of the curve -x**2 + y**2 = 1 + d * x**2 * y**2 (RFC 8032, section 5.1)."""


def is_of_low_order(public_key: str) -> bool:
    """Tell whether anybody can sign for an Ed25519 key, since its point has order 8 or less.

    Such points have y = 1, -1, 0, or the y of a point whose double has y = 0; that is where
    d * y**4 + 2 * y**2 = 1. A verification need not notice (RFC 8032 does not ask for it).

    Args:
        public_key: 64 hex digits. The same point may be written in more than one way.
    """
    y = int.from_bytes(bytes.fromhex(public_key), "little") % 2**255
    return y * (y**2 - 1) * (_CURVE * y**4 + 2 * y**2 - 1) % _PRIME == 0


def generate_key() -> tuple[Ed25519PrivateKey, bytes]:
    """Return a new key, and what its file holds."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
    )

    key = Ed25519PrivateKey.generate()
    return key, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def new_key(path: Path) -> Ed25519PrivateKey:
    """Write a new key, for its owner's eyes only; a file that is there is never overwritten.

    Raises:
        FileExistsError: There is one.
    """
    key, pem = generate_key()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not by way of `federation.atomic`, whose files all may read.
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(path.parent)
    return key


def read_key(path: Path, *, what: str, fix: str) -> Ed25519PrivateKey:
    """Return the private key of a file.

    Args:
        path: Of the file.
        what: What the key is, for the error message: "signing key".
        fix: How to make one, for the error message.

    Raises:
        SettingsError: The file is missing or holds no unencrypted Ed25519 key in PEM.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise SettingsError(
            f"{what} {path.name} cannot be read ({error.strerror}): {fix}"
        ) from None
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise SettingsError(f"{what} {path.name} holds no unencrypted Ed25519 key in PEM: {fix}")
    return key


def public_half(key: Ed25519PrivateKey) -> str:
    """Return the public half as policies list it: 64 hex digits."""
    return key.public_key().public_bytes_raw().hex()
