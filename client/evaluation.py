"""How well a model predicts held-out responses: loss, perplexity, token accuracy.

Shape letters: N learned positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from client.batches import Example, collate
from client.training import decoder_of, learned_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Evaluation:
    """Sums over all response tokens of a data set, as means."""

    loss: float
    """Mean cross-entropy over tokens (not over records), nats."""
    perplexity: float
    token_accuracy: float
    """Share of tokens that the model ranks first, in [0, 1]."""
    num_tokens: int


def evaluate(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    pad_id: int,
    batch_size: int = 16,
    on_batch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Score every response token of ``examples``; the result does not depend on ``batch_size``.

    Args:
        model: In evaluation mode; its mode is left as it is.
        examples: Held-out records.
        pad_id: Token id to pad with.
        batch_size: Records in one forward pass.
        on_batch: Called with the number of records in each batch, for a progress bar.
    """
    import torch
    from torch.nn.functional import cross_entropy

    total_loss, num_correct, num_tokens = 0.0, 0, 0
    head = decoder_of(model).lm_head
    # Records of like length together: less padding, the same sums.
    ordered = sorted(examples, key=lambda example: len(example.input_ids))
    with torch.inference_mode():
        for start in range(0, len(ordered), batch_size):
            rows = ordered[start : start + batch_size]
            batch = {name: t.to(model.device) for name, t in collate(rows, pad_id).items()}
            hidden_ND, targets_N = learned_positions(model, batch)
            logits_NV = head(hidden_ND.to(head.weight.dtype)).float()
            total_loss += cross_entropy(logits_NV, targets_N, reduction="sum").item()
            num_correct += int((logits_NV.argmax(-1) == targets_N).sum())
            num_tokens += len(targets_N)
            if on_batch:
                on_batch(len(rows))
    loss = total_loss / num_tokens
    return Evaluation(loss, math.exp(min(loss, 700.0)), num_correct / num_tokens, num_tokens)
