"""The one error of this package, apart so that its modules can share it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from federation.errors import FedgeError

if TYPE_CHECKING:
    from federation.adapter import LowRank


class AggregationError(FedgeError):
    """Updates that cannot be averaged."""


def normalised_weights(updates: Sequence["LowRank"], weights: Sequence[float]) -> list[float]:
    """Return weights that sum to 1, after checking what every average expects.

    Raises:
        AggregationError: Weights do not fit, are negative or sum to 0, or the shapes differ.
    """
    if len(weights) != len(updates) or not updates:
        raise AggregationError(f"{len(weights)} weights for {len(updates)} updates")
    total = float(sum(weights))
    if min(weights) < 0 or not 0 < total < float("inf"):
        raise AggregationError(f"weights {list(weights)}: expected counts with a positive sum")
    shapes = {(update.b_OR.shape[0], update.a_RI.shape[1]) for update in updates}
    if len(shapes) != 1:
        raise AggregationError(f"updates of different shapes: {sorted(shapes)}")
    return [weight / total for weight in weights]
