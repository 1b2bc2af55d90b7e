"""The usual baseline: A and B averaged apart (FedIT, arXiv:2305.05644).

Cheap, additive, and not the mean update: it is kept to be compared with.

Shape letters: O out features, I in features, R rank, S slices of all clients, C columns (O or I).
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

    # Both products are B X A over the same stacks, so one Gram matrix a factor tells both norms.
    mean_RS = mean_RS[:num_means]
    gram_SS, exact_SS = _gram(b_OS.mT), weights_S.diag()
    gram_of_a_SS = _gram(a_SI)
    size = _norm(exact_SS, gram_SS, gram_of_a_SS)
    distance = _norm(exact_SS - mean_RS.mT @ mean_RS, gram_SS, gram_of_a_SS)
    return LowRank(b_OR, a_RI), distance / size if size > 0 else 0.0


def _gram(rows_SC: Tensor) -> Tensor:
    """Return the inner products of S slices of C numbers, [S, S] float64."""
    wide_SC = rows_SC.double()
    return wide_SC @ wide_SC.mT


def _norm(inner_SS: Tensor, gram_b_SS: Tensor, gram_a_SS: Tensor) -> float:
    """Return the Frobenius norm of ``B X A`` from X [S, S] and the Gram matrices of B and A."""
    squares_SS = (inner_SS.mT @ gram_b_SS @ inner_SS) * gram_a_SS
    return float(squares_SS.sum().clamp_min(0).sqrt())
