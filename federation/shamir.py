"""Shamir's secret sharing: any ``threshold`` shares give the secret, fewer say nothing of it.

The secret is the value at 0 of a random polynomial of degree ``threshold - 1`` over a prime field;
a share is its value at the holder's point (Shamir, 1979). A share that was tampered with gives
another secret and is not noticed here: ``reconstruct`` asks its caller whether a secret is the one
that was committed to, and looks for shares that give it.

Flower carries a Shamir too (`flwr.common.secure_aggregation.crypto.shamir`, on pycryptodome). Its
arithmetic is sound, but it takes however many shares it is given for the threshold, knows of no
commitment, and may be imported only at the Flower edge of the rooms: hence these lines.

Python's integers take a time that depends on their values; the shares are made and joined where
the secret is known anyway.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Mapping

PRIME = 2**256 + 297
"""The smallest prime above every secret of 32 bytes."""
SECRET_BYTES = 32
SHARE_BYTES = 33
_MAX_TRIES = 500
"""Sets of shares that are tried where some were tampered with: all of them in a cohort of 11 with
a threshold of 8 (330)."""


def split(secret: bytes, threshold: int, points: int) -> list[bytes]:
    """Return one share for each of the points 1 to ``points``.

    Args:
        secret: 32 bytes.
        threshold: Shares that give it back, in [1, ``points``].
        points: How many shares.

    Raises:
        ValueError: The secret is of another length, or the threshold out of its range.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"the secret has {len(secret)} bytes: expected {SECRET_BYTES}")
    if not 1 <= threshold <= points:
        raise ValueError(f"threshold {threshold} of {points} shares: expected 1 to {points}")
    coefficients = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    coefficients.append(int.from_bytes(secret, "big"))
    return [
        _value(coefficients, point).to_bytes(SHARE_BYTES, "big") for point in range(1, points + 1)
    ]


def join(shares: Mapping[int, bytes]) -> bytes:
    """Return what a polynomial through these shares is at 0.

    That is the secret if they are as many as the threshold, or more, and all genuine.

    Args:
        shares: By point; at least one.

    Raises:
        ValueError: A point or a share is no element of the field, or the value no secret.
    """
    values = {point: int.from_bytes(share, "big") for point, share in shares.items()}
    if not values or not all(
        0 < point < PRIME and len(shares[point]) == SHARE_BYTES and value < PRIME
        for point, value in values.items()
    ):
        raise ValueError(f"expected shares of {SHARE_BYTES} bytes below the prime, by point from 1")
    secret = 0
    for point, value in values.items():
        numerator = denominator = 1
        for other in values:
            if other != point:
                numerator = numerator * other % PRIME
                denominator = denominator * (other - point) % PRIME
        secret += value * numerator * pow(denominator, -1, PRIME)
    secret %= PRIME
    if secret >= 1 << (8 * SECRET_BYTES):
        raise ValueError("the shares give no secret: one of them is not genuine")
    return secret.to_bytes(SECRET_BYTES, "big")


def reconstruct(
    shares: Mapping[int, bytes], threshold: int, is_genuine: Callable[[bytes], bool]
) -> bytes | None:
    """Return the secret that was committed to, or None if no set of the shares gives it.

    With more shares than the threshold, some may be wrong: other sets are tried, a few hundred.

    Args:
        shares: By point.
        threshold: Shares that give it.
        is_genuine: Whether a secret is the one that was committed to.
    """
    for chosen in itertools.islice(itertools.combinations(sorted(shares), threshold), _MAX_TRIES):
        try:
            secret = join({point: shares[point] for point in chosen})
        except ValueError:
            continue
        if is_genuine(secret):
            return secret
    return None


def _value(coefficients: list[int], point: int) -> int:
    """Return the polynomial's value, the highest power first (Horner)."""
    value = 0
    for coefficient in coefficients:
        value = (value * point + coefficient) % PRIME
    return value
