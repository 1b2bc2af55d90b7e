import itertools
import random
import time
from collections.abc import Iterable, Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation.shamir import (
    MAX_TRIES,
    PRIME,
    SECRET_BYTES,
    SHARE_BYTES,
    join,
    reconstruct,
    split,
)


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


def tampered(shares: list[bytes], wrong: Mapping[int, bytes]) -> dict[int, bytes]:
    return dict(enumerate(shares, start=1)) | wrong


def gives(points: Iterable[int], shares: Mapping[int, bytes], secret: bytes) -> bool:
    try:
        return join({point: shares[point] for point in points}) == secret
    except ValueError:
        return False


def by_brute_force(
    shares: Mapping[int, bytes], threshold: int, secret: bytes
) -> set[frozenset[int]]:
    """Return whose shares are wrong, by every set that gives the secret; the fewest, or each tie.

    A point is of the same polynomial if it can stand for one of the set's points, itself or not.
    """
    wrong = set()
    for chosen in itertools.combinations(shares, threshold):
        if gives(chosen, shares, secret):
            others = shares.keys() - set(chosen)
            wrong.add(frozenset(p for p in others if not gives((*chosen[1:], p), shares, secret)))
    fewest = min(map(len, wrong), default=0)
    return {points for points in wrong if len(points) == fewest}


@given(st.integers(2, 8), st.data())
def test_wrong_shares_are_found_as_by_trying_every_set(points: int, data: st.DataObject) -> None:
    threshold = data.draw(st.integers(1, points))
    secret = data.draw(st.binary(min_size=SECRET_BYTES, max_size=SECRET_BYTES))
    share = st.one_of(st.just(bytes(SHARE_BYTES)), st.integers(0, PRIME - 1).map(_as_share))
    liars = st.dictionaries(st.integers(1, points), share, max_size=points)
    shares = tampered(split(secret, threshold, points), data.draw(liars))
    seen = reconstruct(shares, threshold, lambda s: s == secret)
    expected = by_brute_force(shares, threshold, secret)
    assert (seen.secret, seen.wrong in expected) == (secret, True) if expected else seen is None


def _as_share(value: int) -> bytes:
    return value.to_bytes(SHARE_BYTES, "big")


@pytest.mark.parametrize(("points", "threshold"), [(5, 3), (14, 9), (16, 11), (64, 43), (64, 64)])
def test_as_many_liars_as_the_code_bears_are_named_at_once(points: int, threshold: int) -> None:
    """They lie at the low points, and all alike: as shares of another polynomial."""
    secret, other = b"\x01" * SECRET_BYTES, split(b"\x02" * SECRET_BYTES, threshold, points)
    liars = set(range(1, 1 + (points - threshold) // 2))
    shares = tampered(split(secret, threshold, points), {n: other[n - 1] for n in liars})
    asked: list[bytes] = []

    def is_genuine(tried: bytes) -> bool:
        asked.append(tried)
        return tried == secret

    began = time.process_time()
    seen = reconstruct(shares, threshold, is_genuine, max_tries=0)
    assert time.process_time() - began < 1
    assert (seen.secret, seen.wrong) == (secret, liars)
    assert len(asked) <= 2


def cancelling(
    points: int, threshold: int, liars: Sequence[int], secret: bytes
) -> dict[int, bytes]:
    """Return shares of which two are changed by what cancels in the secret of the first ones."""
    shares = dict(enumerate(split(secret, threshold, points), start=1))
    for sign, liar in zip((1, -1), liars, strict=True):
        weight = 1
        for other in range(1, threshold + 1):
            if other != liar:
                weight = weight * other * pow(other - liar, -1, PRIME) % PRIME
        value = int.from_bytes(shares[liar], "big") + sign * 12345 * pow(weight, -1, PRIME)
        shares[liar] = _as_share(value % PRIME)
    assert join({n: shares[n] for n in range(1, threshold + 1)}) == secret
    return shares


@pytest.mark.parametrize(("points", "threshold"), [(8, 4), (16, 11), (64, 43)])
def test_two_liars_whose_changes_cancel_are_found_all_the_same(points: int, threshold: int) -> None:
    """The first shares give the secret; honest shares are not of their polynomial."""
    secret = bytes(range(SECRET_BYTES))
    shares = cancelling(points, threshold, [1, threshold], secret)
    seen = reconstruct(shares, threshold, secret.__eq__)
    assert (seen.secret, seen.wrong) == (secret, {1, threshold})


def test_beyond_what_the_code_bears_the_polynomial_of_most_shares_is_taken() -> None:
    """Of eight with a threshold of five one wrong share is borne; the two blame three others."""
    secret = bytes(range(SECRET_BYTES))
    seen = reconstruct(cancelling(8, 5, [2, 3], secret), 5, secret.__eq__)
    assert (seen.secret, seen.wrong) == (secret, {2, 3})


def test_liars_that_agree_can_have_as_many_others_found_wrong_where_no_more_can_be_spared() -> None:
    """What the code cannot bear: with six of eight there are two polynomials of six shares each."""
    secret = bytes(range(SECRET_BYTES))
    seen = reconstruct(cancelling(8, 6, [1, 2], secret), 6, secret.__eq__)
    assert (seen.secret, seen.wrong) == (secret, {7, 8})


def test_beyond_what_the_code_bears_sets_sets_are_tried_wherever_the_liars_are() -> None:
    secret = bytes(range(SECRET_BYTES))
    for liars in ({1, 2, 3}, {12, 13, 14}, {2, 7, 14}):
        wrong = {n: _as_share(n) for n in liars}
        seen = reconstruct(tampered(split(secret, 9, 14), wrong), 9, secret.__eq__)
        assert (seen.secret, seen.wrong) == (secret, liars)


def test_without_a_genuine_secret_the_search_ends_within_its_bound() -> None:
    """Of the largest cohort, whoever wants to keep the server busy."""
    tried: list[bytes] = []

    def is_genuine(secret: bytes) -> bool:
        tried.append(secret)
        return False

    shares = tampered(split(bytes(SECRET_BYTES), 43, 64), {})
    began = time.process_time()
    assert reconstruct(shares, 43, is_genuine) is None
    assert time.process_time() - began < 10
    assert len(tried) <= MAX_TRIES + 2


def test_doubted_shares_are_left_out_first_and_used_where_nothing_goes_without_them() -> None:
    secret = bytes(range(SECRET_BYTES))
    shares = tampered(split(secret, 10, 20), {n: _as_share(n) for n in range(1, 8)})
    assert reconstruct(shares, 10, secret.__eq__, max_tries=0) is None  # 7 of 20, and 5 are borne
    seen = reconstruct(shares, 10, secret.__eq__, doubted={1, 2, 3, 4}, max_tries=0)
    assert (seen.secret, seen.wrong) == (secret, set(range(1, 8)))
    honest = tampered(split(secret, 10, 20), {})
    seen = reconstruct(honest, 10, secret.__eq__, doubted=set(range(1, 16)), max_tries=0)
    assert (seen.secret, seen.wrong) == (secret, frozenset())


def test_what_is_no_share_is_refused() -> None:
    shares = split(bytes(SECRET_BYTES), 2, 3)
    for wrong in ({}, {0: shares[0]}, {1: shares[0][1:]}, {1: b"\xff" * SHARE_BYTES}):
        with pytest.raises(ValueError, match="expected shares"):
            join(wrong)
    with pytest.raises(ValueError, match="expected 32"):
        split(b"short", 2, 3)
    with pytest.raises(ValueError, match="expected 1 to 3"):
        split(bytes(SECRET_BYTES), 4, 3)
