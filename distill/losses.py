"""The distillation loss, without ever holding [tokens, vocabulary] for teacher and student.

At the Qwen vocabulary the two matrices of logits and their autograd copies are most of a step's
memory. Here a chunk of tokens at a time is projected, compared and turned into gradients in the
*forward* pass, and dropped; the backward pass only hands the gradients on. Each projection is done
once, where a checkpointed loss does it twice.

Shape letters: N learned positions, R most positions of a chunk, C positions of this one, V
vocabulary, D student's hidden, E teacher's hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from client.training import decoder_of, learned_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_BYTES = 20 << 20
"""Logits of one model held at a time. Smaller costs CPU time: the head's gradient is swept once a
chunk (`benchmarks/distillation_loss.py`)."""
CACHED_BYTES = 1 << 20
"""On a CPU the elementwise work is done on rows that stay in its cache."""
VOCABULARY_TILE = 16384
"""Rows of the head's gradient that a half-precision product is made for at a time."""


class DistillationLoss:
    """A ``LossFunction`` for ``client.training.train``: student against a frozen teacher.

    The teacher runs without gradients on the very batch of the student, and only learned positions
    reach the heads. With ``dtype`` bfloat16 the student's matrix products run in bfloat16 over its
    float32 weights.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        *,
        temperature: float,
        cross_entropy_weight: float,
        dtype: torch.dtype,
    ) -> None:
        self._teacher = teacher
        self._temperature = temperature
        self._cross_entropy_weight = cross_entropy_weight
        self._dtype = dtype

    def __call__(self, model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
        """Return the mean loss over the batch's learned positions."""
        device = batch["labels"].device.type
        with torch.no_grad():
            teacher_NE, _ = learned_positions(self._teacher, batch)
        with torch.autocast(device, self._dtype, enabled=self._dtype != torch.float32):
            student_ND, targets_N = learned_positions(model, batch)
        return distillation_loss(
            student_ND.to(self._dtype),
            decoder_of(model).lm_head.weight,
            teacher_NE,
            decoder_of(self._teacher).lm_head.weight,
            targets_N,
            temperature=self._temperature,
            cross_entropy_weight=self._cross_entropy_weight,
        )


