"""Averages that bear sites which lie, from a matrix as small as the number of sites.

Let P_k be the product B_k A_k of site k, P_0 what it was sent and D_k = P_k - P_0 its change. Norm
clipping, Krum and the geometric median need nothing of the D_k but their inner products summed over
all modules, and these come from the factors: <B1 A1, B2 A2> = sum((B1.T B2) * (A1 A2.T)). So a rule
here takes the [N, N] Gram matrix and returns one weight a site; the exact average of products does
the rest, with P_0 as one more participant where changes are shortened (`robust_weights`).

Distances in product space do not depend on the gauge: (B / G, G A) is the same update, and what
that leaves open the average of products closes by itself. The coordinate-wise rules
(`median_factors`, `trimmed_mean_factors`) have no such form: see what their docstrings say.

The rules count sites, not examples: `num_examples` is what a site says of itself, nobody can check
it, and a liar would own the average with it. A site that honestly has many records loses by that.

Shape letters: N sites, O out features, I in features, R largest rank, S sum of all ranks (origin
first), L length of the rows that are stacked (O or I), M sites that have a slice, T slices.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from federation.adapter import LowRank
from federation.aggregation.errors import AggregationError, normalised_weights

if TYPE_CHECKING:
    from torch import Tensor

_SLAB = 4096
"""Columns that are widened to float64 at a time: bounds the copy."""
_SMOOTHING = 1e-6
"""Floor of a distance to the geometric median, as a share of the honest spread: 1 / distance has no
bound otherwise (nu of arXiv:1912.13445, there absolute). The rounding of a root in float64, 1e-8 of
the spread, lies well below it."""


def changes_gram(origin: LowRank, factors: Sequence[LowRank]) -> Tensor:
    """Return the inner products <D_i, D_j> of what the sites changed in one module.

    D = (B - B_0) A_0 + B (A - A_0), so a small step on a large adapter keeps its digits; the
    difference of two large products would not. A site of a smaller rank was sent the first slices
    only and is measured from those.

    **Rounding is counted against the site.** Slices that are huge and cancel each other leave a
    product that float64 knows badly: a liar could work out in advance that its distance rounds to
    nothing. So each diagonal entry is raised by a bound of its site's rounding: distances and norms
    come out too large, never too small, for honest sites by less than 1e-9 of themselves (a test).
    The same makes a site look far that sends its update in a gauge many orders of magnitude away.

    Time O((O + I) * S**2) in float64; memory O(S * 4096 + N**2 * R**2). Never out x in. Factors of
    any finite float32 values stay far from overflow.

    Args:
        origin: What the sites were sent, at the same scale.
        factors: One a site, any ranks, the same O and I, scales folded into B.

    Returns:
        [N, N] float64, symmetric; add them up over the modules.

    Raises:
        AggregationError: There are none, O or I differ, or a value is not finite.
    """
    import torch

    _refuse_unlike(factors)
    everyone = [origin, *factors]
    _refuse_unlike(everyone)
    ranks = [len(one.a_RI) for one in everyone]
    b_SS = _rows_gram(origin.b_OR.mT, [site.b_OR.mT for site in factors])
    a_SS = _rows_gram(origin.a_RI, [site.a_RI for site in factors])
    b_KRKR, a_KRKR = _by_site(b_SS, ranks), _by_site(a_SS, ranks)

    # Of [origin | changes]: origin with origin, change with origin, change with change.
    b_RR, b_NRR, b_NRNR = b_KRKR[0, :, 0], b_KRKR[1:, :, 0], b_KRKR[1:, :, 1:]
    a_RR, a_NRR, a_NRNR = a_KRKR[0, :, 0], a_KRKR[1:, :, 0], a_KRKR[1:, :, 1:]
    change_whole_NRNR = b_NRNR + b_NRR[:, :, None]
    whole_whole_NRNR = change_whole_NRNR + (b_RR[:, None] + b_NRR.permute(2, 0, 1))
    cross_NN = torch.einsum("kpjq,jqp->kj", change_whole_NRNR, a_NRR)
    gram_NN = (
        torch.einsum("kpjq,pq->kj", b_NRNR, a_RR)
        + (cross_NN + cross_NN.mT)
        + torch.einsum("kpjq,kpjq->kj", whole_whole_NRNR, a_NRNR)
    )
    gram_NN = (gram_NN + gram_NN.mT) / 2
    gram_NN.diagonal().add_(_rounding(origin, b_KRKR, a_KRKR))
    _refuse_infinite(gram_NN)
    return gram_NN


def _rows_gram(origin_RL: Tensor, sites: Sequence[Tensor]) -> Tensor:
    """Return the [S, S] Gram matrix of the rows [origin; site - origin, ...], slab by slab."""
    import torch

    total = len(origin_RL) + sum(len(rows_RL) for rows_RL in sites)
    gram_SS = torch.zeros(total, total, dtype=torch.float64)
    for start in range(0, origin_RL.shape[1], _SLAB):
        columns = slice(start, start + _SLAB)
        wide_SL = torch.cat([rows[:, columns].double() for rows in (origin_RL, *sites)])
        row = len(origin_RL)
        for rows_RL in sites:
            shared = min(len(origin_RL), len(rows_RL))
            wide_SL[row : row + shared] -= wide_SL[:shared]
            row += len(rows_RL)
        gram_SS.addmm_(wide_SL, wide_SL.mT)
    return gram_SS


def _by_site(gram_SS: Tensor, ranks: Sequence[int]) -> Tensor:
    """Spread stacked rows out to [N + 1, R, N + 1, R]: a slice that a site lacks is zero."""
    import torch

    width = max(ranks)
    places_S = torch.cat([site * width + torch.arange(rank) for site, rank in enumerate(ranks)])
    size = len(ranks) * width
    spread = torch.zeros(size, size, dtype=gram_SS.dtype)
    spread[places_S[:, None], places_S] = gram_SS
    return spread.view(len(ranks), width, len(ranks), width)


def _rounding(origin: LowRank, b_KRKR: Tensor, a_KRKR: Tensor) -> Tensor:
    """Return [N]: what to add to each <D_k, D_k> so that no distance is below the true one.

    With s_k the summed norms of the slices that make up D_k, an inner product of i and j is wrong
    by at most u * s_i * s_j (u: number of additions times the machine epsilon), so a squared
    distance by at most u * (s_i + s_j)**2 <= 2 * u * (s_i**2 + s_j**2).
    """
    import torch

    num_sites, width = b_KRKR.shape[:2]
    flat = (num_sites * width, num_sites * width)
    b_KR = b_KRKR.reshape(flat).diagonal().clamp_min(0).sqrt().view(num_sites, width)
    a_KR = a_KRKR.reshape(flat).diagonal().clamp_min(0).sqrt().view(num_sites, width)
    sizes_N = (b_KR[1:] * a_KR[0] + (b_KR[0] + b_KR[1:]) * a_KR[1:]).sum(dim=1)
    num_additions = origin.b_OR.shape[0] + origin.a_RI.shape[1] + width * width
    added_N: Tensor = 2 * num_additions * torch.finfo(torch.float64).eps * sizes_N.square()
    return added_N


def _refuse_unlike(updates: Sequence[LowRank]) -> None:
    """Refuse updates that no average takes: none at all, or of different O or I."""
    normalised_weights(updates, [1.0] * len(updates))


def _refuse_infinite(gram_NN: Tensor) -> None:
    import torch

    is_finite = torch.isfinite(gram_NN.diagonal()).tolist()
    if not all(is_finite):
        raise AggregationError(
            f"update {is_finite.index(False) + 1} of {len(gram_NN)} holds values that are not "
            "finite, or the adapter that was sent does: leave it out"
        )


def distances(gram_NN: Tensor) -> Tensor:
    """Return the [N, N] squared distances ||D_i - D_j||**2 of a Gram matrix, none below 0."""
    norms_N = gram_NN.diagonal()
    squared_NN: Tensor = (norms_N[:, None] + norms_N - 2 * gram_NN).clamp_min(0)
    return squared_NN


def clip_factors(gram_NN: Tensor, clip_norm: float) -> list[float]:
    """Return min(1, clip_norm / ||D_k||) for each site; 1 for a site that changed nothing.

    Args:
        gram_NN: `changes_gram`, summed over the modules.
        clip_norm: Largest Frobenius norm of a site's change of the whole model, > 0.
    """
    if clip_norm <= 0:
        raise ValueError(f"clip_norm is {clip_norm}: expected more than 0")
    norms = gram_NN.diagonal().clamp_min(0).sqrt().tolist()
    return [clip_norm / norm if norm > clip_norm else 1.0 for norm in norms]


def krum_scores(gram_NN: Tensor, num_byzantine: int) -> list[float]:
    """Return each site's sum of squared distances to its N - f - 2 nearest others.

    Blanchard et al., 2017 (arXiv:1703.02757): low is good; safe against f liars among N >= 2 f + 3.
    Flower's Krum differs: it measures raw parameters in float32 (for LoRA: the factors, not the
    update), goes on with fewer than 2 f + 3 replies, and drops the nearest entry of a row where we
    drop the site itself.

    Args:
        gram_NN: `changes_gram`, summed over the modules.
        num_byzantine: f, liars to bear, >= 0.

    Raises:
        AggregationError: Fewer than 2 f + 3 updates.
    """
    count, needed = len(gram_NN), 2 * num_byzantine + 3
    if num_byzantine < 0:
        raise ValueError(f"num_byzantine is {num_byzantine}: expected 0 or more")
    if count < needed:
        raise AggregationError(
            f"krum bears {num_byzantine} liars among {needed} updates or more, and there are "
            f"{count}: lower robust.num_byzantine, wait for more sites (quorum), or take "
            "geometric_median"
        )
    squared_NN = distances(gram_NN)
    squared_NN.fill_diagonal_(float("inf"))
    nearest_NN = squared_NN.sort(dim=1).values[:, : count - num_byzantine - 2]
    scores: list[float] = nearest_NN.sum(dim=1).tolist()
    return scores


def krum_weights(gram_NN: Tensor, num_byzantine: int) -> list[float]:
    """Return 1 for the site with the lowest Krum score and 0 for the others (ties: the first)."""
    return multi_krum_weights(gram_NN, num_byzantine, num_selected=1)


def multi_krum_weights(
    gram_NN: Tensor, num_byzantine: int, num_selected: int | None = None
) -> list[float]:
    """Return even weights on the sites with the lowest Krum scores (ties: the first ones).

    Flower weights the selected by the number of examples that they report, and selects one unless
    told otherwise.

    Args:
        gram_NN: `changes_gram`, summed over the modules.
        num_byzantine: f, liars to bear, >= 0.
        num_selected: How many are averaged, in [1, N]; N - f by default, as many as are honest.

    Raises:
        AggregationError: Fewer than 2 f + 3 updates.
    """
    scores = krum_scores(gram_NN, num_byzantine)
    count = len(scores) - num_byzantine if num_selected is None else num_selected
    if not 1 <= count <= len(scores):
        raise ValueError(f"num_selected is {count}: expected 1 to {len(scores)}")
    selected = set(sorted(range(len(scores)), key=scores.__getitem__)[:count])
    return [1 / count if site in selected else 0.0 for site in range(len(scores))]


def geometric_median_weights(
    gram_NN: Tensor, iterations: int = 1000, tolerance: float = 1e-9
) -> list[float]:
    """Return weights, summing to 1, whose mean of the changes is their geometric median.

    The point with the least sum of distances to all: less than half of the sites, wherever they go,
    move it only as far as the others lie apart. Weiszfeld's iteration, smoothed (RFA, Pillutla et
    al., arXiv:1912.13445), entirely on [N, N]: O(N**2) an iteration. It starts at the mean of the
    majority that lies nearest to the medoid: from the mean of all, a liar at 1e30 would cost dozens
    of iterations. Of two sites every point between is a median: they get a half each.

    Args:
        gram_NN: `changes_gram`, summed over the modules.
        iterations: At most so many.
        tolerance: Stop when no weight moves by more.
    """
    import torch

    count = len(gram_NN)
    apart_NN = distances(gram_NN).sqrt()
    sums = apart_NN.sum(dim=1).tolist()
    medoid = sums.index(min(sums))
    from_medoid_N = apart_NN[medoid]
    near = from_medoid_N.sort(stable=True).indices[: count // 2 + 1]
    weights_N = torch.zeros(count, dtype=torch.float64)
    weights_N[near] = 1 / len(near)
    spread = float(from_medoid_N[near].max())
    # With no spread more than half are at one point, and that point is the median.
    for _ in range(iterations if spread > 0 else 0):
        pull_N = gram_NN @ weights_N
        squared_N = gram_NN.diagonal() - 2 * pull_N + weights_N @ pull_N
        closeness_N = 1 / squared_N.clamp_min(0).sqrt().clamp_min(_SMOOTHING * spread)
        previous_N, weights_N = weights_N, closeness_N / closeness_N.sum()
        if float((weights_N - previous_N).abs().max()) <= tolerance:
            break
    weights: list[float] = weights_N.tolist()
    return weights


def robust_weights(
    gram_NN: Tensor,
    fractions: Sequence[float],
    *,
    kind: str,
    num_byzantine: int = 0,
    clip_norm: float = 0.0,
) -> tuple[list[float], list[float]]:
    """Return the weight of each site and the fraction of its change that counts.

    Changes are shortened first and judged as shortened: P_0 + sum(w_k c_k D_k) is
    sum(w_k c_k P_k) + (1 - sum(w_k c_k)) P_0. Leave sites of weight 0 out of the average; a site of
    a smaller rank enters it with the slices of P_0 that it was not sent.

    Args:
        gram_NN: `changes_gram`, summed over the modules.
        fractions: The plain mean's weights, summing to 1; for "products" only.
        kind: "products", "krum", "multi_krum" or "geometric_median".
        num_byzantine: Liars that the two krums bear.
        clip_norm: Largest norm of a change; 0 = no bound.

    Returns:
        [N] weights w, >= 0 and together 1, and [N] fractions c in [0, 1].

    Raises:
        AggregationError: Too few updates for a krum.
    """
    import torch

    clips = clip_factors(gram_NN, clip_norm) if clip_norm > 0 else [1.0] * len(gram_NN)
    clips_N = torch.tensor(clips, dtype=torch.float64)
    clipped_NN = gram_NN * clips_N[:, None] * clips_N
    if kind == "products":
        weights = list(fractions)
    elif kind == "krum":
        weights = krum_weights(clipped_NN, num_byzantine)
    elif kind == "multi_krum":
        weights = multi_krum_weights(clipped_NN, num_byzantine)
    elif kind == "geometric_median":
        weights = geometric_median_weights(clipped_NN)
    else:
        raise ValueError(f"{kind!r} is no rule that weights products")
    return weights, clips


def median_factors(updates: Sequence[LowRank], rank: int) -> LowRank:
    """Return the coordinate-wise median of B and of A (Yin et al., arXiv:1803.01498).

    Bears liars up to just under half of the sites that have a slice. What it rests on: coordinates
    of factors can be compared only because all sites start from the same factors and take few
    steps, so that all are in the same gauge. An honest site that sends the same update in another
    gauge is an outlier here, and the product of two medians is not the median of the products.

    Args:
        updates: One a site, any ranks, the same O and I, scales folded into B.
        rank: Rank of the result: a slice that no site has is zero.

    Returns:
        Factors in the dtype of the input. Each slice is the median of the sites that have it.

    Raises:
        AggregationError: There are none, or O or I differ.
    """
    return _trimmed(updates, rank, lambda owners: (owners - 1) // 2)


def trimmed_mean_factors(updates: Sequence[LowRank], rank: int, num_trimmed: int) -> LowRank:
    """Return the coordinate-wise mean without the ``num_trimmed`` lowest and highest values.

    Bears ``num_trimmed`` liars (Yin et al., arXiv:1803.01498) and rests on the same gauge as
    `median_factors`. With mixed ranks a slice that only 2 f sites or fewer have is their median:
    all the trimming that is left. Such a slice is only as safe as the majority of its owners; one
    that a single site has is that site's word.

    Args:
        updates: One a site, any ranks, the same O and I, scales folded into B.
        rank: Rank of the result: a slice that no site has is zero.
        num_trimmed: f, values dropped at each end, >= 0; 0 is the plain mean.

    Raises:
        AggregationError: There are only 2 f updates or fewer, or O or I differ.
    """
    if num_trimmed < 0:
        raise ValueError(f"num_trimmed is {num_trimmed}: expected 0 or more")
    if updates and len(updates) <= 2 * num_trimmed:
        raise AggregationError(
            f"trimmed_mean without the {num_trimmed} lowest and highest needs more than "
            f"{2 * num_trimmed} updates, and there are {len(updates)}: lower "
            "robust.num_byzantine, wait for more sites (quorum), or take median"
        )
    return _trimmed(updates, rank, lambda owners: min(num_trimmed, (owners - 1) // 2))


def _trimmed(updates: Sequence[LowRank], rank: int, trim: Callable[[int], int]) -> LowRank:
    """Average the middle of each coordinate, ``trim(number of owners)`` dropped at each end."""
    import torch

    _refuse_unlike(updates)
    first = updates[0]
    b_RO = torch.zeros(rank, first.b_OR.shape[0], dtype=first.b_OR.dtype)
    a_RI = torch.zeros(rank, first.a_RI.shape[1], dtype=first.a_RI.dtype)
    edges = sorted({0, rank, *(min(rank, len(update.a_RI)) for update in updates)})
    for start, end in itertools.pairwise(edges):
        owners = [update for update in updates if len(update.a_RI) >= end]
        if owners:
            b_RO[start:end] = _middle([o.b_OR.mT[start:end] for o in owners], trim(len(owners)))
            a_RI[start:end] = _middle([o.a_RI[start:end] for o in owners], trim(len(owners)))
    return LowRank(b_RO.mT.contiguous(), a_RI)


def _middle(rows: Sequence[Tensor], num_trimmed: int) -> Tensor:
    """Return the [T, L] mean of the sorted values without ``num_trimmed`` at each end."""
    import torch

    parts = []
    for start in range(0, rows[0].shape[1], _SLAB):
        sorted_MTL = torch.stack([row[:, start : start + _SLAB] for row in rows]).sort(dim=0).values
        kept_MTL = sorted_MTL[num_trimmed : len(rows) - num_trimmed]
        # In float64: the sum of two huge float32 numbers would not be finite.
        parts.append(kept_MTL.double().mean(dim=0).to(rows[0].dtype))
    return torch.cat(parts, dim=1)
