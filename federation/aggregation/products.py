"""Exact LoRA averaging that never leaves the low-rank form.

The mean of products is not the product of means: ``mean(B_k @ A_k)`` is the update that federated
averaging asks for, and ``mean(B_k) @ mean(A_k)`` is not.

The mean of K products is one product of the concatenated factors, so its best low-rank
approximation comes from two Gram matrices of the size of the summed ranks (Eckart and Young, 1936);
the out x in matrix is never formed. What remains free is the gauge: ``(B G^-1)(G A)`` is the same
update for every invertible G, but not the same for the clients' optimizer. We keep the clients'
own: A stays the mean A, projected on the row space that is kept, and B takes the rest. A balanced
split of the singular values, as FlexLoRA does it, trains measurably worse (docs/experiments.md).

Shape letters: O out features, I in features, R target rank, S sum of all client ranks,
P numerical rank of the stacked A, Q rank that is kept of the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from federation.adapter import LowRank
from federation.aggregation.errors import normalised_weights

if TYPE_CHECKING:
    from torch import Tensor

_SLAB = 4096
"""Columns that are widened to float64 at a time: bounds the copy, keeps the sums exact enough."""
_MAX_GAUGE_CONDITION = 100.0
"""A mean A that nearly lost a direction is propped up to this condition number."""


def average_products(
    updates: Sequence[LowRank], weights: Sequence[float], rank: int
) -> tuple[LowRank, float]:
    """Return the best rank-``rank`` approximation of the weighted mean update.

    Exact when ``rank`` >= the rank of the mean. Time O((O + I) * S**2), memory O((O + I) * S).

    Args:
        updates: One per client, in any ranks, all with the same O and I, scales folded into B.
        weights: Number of examples of each client (counts, not fractions). Same order.
        rank: Rank of the result; more than min(O, I) only adds zeros.

    Returns:
        Factors with exactly ``rank`` columns and rows, in the dtype of the input, and the relative
        Frobenius error that cutting the rank cost.

    Raises:
        AggregationError: ``weights`` do not sum to a positive number, or O or I differ.
    """
    import torch

    fractions = normalised_weights(updates, weights)
    dtype = updates[0].b_OR.dtype
    b_OS = torch.cat([f * u.b_OR for f, u in zip(fractions, updates, strict=True)], dim=1)
    a_SI = torch.cat([update.a_RI for update in updates], dim=0)
    balance_S = _balance(b_OS, a_SI)
    b_OS, a_SI = b_OS * balance_S.to(dtype), a_SI / balance_S[:, None].to(dtype)

    # b_OS = (orthonormal) @ left_QS and a_SI = right_SP @ (orthonormal), up to rounding.
    left_vectors_SQ, left_values_Q = _principal_axes(_gram(b_OS.mT))
    right_vectors_SP, right_values_P = _principal_axes(_gram(a_SI))
    left_QS = left_values_Q[:, None] * left_vectors_SQ.mT
    right_SP = right_vectors_SP * right_values_P
    u, s, vh = torch.linalg.svd(left_QS @ right_SP, full_matrices=False)

    kept = int((s[:rank] > 1e-14 * s[:1]).sum()) if len(s) else 0
    total = s.square().sum()
    error = float((s[kept:].square().sum() / total).sqrt()) if total > 0 else 0.0

    mean_a_RP = (_mean_rows(updates, fractions, rank) * balance_S) @ right_SP
    axes_PR = _complete_basis(vh[:kept].mT, mean_a_RP, rank)
    gauge_RR = _propped_up(mean_a_RP @ axes_PR)
    # B = U S G^-1 and A = G V^T, written as combinations of the clients' own rows and columns.
    singular_QR = (u[:, :kept] * s[:kept]) @ torch.linalg.pinv(gauge_RR)[:kept]
    b_weights_SR = (left_vectors_SQ / left_values_Q) @ singular_QR
    a_weights_RS = gauge_RR @ axes_PR.mT @ (right_vectors_SP / right_values_P).mT
    b_OR = _combine(b_weights_SR.mT, b_OS.mT).mT
    a_RI = _combine(a_weights_RS, a_SI)
    return LowRank(b_OR.to(dtype).contiguous(), a_RI.to(dtype).contiguous()), error


def _balance(b_OS: Tensor, a_SI: Tensor) -> Tensor:
    """Return d such that column i of ``b * d`` and row i of ``a / d`` have the same norm.

    A site may send its update as (1e4 B, A / 1e4): the same update, but without this the directions
    of the others would sink below the rounding of the Gram matrices.
    """
    import torch

    b_norms_S, a_norms_S = b_OS.double().norm(dim=0), a_SI.double().norm(dim=1)
    sizes_S = (b_norms_S * a_norms_S).sqrt()
    largest = float(sizes_S.max())
    # Where one factor is zero the product is too: its rows only matter for the mean A.
    target_S = torch.where(sizes_S > 0, sizes_S, largest if largest > 0 else 1.0)
    return torch.where(a_norms_S > 0, a_norms_S / target_S, 1.0)


def _gram(x_SN: Tensor) -> Tensor:
    """Return x @ x.T in float64, widening a slab of columns at a time."""
    import torch

    gram_SS = torch.zeros(len(x_SN), len(x_SN), dtype=torch.float64)
    for start in range(0, x_SN.shape[1], _SLAB):
        wide = x_SN[:, start : start + _SLAB].double()
        gram_SS.addmm_(wide, wide.mT)
    return gram_SS


def _combine(weights_RS: Tensor, x_SN: Tensor) -> Tensor:
    """Return weights @ x, summed in float64 and kept in the dtype of x."""
    import torch

    out_RN = torch.empty(len(weights_RS), x_SN.shape[1], dtype=x_SN.dtype)
    for start in range(0, x_SN.shape[1], _SLAB):
        columns = slice(start, start + _SLAB)
        out_RN[:, columns] = (weights_RS @ x_SN[:, columns].double()).to(x_SN.dtype)
    return out_RN


def _principal_axes(gram_SS: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvectors and the roots of the eigenvalues, of the directions above rounding."""
    import torch

    values_S, vectors_SS = torch.linalg.eigh(gram_SS)
    noise = len(gram_SS) * torch.finfo(torch.float64).eps * values_S[-1:].clamp_min(0)
    is_real_S = values_S > noise.clamp_min(torch.finfo(torch.float64).tiny)
    return vectors_SS[:, is_real_S], values_S[is_real_S].sqrt()


