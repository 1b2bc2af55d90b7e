"""Alternating orthonormal LoRA: one factor is trained a round, the other is frozen.

With A the same at every site, ``mean(B_k A) = mean(B_k) A``: the plain mean of one factor is exact,
so a secure sum can take it, and half of the bytes travel. Training B alone (FFA-LoRA) never leaves
the row space of the first A; so the roles change each round (RoLoRA). Between rounds the factor
that was trained is made orthonormal by a thin QR and the other takes the triangle: the product
stays, and the frozen factor scales no gradient. O((O + I) * R**2) a module.

Odd rounds train B, even rounds train A.

Shape letters: O out features, I in features, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from federation.adapter import LowRank

if TYPE_CHECKING:
    from torch import Tensor


def trained_factor(server_round: int) -> str:
    """Return "B" in odd rounds, "A" in even ones."""
    return "B" if server_round % 2 else "A"


def orthonormalised(factors: LowRank, frozen: str) -> LowRank:
    """Return the same product with an orthonormal ``frozen`` factor ("A": rows, "B": columns).

    The QR is taken in float64. Where the factor is rank-deficient it is orthonormal all the same,
    and the product unchanged, as long as R is at most the factor's length.
    """
    import torch

    if frozen == "B":
        q_OR, r_RR = torch.linalg.qr(factors.b_OR.double())
        return LowRank(_like(q_OR, factors.b_OR), _like(r_RR @ factors.a_RI.double(), factors.a_RI))
    q_IR, r_RR = torch.linalg.qr(factors.a_RI.double().mT)
    b_OR = factors.b_OR.double() @ r_RR.mT
    return LowRank(_like(b_OR, factors.b_OR), _like(q_IR.mT, factors.a_RI))


def average_factor(
    origin: LowRank, updates: Sequence[LowRank], shares: Sequence[float], trained: str
) -> LowRank:
    """Return the mean of the trained factor beside the frozen one.

    With mixed ranks a slice is the mean over the sites that have it.

    Args:
        origin: What the sites were sent.
        updates: What they sent back; only the trained factor is read.
        shares: What each counts.
        trained: "A" or "B".
    """
    import torch

    rank = origin.a_RI.shape[0]
    rows = [(u.b_OR.mT if trained == "B" else u.a_RI)[:rank] for u in updates]
    mean_RN = torch.zeros(rank, rows[0].shape[1], dtype=torch.float64)
    totals_R1 = torch.zeros(rank, 1, dtype=torch.float64)
    for row, share in zip(rows, shares, strict=True):
        mean_RN[: len(row)] += share * row.double()
        totals_R1[: len(row)] += share
    own = origin.b_OR.mT if trained == "B" else origin.a_RI
    mean_RN = torch.where(totals_R1 > 0, mean_RN / totals_R1.clamp_min(1e-300), own.double())
    mean = mean_RN.to(own.dtype)
    return LowRank(mean.mT, origin.a_RI) if trained == "B" else LowRank(origin.b_OR, mean)


def _like(value: Tensor, other: Tensor) -> Tensor:
    return value.to(other.dtype).contiguous()
