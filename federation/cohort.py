"""Whom an attempt at a secure sum asks: first those that have not been in the way.

A sum needs all of a cohort's members at their best, so one that is silent, answers wrongly or lies
costs the others an attempt or a round. No vote of the server's is needed for that: the sites that
answered well and lost no sum come first, and the others fill up what is left.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from federation.gathering import draw

if TYPE_CHECKING:
    from federation.lost_rounds import LostRound


class Candidates:
    """The sites of a run, as it has come to know them."""

    def __init__(self, lost: Sequence[LostRound]) -> None:
        """Begin with what is on disk.

        Args:
            lost: The run's lost rounds; it grows while the run lasts.
        """
        self._lost = lost
        self._failed: set[str] = set()
        self._doubted: set[str] = set()
        self._strangers: set[str] = set()

    def ask(self, sites: Collection[str]) -> None:
        """Forget that these sites failed: they are asked now."""
        self._failed -= set(sites)

    def fail(self, site: str) -> None:
        """Ask a site last until it is asked and does not fail: it was silent, or wrong."""
        self._failed.add(site)

    def doubt(self, sites: Collection[str]) -> None:
        """Ask sites last from now on: they are at odds with most of the others."""
        self._doubted |= set(sites)

    def drawn(self, connected: Collection[str], count: int, seed: str) -> list[str]:
        """Return up to ``count`` sites, sorted: the same for the same seed and past.

        First those that did not fail, of them those that had part in the fewest lost rounds;
        strangers never.
        """
        free = sorted(set(connected) - self._strangers)
        drawn: list[str] = []
        for turn in sorted(set(map(self._turn, free))):
            alike = [site for site in free if self._turn(site) == turn]
            drawn += draw(alike, count - len(drawn), seed)
        return sorted(drawn)

    def _turn(self, site: str) -> tuple[bool, int]:
        """Return how late a site is asked; the least is first."""
        was_named = any(site in each.named for each in self._lost)
        is_last = was_named or site in self._failed or site in self._doubted
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
            self._failed -= refusals.keys()
        return found
