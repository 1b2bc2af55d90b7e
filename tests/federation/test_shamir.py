import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation.shamir import PRIME, SECRET_BYTES, SHARE_BYTES, join, reconstruct, split


def test_the_field_is_prime() -> None:
    # Miller and Rabin: a composite passes one base with probability below 1/4.
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    draw = random.Random(0)  # noqa: S311 - no secret
    for _ in range(40):
        x = pow(draw.randrange(2, PRIME - 1), odd, PRIME)
        powers = [pow(x, 2**k, PRIME) for k in range(twos)]
        assert x == 1 or PRIME - 1 in powers


@given(st.binary(min_size=SECRET_BYTES, max_size=SECRET_BYTES), st.integers(1, 6), st.data())
def test_any_threshold_of_the_shares_gives_the_secret(
    secret: bytes, points: int, data: st.DataObject
) -> None:
    threshold = data.draw(st.integers(1, points))
    shares = split(secret, threshold, points)
    assert {len(share) for share in shares} == {SHARE_BYTES}
    for count in range(threshold, points + 1):
        for chosen in itertools.combinations(range(points), count):
            assert join({n + 1: shares[n] for n in chosen}) == secret


def test_fewer_shares_fit_every_secret() -> None:
    """With two of three shares, each secret has exactly one third share that would give it."""
    secret = b"\x07" * SECRET_BYTES
    shares = split(secret, 3, 5)
    for other in (bytes(SECRET_BYTES), b"\xff" * SECRET_BYTES):
        # Lagrange at point 3, through the two shares and the other secret at 0, by hand.
        y1, y2 = (int.from_bytes(share, "big") for share in shares[:2])
        y0 = int.from_bytes(other, "big")
        third = (y0 - 3 * y1 + 3 * y2) % PRIME
        assert join({1: shares[0], 2: shares[1], 3: third.to_bytes(SHARE_BYTES, "big")}) == other


def test_two_sharings_of_one_secret_have_no_share_in_common() -> None:
    secret = bytes(SECRET_BYTES)
    assert not set(split(secret, 2, 5)) & set(split(secret, 2, 5))


def test_tampered_shares_are_outvoted_or_noticed() -> None:
    secret = bytes(range(SECRET_BYTES))
    shares = dict(enumerate(split(secret, 3, 5), start=1))
    spoiled = shares | {1: shares[2], 4: bytes(SHARE_BYTES)}
    assert reconstruct(spoiled, 3, lambda s: s == secret) == secret
    assert reconstruct(spoiled | {5: bytes(SHARE_BYTES)}, 3, lambda s: s == secret) is None
    assert reconstruct({1: shares[1], 2: shares[2]}, 3, lambda s: s == secret) is None


def test_what_is_no_share_is_refused() -> None:
    shares = split(bytes(SECRET_BYTES), 2, 3)
    for wrong in ({}, {0: shares[0]}, {1: shares[0][1:]}, {1: b"\xff" * SHARE_BYTES}):
        with pytest.raises(ValueError, match="expected shares"):
            join(wrong)
    with pytest.raises(ValueError, match="expected 32"):
        split(b"short", 2, 3)
    with pytest.raises(ValueError, match="expected 1 to 3"):
        split(bytes(SECRET_BYTES), 4, 3)