def _mean_rows(updates: Sequence[LowRank], fractions: Sequence[float], rank: int) -> Tensor:
    """Return the [R, S] matrix that takes stacked rows to the mean A.

    Row i is the mean over the clients whose rank exceeds i: with mixed ranks the short ones do not
    dilute the high rows (raFLoRA, arXiv:2602.13486).
    """
    import torch

    mean_RS = torch.zeros(rank, sum(len(update.a_RI) for update in updates), dtype=torch.float64)
    start = 0
    for fraction, update in zip(fractions, updates, strict=True):
        for row in range(min(rank, len(update.a_RI))):
            mean_RS[row, start + row] = fraction
        start += len(update.a_RI)
    totals_R1 = mean_RS.sum(dim=1, keepdim=True)
    rows_RS: Tensor = mean_RS / totals_R1.clamp_min(torch.finfo(torch.float64).tiny)
    return rows_RS


def _complete_basis(kept_PQ: Tensor, mean_a_RP: Tensor, rank: int) -> Tensor:
    """Fill the kept directions up to ``rank`` with those in which the mean A is largest.

    Before the first step every B is zero and nothing is kept: then the basis is the row space of
    the mean A itself, and A passes through unchanged.
    """
    import torch

    missing = min(rank, mean_a_RP.shape[1]) - kept_PQ.shape[1]
    if missing <= 0:
        return kept_PQ
    rest_RP = mean_a_RP - (mean_a_RP @ kept_PQ) @ kept_PQ.mT
    # Orthonormal even where the rest is zero: QR of [kept | leading directions of the rest].
    _, _, vh = torch.linalg.svd(rest_RP, full_matrices=True)
    basis_PR, _ = torch.linalg.qr(torch.cat([kept_PQ, vh.mT], dim=1))
    return torch.cat([kept_PQ, basis_PR[:, kept_PQ.shape[1] : kept_PQ.shape[1] + missing]], dim=1)


def _propped_up(gauge_RR: Tensor) -> Tensor:
    """Bound the condition number from below, so that dividing by the gauge loses no digits."""
    import torch

    x, s, yh = torch.linalg.svd(gauge_RR, full_matrices=False)
    if not len(s):
        return gauge_RR
    largest = float(s[0]) or 1.0
    propped_RR: Tensor = (x * s.clamp_min(largest / _MAX_GAUGE_CONDITION)) @ yh
    return propped_RR
