"""Averaging LoRA updates on the server, module by module.

`aggregate` is the walk over the modules with one module of every site in memory; how one module is
averaged is a pure function. Three families:

- weights: the exact mean of ``B_k @ A_k`` (`products`), with even or chosen weights when some
  sites may lie (`krum`, `multi_krum`, `geometric_median`, a clip of long updates: `robust`);
- coordinates: A and B each by themselves (`factors`, the usual mean; `median`, `trimmed_mean`);
- `alternating`: one factor is trained and sent, the other is frozen, so a plain sum is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from federation.adapter import LowRank
from federation.aggregation import robust
from federation.aggregation.alternating import average_factor
from federation.aggregation.errors import AggregationError
from federation.aggregation.factors import average_factors
from federation.aggregation.products import Average, average_products, cut, spectrum
from federation.aggregation.stack import Stack, slice_weights_with_origin, take_differences

if TYPE_CHECKING:
    from torch import Tensor

    from federation.update import Readable

CHOOSES_WEIGHTS = ("krum", "multi_krum", "geometric_median")
COORDINATES = ("factors", "median", "trimmed_mean")
TREATS_SITES_EVENLY = ("median", "trimmed_mean", *CHOOSES_WEIGHTS)
"""With these a site that claims many examples gains nothing by it."""


@dataclass(frozen=True)
class Rule:
    """How the updates of a round become the next adapter; see federation.settings."""

    kind: str
    rank: int
    """Of the result; with an ``energy`` of the first result."""
    alpha: float
    tail_rank: int = 0
    energy: float = 0.0
    max_rank: int = 0
    num_byzantine: int = 0
    clip_norm: float = 0.0

    @property
    def scale(self) -> float:
        """What ``B @ A`` is multiplied by; it stays when the rank changes."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class ModuleAverage:
    """One module of the next adapter."""

    name: str
    factors: LowRank
    tail: LowRank | None
    error: float
    """Relative Frobenius error of the rank cut, or of averaging factors."""


@dataclass(frozen=True)
class Aggregation:
    """An average that is taken while it is iterated: one module of each site in memory."""

    rank: int
    alpha: float
    shares: tuple[float, ...]
    """What each update weighs, in order; less than 1 in all when some were shortened."""
    modules: Iterator[ModuleAverage]


def aggregate(
    updates: Sequence[Readable],
    weights: Sequence[float],
    rule: Rule,
    *,
    origin: Readable,
    trains: str = "AB",
    tails: Callable[[str], LowRank | None] = lambda _: None,
) -> Aggregation:
    """Average updates on disk.

    The result depends on the order of ``updates`` in its last bits only; callers sort by digest, so
    that the order of arrival changes nothing at all.

    Args:
        updates: One a site, at the scale of ``origin``; ranks may differ.
        weights: Number of examples at each site.
        rule: Which average.
        origin: The adapter that the sites were sent.
        trains: "AB", or the one factor that was trained ("A" or "B", alternating).
        tails: What the last average lost in a module.

    Raises:
        AggregationError: The updates do not belong to the same modules or the same base model, or
            are too few for the rule.
    """
    _check(updates, origin)
    walk = _Walk(updates, rule, origin)
    if rule.kind in TREATS_SITES_EVENLY:
        weights = [1.0] * len(updates)
    shares, clips = _shares(walk, weights)
    rank = rule.rank
    if rule.kind in COORDINATES or rule.kind == "alternating":
        modules = _coordinate_modules(walk, shares, trains)
    else:
        if rule.energy:
            # Taken again below: the spectra of all modules would be GBs with some sites.
            rank = max(
                spectrum(walk.stack(name, shares, clips, tails(name))).rank_for(rule.energy)
                for name in walk.names
            )
            rank = min(max(rank, 1), rule.max_rank)
        modules = _product_modules(walk, shares, clips, tails, rank)
    effective = tuple(share * clip for share, clip in zip(shares, clips, strict=True))
    return Aggregation(rank, rule.scale * rank, effective, modules)


def _check(updates: Sequence[Readable], origin: Readable) -> None:
    if not updates:
        raise AggregationError("there is no update to average")
    for update in updates:
        if update.base_model != origin.base_model:
            raise AggregationError(
                f"updates for two base models: {origin.base_model[:16]}… and "
                f"{update.base_model[:16]}…: every site must hold the same model"
            )
        if update.shapes() != origin.shapes():
            raise AggregationError("updates with different modules or shapes cannot be averaged")


