"""What every exchange of a round shares: whom it asks what, and what the round is averaged from.

`federation.exchange` gathers an update of each site, `federation.secure_rounds` their sum alone.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from federation.sites import Reply, Request
from federation.update import Readable
from federation.wire import Update

if TYPE_CHECKING:
    from federation.lost_rounds import LostRound
    from federation.settings import FederationSettings


@dataclass(frozen=True)
class Outgoing:
    """What a round sends."""

    served: Update
    """The adapter that all sites of the round train, as a float32 message."""
    message: Path
    """The message for sites that hold the adapter before it, or for all."""
    before: Update | None = None
    """The adapter of the round before."""
    is_change: bool = False
    """Only a site that holds ``before`` can read the message."""
    unsent: Update | None = None
    """What rounding kept from the sites: the server's adapter less ``served``; None = nothing."""


@dataclass(frozen=True)
class Part:
    """One site's part in a round's average."""

    reply: Reply
    """Without its bytes, and without the numbers that the run did not ask for."""
    sha256: str
    """Of what it sent: its update, or its masked vector."""


@dataclass(frozen=True)
class Gathered:
    """What a round is averaged from."""

    updates: Sequence[Readable]
    """In a fixed order. In a secure sum it is one, of all sites together."""
    weights: Sequence[int]
    """What each counts."""
    parts: Sequence[Part]
    """Whose updates these are; in the order of the updates, where there is one a site."""
    secure_sum: Mapping[str, object] | None = None
    """For the lineage: terms and outcome of the secure sum."""
    lost: LostRound | None = None
    """There is no sum, and nothing else here: the round leaves the adapter as it was."""

    @property
    def replies(self) -> list[Reply]:
        """What the sites said beside their updates."""
        return [part.reply for part in self.parts]


def request_of(
    settings: FederationSettings, run: str, server_round: int, message: Path, trains: str
) -> Request:
    """Return what a round asks of its sites."""
    return Request(
        server_round=server_round,
        message=message,
        training=settings.training,
        uplink=settings.wire.uplink,
        downlink=settings.wire.downlink,
        trains=trains,
        run=run,
        aggregation=settings.aggregation,
        num_rounds=settings.num_rounds,
        cohort=settings.quorum,
        metrics=settings.asked_metrics,
        description=settings.signed.description,
        signature=settings.signed.signature,
        simulation={
            "base_model": settings.base_model,
            "simulated_sites": settings.simulated_sites,
        }
        if settings.simulated_sites
        else None,
    )


def draw(sites: Sequence[str], count: int, seed: str) -> list[str]:
    """Return ``count`` of the sites, sorted: the same for the same sites and seed."""
    if count <= 0:
        return []
    chosen = random.Random(seed).sample(list(sites), min(count, len(sites)))  # noqa: S311 - no secret
    return sorted(chosen)
