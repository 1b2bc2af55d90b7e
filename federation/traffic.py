"""How many bytes a run moves, counted from its settings and the adapter's shapes alone.

A message is counted exactly as `federation.wire` writes it, header included. What Flower adds
around it (a few hundred bytes of records) is left out, and so is what TLS makes of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from federation.header import holds_changes, message_bytes, num_numbers
from federation.settings import FederationSettings

Shapes = Mapping[str, tuple[int, int]]
"""(out features, in features) by module name, sorted by name."""


@dataclass(frozen=True)
class PerRound:
    """Bytes of a round, by which round it is: alternating sends B in odd and A in even ones."""

    first: int
    odd: int
    """Rounds 3, 5, …"""
    even: int
    """Rounds 2, 4, …"""


@dataclass(frozen=True)
class Traffic:
    """Bytes in one direction."""

    site: PerRound
    """One site that took part in the round before."""
    all_sites: PerRound
    """All that a round asks; an average where newcomers get a larger message."""
    run: int
    """All sites, all rounds."""


def largest_rank(settings: FederationSettings) -> int:
    """Return the rank to plan for: with an energy target the largest that it may ask for."""
    adapter = settings.adapter
    has_energy = adapter.energy > 0 and settings.aggregation == "products"
    return max(adapter.rank, adapter.max_rank) if has_energy else adapter.rank


def num_asked(settings: FederationSettings, num_connected: int | None = None) -> int:
    """Return how many of the connected sites (default: ``num_sites``) a round asks."""
    connected = settings.num_sites if num_connected is None else num_connected
    return settings.num_asked(connected)


def planned_message(
    settings: FederationSettings, shapes: Shapes, dtype: str, factors: str = "AB"
) -> int:
    """Return the bytes of a message of this run in a number format."""
    alpha = settings.adapter.alpha
    return message_bytes(shapes, largest_rank(settings), dtype, factors, alpha=alpha)


def planned_reply(settings: FederationSettings, shapes: Shapes, factors: str) -> int:
    """Return the bytes of an update of this run, or of a masked vector where it is a secure sum.

    Keys, shares and signatures of a secure sum are left out: under 1 MB a site and round.
    """
    if not settings.secure_sum.enabled:
        return planned_message(settings, shapes, settings.wire.uplink, factors)
    from federation.secure_messages import masked_bytes

    terms = settings.secure_terms
    return masked_bytes(
        num_numbers(shapes, largest_rank(settings), factors),
        cohort=terms["cohort"],
        bits=terms["bits"],
        max_examples=terms["max_examples"],
    )


def up_traffic(settings: FederationSettings, shapes: Shapes) -> Traffic:
    """Return the bytes from the sites to the server; an alternating round sends one factor."""
    asked, num_rounds = num_asked(settings), settings.num_rounds
    sent = ("B", "A") if settings.aggregation == "alternating" else ("AB", "AB")
    odd, even = (planned_reply(settings, shapes, each) for each in sent)
    num_even = num_rounds // 2
    return Traffic(
        site=PerRound(odd, odd, even),
        all_sites=PerRound(asked * odd, asked * odd, asked * even),
        run=asked * (odd * (num_rounds - num_even) + even * num_even),
    )


def down_traffic(settings: FederationSettings, shapes: Shapes) -> Traffic:
    """Return the bytes from the server to the sites.

    With int8 or int4 a site that took part in the round before gets the change, every other the
    whole adapter in float32: all of them in round 1; where a round asks a fraction of the sites,
    also a share of ``1 - asked / num_sites`` of those that it asks, on average.
    """
    asked, downlink = num_asked(settings), settings.wire.downlink
    message = planned_message(settings, shapes, downlink)
    full, share = message, 1.0
    if holds_changes(downlink):
        full = planned_message(settings, shapes, "float32")
        share = asked / settings.num_sites
    everyone = round(asked * (share * message + (1 - share) * full))
    return Traffic(
        site=PerRound(full, message, message),
        all_sites=PerRound(asked * full, everyone, everyone),
        run=asked * full + (settings.num_rounds - 1) * everyone,
    )
