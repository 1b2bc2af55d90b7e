"""What a round asks of the server: disk, memory and seconds, from settings and shapes alone.

Disk is exact but for the small files. Memory is the larger of two sums of named parts, above what
importing torch takes. Seconds are the arithmetic of one averaging divided by measured speeds of
one core (`Machine`): an order of size, not a promise.

Letters: O out features, I in features, R rank of one site, S sum of the ranks of all sites.
"""

from dataclasses import dataclass

from federation.header import holds_changes
from federation.settings import FederationSettings
from federation.traffic import (
    Shapes,
    largest_rank,
    num_asked,
    planned_message,
    up_traffic,
)

_FLOWER_BYTES = 38_000_000
"""What importing Flower takes: `flwr_import_bytes` of `python -m benchmarks.rounds`."""
_SQUARES = 8
"""float64 matrices of S x S that the averaging of one module holds."""
_SLAB = 4096
"""Columns that are widened to float64 at a time where changes are compared or numbers sorted."""

IN_PRODUCT_SPACE = ("krum", "multi_krum", "geometric_median")
"""These compare the sites' changes of the model, B @ A - B_0 @ A_0, with the adapter that they
were sent as one more participant."""
IN_COORDINATES = ("median", "trimmed_mean")
"""These sort each number of the factors over the sites."""


@dataclass(frozen=True)
class Machine:
    """How fast one core of the server is.

    The defaults are what `python -m benchmarks.plan_constants` printed on one core of an AMD EPYC.
    """

    gemm_flops_per_s: float = 9.0e10
    """float32 products of the stacked factors with themselves: Gram matrices."""
    thin_flops_per_s: float = 5.5e10
    """float32 products whose result has few rows."""
    cube_s: float = 2.6e-9
    """Seconds per S**3 of the float64 factorisations of one module."""
    read_bytes_per_s: float = 4.6e9
    """Reading spooled factors and adding them up."""
    sort_numbers_per_s: float = 5.6e7
    """Sorting a coordinate over the sites, per number."""


def server_disk(settings: FederationSettings, shapes: Shapes) -> dict[str, int]:
    """Return the bytes on the server's disk, by what they are.

    ``updates`` are there for one round and then deleted, and an adapter a round in float32 stays.
    When a round is about to be committed, that of the round before is there too: twice what the
    sites hold, as one message (with few bits down beside the message itself and what rounding kept
    back), twice the tail that the rank cut left (products), twice the moments of the server
    optimizer.
    """
    length = sum(o + i for o, i in shapes.values())
    adapter = 4 * largest_rank(settings) * length
    tail_rank = settings.tail_rank if settings.aggregation == "products" else 0
    num_moments = {"none": 0, "fedavgm": 1, "fedadam": 2}[settings.server_optimizer.kind]
    up = up_traffic(settings, shapes).all_sites
    dtype, whole = settings.wire.downlink, planned_message(settings, shapes, "float32")
    narrow = planned_message(settings, shapes, dtype) + whole if dtype != "float32" else 0
    kept = 2 if settings.num_rounds > 1 else 1
    return {
        "updates": max(up.first, up.even) if settings.num_rounds > 1 else up.first,
        "adapters": settings.num_rounds * adapter,
        "served": kept * (whole + narrow),
        "tail": kept * 4 * tail_rank * length,
        "moments": kept * num_moments * adapter,
    }


def server_memory(settings: FederationSettings, shapes: Shapes) -> dict[str, int]:
    """Return what the server holds above the torch import, in bytes, while it does what.

    The two follow each other, so the peak is the larger one (`peak_memory`).

    - ``exchange``: the message of a round and one reply; the others are on disk already. With int8
      or int4 the first message is whole, in float32; later ones stand beside it where a round asks
      a fraction of the sites. And what importing Flower takes.
    - ``averaging``: one module, the largest: 4 (S + R)(O + I) for the factors of all sites and the
      result. S has the tail in it (products), or the adapter that was sent where changes are
      compared. These also hold eight float64 matrices of S x S; comparing and sorting take a
      float64 slab of S x 4096. The adapter itself goes to disk module by module.
    """
    rank, asked, wire = largest_rank(settings), num_asked(settings), settings.wire
    broadcast = planned_message(settings, shapes, wire.downlink)
    if holds_changes(wire.downlink):
        later = broadcast if asked < settings.num_sites else 0
        broadcast = planned_message(settings, shapes, "float32") + later
    up = up_traffic(settings, shapes).site
    kind, stacked = settings.aggregation, _stacked_rank(settings)
    sides = max if kind == "alternating" else sum
    longest = max(sides(shape) for shape in shapes.values())
    has_gram = kind == "products" or kind in IN_PRODUCT_SPACE
    squares = _SQUARES * stacked**2 if has_gram else 0
    slab = _SLAB * stacked if kind in (*IN_PRODUCT_SPACE, *IN_COORDINATES) else 0
    return {
        "exchange": _FLOWER_BYTES + broadcast + max(up.first, up.even),
        "averaging": _FLOWER_BYTES + 4 * (stacked + rank) * longest + 8 * (squares + slab),
    }


def peak_memory(settings: FederationSettings, shapes: Shapes) -> int:
    """Return the server's peak above the torch import, in bytes."""
    return max(server_memory(settings, shapes).values())


def _stacked_rank(settings: FederationSettings) -> int:
    """Return S: what the factors of all participants are stacked to."""
    ranks = num_asked(settings) * largest_rank(settings)
    if settings.aggregation == "products":
        return ranks + settings.tail_rank
    is_compared = settings.aggregation in IN_PRODUCT_SPACE
    return ranks + largest_rank(settings) if is_compared else ranks


def aggregation_seconds(
    settings: FederationSettings, shapes: Shapes, machine: Machine | None = None
) -> float:
    """Return the seconds that averaging one round takes on one core.

    - reading: 4 S (O + I) bytes.
    - Gram matrices: 2 S**2 (O + I) flops, of the stacked factors. Those of the changes (krum,
      multi_krum, geometric_median) are in float64, at half the speed.
    - factorisations of S x S: ``cube_s`` S**3 seconds.
    - the result: 2 (R + tail) S (O + I) flops.
    - median and trimmed_mean: sorting R (O + I) coordinates of every site.
    - a ``robust.clip_norm``: needs the Gram matrices of the changes too.

    The last step of multi_krum and geometric_median is the exact average of the sites that they
    keep; krum keeps one. alternating reads one factor, half of O + I on average over its rounds;
    the thin QR at its end is not counted.
    """
    machine = machine or Machine()
    kind, rank, asked = settings.aggregation, largest_rank(settings), num_asked(settings)
    length = sum(o + i for o, i in shapes.values()) / (2 if kind == "alternating" else 1)
    summed = asked * rank
    seconds = 4 * summed * length / machine.read_bytes_per_s
    if settings.robust.clip_norm > 0 or kind in IN_PRODUCT_SPACE:
        seconds += 2 * 2 * (summed + rank) ** 2 * length / machine.gemm_flops_per_s
    if kind in IN_COORDINATES:
        seconds += summed * length / machine.sort_numbers_per_s
    tail = settings.tail_rank if kind == "products" else 0
    averaged = {
        "products": summed + tail,
        "multi_krum": max(1, asked - settings.robust.num_byzantine) * rank,
        "geometric_median": summed,
    }.get(kind, 0)
    seconds += 2 * averaged**2 * length / machine.gemm_flops_per_s
    seconds += machine.cube_s * averaged**3 * len(shapes)
    return seconds + 2 * (rank + tail) * averaged * length / machine.thin_flops_per_s
