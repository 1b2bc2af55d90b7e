"""The publisher's Ed25519 key pair, as PEM files.

The private key never leaves the publisher; a device holds only public ones. A passphrase comes
from the environment (EDGE_KEY_PASSPHRASE), never from an argument that `ps` would show.
"""

import os
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from edge.atomic import write_atomically
from edge.errors import UserError

PASSPHRASE_VARIABLE = "EDGE_KEY_PASSPHRASE"  # noqa: S105 (the name of a variable)


def generate_keys(out: Path, passphrase: str | None = None) -> tuple[Path, Path]:
    """Write a new key pair into ``out``; return the paths of the private and the public key.

    Raises:
        UserError: ``out`` holds a key already: overwriting it would strand every device.
    """
    private, public = out / "private.pem", out / "public.pem"
    if present := [path for path in (private, public) if path.exists()]:
        raise UserError(f"{present[0]} exists already and is not overwritten: choose another --out")
    key = Ed25519PrivateKey.generate()
    encryption = BestAvailableEncryption(passphrase.encode()) if passphrase else NoEncryption()
    out.mkdir(parents=True, exist_ok=True)
    # Created readable by its owner alone: a chmod afterwards would leave a moment in between.
    descriptor = os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
        file.flush()
        os.fsync(file.fileno())
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    write_atomically(public, pem)
    return private, public


def read_private_key(path: Path, passphrase: str | None = None) -> Ed25519PrivateKey:
    """Load the publisher's key.

    Raises:
        UserError: No such file, no Ed25519 private key in it, or the passphrase does not open it.
    """
    content = _read(path)
    secret = passphrase.encode() if passphrase and b"ENCRYPTED" in content else None
    try:
        key = load_pem_private_key(content, secret)
    except TypeError:
        raise UserError(f"{path} is encrypted: set {PASSPHRASE_VARIABLE}") from None
    except (ValueError, UnsupportedAlgorithm):
        if secret:
            raise UserError(f"{PASSPHRASE_VARIABLE} does not open {path}") from None
        raise UserError(f"{path} holds no PEM private key: make one with `edge keygen`") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"{path} is no Ed25519 key: make one with `edge keygen`")
    return key


def read_public_key(path: Path) -> Ed25519PublicKey:
    """Load a key that a device pins.

    Raises:
        UserError: No such file, or no Ed25519 public key in it.
    """
    try:
        key = load_pem_public_key(_read(path))
    except (ValueError, UnsupportedAlgorithm):
        raise UserError(
            f"{path} holds no PEM public key: take public.pem of `edge keygen`"
        ) from None
    if not isinstance(key, Ed25519PublicKey):
        raise UserError(f"{path} is no Ed25519 key: take public.pem of `edge keygen`")
    return key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"key {path} cannot be read: {error.strerror}") from None
