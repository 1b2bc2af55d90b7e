"""What is derived in a secure sum serves one purpose, in one place, once."""

from collections.abc import Callable

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from federation.masking import Mask
from federation.secure_keys import (
    canonical_key,
    commitment_of,
    own_mask,
    pair_mask,
    public_key,
    seal,
    unseal,
)

ANNA, BERT = (X25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2))
SEED, CONTEXT = bytes(range(32)), "ab" * 32
PLAIN = bytes(66)


@pytest.mark.parametrize(
    ("context", "sender", "receiver"), [("cd" * 32, 0, 1), (CONTEXT, 2, 1), (CONTEXT, 0, 2)]
)
def test_shares_are_opened_only_where_they_were_sealed_for(
    context: str, sender: int, receiver: int
) -> None:
    sealed = seal(ANNA, public_key(BERT), CONTEXT, 0, 1, PLAIN)
    assert unseal(BERT, public_key(ANNA), CONTEXT, 0, 1, sealed) == PLAIN
    assert unseal(BERT, public_key(ANNA), context, sender, receiver, sealed) is None


def test_the_same_shares_are_never_sealed_to_the_same_bytes() -> None:
    sealed = {seal(ANNA, public_key(BERT), CONTEXT, 0, 1, PLAIN) for _ in range(3)}
    assert len(sealed) == 3


def test_of_all_private_keys_with_one_public_key_one_is_canonical() -> None:
    raw = X25519PrivateKey.generate().private_bytes_raw()
    alike = [
        X25519PrivateKey.from_private_bytes(
            bytes([raw[0] & 248 | low]) + raw[1:31] + bytes([raw[31] & 63 | high << 6])
        )
        for low in range(8)
        for high in range(4)
    ]
    assert len({key.private_bytes_raw() for key in alike}) == 32
    assert {public_key(key) for key in alike} == {public_key(alike[0])}
    (canonical,) = {canonical_key(key) for key in alike}
    assert public_key(X25519PrivateKey.from_private_bytes(canonical)) == public_key(alike[0])


def stream(mask: Mask) -> bytes:
    """Return the beginning of a mask that is added."""
    ring_N = np.zeros(16, np.uint32)
    mask.apply(ring_N)
    return ring_N.tobytes()


def own(context: str, member: int) -> Mask:
    return own_mask(SEED, member, context, undo=False)


def pair(context: str, other: int) -> Mask:
    return pair_mask(ANNA, 0, other, public_key(BERT), context, undo=False)


@pytest.mark.parametrize("mask_of", [own, pair])
def test_a_mask_is_another_one_in_each_attempt_and_for_each_member(
    mask_of: Callable[[str, int], Mask],
) -> None:
    """Two vectors under one mask would give their difference away."""
    places = [(CONTEXT, 1), (CONTEXT, 2), ("cd" * 32, 1)]
    assert len({stream(mask_of(*place)) for place in places}) == 3
    assert stream(mask_of(*places[0])) == stream(mask_of(*places[0]))


def test_a_commitment_is_to_a_seed_in_one_attempt() -> None:
    committed = {
        commitment_of(*one)
        for one in [(CONTEXT, SEED), ("cd" * 32, SEED), (CONTEXT, bytes(32)), (CONTEXT, SEED)]
    }
    assert len(committed) == 3
