"""Shamir's secret sharing: any ``threshold`` shares give the secret, fewer say nothing of it.

The secret is the value at 0 of a random polynomial of degree ``threshold - 1`` over a prime field;
a share is its value at the holder's point (Shamir, 1979). So the shares are a word of a
Reed-Solomon code, and those that were tampered with are errors in it: with n shares up to
(n - threshold) / 2 of them are found and put right, by Gao's decoding ("A New Algorithm for
Decoding Reed-Solomon Codes", 2003). ``reconstruct`` asks its caller whether a secret is the one
that was committed to; where more shares are wrong, it looks for a set of them that gives it.

Flower carries a Shamir too (`flwr.common.secure_aggregation.crypto.shamir`, on pycryptodome). Its
arithmetic is sound, but it takes however many shares it is given for the threshold, knows of no
commitment, and may be imported only at the Flower edge of the rooms: hence these lines.

Python's integers take a time that depends on their values; the shares are made and joined where
the secret is known anyway.
"""

from __future__ import annotations

import itertools
import math
import random
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

PRIME = 2**256 + 297
"""The smallest prime above every secret of 32 bytes."""
SECRET_BYTES = 32
SHARE_BYTES = 33
MAX_TRIES = 500
"""Sets of shares that are tried where more are wrong than decoding bears: all of them in a cohort
of 11 with a threshold of 8 (330)."""


@dataclass(frozen=True)
class Reconstructed:
    """A secret that was committed to."""

    secret: bytes
    wrong: frozenset[int]
    """Points whose shares are not of it: their holders lied, or whoever dealt them."""


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
    shares: Mapping[int, bytes],
    threshold: int,
    is_genuine: Callable[[bytes], bool],
    *,
    doubted: Collection[int] = (),
    max_tries: int = MAX_TRIES,
) -> Reconstructed | None:
    """Return the secret that was committed to, and whose shares are not of it.

    Up to (n - threshold) / 2 wrong shares of n are always found, in O(n**2) operations. That a
    polynomial gives the secret is not enough for that: two holders that change their shares by what
    cancels at 0 make one, which honest shares are not of. Beyond that bound, sets of ``threshold``
    shares are tried, drawn at random where they are many: few liars too many are still found in a
    small cohort. But liars that agree may then have others found wrong: of what gives the secret
    the polynomial of most shares is taken. tests/federation/test_shamir.py bounds the CPU of 64
    shares with a threshold of 43: 1 s to decode, 10 s where all tries are in vain.

    Args:
        shares: By point.
        threshold: Shares that give it.
        is_genuine: Whether a secret is the one that was committed to.
        doubted: Points whose shares of other secrets were wrong: the secret is sought without
            them first. They are not ruled out: whoever deals wrong shares makes others doubted.
        max_tries: Sets that are tried at most.

    Returns:
        None if no secret was found.
    """
    values = {point: int.from_bytes(share, "big") for point, share in shares.items()}
    values = {
        point: value
        for point, value in values.items()
        if value < PRIME and len(shares[point]) == SHARE_BYTES
    }
    trusted = {point: value for point, value in values.items() if point not in doubted}
    # Two polynomials with the same secret have at most threshold - 2 shares in common: num_sure
    # shares only one of them can have right, and than num_best none can have more.
    spare = len(values) - threshold
    num_sure, num_best = len(values) - (spare + 1) // 2, len(values) - (spare + 2) // 2
    best = _most_right(_likely(values, trusted, threshold), values, is_genuine, num_sure)
    are_all = math.comb(len(values), threshold) <= MAX_TRIES
    if best is None or are_all:
        sets = itertools.islice(_sets(values, threshold), max_tries)
        tried = (_interpolated({point: values[point] for point in chosen}) for chosen in sets)
        enough = num_best if are_all else threshold
        best = _most_right(tried, values, is_genuine, enough, best)
    return best and Reconstructed(best[0], frozenset(shares.keys() - best[1]))


def _most_right(
    polynomials: Iterable[Sequence[int]],
    values: Mapping[int, int],
    is_genuine: Callable[[bytes], bool],
    enough: int,
    best: tuple[bytes, set[int]] | None = None,
) -> tuple[bytes, set[int]] | None:
    """Return the genuine secret whose polynomial has most shares right, and their points.

    Args:
        polynomials: They are tried in this order.
        values: Of the shares, by point.
        is_genuine: Whether a secret is the one that was committed to.
        enough: Right shares with which no other polynomial is tried.
        best: What was found before.
    """
    for coefficients in polynomials:
        if best is not None and len(best[1]) >= enough:
            break
        secret = coefficients[0]
        if secret >= 1 << (8 * SECRET_BYTES):
            continue
        raw, highest_first = secret.to_bytes(SECRET_BYTES, "big"), coefficients[::-1]
        if not is_genuine(raw):
            continue
        right = {p for p, value in values.items() if _value(highest_first, p) == value}
        if best is None or len(right) > len(best[1]):
            best = raw, right
    return best


