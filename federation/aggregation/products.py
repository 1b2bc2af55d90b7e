"""Exact LoRA averaging that never leaves the low-rank form.

The mean of products is not the product of means: ``mean(B_k @ A_k)`` is the update that federated
averaging asks for, and ``mean(B_k) @ mean(A_k)`` is not.

The mean of K products is one product of the concatenated factors, ``P = Bᵀ W A`` with a diagonal W
of weights (B and A hold one slice a row here), so its best low-rank approximation comes from two
Gram matrices of the size of the summed ranks (Eckart and Young, 1936); the out x in matrix is
never formed. With ``A Aᵀ = L Lᵀ`` the rows of ``L⁻¹ A`` are orthonormal, and the right singular
vectors of P in them are the eigenvectors of ``Lᵀ W (B Bᵀ) W L``. So only A has to be factorised,
and a B that is zero or deficient costs nothing.

What remains free is the gauge: ``(B G⁻¹)(G A)`` is the same update for every invertible G, but not
the same for the clients' optimizer. We keep the clients' own: A stays the mean A, projected on the
row space that is kept, and B takes the rest. A balanced split of the singular values, as FlexLoRA
does it, trains measurably worse (docs/experiments.md).

What the cut to the target rank loses can be returned as a `tail`, and given to the next average
as one more participant: what the tail's rank holds is late and not lost.

Shape letters: O out features, I in features, N either; R target rank, T tail rank, S sum of all
client ranks (and the tail's), P numerical rank of the stacked A, K of the stacked B, Q rank of the
product or of what is kept of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from federation.adapter import LowRank
from federation.aggregation.errors import normalised_weights
from federation.aggregation.stack import Stack, slice_weights, take_differences

if TYPE_CHECKING:
    from torch import Tensor

_TILE = 4096
"""Columns of one product; the sums over tiles are taken in float64."""
_BLOCK_ROWS = 4
"""Parts in which a Gram matrix is taken, so that most of its upper half is not computed twice."""
_LEAST_PIVOT = 1e-3
"""Smallest squared pivot of the row-normalised A for which float32 products are exact enough."""
_MAX_GAUGE_CONDITION = 100.0
"""A mean A that nearly lost a direction is propped up to this condition number."""
_NARROW_GAUGE_CONDITION = 8.0
"""Up to it the results are combined in float32, beyond it in float64."""


@dataclass(frozen=True)
class Spectrum:
    """The singular value decomposition of a mean update, in coordinates of the stacked rows."""

    values_Q: Tensor
    """Singular values, falling, without those that are zero."""
    vectors_PQ: Tensor
    """Right singular vectors, in an orthonormal basis of the rows of the A's."""
    rows_SP: Tensor
    """The A's own rows in those orthonormal rows."""
    to_stack: Callable[[Tensor], Tensor]
    """Takes coordinates [R, P] in those orthonormal rows to combinations [R, S] of the stack's."""
    is_wide: bool
    """The rows are so dependent that the results must be combined in float64."""

    def rank_for(self, energy: float) -> int:
        """Return the smallest rank that keeps this share of the squared norm."""
        total = float(self.values_Q.square().sum())
        kept = self.values_Q.square().cumsum(0)
        return 1 + int((kept < energy * total).sum()) if total > 0 else 0


@dataclass(frozen=True)
class Average:
    """The mean of one module's updates."""

    factors: LowRank
    tail: LowRank | None
    """What the cut lost, up to the tail's rank; None when nothing was lost or asked for."""
    error: float
    """Relative Frobenius error that cutting the rank cost, before the tail gives it back."""


