"""The factors of all participants in one module, one under the other, and what each slice weighs.

After a few local steps the A's of all sites are nearly the same, and float32 Gram matrices of
nearly equal rows have lost what tells them apart. So A is stacked as one site's rows and the
others' differences from them, an exact change of basis.

Clients of smaller rank hold the first slices (column i of B, row i of A) of the served adapter.
Then each slice is to be weighted by the clients that have it: the plain mean counts the others as
zeros, and shrinks the high slices a little every round (rank collapse: raFLoRA, arXiv:2602.13486).

Shape letters: O out features, I in features, R rank of one client or the largest, S sum of all
client ranks (and the tail's), N clients.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Stack:
    """The factors of all participants in one module, one under the other.

    ``b_SO`` and ``a_SI`` may be views of buffers that the caller uses again for the next module.
    """

    b_SO: Tensor
    """Columns of the B's as rows."""
    a_SI: Tensor
    """Rows of the A's, or their differences from the rows that ``reference_S`` names."""
    reference_S: Tensor
    """int64: the row that was subtracted from this one, or the row itself for none."""
    weights_S: Tensor
    """float64: what each slice is multiplied by in the mean."""
    mean_rows_RS: Tensor
    """float64, R the largest rank of a client: takes the rows of the A's to the mean A."""

    def undo_differences(self, coordinates_SP: Tensor) -> Tensor:
        """Return the coordinates of the A's own rows, given those of ``a_SI``."""
        import torch

        own_S = torch.arange(len(self.reference_S))
        is_difference_S1 = (self.reference_S != own_S)[:, None]
        return coordinates_SP + is_difference_S1 * coordinates_SP[self.reference_S]


def take_differences(a_SI: Tensor, ranks: Sequence[int]) -> Tensor:
    """Subtract one client's rows from the others', in place; return `Stack.reference_S`.

    A subtraction rounds once, relative to the difference: nothing is lost that float32 could hold.
    A client whose rows are of another size (it sent its update in another gauge) is left alone, and
    so is what stands below the clients.
    """
    import torch

    reference_S = torch.arange(len(a_SI))
    num_rows, rank = sum(ranks), max(ranks)
    norms_S = torch.linalg.vector_norm(a_SI[:num_rows], dim=1)
    base = sum(ranks[: ranks.index(rank)])
    starts = itertools.accumulate(ranks, initial=0)
    blocks = [(start, r) for start, r in zip(starts, ranks, strict=False) if start != base]
    ratios_S = norms_S / norms_S[base : base + rank].repeat(len(ranks))[:num_rows]
    if len(set(ranks)) == 1 and base == 0 and bool(_alike(ratios_S)):
        # The usual case in one pass over the memory.
        a_NRI = a_SI[:num_rows].view(len(ranks), rank, -1)
        a_NRI[1:] -= a_NRI[0]
        reference_S[:num_rows] = torch.arange(rank).repeat(len(ranks))
        return reference_S
    for start, r in blocks:
        rows, base_rows = slice(start, start + r), slice(base, base + r)
        if bool(_alike(norms_S[rows] / norms_S[base_rows])):
            a_SI[rows] -= a_SI[base_rows]
            reference_S[rows] = torch.arange(base, base + r)
    return reference_S


def _alike(ratios_S: Tensor) -> Tensor:
    return ((ratios_S > 0.25) & (ratios_S < 4)).all()


def slice_weights(
    ranks: Sequence[int], shares: Sequence[float], tail_rank: int = 0, *, by_slice: bool = True
) -> tuple[Tensor, Tensor]:
    """Return the weight of each stacked slice [S], and the matrix to the mean A [R, S].

    A slice counts as its client's share, or with ``by_slice`` as its share among the clients that
    have that slice. The mean A is by slice in any case: short clients do not dilute its high rows.
    A tail counts in full, and is no part of the mean A.
    """
    import torch

    num_rows = sum(ranks)
    mean_RS = torch.zeros(max(ranks), num_rows + tail_rank, dtype=torch.float64)
    start = 0
    for rank, share in zip(ranks, shares, strict=True):
        rows = torch.arange(rank)
        mean_RS[rows, start + rows] = share
        start += rank
    shares_S = mean_RS.sum(dim=0)
    mean_RS /= mean_RS.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    weights_S = mean_RS.sum(dim=0) if by_slice else shares_S
    weights_S[num_rows:] = 1.0
    return weights_S, mean_RS


def slice_weights_with_origin(
    ranks: Sequence[int],
    shares: Sequence[float],
    clips: Sequence[float],
    *,
    origin_rank: int,
    tail_rank: int,
) -> tuple[Tensor, Tensor, bool]:
    """Return `slice_weights` by slice for clients of which only a part counts.

    Of client k the fraction ``clips[k]`` counts; what is missing from a slice is taken from the
    adapter that all clients were sent (the origin), which then stands between clients and tail.

    Returns:
        The weights, the matrix to the mean A, and whether the origin is in them.
    """
    import torch

    weights_S, mean_RS = slice_weights(ranks, shares)
    clips_S = torch.repeat_interleave(torch.tensor(clips, dtype=torch.float64), torch.tensor(ranks))
    rows = max(origin_rank, len(mean_RS))
    clipped_RS = torch.zeros(rows, len(weights_S), dtype=torch.float64)
    clipped_RS[: len(mean_RS)] = mean_RS * clips_S
    missing_R = (1 - clipped_RS.sum(dim=1))[:origin_rank]
    needs_origin = bool((missing_R > 1e-12).any())
    parts = [clipped_RS]
    if needs_origin:
        origin_RS = torch.zeros(rows, origin_rank, dtype=torch.float64)
        origin_RS[:origin_rank] = torch.diag(missing_R.clamp_min(0))
        parts.append(origin_RS)
    tail_S = torch.ones(tail_rank, dtype=torch.float64)
    mean_RS = torch.cat([*parts, torch.zeros(rows, tail_rank, dtype=torch.float64)], dim=1)
    weights_S = torch.cat([torch.cat(parts, dim=1).sum(dim=0), tail_S])
    return weights_S, mean_RS, needs_origin