def _likely(
    values: Mapping[int, int], trusted: Mapping[int, int], threshold: int
) -> Iterator[list[int]]:
    """Yield polynomials that may be the one, the cheap one first."""
    first = dict(sorted(trusted.items())[:threshold])
    if len(first) == threshold:
        yield _interpolated(first)
    for word in (trusted, values) if trusted != values else (values,):
        if len(word) > threshold and (decoded := _decoded(word, threshold)):
            yield decoded


def _sets(values: Mapping[int, int], size: int) -> Iterator[Collection[int]]:
    """Yield sets of points: every one where they are few, else drawn by the shares themselves."""
    points = sorted(values)
    if math.comb(len(points), size) <= MAX_TRIES:
        yield from itertools.combinations(points, size)
        return
    # In order, a liar at a low point would be in all of the first ones.
    draw = random.Random(repr(sorted(values.items())))  # noqa: S311 - no secret
    while True:
        yield draw.sample(points, size)


# Polynomials are lists of coefficients, the lowest power first, without zeros at the end.


def _interpolated(values: Mapping[int, int]) -> list[int]:
    """Return the polynomial of the lowest degree through these values (Lagrange).

    Of at least one coefficient, and with zeros at its end where its degree is lower.
    """
    zeros = _through(values)
    result = [0] * len(values)
    for point, value in values.items():
        basis = _without(zeros, point)
        weight = value * pow(_value(basis[::-1], point), -1, PRIME) % PRIME
        result = [
            (mine + weight * other) % PRIME for mine, other in zip(result, basis, strict=True)
        ]
    return result


def _decoded(values: Mapping[int, int], threshold: int) -> list[int] | None:
    """Return the polynomial of degree below ``threshold`` that most values are of, if there is one.

    There is one if at most (n - threshold) / 2 of n values are wrong. Euclid's algorithm on the
    polynomial through all values and the one that is zero at all points comes to a remainder that
    is the wanted one times the one that is zero at the wrong points (Gao, 2003).
    """
    above, below = _through(values), _trimmed(_interpolated(values))
    factor_above: list[int] = []
    factor_below = [1]
    while 2 * (len(below) - 1) >= len(values) + threshold:
        quotient, rest = _divided(above, below)
        above, below = below, rest
        factor_above, factor_below = (
            factor_below,
            _difference(factor_above, _product(quotient, factor_below)),
        )
    decoded, rest = _divided(below, factor_below)
    if rest or len(decoded) > threshold:
        return None
    return decoded or [0]


def _through(points: Collection[int]) -> list[int]:
    """Return the product of (x - point)."""
    result = [1]
    for point in points:
        shifted = [0, *result]
        result = [
            (high - point * low) % PRIME for high, low in zip(shifted, [*result, 0], strict=True)
        ]
    return result


def _without(zeros: Sequence[int], point: int) -> list[int]:
    """Return a polynomial divided by (x - point), which divides it."""
    quotient, carried = [], 0
    for coefficient in reversed(zeros[1:]):
        carried = (coefficient + carried * point) % PRIME
        quotient.append(carried)
    return quotient[::-1]


def _divided(above: Sequence[int], below: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return quotient and remainder; ``below`` is not 0."""
    rest, inverse = list(above), pow(below[-1], -1, PRIME)
    quotient = [0] * max(len(above) - len(below) + 1, 0)
    for shift in reversed(range(len(quotient))):
        quotient[shift] = factor = rest[shift + len(below) - 1] * inverse % PRIME
        for place, coefficient in enumerate(below):
            rest[shift + place] = (rest[shift + place] - factor * coefficient) % PRIME
    return _trimmed(quotient), _trimmed(rest)


def _product(one: Sequence[int], other: Sequence[int]) -> list[int]:
    result = [0] * max(len(one) + len(other) - 1, 0)
    for shift, factor in enumerate(one):
        for place, coefficient in enumerate(other):
            result[shift + place] = (result[shift + place] + factor * coefficient) % PRIME
    return _trimmed(result)


def _difference(one: Sequence[int], other: Sequence[int]) -> list[int]:
    pairs = itertools.zip_longest(one, other, fillvalue=0)
    return _trimmed([(mine - theirs) % PRIME for mine, theirs in pairs])


def _trimmed(polynomial: list[int]) -> list[int]:
    while polynomial and not polynomial[-1]:
        polynomial.pop()
    return polynomial


def _value(coefficients: Sequence[int], point: int) -> int:
    """Return the polynomial's value, the highest power first (Horner)."""
    value = 0
    for coefficient in coefficients:
        value = (value * point + coefficient) % PRIME
    return value
