"""Training in which no single record can be told from the result: DP-SGD on the LoRA factors.

A step draws each record with the same small probability, cuts each drawn record's gradient to a
bound, adds them, and adds Gaussian noise as large as the bound allows one record to matter (Abadi
et al., arXiv:1607.00133). Optimizer, schedule, weight decay and the proximal term come after the
noise and see nothing else of the records. Neighbours are two data sets of which one has one record
more; the number of records counts as known.

What this does not do: it does not protect a text that stands in many records, and the losses that
it returns are the records' own, without noise. They are for the site's eyes: whoever sends one
leaves the guarantee. Train one factor and keep the other as it is (``train_only``): noise in both
multiplies in their product (Sun et al., arXiv:2403.12313).

A killed run starts over with other records and other noise. Nothing of the first had left the
site, so that it costs nothing; a checkpoint would keep the noise on a disk, to be subtracted from
the rest. A run that *fails* may tell of its draw by that: its caller charges it
(`client.trainer`).

Shape letters: B records, T tokens, N learned positions, O out features, I in features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from client.batches import IGNORED, Example, collate
from client.randomness import RandomStream
from client.record_gradients import PrivacyError, clipped_sum, record_gradients
from client.settings import TrainingSettings
from client.training import (
    Gradient,
    Step,
    decoder_of,
    draw_batches,
    learned_positions,
    train,
    train_with,
)
from federation.accountant import PrivacyEvent
from federation.settings import SettingsError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedModel

    from client.record_gradients import RecordGradients

CLIP_SLACK = 2.0**-9
"""A record is cut to this much less than the bound. The rest is for rounding onto the grid (at most
2**-10 of the bound) and for the rounding errors of norms and sums."""


@dataclass(frozen=True)
class Trained:
    """What a stretch of training did."""

    steps: list[Step]
    event: PrivacyEvent | None
    """What it spent of the records' privacy, or None: it was not private at all."""


def privacy_event(settings: TrainingSettings, num_records: int) -> PrivacyEvent | None:
    """Return what a stretch of training will spend, or None when it is not private.

    Args:
        settings: Of the training.
        num_records: That a step draws from.

    Raises:
        SettingsError: A step wants more records than there are.
    """
    if settings.noise_multiplier == 0:
        return None
    expected = settings.batch_size * settings.accumulation
    if expected > num_records:
        # Not how many there are: the sentence may reach whoever chose the batch.
        raise SettingsError(
            f"training.batch_size x training.accumulation is {expected}, more than the data set "
            "holds: a private step draws each record at most once; lower one of the two"
        )
    return PrivacyEvent(
        noise_multiplier=settings.noise_multiplier,
        sampling_rate=expected / num_records,
        steps=settings.num_steps,
    )


def train_records(
    model: PreTrainedModel,
    examples: Sequence[Example],
    settings: TrainingSettings,
    *,
    pad_id: int,
    stretch: int = 0,
    checkpoints: Path | None = None,
    on_step: Callable[[Step], None] | None = None,
    key: bytes | None = None,
) -> Trained:
    """Train ``model`` in place on a data set, privately if the settings say so.

    Args:
        model: Its parameters with ``requires_grad`` are trained; float32.
        examples: The whole data set, each record once; for private training those without a token
            to learn too (``encode_records(keeps_all=True)``).
        settings: Steps, batch, learning rate, noise.
        pad_id: Token id to pad with.
        stretch: Number of the round, from 0: training that is not private goes on with the
            records where the stretch before it stopped.
        checkpoints: Directory for checkpoints of training that is not private.
        on_step: Called after each step.
        key: See ``train_privately``.

    Raises:
        SettingsError: A private step wants more records than there are.
        TrainingError: A step's loss is not finite.
        PrivacyError: The model cannot be trained privately.
    """
    if settings.noise_multiplier > 0:
        return train_privately(model, examples, settings, pad_id=pad_id, on_step=on_step, key=key)
    drawn = draw_batches(examples, settings, stretch=stretch)
    steps = train(model, drawn, settings, pad_id=pad_id, checkpoints=checkpoints, on_step=on_step)
    return Trained(steps, None)


def train_privately(
    model: PreTrainedModel,
    examples: Sequence[Example],
    settings: TrainingSettings,
    *,
    pad_id: int,
    on_step: Callable[[Step], None] | None = None,
    key: bytes | None = None,
) -> Trained:
    """Train ``model`` in place so that the result is differentially private for each record.

    The gradient of a record is that of its mean loss over its tokens. The drawn records go through
    the model ``batch_size`` at a time; their number varies from step to step and can be 0, in which
    case the step is noise only. The sum is always divided by the expected number, batch_size x
    accumulation. ``max_grad_norm`` has no part: each record is clipped before the sum. A record
    whose gradient is not finite counts as zero, so that none can end the training.

    Args:
        model: Its parameters with ``requires_grad`` are trained: linear maps without a bias.
        examples: The whole data set, each record once; one without a token to learn is drawn like
            any other and has gradient 0.
        settings: ``noise_multiplier`` > 0.
        pad_id: Token id to pad with.
        on_step: Called after each step; what it is told is not private.
        key: 32 bytes from which records and noise are drawn, for tests. Whoever knows the key
            knows the noise. None = drawn from the operating system.

    Raises:
        SettingsError: A step wants more records than there are.
        PrivacyError: Something else than linear maps is trained, or several processes train.
    """
    import torch

    event = privacy_event(settings, len(examples))
    if event is None:
        raise ValueError("noise_multiplier is 0: use train()")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise PrivacyError(
            "several processes train together: each would draw records and noise of its own, and "
            "what is spent would be counted wrong; train privately in one process"
        )
    stream = RandomStream(key)
    with record_gradients(model) as gradients:

        def step_gradient(model: PreTrainedModel) -> Gradient:
            drawn = [examples[i] for i in stream.chosen(len(examples), event.sampling_rate)]
            return _private_gradient(model, drawn, settings, gradients, stream, pad_id)

        steps = train_with(step_gradient, model, settings, on_step=on_step)
    return Trained(steps, event)


