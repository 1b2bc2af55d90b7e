"""A late update, read as the change it made to its own adapter, on a newer one.

Shape letters: O out features, I in features, R rank, C columns (O or I).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from federation.adapter import LowRank
from federation.update import Update

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RebasedUpdate:
    """A late update: the change that it made to its own reference, on a newer one.

    Read like an `Update`; its rank slices are those of the newer adapter.
    """

    late: Update
    """Trained from ``before``."""
    before: Update
    now: Update

    @property
    def rank(self) -> int:
        """Slices of every factor."""
        return min(self.late.rank, self.now.rank)

    @property
    def alpha(self) -> float:
        """At the scale of the newer adapter."""
        return self.now.alpha / self.now.rank * self.rank

    @property
    def base_model(self) -> str:
        """Digest of the base model."""
        return self.late.base_model

    @property
    def num_bytes(self) -> int:
        """Of the message that came."""
        return self.late.num_bytes

    @property
    def modules(self) -> list[str]:
        """Module names."""
        return self.late.modules

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return (out features, in features) by module."""
        return self.late.shapes()

    def read(self, module: str) -> LowRank:
        """Return the factors of one module, float32."""
        b_RO, a_RI = (self.rows(module, factor, self.rank) for factor in "BA")
        return LowRank(b_RO.mT.contiguous(), a_RI)

    def read_rows(self, module: str, b_RO: Tensor, a_RI: Tensor) -> None:
        """Fill two float32 tensors with the first rank slices of one module."""
        b_RO.copy_(self.rows(module, "B", len(b_RO)))
        a_RI.copy_(self.rows(module, "A", len(a_RI)))

    def rows(self, module: str, factor: str, num_rows: int) -> Tensor:
        """Return the first slices of one factor: [num_rows, C] float32."""
        change_RC = self.late.rows(module, factor, num_rows)
        change_RC -= self.before.rows(module, factor, num_rows)
        return self.now.rows(module, factor, num_rows).add_(change_RC)
