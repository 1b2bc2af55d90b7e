"""From the shares that members showed to the masks that are in a sum.

Of every member that dealt shares one secret is needed: of one whose vector is in the sum the seed
of its own mask, of one that dropped out the key of its masks with the others. A secret is
what its member committed to, or it is none; wrong shares among those that were shown are found
(federation.shamir) and said.

**Who lied is not always to be told.** A share that does not fit may be the fault of who showed it
or of who dealt it, and no third one can look into the seal. So the pair of the two is noted. Where
e members lie, an honest one is at odds with at most e: who is at odds with more is doubted, for the
fewest liars that there may be. One liar alone so never brings another member into doubt. Two that
agree can: both deal a third wrong shares, or both change theirs (federation.shamir). So a doubt
costs a site its turn and nothing else. A secret that no shares give is its dealer's fault where
shares can be spared and most of the secrets are there; where just as many shares came as are
needed, any holder of one could have done it, and nobody is doubted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from federation.masking import Mask
from federation.secure_keys import canonical_key, commitment_of, own_mask, pair_mask, public_key
from federation.secure_messages import Roster
from federation.shamir import MAX_TRIES, reconstruct

_MAX_SEARCHES = 8
"""Secrets for which sets of shares are tried in vain: after so many the sum is lost anyway."""


@dataclass(frozen=True)
class Secrets:
    """What the shares of a cohort give. Members by their place in the roster."""

    found: Mapping[int, bytes]
    """Of every dealer whose secret could be put together."""
    missing: tuple[int, ...]
    """Dealers whose secrets could not."""
    misfits: frozenset[tuple[int, int]]
    """Holder and dealer of shares that are not of the dealer's secret."""
    spare: int
    """By how many more shares came than are needed."""

    @property
    def doubted(self) -> frozenset[int]:
        """Who is at odds with most: the liar, if there is one and it can be told.

        Of more liars perhaps some, and if they agree perhaps another in their stead.
        """
        # A set: one liar can fall out with the same member as its holder and as its dealer.
        pairs = {frozenset(pair) for pair in self.misfits}
        at_odds = Counter(member for pair in pairs for member in pair)
        num_liars, doubted = 0, set(at_odds)
        while len(doubted) > num_liars:
            num_liars += 1
            doubted = {member for member, count in at_odds.items() if count > num_liars}
        doubted |= {holder for holder, dealer in self.misfits if holder == dealer}
        num_dealers = len(self.found) + len(self.missing)
        if self.spare > 0 and 2 * len(self.missing) < num_dealers:
            doubted |= set(self.missing)
        return frozenset(doubted)


def recover(
    roster: Roster,
    dealers: Collection[int],
    summed: Collection[int],
    revealed: Mapping[int, tuple[str, ...]],
    threshold: int,
) -> Secrets:
    """Return what the shares give of each dealer.

    Args:
        roster: The members, with what they committed to.
        dealers: Members that dealt shares, in the order of the shares.
        summed: Those of them whose vectors are in the sum.
        revealed: By holder: its share of each dealer's secret in hex, "" where it has none.
        threshold: Shares that give a secret.
    """
    found: dict[int, bytes] = {}
    misfits: set[tuple[int, int]] = set()
    missing: list[int] = []
    for position, dealer in enumerate(dealers):
        shares = {
            holder + 1: bytes.fromhex(shown[position])
            for holder, shown in revealed.items()
            if shown[position]
        }
        is_genuine = partial(_is_seed if dealer in summed else _is_mask_key, roster, dealer)
        seen = reconstruct(
            shares,
            threshold,
            is_genuine,
            doubted={holder + 1 for holder, _ in misfits},
            max_tries=MAX_TRIES if len(missing) < _MAX_SEARCHES else 0,
        )
        if seen is None:
            missing.append(dealer)
            continue
        found[dealer] = seen.secret
        misfits |= {(point - 1, dealer) for point in seen.wrong}
    spare = len(revealed) - threshold
    return Secrets(found, tuple(missing), frozenset(misfits), spare)


def masks_left(
    secrets: Mapping[int, bytes], summed: Collection[int], roster: Roster, context: str
) -> Iterator[Mask]:
    """Yield what undoes the masks in the sum: own ones, and those with members that dropped out.

    Args:
        secrets: Of every member that dealt shares.
        summed: Those of them whose vectors are in the sum.
        roster: The members.
        context: Under which masks are derived.
    """
    for dealer, secret in secrets.items():
        if dealer in summed:
            yield own_mask(secret, dealer, context, undo=True)
            continue
        private = X25519PrivateKey.from_private_bytes(secret)
        for member in sorted(summed):
            key = roster.advertisements[member].mask_key
            yield pair_mask(private, member, dealer, key, context, undo=True)


def _is_seed(roster: Roster, member: int, secret: bytes) -> bool:
    return commitment_of(roster.session, secret) == roster.advertisements[member].commitment


def _is_mask_key(roster: Roster, member: int, secret: bytes) -> bool:
    private = X25519PrivateKey.from_private_bytes(secret)
    # Of the 32 strings with this public key one was shared; the others are made from wrong shares.
    is_canonical = secret == canonical_key(private)
    return is_canonical and public_key(private) == roster.advertisements[member].mask_key
