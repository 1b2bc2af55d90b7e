"""What a site and the server say to each other in a secure sum, and what binds it together.

Five stages, one request to all sites and one reply of each:

    stage      request                     reply
    advertise  (the terms)                 Advertisement: keys and a commitment, signed
    share      Roster: the advertisements  SealedShares: a pair of shares for every member
    mask       Sealed: all sealed shares   the context (32 bytes), then the packed vector
    agree      Survivors: whose input came Agreement: a signature over the list
    reveal     Agreements: the signatures  Revealed: one share for every member

All but the masked vector is JSON. Every stage has a **context**: a digest of the terms and of all
that was said up to there. Keys are derived under it, signatures made over it, replies bear it.
So two sites that were told different things share no key, and what was said in another round,
attempt or stage, or about another adapter, fits nowhere else.

A member is named by its place in the roster, from 0; the roster is sorted by identity.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from federation.errors import FedgeError
from federation.masking import KEY_BYTES, ring_bits
from federation.secure_keys import SEALED_BYTES, digest, is_signed, is_usable
from federation.settings import Settings
from federation.shamir import SHARE_BYTES

MAX_COHORT = 64
MAX_MESSAGE_BYTES = 4 << 20
"""Of JSON: the sealed shares of 64 members among each other take under 1 MB."""

Hex32 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Signature = Annotated[str, Field(pattern="^[0-9a-f]{128}$")]
Members = Annotated[
    tuple[Annotated[int, Field(ge=0, lt=MAX_COHORT)], ...], Field(max_length=MAX_COHORT)
]
SealedShare = Annotated[str, Field(pattern=f"^[0-9a-f]{{{2 * SEALED_BYTES}}}$")]
ShareOrNone = Annotated[str, Field(pattern=f"^([0-9a-f]{{{2 * SHARE_BYTES}}})?$")]


class SecureSumError(FedgeError):
    """A secure sum that cannot go on, or a message that must not be answered."""


class Stage(StrEnum):
    """The stages of a secure sum, in order."""

    ADVERTISE = "advertise"
    SHARE = "share"
    MASK = "mask"
    AGREE = "agree"
    REVEAL = "reveal"


class Terms(Settings):
    """What is summed, by whom: server and sites each put it together from what they know."""

    run: Annotated[str, Field(pattern="^[0-9a-f]{1,64}$")]
    server_round: Annotated[int, Field(ge=1)]
    attempt: Annotated[int, Field(ge=1)] = 1
    """Of the round: it rises with each new cohort, and after a server that was killed."""
    subject: Hex32
    """``subject_of`` what is trained. Sites that train different things never make one sum: else
    a server could send all but one of them an adapter whose update is 0."""
    cohort: Annotated[int, Field(ge=3, le=MAX_COHORT)]
    """Sites at most. With two, each would read the other's update off the sum."""
    threshold: Annotated[int, Field(ge=2, le=MAX_COHORT)]
    """Sites that each stage needs, and least sites in a sum. Above half the cohort."""
    num_coordinates: Annotated[int, Field(ge=1, le=1 << 34)]
    """Length of the vector."""
    clip: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
    """Largest absolute value of a coordinate. AdamW moves a number by about its learning rate a
    step, so learning_rate * num_steps is a bound that hardly clips."""
    bits: Annotated[int, Field(ge=2, le=32)] = 16
    """Of a coordinate before the sum: it takes 2**bits - 1 levels between -clip and clip."""
    max_examples: Annotated[int, Field(ge=1, le=1_000_000_000)] = 1
    """Largest weight of a site; one with more examples counts as this many. 1 = all count alike."""

    @model_validator(mode="after")
    def _no_two_majorities(self) -> Self:
        if not self.cohort < 2 * self.threshold <= 2 * self.cohort:
            raise ValueError(
                f"threshold is {self.threshold} of a cohort of {self.cohort}: expected more than "
                "half, so that no two parts of the cohort can be told different stories, and at "
                "most all"
            )
        return self

    @property
    def half(self) -> int:
        """Largest integer that a coordinate becomes."""
        return (1 << (self.bits - 1)) - 1

    @property
    def ring_bits(self) -> int:
        """Bits of an element of the sum."""
        return ring_bits(2 * self.half + 1, self.cohort)

    @property
    def num_limbs(self) -> int:
        """Elements that carry the number of examples."""
        return num_limbs(self.max_examples, self.bits)

    @property
    def num_elements(self) -> int:
        """Length of the vector with the number of examples at its end."""
        return self.num_coordinates + self.num_limbs

    @property
    def masked_bytes(self) -> int:
        """Length of a masked vector with its head."""
        return masked_bytes(
            self.num_coordinates,
            cohort=self.cohort,
            bits=self.bits,
            max_examples=self.max_examples,
        )