def distillation_loss(
    student_ND: Tensor,
    student_head_VD: Tensor,
    teacher_NE: Tensor,
    teacher_head_VE: Tensor,
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    cross_entropy_weight: float = 0.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Return (1 - w) T² KL(teacher ‖ student) at temperature T, plus w times the cross-entropy.

    Forward KL over the whole vocabulary; T² keeps the size of the gradient when T changes (Hinton
    et al., 2015). Products run in the dtype of the hidden states, softmax and sums in float32 or
    wider. Memory beyond the gradients: about 2.5 x ``chunk_bytes``. The gradients exist once, so
    ``backward`` runs once.

    Args:
        student_ND: Hidden states after the final norm, at the learned positions.
        student_head_VD: Output projection. Its gradient has its dtype, summed in float32.
        teacher_NE: The teacher's, at the same positions. No gradient.
        teacher_head_VE: Over the same vocabulary as the student's.
        targets_N: The next token of each position.
        temperature: Of both softmaxes in the KL, above 0. The cross-entropy stays at 1.
        cross_entropy_weight: w in [0, 1].
        chunk_bytes: Float32 logits of one model held at a time.

    Returns:
        The mean over N, a scalar.

    Raises:
        ValueError: The heads have different vocabularies, or there is no position.
    """
    if len(student_head_VD) != len(teacher_head_VE):
        raise ValueError(
            f"the teacher's head has {len(teacher_head_VE)} rows, the student's "
            f"{len(student_head_VD)}: they need one vocabulary"
        )
    if len(targets_N) == 0:
        raise ValueError("no learned position in this batch")
    rows = max(1, chunk_bytes // (4 * len(student_head_VD)))
    rows -= rows % 16 if rows > 16 else 0  # matrix kernels like whole tiles
    loss: Tensor = _GradientsInForward.apply(  # type: ignore[no-untyped-call]
        student_ND,
        student_head_VD,
        teacher_NE,
        teacher_head_VE,
        targets_N,
        temperature,
        cross_entropy_weight,
        rows,
    )
    return loss


class _GradientsInForward(torch.autograd.Function):
    """Loss and both gradients in one sweep over chunks of positions."""

    @staticmethod
    def forward(
        ctx: Any,
        student_ND: Tensor,
        student_head_VD: Tensor,
        teacher_NE: Tensor,
        teacher_head_VE: Tensor,
        targets_N: Tensor,
        temperature: float,
        cross_entropy_weight: float,
        rows: int,
    ) -> Tensor:
        wide = torch.promote_types(student_ND.dtype, torch.float32)
        head_VD = student_head_VD.to(student_ND.dtype)
        teacher_head_VE = teacher_head_VE.to(teacher_NE.dtype)
        grad_ND = torch.empty_like(student_ND)
        grad_head_VD = torch.zeros_like(head_VD, dtype=wide)
        # Made once: fresh ones for every chunk would be mapped and cleared by the system each time.
        logits_RV, teacher_RV = (
            head_VD.new_empty(min(rows, len(targets_N)), len(head_VD), dtype=wide) for _ in range(2)
        )
        total = 0.0
        for start in range(0, len(targets_N), rows):
            chunk = slice(start, start + rows)
            hidden_CD = student_ND[chunk]
            logits_CV = _project(hidden_CD, head_VD, logits_RV)
            teacher_CV = _project(teacher_NE[chunk], teacher_head_VE, teacher_RV)
            total += _replace_by_gradient(
                logits_CV, teacher_CV, targets_N[chunk], temperature, cross_entropy_weight
            )
            delta_CV = logits_CV.div_(len(targets_N)).to(student_ND.dtype)
            grad_ND[chunk] = delta_CV @ head_VD
            _add_product(grad_head_VD, delta_CV, hidden_CD)
        ctx.gradients = grad_ND, grad_head_VD
        ctx.head_dtype = student_head_VD.dtype
        return student_ND.new_tensor(total / len(targets_N), dtype=wide)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        # Handed over, not copied: torch then keeps the head's gradient itself as `.grad`.
        if ctx.gradients is None:
            raise RuntimeError("backward runs once on this loss: compute the loss again")
        grad_ND, grad_head_VD = ctx.gradients
        ctx.gradients = None
        if upstream[0] != 1:
            grad_ND.mul_(upstream[0])
            grad_head_VD.mul_(upstream[0])
        return grad_ND, grad_head_VD.to(ctx.head_dtype), None, None, None, None, None, None


def _project(hidden_CD: Tensor, head_VD: Tensor, buffer_RV: Tensor) -> Tensor:
    """Write the logits into the first rows of ``buffer_RV`` and return those rows."""
    logits_CV = buffer_RV[: len(hidden_CD)]
    if hidden_CD.dtype == buffer_RV.dtype:
        return torch.mm(hidden_CD, head_VD.T, out=logits_CV)
    return logits_CV.copy_(hidden_CD @ head_VD.T)


def _replace_by_gradient(
    logits_CV: Tensor,
    teacher_CV: Tensor,
    targets_C: Tensor,
    temperature: float,
    cross_entropy_weight: float,
) -> float:
    """Return the summed loss of a chunk; leave its gradient by the logits in their place."""
    total = 0.0
    row_bytes = logits_CV.shape[1] * logits_CV.element_size()
    # A GPU wants few large kernels, a CPU wants rows that stay in its cache.
    step = len(logits_CV) if logits_CV.is_cuda else max(1, CACHED_BYTES // row_bytes)
    kl_weight = 1.0 - cross_entropy_weight
    for logits, teacher, targets in zip(
        torch.split(logits_CV, step),
        torch.split(teacher_CV, step),
        torch.split(targets_C, step),
        strict=True,
    ):
        log_q = log_softmax(logits / temperature if temperature != 1 else logits, -1)
        log_p = log_softmax(teacher / temperature if temperature != 1 else teacher, -1)
        p = log_p.exp()
        divergence = log_p.sub_(log_q).mul_(p).sum(dtype=torch.float64)
        total += kl_weight * temperature**2 * divergence.item()
        gradient = p.neg_().add_(log_q.exp()).mul_(kl_weight * temperature)
        if cross_entropy_weight:
            if temperature != 1:
                log_q = log_softmax(logits, -1)
            at_target = targets[:, None]
            total -= cross_entropy_weight * log_q.gather(1, at_target).sum().item()
            q = log_q.exp_()
            q.scatter_add_(1, at_target, torch.full_like(at_target, -1, dtype=q.dtype))
            gradient.add_(q, alpha=cross_entropy_weight)
        logits.copy_(gradient)
    return total


def _add_product(sum_VD: Tensor, delta_CV: Tensor, hidden_CD: Tensor) -> None:
    """Add delta.T @ hidden; half-precision products are rounded once and summed in float32."""
    if delta_CV.dtype == sum_VD.dtype:
        sum_VD.addmm_(delta_CV.T, hidden_CD)
        return
    for start in range(0, len(sum_VD), VOCABULARY_TILE):
        tile = slice(start, start + VOCABULARY_TILE)
        sum_VD[tile] += delta_CV[:, tile].T @ hidden_CD