def noised_mean(
    sum_OI: NDArray[np.float64],
    normal_OI: NDArray[np.float64],
    *,
    clip_norm: float,
    noise_multiplier: float,
    expected: int,
    num_weights: int,
) -> NDArray[np.float64]:
    """Return the sum with its noise, divided by the expected number of records.

    Sum and noise are rounded onto the same grid first. The rounded noise plus a number on the grid
    is the continuous noise plus that number, rounded: what was proven for the Gaussian mechanism
    holds for it, and the last bits of a float tell nothing (Mironov, CCS 2012). The grid moves a
    sum by at most half of 2**-10 of the bound over all weights, so two neighbours by that much
    apart at most; ``CLIP_SLACK`` has room for it.

    Args:
        sum_OI: Clipped gradients of the drawn records.
        normal_OI: Standard normal numbers.
        clip_norm: The bound of one record.
        noise_multiplier: Standard deviation of the noise in units of the bound, > 0.
        expected: Number of records that a step draws in the mean.
        num_weights: Of all factors together.
    """
    deviation = noise_multiplier * clip_norm
    widest = min(clip_norm / (1024 * math.sqrt(num_weights)), deviation / 2**20)
    grid = 2.0 ** math.floor(math.log2(widest))  # a power of two: the products are exact
    rounded_OI = np.rint(sum_OI / grid) + np.rint(normal_OI * (deviation / grid))
    return rounded_OI * (grid / expected)


def record_losses(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the sum of the response's cross-entropy [B] of each record, nats, and its tokens [B].

    Only learned positions reach the head, as in ``response_cross_entropy``.
    """
    import torch
    from torch.nn.functional import cross_entropy

    hidden_ND, targets_N = learned_positions(model, batch)
    head = decoder_of(model).lm_head
    logits_NV = head(hidden_ND.to(head.weight.dtype)).float()
    losses_N = cross_entropy(logits_NV, targets_N, reduction="none")
    is_learned_BT = batch["labels"][:, 1:] != IGNORED
    record_N = is_learned_BT.nonzero()[:, 0]
    zeros_B = torch.zeros(len(is_learned_BT), device=losses_N.device)
    return zeros_B.index_add(0, record_N, losses_N), is_learned_BT.sum(dim=1)


def _private_gradient(
    model: PreTrainedModel,
    drawn: Sequence[Example],
    settings: TrainingSettings,
    gradients: RecordGradients,
    stream: RandomStream,
    pad_id: int,
) -> Gradient:
    """Put the private gradient of one step into ``.grad``; return the records' own loss."""
    import torch

    bound = settings.record_clip_norm * (1 - CLIP_SLACK)
    sums_OI = [torch.zeros_like(weight, dtype=torch.float64) for weight in gradients.weights]
    total_loss, num_tokens = 0.0, 0
    # What has nothing to learn has gradient 0. The order is for less padding.
    learned = [example for example in drawn if example.num_learned]
    ordered = sorted(learned, key=lambda example: len(example.input_ids))
    for start in range(0, len(ordered), settings.batch_size):
        rows = ordered[start : start + settings.batch_size]
        batch = {name: t.to(model.device) for name, t in collate(rows, pad_id).items()}
        losses_B, tokens_B = record_losses(model, batch)
        torch.autograd.backward((losses_B / tokens_B.clamp(min=1)).sum())
        parts_OI, _ = clipped_sum(gradients.take(), bound)
        for sum_OI, part_OI in zip(sums_OI, parts_OI, strict=True):
            sum_OI.add_(part_OI)
        is_finite_B = losses_B.isfinite()
        total_loss += float(losses_B.detach()[is_finite_B].sum())
        num_tokens += int(tokens_B[is_finite_B].sum())
    num_weights = sum(weight.numel() for weight in gradients.weights)
    for weight, sum_OI in zip(gradients.weights, sums_OI, strict=True):
        mean_OI = noised_mean(
            sum_OI.cpu().numpy(),
            stream.normal(weight.numel()).reshape(weight.shape),
            clip_norm=settings.record_clip_norm,
            noise_multiplier=settings.noise_multiplier,
            expected=settings.batch_size * settings.accumulation,
            num_weights=num_weights,
        )
        weight.grad = torch.from_numpy(mean_OI).to(weight)
    return Gradient(total_loss / max(num_tokens, 1), num_tokens)
