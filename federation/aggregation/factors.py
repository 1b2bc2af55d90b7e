"""The usual baseline: A and B averaged apart (FedIT, arXiv:2305.05644).

Cheap, additive, and not the mean update: it is kept to be compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from federation.adapter import LowRank
from federation.aggregation.errors import normalised_weights
from federation.aggregation.stack import slice_weights

if TYPE_CHECKING:
    from torch import Tensor


def average_factors(
    updates: Sequence[LowRank], weights: Sequence[float], rank: int
) -> tuple[LowRank, float]:
    """Return ``(mean(B), mean(A))``, each slice over the clients that have it, and its error.

    Args:
        updates: One per client, all with the same O and I.
        weights: Number of examples of each client. Same order.
        rank: Rank of the result.

    Returns:
        The averaged factors, cut or padded with zeros to ``rank``, and
        ``||mean(B) mean(A) - mean(B A)|| / ||mean(B A)||`` (Frobenius).

    Raises:
        AggregationError: ``weights`` do not sum to a positive number, or O or I differ.
    """
    import torch

    shares = normalised_weights(updates, weights)
    ranks = [len(update.a_RI) for update in updates]
    weights_S, mean_RS = slice_weights(ranks, shares)
    b_OS = torch.cat([update.b_OR for update in updates], dim=1)
    a_SI = torch.cat([update.a_RI for update in updates], dim=0)
    dtype, num_means = b_OS.dtype, min(rank, len(mean_RS))
    b_OR = torch.zeros(len(b_OS), rank, dtype=dtype)
    a_RI = torch.zeros(rank, a_SI.shape[1], dtype=dtype)
    b_OR[:, :num_means] = b_OS @ mean_RS[:num_means].mT.to(dtype)
    a_RI[:num_means] = mean_RS[:num_means].to(dtype) @ a_SI

    exact_b = b_OS * weights_S.to(dtype)
    size = _product_norm(exact_b, a_SI)
    distance = _product_norm(torch.cat([exact_b, -b_OR], 1), torch.cat([a_SI, a_RI], 0))
    return LowRank(b_OR, a_RI), distance / size if size > 0 else 0.0


def _product_norm(b_OR: Tensor, a_RI: Tensor) -> float:
    """Return the Frobenius norm of ``b @ a`` from the Gram matrices of its factors."""
    b, a = b_OR.double(), a_RI.double()
    return float(((b.mT @ b) * (a @ a.mT)).sum().clamp_min(0).sqrt())
