"""Whom an attempt at a secure sum asks: first those that have not been in the way.

A sum needs all of a cohort's members at their best, so one that is silent, answers wrongly or lies
costs the others an attempt or a round. No vote of the server's is needed for that: the sites that
answered well and lost no sum come first, and the others fill up what is left. A failure is
forgotten after two rounds: one slip must not leave a site's records out of the run for good.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from federation.gathering import draw

if TYPE_CHECKING:
    from federation.lost_rounds import LostRound


ROUNDS_LAST = 2
"""Rounds after the one in which a site failed, in which it is asked last."""


class Candidates:
    """The sites of a run, as it has come to know them."""

    def __init__(self, lost: Sequence[LostRound]) -> None:
        """Begin with what is on disk.

        Args:
            lost: The run's lost rounds; it grows while the run lasts.
        """
        self._lost = lost
        self._failed: dict[str, int] = {}
        """In which round a site failed."""
        self._doubted: set[str] = set()
        self._strangers: set[str] = set()

    def ask(self, sites: Collection[str]) -> None:
        """Forget that these sites failed: they are asked now."""
        for site in sites:
            self._failed.pop(site, None)

    def fail(self, site: str, server_round: int) -> None:
        """Ask a site last in this round and two more, or until it is asked and does not fail."""
        self._failed[site] = server_round

    def doubt(self, sites: Collection[str]) -> None:
        """Ask sites last from now on: they are at odds with most of the others."""
        self._doubted |= set(sites)

    def drawn(
        self, connected: Collection[str], count: int, seed: str, server_round: int
    ) -> list[str]:
        """Return up to ``count`` sites for a round, sorted: the same for the same seed and past.

        First those that did not fail lately, of them those that had part in the fewest lost rounds;
        strangers never.
        """
        free = sorted(set(connected) - self._strangers)
        turns = {site: self._turn(site, server_round) for site in free}
        drawn: list[str] = []
        for turn in sorted(set(turns.values())):
            alike = [site for site in free if turns[site] == turn]
            drawn += draw(alike, count - len(drawn), seed)
        return sorted(drawn)

    def _turn(self, site: str, server_round: int) -> tuple[bool, int]:
        """Return how late a site is asked; the least is first."""
        failed = self._failed.get(site)
        has_failed = failed is not None and server_round - failed <= ROUNDS_LAST
        was_named = any(site in each.named for each in self._lost)
        is_last = was_named or has_failed or site in self._doubted
        return is_last, sum(site in each.suspects for each in self._lost)

    def leave_strangers_out(
        self, identities: Mapping[str, str], refusals: Mapping[str, str]
    ) -> list[str]:
        """Ask those no more with which the others take part in no sum; return them.

        A site answers no roster with a member that its policy does not list. So one stranger would
        end every attempt, and the others would look as if they had failed. Its own word does not
        count, and most of the others must name it.

        Args:
            identities: Of the roster, by site.
            refusals: What sites said instead of answering it.
        """
        found = [
            site
            for site, identity in sorted(identities.items())
            if 2 * sum(identity[:16] in refusals[one] for one in refusals.keys() - {site})
            >= len(identities)
        ]
        self._strangers |= set(found)
        if found:
            self.ask(refusals)
        return found
