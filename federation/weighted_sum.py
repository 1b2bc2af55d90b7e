"""The sum that a secure sum opened: whether sites can have made it; as a number; as an adapter.

Shape letters: N elements of the sum, R rank, C columns (O out or I in features).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from federation.header import tensor_shapes
from federation.masking import signed
from federation.secure_messages import SecureSumError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from federation.masking import Ring
    from federation.secure_messages import Terms
    from federation.update import Update


_PIECE = 1 << 16
"""Elements that are looked at together."""


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


def plausible_sum(terms: Terms, sites: Sequence[str], elements_N: Ring) -> WeightedSum:
    """Return the sum, if sites that clip can have made it together.

    The ring is wider than that, so that one site could move the mean by far more than the clip.

    Args:
        terms: What is summed.
        sites: Whose vectors are in it.
        elements_N: The sum, without its masks.

    Raises:
        SecureSumError: They cannot: a site lied, and nobody can tell which.
    """
    limbs = signed(elements_N[terms.num_coordinates :], terms.ring_bits).tolist()
    total = sum(limb << (number * (terms.bits - 1)) for number, limb in enumerate(limbs))
    least, most = len(sites), len(sites) * terms.max_examples
    if not least <= total <= most:
        raise SecureSumError(
            f"the sites' examples add up to {total}, expected {least} to {most}: a site sent no "
            "honest vector, and which one cannot be told"
        )
    # Each site's share of ``half``, and one for the rounding.
    bound = terms.half * total / terms.max_examples + len(sites)
    for start in range(0, terms.num_coordinates, _PIECE):
        stop = min(start + _PIECE, terms.num_coordinates)
        largest = int(np.abs(signed(elements_N[start:stop], terms.ring_bits)).max())
        if largest > bound:
            raise SecureSumError(
                f"a number of the sum is {largest} levels, and sites that clip reach {bound:.0f} "
                "together: a site sent no honest vector, and which one cannot be told"
            )
    return WeightedSum(terms, tuple(sorted(sites)), total, elements_N)


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