def _shares(walk: _Walk, weights: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return each update's share of the mean, and the fraction of its change that counts."""
    rule, total = walk.rule, float(sum(weights))
    if min(weights) < 0 or not 0 < total < float("inf"):
        raise AggregationError(f"weights {list(weights)}: expected counts with a positive sum")
    shares = [weight / total for weight in weights]
    if rule.kind not in CHOOSES_WEIGHTS and not rule.clip_norm:
        return shares, [1.0] * len(shares)
    return robust.robust_weights(
        walk.gram_of_changes(),
        shares,
        kind=rule.kind,
        num_byzantine=rule.num_byzantine,
        clip_norm=rule.clip_norm,
    )


def _coordinate_modules(
    walk: _Walk, shares: Sequence[float], trains: str
) -> Iterator[ModuleAverage]:
    """Average A and B apart."""
    rule = walk.rule
    for name in walk.names:
        factors = [update.read(name) for update in walk.updates]
        error = 0.0
        if rule.kind == "alternating":
            average = average_factor(walk.origin.read(name), factors, shares, trains)
        elif rule.kind == "median":
            average = robust.median_factors(factors, rule.rank)
        elif rule.kind == "trimmed_mean":
            average = robust.trimmed_mean_factors(factors, rule.rank, rule.num_byzantine)
        else:
            average, error = average_factors(factors, shares, rule.rank)
        yield ModuleAverage(name, _completed(average, walk, name), None, error)


def _completed(average: LowRank, walk: _Walk, name: str) -> LowRank:
    """Leave the slices that no site of the round has as they were sent.

    As zeros they would be lost for good: where B and A are both zero, no gradient moves either.
    """
    import torch

    width = max(update.rank for update in walk.updates)
    if width >= len(average.a_RI):
        return average
    sent = walk.origin.read(name)
    return LowRank(
        torch.cat([average.b_OR[:, :width], sent.b_OR[:, width:]], dim=1),
        torch.cat([average.a_RI[:width], sent.a_RI[width:]]),
    )


def _product_modules(
    walk: _Walk,
    shares: Sequence[float],
    clips: Sequence[float],
    tails: Callable[[str], LowRank | None],
    rank: int,
) -> Iterator[ModuleAverage]:
    """Average the products exactly."""
    for name in walk.names:
        stack = walk.stack(name, shares, clips, tails(name))
        average = cut(stack, spectrum(stack), rank, walk.rule.tail_rank)
        yield ModuleAverage(name, average.factors, average.tail, average.error)


class _Walk:
    """Reads one module of every update into buffers that are used again for the next module."""

    def __init__(self, updates: Sequence[Readable], rule: Rule, origin: Readable) -> None:
        self.updates = updates
        self.rule = rule
        self.origin = origin
        self.names = origin.modules
        self._shapes = origin.shapes()
        self._buffer: Tensor | None = None
        self._weights: dict[int, tuple[Tensor, Tensor, bool]] = {}

    def gram_of_changes(self) -> Tensor:
        """Return the inner products of the sites' changes of the whole model, [n, n] float64."""
        import torch

        count = len(self.updates)
        gram_NN = torch.zeros(count, count, dtype=torch.float64)
        for name in self.names:
            factors = [update.read(name) for update in self.updates]
            gram_NN += robust.changes_gram(self.origin.read(name), factors)
        return gram_NN * self.rule.scale**2

    def stack(
        self, name: str, shares: Sequence[float], clips: Sequence[float], tail: LowRank | None
    ) -> Stack:
        """Return the factors of those updates that count, with their weights.

        A change that is shortened to the fraction c counts as c of the site's update and 1 - c of
        what the site was sent; a slice that no site has stays what was sent. Where that is so,
        what was sent is one more participant.
        """
        tail_rank = 0 if tail is None else len(tail.a_RI)
        if tail_rank not in self._weights:  # the same for all modules but for the tail's rank
            counted = [i for i, share in enumerate(shares) if share > 0]
            self._weights[tail_rank] = slice_weights_with_origin(
                [self.updates[i].rank for i in counted],
                [shares[i] for i in counted],
                [clips[i] for i in counted],
                origin_rank=self.origin.rank,
                tail_rank=tail_rank,
            )
        weights_S, mean_RS, needs_origin = self._weights[tail_rank]
        parts = [part for part, share in zip(self.updates, shares, strict=True) if share > 0]
        if needs_origin:
            parts.append(self.origin)
        out_features, in_features = self._shapes[name]
        b_SO, a_SI = self._rows(len(weights_S), out_features, in_features)
        start = 0
        for part in parts:
            rows = slice(start, start + part.rank)
            part.read_rows(name, b_SO[rows], a_SI[rows])
            start += part.rank
        if tail is not None:
            b_SO[start:], a_SI[start:] = tail.b_OR.mT, tail.a_RI
        reference_S = take_differences(a_SI, [part.rank for part in parts])
        return Stack(b_SO, a_SI, reference_S, weights_S, mean_RS)

    def _rows(self, count: int, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
        """Return uninitialised float32 rows for both factors, of one buffer for all modules."""
        import torch

        if self._buffer is None or len(self._buffer) < count * (out_features + in_features):
            self._buffer = None  # the old one goes before the new one comes
            widest = max(out + inn for out, inn in self._shapes.values())
            self._buffer = torch.empty(count * widest)
        b_length, a_length = count * out_features, count * in_features
        b_SO = self._buffer[:b_length].view(count, out_features)
        a_SI = self._buffer[b_length : b_length + a_length].view(count, in_features)
        return b_SO, a_SI


__all__ = [
    "Aggregation",
    "AggregationError",
    "Average",
    "ModuleAverage",
    "Rule",
    "aggregate",
    "average_factors",
    "average_products",
]