def num_limbs(max_examples: int, bits: int) -> int:
    """Return the elements that carry a number of examples."""
    return -(-max_examples.bit_length() // (bits - 1))


def masked_bytes(num_coordinates: int, *, cohort: int, bits: int, max_examples: int) -> int:
    """Return the length of a masked vector with its head. Arguments as the fields of `Terms`."""
    width = ring_bits(2**bits - 1, cohort) // 8
    return KEY_BYTES + (num_coordinates + num_limbs(max_examples, bits)) * width


class Advertisement(Settings):
    """One member's keys of one attempt of one round."""

    context: Hex32
    identity: Hex32
    """Ed25519 public key of the site, for life."""
    seal_key: Hex32
    """X25519: shares for this member are sealed with it."""
    mask_key: Hex32
    """X25519: masks with the others are agreed on with it. Its private half is shared."""
    commitment: Hex32
    """To the seed of the member's own mask, which is shared too."""
    signature: Signature


class Request(Settings):
    """Base of what the server asks after the first stage."""

    session: Hex32
    """``session_of`` the terms."""


class Roster(Request):
    """Who takes part."""

    advertisements: Annotated[tuple[Advertisement, ...], Field(max_length=MAX_COHORT)]


class SealedShares(Settings):
    """One member's shares, one for each of the roster in its order, its own included."""

    context: Hex32
    sealed: Annotated[tuple[SealedShare, ...], Field(max_length=MAX_COHORT)]


class Sealed(Request):
    """The sealed shares of all who sent theirs."""

    senders: Members
    sealed: Annotated[tuple[tuple[SealedShare, ...], ...], Field(max_length=MAX_COHORT)]
    """In the order of ``senders``."""


class Survivors(Request):
    """Whose masked vectors came, and are summed."""

    members: Members


class Agreement(Settings):
    """A member's signature over the survivors and all that was before."""

    context: Hex32
    signature: Signature


class Agreements(Request):
    """Who signed that they know one and the same list of survivors."""

    signers: Members
    signatures: Annotated[tuple[Signature, ...], Field(max_length=MAX_COHORT)]


class Revealed(Settings):
    """For each of the senders in their order: a share of its seed if it survived, else of its key.

    "" where the sender's seal could not be opened. The form has no room for both.
    """

    context: Hex32
    shares: Annotated[tuple[ShareOrNone, ...], Field(max_length=MAX_COHORT)]


class Opening(Settings):
    """All that was said up to the stage ``reveal``, from which a killed server goes on."""

    terms: Terms
    sites: tuple[str, ...]
    """What the server calls each member of the roster, in its order."""
    roster: Roster
    sealed: Sealed
    survivors: Survivors
    agreements: Agreements


Message = TypeVar("Message", bound=Settings)
Asked = TypeVar("Asked", bound=Request)


def write(message: Settings) -> bytes:
    """Return a message as JSON, the same bytes for the same content."""
    return message.model_dump_json().encode()


def read(kind: type[Message], raw: bytes | memoryview) -> Message:
    """Return a message that was checked field by field.

    Raises:
        SecureSumError: It is none of that kind.
    """
    if len(raw) > MAX_MESSAGE_BYTES:
        raise SecureSumError(
            f"{kind.__name__} has {len(raw)} bytes: expected at most {MAX_MESSAGE_BYTES}"
        )
    try:
        return kind.model_validate_json(bytes(raw))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise SecureSumError(
            f"{kind.__name__}{f', {place}' if place else ''}: {first['msg'][:200]}"
        ) from None


def read_request(kind: type[Asked], raw: bytes, terms: Terms) -> Asked:
    """Return a request of the attempt that has these terms.

    Raises:
        SecureSumError: It is none of that kind, or another attempt's.
    """
    request = read(kind, raw)
    if request.session != session_of(terms):
        raise SecureSumError(
            f"{kind.__name__} belongs to another attempt than {terms.attempt} of round "
            f"{terms.server_round}, or to other terms"
        )
    return request


def subject_of(adapter: str, trains: str, training: Mapping[str, object]) -> str:
    """Return the digest of what a round trains.

    Args:
        adapter: Content digest of the adapter that was sent.
        trains: The factor.
        training: The run's training settings, JSON values.
    """
    settings = json.dumps(training, sort_keys=True)
    return digest("subject", adapter.encode(), trains.encode(), settings.encode()).hex()


def session_of(terms: Terms) -> str:
    """Return the digest of the terms: the name of one attempt of one round."""
    return digest("terms", write(terms)).hex()


def roster_context(roster: Roster) -> str:
    """Return the context under which shares are sealed."""
    return digest("roster", write(roster)).hex()


def sealed_context(roster: Roster, sealed: Sealed) -> str:
    """Return the context under which masks are derived."""
    return digest("sealed", roster_context(roster).encode(), write(sealed)).hex()


def survivors_context(roster: Roster, sealed: Sealed, survivors: Survivors) -> str:
    """Return what the survivors sign, and under which shares are revealed."""
    return digest("survivors", sealed_context(roster, sealed).encode(), write(survivors)).hex()


def advertised_bytes(advertisement: Advertisement) -> bytes:
    """Return what the signature of an advertisement is made over."""
    unsigned = advertisement.model_copy(update={"signature": ""})
    return digest("advertise", write(unsigned))


def agreed_bytes(context: str) -> bytes:
    """Return what an agreement is signed over, of a context of ``survivors_context``."""
    return digest("agree", context.encode())


def check_roster(terms: Terms, roster: Roster) -> None:
    """Check that a roster has enough members, no key twice, and that every member signed.

    Raises:
        SecureSumError: It has not.
    """
    members = roster.advertisements
    if not terms.threshold <= len(members) <= terms.cohort:
        raise SecureSumError(
            f"the roster has {len(members)} members: expected {terms.threshold} (the threshold) to "
            f"{terms.cohort} (the cohort)"
        )
    identities = [member.identity for member in members]
    if identities != sorted(set(identities)):
        raise SecureSumError("the roster names a member twice, or is not sorted by identity")
    keys = [key for member in members for key in (member.seal_key, member.mask_key)]
    if len(set(keys)) < len(keys):
        raise SecureSumError("a key stands twice in the roster: each member makes two of its own")
    for place, member in enumerate(members):
        check_advertisement(terms, member, f"member {place} of the roster")


def check_advertisement(terms: Terms, advertisement: Advertisement, who: str) -> None:
    """Check that keys are signed, for these terms, and usable.

    Raises:
        SecureSumError: They are not.
    """
    if advertisement.context != session_of(terms):
        raise SecureSumError(
            f"{who} has other terms: another round, attempt, adapter, length, threshold or clip"
        )
    if not is_signed(
        advertisement.identity, advertisement.signature, advertised_bytes(advertisement)
    ):
        raise SecureSumError(f"{who}: its identity did not sign these keys")
    if not (is_usable(advertisement.seal_key) and is_usable(advertisement.mask_key)):
        raise SecureSumError(f"{who}: a key of low order, with which nothing is secret")


def check_members(members: Sequence[int], among: Sequence[int], least: int, what: str) -> None:
    """Check a list of members: sorted, each once, known, and not too few.

    Raises:
        SecureSumError: It is not so.
    """
    if list(members) != sorted(set(members)) or not set(members) <= set(among):
        raise SecureSumError(f"{what} are {list(members)}: expected a sorted part of {list(among)}")
    if len(members) < least:
        raise SecureSumError(f"{len(members)} {what}: expected at least {least}")
