"""The usual baseline: A and B averaged apart (FedIT, arXiv:2305.05644).

Cheap, additive, and not the mean update: it is kept to be compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from federation.adapter import LowRank
from federation.aggregation.errors import normalised_weights

if TYPE_CHECKING:
    from torch import Tensor


def average_factors(
    updates: Sequence[LowRank], weights: Sequence[float], rank: int
) -> tuple[LowRank, float]:
    """Return ``(mean(B), mean(A))``, ranks padded with zeros or cut, and its relative error.

    Args:
        updates: One per client, all with the same O and I.
        weights: Number of examples of each client. Same order.
        rank: Rank of the result.

    Returns:
        The averaged factors, and ``||mean(B) mean(A) - mean(B A)|| / ||mean(B A)||`` (Frobenius).

    Raises:
        AggregationError: ``weights`` do not sum to a positive number, or O or I differ.
    """
    import torch

    fractions = normalised_weights(updates, weights)
    first = updates[0]
    b_OR = torch.zeros(first.b_OR.shape[0], rank, dtype=first.b_OR.dtype)
    a_RI = torch.zeros(rank, first.a_RI.shape[1], dtype=first.a_RI.dtype)
    for fraction, update in zip(fractions, updates, strict=True):
        width = min(rank, update.b_OR.shape[1])
        b_OR[:, :width] += fraction * update.b_OR[:, :width]
        a_RI[:width] += fraction * update.a_RI[:width]

    exact_b = torch.cat([f * u.b_OR for f, u in zip(fractions, updates, strict=True)], dim=1)
    exact_a = torch.cat([update.a_RI for update in updates], dim=0)
    size = _product_norm(exact_b, exact_a)
    distance = _product_norm(torch.cat([exact_b, -b_OR], 1), torch.cat([exact_a, a_RI], 0))
    return LowRank(b_OR, a_RI), distance / size if size > 0 else 0.0


def _product_norm(b_OR: Tensor, a_RI: Tensor) -> float:
    """Return the Frobenius norm of ``b @ a`` from the Gram matrices of its factors."""
    b, a = b_OR.double(), a_RI.double()
    return float(((b.mT @ b) * (a @ a.mT)).sum().clamp_min(0).sqrt())
