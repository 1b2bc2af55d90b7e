"""Secure aggregation, the site's half: what it answers in each stage, and what it refuses.

Pure: a stage takes what the site holds of an attempt (`Held`) and a request, and gives the `Held`
with the answer in it. client.secure_sum_state puts that on disk before the answer leaves. Keys and
seeds come from the system's secure source and from nowhere else: one that an argument could choose
could be chosen twice.

A site refuses an attempt below its policy's cohort or with members that its policy does not list; a
roster that does not bear its own keys, or a key twice; a list of survivors that is too short or
names one that never shared; to reveal anything before enough members signed that very list; and
in each stage a second, different request. The threat model: federation.secure_sum.

Shape letters: N numbers of a piece of the vector.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from pydantic import Field

from federation import shamir
from federation.masking import Mask, pack, quantize, ring_dtype
from federation.secure_keys import (
    canonical_key,
    commitment_of,
    is_signed,
    own_mask,
    pair_mask,
    public_key,
    seal,
    unseal,
)
from federation.secure_messages import (
    Advertisement,
    Agreement,
    Agreements,
    Hex32,
    Revealed,
    Roster,
    Sealed,
    SealedShares,
    SecureSumError,
    Stage,
    Survivors,
    Terms,
    advertised_bytes,
    agreed_bytes,
    check_members,
    check_roster,
    read_request,
    roster_context,
    sealed_context,
    session_of,
    survivors_context,
    write,
)
from federation.settings import Settings

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Membership:
    """This site as a member of cohorts, and what its policy asks of them."""

    identity: Ed25519PrivateKey
    min_cohort: int
    """Least sites in a cohort, and in a sum that is opened."""
    identities: frozenset[str] = frozenset()
    """Ed25519 public keys, in hex, of the sites that may be in a cohort with this one. Empty = any:
    then the server can play the others (federation.secure_sum)."""


class Secrets(Settings):
    """What nobody else may know while an attempt lasts."""

    # Not in the repr: that may get into a log.
    seal_key: Annotated[Hex32, Field(repr=False)]
    mask_key: Annotated[Hex32, Field(repr=False)]
    seed: Annotated[Hex32, Field(repr=False)]


class Held(Settings):
    """What a site holds of one attempt."""

    terms: Terms
    secrets: Secrets | None
    """None once the shares of the others are revealed: they are not needed any more."""
    requests: dict[Stage, str]
    """What was asked, by stage."""
    answers: dict[Stage, str]
    """What was answered; of the masked vector, how many numbers were clipped."""
    trained: str = ""
    """Digest of what decides the update, as this site computes it; "" = ``terms.subject``."""


def advertise(terms: Terms, member: Membership) -> Held:
    """Return a new attempt with new keys, and their advertisement as its first answer.

    Raises:
        SecureSumError: The cohort is smaller than the policy's.
    """
    check_cohort(terms, member)
    seal_key, mask_key = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    seed, session = secrets.token_bytes(shamir.SECRET_BYTES), session_of(terms)
    unsigned = Advertisement.model_construct(
        context=session,
        identity=_identity(member),
        seal_key=public_key(seal_key),
        mask_key=public_key(mask_key),
        commitment=commitment_of(session, seed),
        signature="",
    )
    signature = member.identity.sign(advertised_bytes(unsigned)).hex()
    held = Held(
        terms=terms,
        secrets=Secrets(
            seal_key=seal_key.private_bytes_raw().hex(),
            mask_key=mask_key.private_bytes_raw().hex(),
            seed=seed.hex(),
        ),
        requests={},
        answers={},
    )
    advertisement = unsigned.model_copy(update={"signature": signature})
    return _with(held, Stage.ADVERTISE, "", write(advertisement).decode())


def check_cohort(terms: Terms, member: Membership) -> None:
    """Return unless the cohort is smaller than the policy's.

    Raises:
        SecureSumError: It is.
    """
    if terms.cohort < member.min_cohort:
        raise SecureSumError(
            f"the cohort is {terms.cohort}: this site's policy asks for {member.min_cohort} or more"
        )


def check_policy(held: Held, member: Membership) -> None:
    """Return unless a policy that changed since the roster came would refuse that roster now.

    Raises:
        SecureSumError: It would.
    """
    if Stage.SHARE in held.requests:
        _check_policy(_roster(held), member)


def _check_policy(roster: Roster, member: Membership) -> None:
    members, listed = roster.advertisements, member.identities
    if len(members) < member.min_cohort:
        raise SecureSumError(
            f"{len(members)} sites take part: this site's policy asks for {member.min_cohort} or "
            "more"
        )
    strangers = [one.identity for one in members if listed and one.identity not in listed]
    if strangers:
        raise SecureSumError(
            f"identity {strangers[0][:16]}… is not one of the {len(listed)} that this site's "
            "policy lists"
        )


def share(held: Held, request: bytes, member: Membership) -> Held:
    """Answer the roster with shares of this site's secrets, sealed to each member.

    Raises:
        SecureSumError: The roster is not one that this site takes part in.
    """
    roster = read_request(Roster, request, held.terms)
    check_roster(held.terms, roster)
    members = roster.advertisements
    if held.answers[Stage.ADVERTISE] not in [write(one).decode() for one in members]:
        raise SecureSumError("the roster does not hold the keys that this site advertised")
    _check_policy(roster, member)
    own, context, place = _secrets(held), roster_context(roster), _place(roster, member)
    threshold, private = held.terms.threshold, _private(own.seal_key)
    shares = zip(
        shamir.split(canonical_key(_private(own.mask_key)), threshold, len(members)),
        shamir.split(bytes.fromhex(own.seed), threshold, len(members)),
        strict=True,
    )
    sealed = tuple(
        seal(private, peer.seal_key, context, place, receiver, key_share + seed_share)
        for receiver, (peer, (key_share, seed_share)) in enumerate(
            zip(members, shares, strict=True)
        )
    )
    answer = write(SealedShares(context=context, sealed=sealed)).decode()
    return _with(held, Stage.SHARE, request.decode(), answer)


@dataclass(frozen=True)
class MaskedVector:
    """A masked vector in the making."""

    head: bytes
    pieces: Iterator[tuple[bytes, int]]
    """Packed elements, and how many numbers were clipped in them."""


def mask(
    held: Held,
    request: bytes,
    member: Membership,
    values: Iterable[NDArray[np.floating[Any]]],
    num_examples: int,
    rng: np.random.Generator,
) -> MaskedVector:
    """Return this site's vector as it leaves, a piece of it in memory at a time.

    Whoever calls notes it with ``masked`` before the first byte leaves.

    Args:
        held: With the answer to the roster.
        request: The sealed shares of all.
        member: This site.
        values: Pieces of the vector, one-dimensional, ``terms.num_coordinates`` numbers together.
        num_examples: Weight of this site, at least 1.
        rng: Draws how numbers are rounded.

    Raises:
        SecureSumError: Too few shared, or this site is not among them; while the pieces are drawn:
            the vector is too long or too short, or holds NaN or infinity.
    """
    terms, roster = held.terms, _roster(held)
    sealed, place = read_request(Sealed, request, terms), _place(roster, member)
    everyone = range(len(roster.advertisements))
    least = max(terms.threshold, member.min_cohort)
    check_members(sealed.senders, everyone, least, "members that shared")
    if len(sealed.sealed) != len(sealed.senders) or any(
        len(shares) != len(everyone) for shares in sealed.sealed
    ):
        raise SecureSumError("the sealed shares are not one for each member of each that shared")
    if place not in sealed.senders:
        raise SecureSumError("this site's shares are not among the sealed ones")
    if num_examples < 1:
        raise SecureSumError(f"num_examples is {num_examples}: expected at least 1")
    own, context = _secrets(held), sealed_context(roster, sealed)
    private = _private(own.mask_key)
    masks = [own_mask(bytes.fromhex(own.seed), place, context, undo=False)]
    masks += [
        pair_mask(private, place, other, roster.advertisements[other].mask_key, context, undo=False)
        for other in sealed.senders
        if other != place
    ]
    weight = min(num_examples, terms.max_examples)
    return MaskedVector(bytes.fromhex(context), _masked_pieces(terms, masks, values, weight, rng))


def _masked_pieces(
    terms: Terms,
    masks: list[Mask],
    values: Iterable[NDArray[np.floating[Any]]],
    weight: int,
    rng: np.random.Generator,
) -> Iterator[tuple[bytes, int]]:
    dtype, count = ring_dtype(terms.ring_bits), 0

    def packed(integers_N: NDArray[np.int64]) -> bytes:
        ring_N = integers_N.astype(dtype)
        for one in masks:
            one.apply(ring_N)
        return pack(ring_N, terms.ring_bits)

    for piece_N in values:
        count += len(piece_N)
        if count > terms.num_coordinates or not np.isfinite(piece_N).all():
            break
        integers_N, num_clipped = quantize(
            piece_N,
            clip=terms.clip,
            half=terms.half,
            share=weight / terms.max_examples,
            rng=rng,
        )
        yield packed(integers_N), num_clipped
    else:
        if count == terms.num_coordinates:
            limbs = [weight >> (n * (terms.bits - 1)) & terms.half for n in range(terms.num_limbs)]
            yield packed(np.array(limbs, np.int64)), 0
            return
    raise SecureSumError(
        f"the update has NaN or infinity in it, or not {terms.num_coordinates} numbers: lower the "
        "learning rate, or look at what was trained"
    )


def masked(held: Held, request: bytes, num_clipped: int) -> Held:
    """Return the attempt after its masked vector was made: there will be no other one."""
    return _with(held, Stage.MASK, request.decode(), str(num_clipped))


def agree(held: Held, request: bytes, member: Membership) -> Held:
    """Answer the list of survivors with a signature over it and all that was before.

    Raises:
        SecureSumError: The list is too short, lacks this site, or names one that never shared.
    """
    roster, sealed, survivors = _read_lists(held, request)
    least = max(held.terms.threshold, member.min_cohort)
    check_members(survivors.members, sealed.senders, least, "survivors")
    if _place(roster, member) not in survivors.members:
        raise SecureSumError("this site is not among the survivors, and it did send its vector")
    context = survivors_context(roster, sealed, survivors)
    signature = member.identity.sign(agreed_bytes(context)).hex()
    answer = write(Agreement(context=context, signature=signature)).decode()
    return _with(held, Stage.AGREE, request.decode(), answer)


def reveal(held: Held, request: bytes, member: Membership) -> Held:
    """Answer enough signatures with one share of every member, and forget this site's secrets.

    Of a survivor it is a share of its own mask's seed, of one that dropped out a share of its key.

    Raises:
        SecureSumError: Fewer than the threshold signed, or a signature is over another list.
    """
    roster, sealed, survivors = _read_lists(held, held.requests[Stage.AGREE].encode())
    agreements = read_request(Agreements, request, held.terms)
    check_members(agreements.signers, survivors.members, held.terms.threshold, "signers")
    context = survivors_context(roster, sealed, survivors)
    if len(agreements.signatures) != len(agreements.signers) or not all(
        is_signed(roster.advertisements[signer].identity, signature, agreed_bytes(context))
        for signer, signature in zip(agreements.signers, agreements.signatures, strict=True)
    ):
        raise SecureSumError(
            "a signature is not over the list of survivors that this site was sent"
        )
    place, private = _place(roster, member), _private(_secrets(held).seal_key)
    shares = []
    for sender, theirs in zip(sealed.senders, sealed.sealed, strict=True):
        peer_key = roster.advertisements[sender].seal_key
        plain = unseal(private, peer_key, roster_context(roster), sender, place, theirs[place])
        key_share, seed_share = (
            (plain or b"")[: shamir.SHARE_BYTES],
            (plain or b"")[shamir.SHARE_BYTES :],
        )
        shares.append((seed_share if sender in survivors.members else key_share).hex())
    answer = write(Revealed(context=context, shares=tuple(shares))).decode()
    return _with(held, Stage.REVEAL, request.decode(), answer).model_copy(update={"secrets": None})


ANSWERS: dict[Stage, Callable[[Held, bytes, Membership], Held]] = {
    Stage.SHARE: share,
    Stage.AGREE: agree,
    Stage.REVEAL: reveal,
}
"""The stages that are answered with a message; ``mask`` is answered with a vector."""


def is_repeated(held: Held, stage: Stage, request: bytes) -> bool:
    """Return whether a stage was answered before, with the same request; False if it is next.

    Raises:
        SecureSumError: It was answered to another request, or is not what comes next.
    """
    if stage in held.requests:
        if held.requests[stage].encode() != request:
            raise SecureSumError(
                f"stage {stage} was answered to another request: a site answers each stage of an "
                "attempt once"
            )
        return True
    done = len(held.requests)
    if list(Stage)[done] != stage:
        raise SecureSumError(f"stage {stage} is asked, and {list(Stage)[done]} comes next")
    return False


def _with(held: Held, stage: Stage, request: str, answer: str) -> Held:
    return held.model_copy(
        update={
            "requests": held.requests | {stage: request},
            "answers": held.answers | {stage: answer},
        }
    )


def _read_lists(held: Held, survivors: bytes) -> tuple[Roster, Sealed, Survivors]:
    sealed = read_request(Sealed, held.requests[Stage.MASK].encode(), held.terms)
    return _roster(held), sealed, read_request(Survivors, survivors, held.terms)


def _roster(held: Held) -> Roster:
    return read_request(Roster, held.requests[Stage.SHARE].encode(), held.terms)


def _secrets(held: Held) -> Secrets:
    if held.secrets is None:  # only after the last stage, which nothing follows
        raise SecureSumError("this attempt is over, and its keys are forgotten")
    return held.secrets


def _private(key: str) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(bytes.fromhex(key))


def _identity(member: Membership) -> str:
    return member.identity.public_key().public_bytes_raw().hex()


def _place(roster: Roster, member: Membership) -> int:
    """Return where in the roster this site stands; ``share`` has checked that it does."""
    return [one.identity for one in roster.advertisements].index(_identity(member))
