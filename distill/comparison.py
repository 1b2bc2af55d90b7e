"""How far a student is from its teacher on held-out responses.

Shape letters: N learned positions, C positions of a chunk, V vocabulary, E teacher's hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, nll_loss

from client.batches import Example, collate
from client.training import learned_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_SIZE = 16
CHUNK = 256
"""Positions whose logits are held at a time."""


@dataclass(frozen=True)
class Comparison:
    """Means over the learned tokens, at temperature 1, in nats."""

    kl: float
    """KL(teacher ‖ student)."""
    ce: float
    """The student's cross-entropy on the data's own tokens."""
    top1: float
    """Share of positions where both rank the same token first, in [0, 1]."""
    teacher_ce: float
    num_tokens: int


class HeldOut:
    """Held-out examples and the teacher's hidden states on them: the teacher runs once."""

    def __init__(
        self, teacher: PreTrainedModel, examples: Sequence[Example], *, pad_id: int
    ) -> None:
        ordered = sorted(examples, key=lambda example: len(example.input_ids))
        head: Any = teacher.lm_head
        self._head_VE: Tensor = head.weight
        device = self._head_VE.device
        self._batches = [
            {
                name: tensor.to(device)
                for name, tensor in collate(ordered[start : start + BATCH_SIZE], pad_id).items()
            }
            for start in range(0, len(ordered), BATCH_SIZE)
        ]
        with torch.no_grad():
            self._teacher = [learned_positions(teacher, batch)[0] for batch in self._batches]

    def compare(self, student: PreTrainedModel) -> Comparison:
        """Score a student of the teacher's vocabulary, on the teacher's device."""
        sums = torch.zeros(4, dtype=torch.float64)
        num_tokens = 0
        head: Any = student.lm_head
        with torch.no_grad():
            for batch, teacher_NE in zip(self._batches, self._teacher, strict=True):
                hidden_ND, targets_N = learned_positions(student, batch)
                for start in range(0, len(targets_N), CHUNK):
                    chunk = slice(start, start + CHUNK)
                    sums += _compare(
                        log_softmax((hidden_ND[chunk] @ head.weight.T).float(), -1),
                        log_softmax((teacher_NE[chunk] @ self._head_VE.T).float(), -1),
                        targets_N[chunk],
                    )
                num_tokens += len(targets_N)
        kl, ce, top1, teacher_ce = (sums / num_tokens).tolist()
        return Comparison(kl, ce, top1, teacher_ce, num_tokens)


def _compare(log_q_CV: Tensor, log_p_CV: Tensor, targets_C: Tensor) -> Tensor:
    kl = (log_p_CV.exp() * (log_p_CV - log_q_CV)).sum(dtype=torch.float64)
    ce = nll_loss(log_q_CV, targets_C, reduction="sum")
    agreed = (log_q_CV.argmax(-1) == log_p_CV.argmax(-1)).sum()
    teacher_ce = nll_loss(log_p_CV, targets_C, reduction="sum")
    sums = [kl.item(), ce.item(), agreed.item(), teacher_ce.item()]
    return torch.tensor(sums, dtype=torch.float64)
