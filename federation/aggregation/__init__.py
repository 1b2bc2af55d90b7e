"""Averaging LoRA updates on the server, module by module.

`aggregate` is the walk over the modules; how one module is averaged is a pure function: exactly, in
product space (`products`), or factor by factor as most systems do (`factors`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from federation.adapter import Adapter, LowRank
from federation.aggregation.errors import AggregationError
from federation.aggregation.factors import average_factors
from federation.aggregation.products import average_products

if TYPE_CHECKING:
    from federation.wire import Update

AVERAGES: dict[str, Callable[[Sequence[LowRank], Sequence[float], int], tuple[LowRank, float]]] = {
    "products": average_products,
    "factors": average_factors,
}


def aggregate(
    updates: Sequence[Update], weights: Sequence[float], *, kind: str, rank: int, alpha: float
) -> tuple[Adapter, float]:
    """Return the weighted average of updates on disk and the largest relative error of a module.

    Holds one module of every update at a time. The result depends on the order of ``updates`` in
    its last bits only; callers sort by digest, so that the order of arrival changes nothing at all.

    Args:
        updates: One a site, ranks and alphas may differ.
        weights: Number of examples at each site.
        kind: "products" or "factors".
        rank: Rank of the result.
        alpha: LoRA alpha of the result.

    Raises:
        AggregationError: The updates do not belong to the same modules or the same base model.
    """
    if not updates:
        raise AggregationError("there is no update to average")
    first = updates[0]
    for update in updates[1:]:
        if update.base_model != first.base_model:
            raise AggregationError(
                f"updates for two base models: {first.base_model[:16]}… and "
                f"{update.base_model[:16]}…: every site must hold the same model"
            )
        if update.shapes() != first.shapes():
            raise AggregationError("updates with different modules or shapes cannot be averaged")
    modules, worst = {}, 0.0
    for name in first.modules:
        factors = [_rescaled(update, name, alpha / rank) for update in updates]
        modules[name], error = AVERAGES[kind](factors, weights, rank)
        worst = max(worst, error)
    return Adapter(rank, alpha, modules), worst


def _rescaled(update: Update, module: str, scale: float) -> LowRank:
    """Return one site's factors such that ``scale * B @ A`` is that site's update."""
    factors = update.read(module)
    own = update.alpha / update.rank
    return factors if own == scale else LowRank(factors.b_OR * (own / scale), factors.a_RI)


__all__ = ["AVERAGES", "AggregationError", "aggregate", "average_factors", "average_products"]