def average_products(
    updates: Sequence[LowRank],
    weights: Sequence[float],
    rank: int,
    *,
    by_slice: bool = False,
    tail: LowRank | None = None,
    tail_rank: int = 0,
) -> Average:
    """Return the best rank-``rank`` approximation of the weighted mean update.

    Exact when ``rank`` >= the rank of the mean. Time O((O + I) * S**2), memory O((O + I) * S).

    Args:
        updates: One per client, in any ranks, all with the same O and I, scales folded into B.
        weights: Number of examples of each client (counts, not fractions). Same order.
        rank: Rank of the result; more than min(O, I) only adds zeros.
        by_slice: Weigh slice i by the clients that have one, instead of by all.
        tail: What the average before this one lost; added to the mean.
        tail_rank: Largest rank of the tail to return.

    Returns:
        Factors with exactly ``rank`` columns and rows, in the dtype of the input, and the tail.

    Raises:
        AggregationError: ``weights`` do not sum to a positive number, or O or I differ.
    """
    stack = _stacked(updates, weights, tail, by_slice=by_slice)
    return cut(stack, spectrum(stack), rank, tail_rank)


def _stacked(
    updates: Sequence[LowRank], weights: Sequence[float], tail: LowRank | None, *, by_slice: bool
) -> Stack:
    import torch

    shares = normalised_weights(updates, weights)
    parts = [*updates, tail] if tail is not None else list(updates)
    ranks = [len(update.a_RI) for update in updates]
    tail_rank = 0 if tail is None else len(tail.a_RI)
    weights_S, mean_rows_RS = slice_weights(ranks, shares, tail_rank, by_slice=by_slice)
    a_SI = torch.cat([part.a_RI for part in parts])
    return Stack(
        torch.cat([part.b_OR.mT for part in parts]),
        a_SI,
        take_differences(a_SI, ranks),
        weights_S,
        mean_rows_RS,
    )


def spectrum(stack: Stack) -> Spectrum:
    """Decompose the mean update of a stack; costs the two Gram matrices.

    Products are taken in the dtype of the factors, a tile of columns at a time, and summed in
    float64. Where the stacked rows of A are too dependent for float32 (deficient factors, identical
    sites), the Gram matrices are taken again in float64.
    """
    import torch

    if stack.a_SI.dtype == torch.float32 and (narrow := _decompose_narrow(stack)) is not None:
        return narrow
    return _decompose_wide(stack)


def _decompose_narrow(stack: Stack) -> Spectrum | None:
    """Decompose by Cholesky and one symmetric eigenproblem; None where digits would be lost."""
    import torch

    unit_SS, norms_S = _normalised(gram(stack.a_SI, wide=False))
    factor_SS, info = torch.linalg.cholesky_ex(unit_SS)
    del unit_SS  # with 64 sites each of these takes 8 MB
    if info or not (factor_SS.diagonal().square() >= _LEAST_PIVOT).all():
        return None
    rows_SP = stack.undo_differences(norms_S[:, None] * factor_SS)
    left_SP = stack.weights_S[:, None] * rows_SP
    squares_PP = left_SP.mT @ gram(stack.b_SO, wide=False) @ left_SP
    del left_SP
    if not squares_PP.isfinite().all():
        return None
    squares_Q, vectors_PQ = torch.linalg.eigh(squares_PP)
    values_Q, vectors_PQ = squares_Q.clamp_min(0).sqrt().flip(0), vectors_PQ.flip(1)
    is_real_Q = values_Q > 1e-7 * values_Q[:1]  # the squares round at 1e-15
    return Spectrum(
        values_Q[is_real_Q],
        vectors_PQ[:, is_real_Q],
        rows_SP,
        lambda x_RP: (
            (torch.linalg.solve_triangular(factor_SS.mT, x_RP.mT, upper=True) / norms_S[:, None]).mT
        ),
        is_wide=False,
    )


