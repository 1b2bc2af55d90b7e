"""The keys of a secure sum: what is signed, sealed, committed to, and expanded into masks.

X25519 agrees, HKDF-SHA256 derives one key for each purpose, AES-GCM seals, Ed25519 signs: all from
`cryptography`. Each derived key is bound to a context (a digest of all that was said before:
federation.secure_messages) and to who speaks to whom, and serves once.
"""

from __future__ import annotations

import hashlib
import secrets

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from federation.masking import KEY_BYTES, Mask
from federation.shamir import SHARE_BYTES

_NONCE_BYTES, _TAG_BYTES = 12, 16
SEALED_BYTES = _NONCE_BYTES + 2 * SHARE_BYTES + _TAG_BYTES
"""Of a sealed pair of shares."""


def is_signed(identity: str, signature: str, content: bytes) -> bool:
    """Return whether ``identity`` made this signature."""
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(identity))
        key.verify(bytes.fromhex(signature), content)
    except (InvalidSignature, ValueError):
        return False
    return True


def commitment_of(session: str, seed: bytes) -> str:
    """Return the commitment to a seed of 32 random bytes, which hides it."""
    return digest("seed", session.encode(), seed).hex()


def seal(
    private: X25519PrivateKey, peer_key: str, context: str, sender: int, receiver: int, plain: bytes
) -> str:
    """Return shares, in hex, that ``receiver`` alone can open, and only as ``sender``'s.

    Args:
        private: Seal key of the sender.
        peer_key: Public seal key of the receiver.
        context: Of the roster.
        sender: Its place in the roster.
        receiver: Its place in the roster.
        plain: Two shares.
    """
    nonce = secrets.token_bytes(_NONCE_BYTES)
    key = _sealing_key(private, peer_key, context, sender, receiver)
    return (nonce + AESGCM(key).encrypt(nonce, plain, None)).hex()


def unseal(
    private: X25519PrivateKey, peer_key: str, context: str, sender: int, receiver: int, sealed: str
) -> bytes | None:
    """Return what was sealed, or None if it was not sealed so.

    Arguments as ``seal``, but the private key is the receiver's and the public one the sender's.
    """
    raw = bytes.fromhex(sealed)
    key = _sealing_key(private, peer_key, context, sender, receiver)
    try:
        return AESGCM(key).decrypt(raw[:_NONCE_BYTES], raw[_NONCE_BYTES:], None)
    except InvalidTag:
        return None


def pair_mask(
    private: X25519PrivateKey, member: int, other: int, other_key: str, context: str, *, undo: bool
) -> Mask:
    """Return the mask of ``member`` with ``other``: the lower place adds it, the higher takes it.

    Args:
        private: Mask key of one of the two.
        member: In whose vector the mask is.
        other: With whom it is agreed on.
        other_key: Public mask key of the one whose private key is not given.
        context: Of ``sealed_context``.
        undo: Take the mask out again.
    """
    low, high = sorted((member, other))
    key = _derived("pair", _agreed(private, other_key), f"{context}/{low}/{high}")
    return Mask(key, is_added=(member == low) is not undo)


def own_mask(seed: bytes, member: int, context: str, *, undo: bool) -> Mask:
    """Return the mask that only ``member`` has in its vector. Arguments as ``pair_mask``."""
    return Mask(_derived("own", seed, f"{context}/{member}"), is_added=not undo)


def public_key(private: X25519PrivateKey) -> str:
    """Return the public half in hex."""
    return private.public_key().public_bytes_raw().hex()


def canonical_key(private: X25519PrivateKey) -> bytes:
    """Return a private key's 32 bytes in the one form that the exchange computes with.

    X25519 does not look at five of its 256 bits (RFC 7748, 5), so 32 strings have the same public
    key: what a public key is a commitment to is this one of them.
    """
    raw = bytearray(private.private_bytes_raw())
    raw[0] &= 248
    raw[31] = raw[31] & 127 | 64
    return bytes(raw)


def is_usable(key: str) -> bool:
    """Return whether a public X25519 key agrees on secrets: one of low order always gives 0."""
    try:
        _agreed(X25519PrivateKey.generate(), key)
    except ValueError:
        return False
    return True


def digest(label: str, *parts: bytes) -> bytes:
    """Return sha256 of the parts, each behind its length, so that no two lists look alike."""
    state = hashlib.sha256()
    for part in (b"fedge secure sum 1", label.encode(), *parts):
        state.update(len(part).to_bytes(8, "big"))
        state.update(part)
    return state.digest()


def _sealing_key(
    private: X25519PrivateKey, peer_key: str, context: str, sender: int, receiver: int
) -> bytes:
    return _derived("seal", _agreed(private, peer_key), f"{context}/{sender}/{receiver}")


def _agreed(private: X25519PrivateKey, public: str) -> bytes:
    return private.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(public)))


def _derived(label: str, secret: bytes, place: str) -> bytes:
    info = digest(label, place.encode())
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(secret)
