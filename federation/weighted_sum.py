"""The sum that a secure sum opened, as a number and as an adapter.

Shape letters: N elements of the sum, R rank, C columns (O out or I in features).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from federation.header import tensor_shapes
from federation.masking import signed

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from federation.masking import Ring
    from federation.secure_messages import Terms
    from federation.update import Update


@dataclass(frozen=True)
class WeightedSum:
    """What the server learned."""

    terms: Terms
    sites: tuple[str, ...]
    """Whose vectors are in it, sorted."""
    total_examples: int
    """Of these sites, each counted up to ``max_examples``."""
    elements_N: Ring
    """The sum in the ring, the limbs of the number of examples at its end."""

    def mean(self, start: int, count: int) -> NDArray[np.float64]:
        """Return a piece of the weighted mean of the vectors."""
        terms = self.terms
        piece_N = signed(self.elements_N[start : start + count], terms.ring_bits)
        unit = terms.clip / terms.half * terms.max_examples / self.total_examples
        return piece_N.astype(np.float64) * unit


class SummedFactors:
    """The adapter that a round sent plus the mean of what the sites changed: an update like one.

    It is read as `federation.wire` writes messages: only of the factors that were trained.
    """

    def __init__(self, total: WeightedSum, served: Update, factors: str) -> None:
        """Lay out the sum.

        Args:
            total: Of the sites' changes, in the order of a message's tensors.
            served: What the sites were sent.
            factors: "AB", "A" or "B": those that they trained.
        """
        self._total = total
        self._served = served
        self._starts: dict[str, int] = {}
        start = 0
        for name, (num_rows, num_columns) in tensor_shapes(served.shapes(), served.rank, factors):
            self._starts[name] = start
            start += num_rows * num_columns

    @property
    def rank(self) -> int:
        """Slices of every factor."""
        return self._served.rank

    @property
    def alpha(self) -> float:
        """LoRA alpha."""
        return self._served.alpha

    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """Return (out features, in features) by module."""
        return self._served.shapes()

    def rows(self, module: str, factor: str, num_rows: int) -> Tensor:
        """Return the first slices of one factor, contiguous [num_rows, C] float32."""
        import torch

        served_RC = self._served.rows(module, factor, num_rows)
        mean_N = self._total.mean(self._starts[f"{module}.{factor}"], served_RC.numel())
        return served_RC.add_(torch.from_numpy(mean_N.astype(np.float32)).view_as(served_RC))