def _decompose_wide(stack: Stack) -> Spectrum:
    """Decompose by eigenvectors and a singular value decomposition: any rows, however dependent."""
    import torch

    gram_a_SS, norms_S = _normalised(gram(stack.a_SI, wide=True))
    factor_SP, inverse_SP = _principal_axes(gram_a_SS)
    rows_SP = stack.undo_differences(norms_S[:, None] * factor_SP)
    left_SP = stack.weights_S[:, None] * rows_SP
    # The size of each slice's product, not the gauge it was sent in, decides what is noise.
    sizes_S = left_SP.norm(dim=1)
    sizes_S = torch.where(sizes_S > 0, sizes_S, 1.0)
    axes_SK, _ = _principal_axes(sizes_S[:, None] * gram(stack.b_SO, wide=True) * sizes_S)
    core_KP = axes_SK.mT @ (left_SP / sizes_S[:, None])
    _, values_Q, vectors_QP = torch.linalg.svd(core_KP, full_matrices=False)
    is_real_Q = values_Q > 1e-14 * values_Q[:1]
    return Spectrum(
        values_Q[is_real_Q],
        vectors_QP.mT[:, is_real_Q],
        rows_SP,
        lambda x_RP: x_RP @ (inverse_SP / norms_S[:, None]).mT,
        is_wide=True,
    )


