"""Secure aggregation, the server's half: it learns the sum of the sites' updates and none of them.

After Bonawitz et al. (CCS 2017, doi:10.1145/3133956.3133982). Every two sites agree on a mask that
one adds and the other subtracts, so that masks vanish in the sum; every site adds a mask of its
own besides. What is needed to take a mask out is shared among the cohort (Shamir): of a site that
survived, the seed of its own mask; of one that dropped out, the key of its masks with the others.
Never both of one site: that would open its update, and no site answers both.

**Curious server, honest protocol.** It learns the sum over the sites whose masked vector came (at
least the threshold t of n), how many examples they have together, and who took part. Below t at
any stage the attempt ends and what the server holds is uniformly random to it.

**Active server** (it lies about who dropped out, forges, replays). It still learns one sum of at
least t sites, or nothing: keys are signed by identities that the sites' policies list, and before
a site reveals a share it sees t signatures of sites over the same list of survivors. It can end
the round, leave sites out, and choose who takes part. *Without the list of identities in the policy
it can play the other sites itself, and then it opens the update of the one that is real.* It cannot
send sites different adapters or settings and keep one sum: they are in the terms.

**Sites that collude with the server** (c of n) subtract what they sent: the others are hidden among
at least t - c. They must be fewer than 2t - n, else the cohort can be split and told two stories;
two thirds and one (federation.settings.default_threshold) bears any third. A site that lies opens
nothing; what it can spoil, and what the sum itself says: docs/decisions/0011-secure-sums.md.

*The whole graph, not the sparse one of SecAgg+* (Bell et al., CCS 2020): with up to 64 sites each
expands at most 63 masks at several GB/s, and a sparse graph buys that for a chance of failure.

*The number of examples rides in the sum*, as further numbers of the vector: sums of w * x and of w
give the weighted mean, whoever drops out, and nobody's w is told.

`SecureSum` is a state machine: requests go out, replies come in, `close` ends a stage. It touches
no network, disk or clock. The site's half: client.secure_sum. Messages: federation.secure_messages.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, NoReturn, Self

import numpy as np

from federation.masking import KEY_BYTES, ring_dtype, unpack
from federation.secure_keys import is_signed
from federation.secure_messages import (
    Advertisement,
    Agreement,
    Agreements,
    Opening,
    Revealed,
    Roster,
    Sealed,
    SealedShares,
    SecureSumError,
    Stage,
    Survivors,
    Terms,
    agreed_bytes,
    check_advertisement,
    read,
    roster_context,
    sealed_context,
    session_of,
    survivors_context,
    write,
)
from federation.unmasking import masks_left, recover
from federation.weighted_sum import WeightedSum, plausible_sum

if TYPE_CHECKING:
    from federation.masking import Ring


_PIECE = 1 << 16
"""Elements that are unpacked at a time."""


class SecureSum:
    """One attempt at the sum of one round."""

    def __init__(self, terms: Terms, sites: Sequence[str]) -> None:
        """Begin with the stage ``advertise``.

        Args:
            terms: What is summed.
            sites: Who is asked: up to ``terms.cohort`` names, each once.

        Raises:
            ValueError: Too many or too few sites, or a name twice.
        """
        if len(set(sites)) < len(sites) or not terms.threshold <= len(sites) <= terms.cohort:
            raise ValueError(
                f"{len(sites)} sites: expected {terms.threshold} to {terms.cohort}, each once"
            )
        self.terms = terms
        self.stage: Stage | None = Stage.ADVERTISE
        """What replies are taken for; None when all is over."""
        self.waiting: set[str] = set(sites)
        """Who has still to answer in this stage."""
        self.misfits: tuple[tuple[str, str], ...] = ()
        """After the last stage: who showed a share that is not of whose secret."""
        self.doubted: frozenset[str] = frozenset()
        """After the last stage: who is at odds with most of the others (federation.unmasking)."""
        self.suspects: frozenset[str] = frozenset()
        """After a last stage that opened no sum: the sites of which one or more are to blame."""
        self._session = session_of(terms)
        self._contexts = {Stage.ADVERTISE: self._session}
        self._advertisements: dict[str, Advertisement] = {}
        self._places: dict[str, int] = {}
        self._roster = Roster(session=self._session, advertisements=())
        self._sealed_by: dict[int, tuple[str, ...]] = {}
        self._sealed = Sealed(session=self._session, senders=(), sealed=())
        self._elements_N: Ring = np.zeros(0, ring_dtype(terms.ring_bits))
        self._summed: set[int] = set()
        self._survivors = Survivors(session=self._session, members=())
        self._signatures: dict[int, str] = {}
        self._revealed: dict[int, tuple[str, ...]] = {}
        self._sum: WeightedSum | None = None

    def request(self) -> bytes:
        """Return what every site in ``waiting`` is sent in this stage; "" at the first.

        What a site is to advertise for are the terms, which it puts together itself.

        Raises:
            SecureSumError: All is over.
        """
        requests: dict[Stage, Callable[[], bytes]] = {
            Stage.ADVERTISE: lambda: b"",
            Stage.SHARE: lambda: write(self._roster),
            Stage.MASK: lambda: write(self._sealed),
            Stage.AGREE: lambda: write(self._survivors),
            Stage.REVEAL: lambda: write(self._agreements()),
        }
        return requests[self._current()]()

    def take(self, site: str, reply: bytes | memoryview) -> None:
        """Take in one site's reply to the current stage; its bytes are not kept.

        A site whose reply is no good has dropped out.

        Raises:
            SecureSumError: The reply is no good, or the site was not waited for.
        """
        takes: dict[Stage, Callable[[str, bytes | memoryview], None]] = {
            Stage.ADVERTISE: self._take_advertisement,
            Stage.SHARE: self._take_shares,
            Stage.MASK: self._take_masked,
            Stage.AGREE: self._take_agreement,
            Stage.REVEAL: self._take_revealed,
        }
        stage = self._current()
        if site not in self.waiting:
            raise SecureSumError(f"site {site} is not waited for in stage {stage}")
        self.waiting.discard(site)
        takes[stage](site, reply)

    def drop(self, site: str) -> None:
        """Wait no longer for a site in this stage: it has dropped out."""
        self.waiting.discard(site)

    @property
    def revealed(self) -> set[str]:
        """The sites that showed their shares."""
        return {site for site, place in self._places.items() if place in self._revealed}

    @property
    def identities(self) -> dict[str, str]:
        """What the sites that advertised call themselves, for life."""
        return {site: said.identity for site, said in self._advertisements.items()}

    @property
    def num_came(self) -> int:
        """How many good replies the current stage has."""
        came: dict[Stage, Collection[object]] = {
            Stage.ADVERTISE: self._advertisements,
            Stage.SHARE: self._sealed_by,
            Stage.MASK: self._summed,
            Stage.AGREE: self._signatures,
            Stage.REVEAL: self._revealed,
        }
        return len(came[self._current()])

    def close(self) -> None:
        """End the current stage with the replies there are, and begin the next one.

        Raises:
            SecureSumError: They are fewer than the threshold, or do not open the sum. All is
                over then.
        """
        stage, terms = self._current(), self.terms
        if (count := self.num_came) < terms.threshold:
            if stage == Stage.REVEAL:
                signed_it = {self._members[place] for place in self._signatures}
                self.suspects = frozenset(signed_it - self.revealed)
            way_out = (
                "those that revealed refuse this round from now on, so go on to the next one"
                if stage == Stage.REVEAL
                else "make another attempt with the sites that answer"
            )
            self._abort(
                f"{count} sites answered in stage {stage}, {terms.threshold} are needed; "
                f"no update and no sum was opened: {way_out}"
            )
        closes: dict[Stage, Callable[[], None]] = {
            Stage.ADVERTISE: self._close_advertise,
            Stage.SHARE: self._close_share,
            Stage.MASK: self._close_mask,
            Stage.AGREE: self._close_agree,
            Stage.REVEAL: self._close_reveal,
        }
        closes[stage]()

    @property
    def result(self) -> WeightedSum:
        """The sum.

        Raises:
            SecureSumError: There is none, or not yet.
        """
        if self._sum is None:
            raise SecureSumError("the sum is not open")
        return self._sum

    def opening(self) -> Opening:
        """Return what the last stage goes on from after a kill, beside the masked sum.

        Nothing in it is secret from the server. Whoever goes on asks the very same request, which a
        site answers with the very same shares.

        Raises:
            ValueError: The stage is not ``reveal``.
        """
        if self.stage != Stage.REVEAL:
            raise ValueError(f"the stage is {self.stage}: expected {Stage.REVEAL}")
        return Opening(
            terms=self.terms,
            sites=tuple(self._members),
            roster=self._roster,
            sealed=self._sealed,
            survivors=self._survivors,
            agreements=self._agreements(),
        )

    @property
    def masked_sum(self) -> Ring:
        """The sum with all masks in it."""
        return self._elements_N

    @classmethod
    def reopened(cls, opening: Opening, masked_sum_N: Ring) -> Self:
        """Go on at the stage ``reveal`` with the very sets that it began with."""
        one = cls(opening.terms, opening.sites)
        one._places = {site: place for place, site in enumerate(opening.sites)}
        one._roster, one._sealed, one._survivors = (
            opening.roster,
            opening.sealed,
            opening.survivors,
        )
        one._elements_N, one._summed = masked_sum_N, set(opening.survivors.members)
        agreements = opening.agreements
        one._signatures = dict(zip(agreements.signers, agreements.signatures, strict=True))
        one._contexts[Stage.MASK] = sealed_context(opening.roster, opening.sealed)
        agreed = survivors_context(opening.roster, opening.sealed, opening.survivors)
        one._begin(Stage.REVEAL, one._signatures, agreed)
        return one

    def _agreements(self) -> Agreements:
        signers = tuple(sorted(self._signatures))
        return Agreements(
            session=self._session,
            signers=signers,
            signatures=tuple(self._signatures[signer] for signer in signers),
        )

    def _current(self) -> Stage:
        if self.stage is None:
            raise SecureSumError("this attempt is over: begin another one")
        return self.stage

    def _abort(self, reason: str) -> NoReturn:
        self.stage, self.waiting = None, set()
        # What came so far is of no use to anybody, so it is not kept.
        self._elements_N = self._elements_N[:0].copy()
        raise SecureSumError(f"secure sum of round {self.terms.server_round}: {reason}")

    def _begin(self, stage: Stage, members: Collection[int], context: str) -> None:
        """Wait for these members' replies, which are to bear this context."""
        self.stage = stage
        self.waiting = {site for site, place in self._places.items() if place in members}
        self._contexts[stage] = context

    def _take_advertisement(self, site: str, reply: bytes | memoryview) -> None:
        advertisement = read(Advertisement, reply)
        check_advertisement(self.terms, advertisement, f"site {site}")
        known = self._advertisements.values()
        taken = {key for one in known for key in (one.identity, one.seal_key, one.mask_key)}
        keys = (advertisement.identity, advertisement.seal_key, advertisement.mask_key)
        if len({*keys, *taken}) < len(keys) + len(taken):
            raise SecureSumError(f"site {site} advertises an identity or a key of another site")
        self._advertisements[site] = advertisement

    def _close_advertise(self) -> None:
        ordered = sorted(self._advertisements.items(), key=lambda item: item[1].identity)
        self._places = {site: place for place, (site, _) in enumerate(ordered)}
        self._roster = Roster(
            session=self._session, advertisements=tuple(one for _, one in ordered)
        )
        self._begin(Stage.SHARE, range(len(ordered)), roster_context(self._roster))

    def _take_shares(self, site: str, reply: bytes | memoryview) -> None:
        shares = read(SealedShares, reply)
        self._check_context(site, shares.context)
        if len(shares.sealed) != len(self._places):
            raise SecureSumError(
                f"site {site} sent {len(shares.sealed)} sealed shares: expected one for each of "
                f"the {len(self._places)} members"
            )
        self._sealed_by[self._places[site]] = shares.sealed

    def _close_share(self) -> None:
        senders = tuple(sorted(self._sealed_by))
        self._sealed = Sealed(
            session=self._session,
            senders=senders,
            sealed=tuple(self._sealed_by[sender] for sender in senders),
        )
        self._elements_N = np.zeros(self.terms.num_elements, ring_dtype(self.terms.ring_bits))
        self._begin(Stage.MASK, senders, sealed_context(self._roster, self._sealed))

    def _take_masked(self, site: str, reply: bytes | memoryview) -> None:
        """Add one masked vector: the order of arrival changes nothing in a ring."""
        expected = self.terms.masked_bytes
        if len(reply) != expected:
            raise SecureSumError(
                f"site {site} sent a masked vector of {len(reply)} bytes: expected {expected}"
            )
        packed = memoryview(reply)
        self._check_context(site, packed[:KEY_BYTES].hex())
        width = self.terms.ring_bits // 8
        for start in range(0, self.terms.num_elements, _PIECE):
            piece_N = self._elements_N[start : start + _PIECE]
            first = KEY_BYTES + start * width
            piece_N += unpack(packed[first : first + len(piece_N) * width], self.terms.ring_bits)
        self._summed.add(self._places[site])

    def _close_mask(self) -> None:
        self._survivors = Survivors(session=self._session, members=tuple(sorted(self._summed)))
        context = survivors_context(self._roster, self._sealed, self._survivors)
        self._begin(Stage.AGREE, self._survivors.members, context)

    def _take_agreement(self, site: str, reply: bytes | memoryview) -> None:
        agreement, place = read(Agreement, reply), self._places[site]
        self._check_context(site, agreement.context)
        identity = self._roster.advertisements[place].identity
        content = agreed_bytes(self._contexts[Stage.AGREE])
        if not is_signed(identity, agreement.signature, content):
            raise SecureSumError(f"site {site} did not sign the list of survivors")
        self._signatures[place] = agreement.signature

    def _close_agree(self) -> None:
        self._begin(Stage.REVEAL, self._signatures, self._contexts[Stage.AGREE])

    def _take_revealed(self, site: str, reply: bytes | memoryview) -> None:
        revealed = read(Revealed, reply)
        self._check_context(site, revealed.context)
        if len(revealed.shares) != len(self._sealed.senders):
            raise SecureSumError(
                f"site {site} revealed {len(revealed.shares)} shares: expected one for each of the "
                f"{len(self._sealed.senders)} members that shared"
            )
        self._revealed[self._places[site]] = revealed.shares

    def _close_reveal(self) -> None:
        """Take every mask out of the sum, one at a time, so that memory stays flat."""
        members, senders, summed = self._members, self._sealed.senders, self._summed
        secrets = recover(self._roster, senders, summed, self._revealed, self.terms.threshold)
        self.misfits = tuple((members[one], members[two]) for one, two in sorted(secrets.misfits))
        self.doubted = frozenset(members[place] for place in secrets.doubted)
        if secrets.missing:
            self.suspects = frozenset(members[place] for place in senders)
            missing = ", ".join(sorted(members[place] for place in secrets.missing))
            self._abort(
                f"the secret of site {missing} cannot be put together from the shares that "
                f"{len(self._revealed)} sites showed: it, or a holder of its shares, lied"
            )
        for mask in masks_left(secrets.found, summed, self._roster, self._contexts[Stage.MASK]):
            mask.apply(self._elements_N)
        names = sorted(members[place] for place in summed)
        try:
            self._sum = plausible_sum(self.terms, names, self._elements_N)
        except SecureSumError as error:
            self.suspects = frozenset(names)
            self._abort(str(error))
        self.stage, self.waiting = None, set()

    @property
    def _members(self) -> list[str]:
        """The sites by their place in the roster."""
        return sorted(self._places, key=self._places.__getitem__)

    def _check_context(self, site: str, said: str) -> None:
        if said != self._contexts[self._current()]:
            raise SecureSumError(
                f"site {site} answers something else than was asked: another attempt, round or list"
            )