def _normalised(gram_SS: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Gram matrix of rows of unit length, and the lengths (1 for a row of zeros)."""
    import torch

    norms_S = gram_SS.diagonal().sqrt()
    norms_S = torch.where(norms_S > 0, norms_S, 1.0)
    return gram_SS / norms_S[:, None] / norms_S, norms_S


def cut(stack: Stack, spectrum: Spectrum, rank: int, tail_rank: int = 0) -> Average:
    """Return the mean of a stack at a rank, in the gauge of its mean A, and what the cut lost.

    Costs two thin products of [rank + tail, S] with the stacked factors.
    """
    import torch

    values_Q, vectors_PQ = spectrum.values_Q, spectrum.vectors_PQ
    kept = min(rank, len(values_Q))
    total = values_Q.square().sum()
    error = float((values_Q[kept:].square().sum() / total).sqrt()) if total > 0 else 0.0

    mean_a_RP = torch.zeros(rank, len(vectors_PQ), dtype=torch.float64)
    num_means = min(rank, len(stack.mean_rows_RS))
    mean_rows_RS = _bounded(stack.mean_rows_RS[:num_means], spectrum.rows_SP.norm(dim=1))
    mean_a_RP[:num_means] = mean_rows_RS @ spectrum.rows_SP
    axes_PR = _complete_basis(vectors_PQ[:, :kept], mean_a_RP, rank)
    gauge_RR, inverse_RR, condition = _propped_up(mean_a_RP @ axes_PR, num_means)
    # B is divided by the gauge: what float32 products round grows with its condition number.
    is_wide = spectrum.is_wide or condition > _NARROW_GAUGE_CONDITION

    # U S of the kept and of the lost directions, as combinations of the clients' own columns; then
    # B = U S G^-1 and A = G V^T. The tail has no gauge to keep: it is split evenly.
    lost = min(tail_rank, len(values_Q) - kept)
    left_SQ = stack.weights_S[:, None] * (spectrum.rows_SP @ vectors_PQ[:, : kept + lost])
    roots_T = values_Q[kept : kept + lost].sqrt()
    b_weights_SR = left_SQ[:, :kept] @ inverse_RR[:kept]
    b_weights_SR = torch.cat([b_weights_SR, left_SQ[:, kept:] / roots_T], dim=1)
    a_weights_RP = torch.cat(
        [gauge_RR @ axes_PR.mT, (vectors_PQ[:, kept : kept + lost] * roots_T).mT]
    )
    b_RO = _combine(b_weights_SR.mT, stack.b_SO, wide=is_wide)
    a_RI = _combine(spectrum.to_stack(a_weights_RP), stack.a_SI, wide=is_wide)
    if not lost:
        return Average(LowRank(b_RO.mT, a_RI), None, error)
    # Copies: views would keep the tail's rows alive as long as the adapter.
    kept_factors = LowRank(b_RO[:rank].clone().mT, a_RI[:rank].clone())
    return Average(kept_factors, LowRank(b_RO[rank:].mT, a_RI[rank:]), error)


def _bounded(mean_rows_RS: Tensor, norms_S: Tensor) -> Tensor:
    """Shorten, in the mean A, rows of more than twice the usual norm of their slice.

    ``(B / 1e6) @ (A * 1e6)`` is an honest update, and no rule that looks at products can see it;
    but it would set the gauge of everybody's next round.
    """
    import torch

    norms_RS = torch.where(mean_rows_RS > 0, norms_S, torch.nan)
    usual_R1 = norms_RS.nanmedian(dim=1, keepdim=True).values
    shorter_RS = (2 * usual_R1 / norms_RS).clamp_max(1.0).nan_to_num(1.0)
    return mean_rows_RS * shorter_RS


def gram(x_SN: Tensor, *, wide: bool) -> Tensor:
    """Return x @ x.T: products of tiles of columns in the dtype of x, or wide, summed in float64.

    Summing tiles apart leaves a fraction of the error of one float32 product over all columns.
    """
    import torch

    count = len(x_SN)
    gram_SS = torch.zeros(count, count, dtype=torch.float64)
    # Block rows up to the diagonal: five eighths of the work.
    ends = [count * part // _BLOCK_ROWS for part in range(_BLOCK_ROWS + 1)]
    for start in range(0, x_SN.shape[1], _TILE):
        tile_SN = x_SN[:, start : start + _TILE]
        if wide:
            tile_SN = tile_SN.double()
        for begin, end in pairwise(ends):
            gram_SS[begin:end, :end] += tile_SN[begin:end] @ tile_SN[:end].mT
    for begin, end in pairwise(ends):
        gram_SS[:begin, begin:end] = gram_SS[begin:end, :begin].mT
    return gram_SS


def _combine(weights_RS: Tensor, x_SN: Tensor, *, wide: bool) -> Tensor:
    """Return weights @ x in the dtype of x; wide: summed in float64, a tile at a time."""
    import torch

    if not wide:
        return weights_RS.to(x_SN.dtype).contiguous() @ x_SN
    out_RN = torch.empty(len(weights_RS), x_SN.shape[1], dtype=x_SN.dtype)
    for start in range(0, x_SN.shape[1], _TILE):
        columns = slice(start, start + _TILE)
        out_RN[:, columns] = (weights_RS @ x_SN[:, columns].double()).to(x_SN.dtype)
    return out_RN


def _principal_axes(gram_SS: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``V sqrt(values)`` and ``V / sqrt(values)`` over the directions above rounding."""
    import torch

    values_S, vectors_SS = torch.linalg.eigh(gram_SS)
    noise = len(gram_SS) * torch.finfo(torch.float64).eps * values_S[-1:].clamp_min(0)
    is_real_S = values_S > noise.clamp_min(torch.finfo(torch.float64).tiny)
    vectors_SP, roots_P = vectors_SS[:, is_real_S], values_S[is_real_S].sqrt()
    return vectors_SP * roots_P, vectors_SP / roots_P


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


def _propped_up(gauge_RR: Tensor, num_means: int) -> tuple[Tensor, Tensor, float]:
    """Make the gauge safe to divide by; return it, its (pseudo-)inverse and its condition number.

    The rows beyond the mean A's (the rank grew) take the directions that are left, at the mean
    A's own scale; then the condition number is bounded from below.
    """
    import torch

    if not gauge_RR.shape[1]:
        return gauge_RR, gauge_RR.mT, 1.0
    if num_means < min(gauge_RR.shape):
        _, s, vh = torch.linalg.svd(gauge_RR[:num_means], full_matrices=True)
        count = min(gauge_RR.shape) - num_means
        gauge_RR = gauge_RR.clone()
        gauge_RR[num_means : num_means + count] = s.mean() * vh[num_means : num_means + count]
    x, s, yh = torch.linalg.svd(gauge_RR, full_matrices=False)
    s = s.clamp_min((float(s[0]) or 1.0) / _MAX_GAUGE_CONDITION)
    return (x * s) @ yh, (yh.mT / s) @ x.mT, float(s[0] / s[-1])
