"""What of a teacher matters on given text: layers, hidden channels, heads and MLP channels.

Forward passes only, over records of the training data. Sources: block influence for layers
(ShortGPT, arXiv 2403.03853), mean activations for width (Minitron, arXiv 2407.14679).

Shape letters: B records, T tokens, N real tokens (no padding), L layers, D hidden, H query
heads, G key/value groups of Q query heads each, K head_dim, F MLP channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from client.batches import Example, collate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_SIZE = 8


@dataclass(frozen=True)
class Importance:
    """Scores, higher means keep. Only their order within one tensor means something."""

    layers_L: Tensor
    """Block influence: 1 - cos(input, output), mean over tokens."""
    hidden_D: Tensor
    """Mean |output| of a channel, summed over all norms."""
    heads_LGQ: Tensor
    """Mean L2 norm of a head's attention output."""
    mlp_LF: Tensor
    """Root mean square of a channel times the norm of its column in down_proj."""


def measure_importance(
    model: PreTrainedModel, examples: Sequence[Example], *, pad_id: int
) -> Importance:
    """Score every part of ``model`` on ``examples``.

    Args:
        model: A Llama- or Qwen2-family decoder in evaluation mode; it is not changed.
        examples: A few thousand tokens are enough for the order of layers and heads.
        pad_id: Token id to pad with; padding is not counted.
    """
    sums = _Sums(model)
    decoder: Any = model.model
    device = next(model.parameters()).device
    hooks = sums.attach(decoder)
    try:
        with torch.no_grad():
            for start in range(0, len(examples), BATCH_SIZE):
                batch = collate(examples[start : start + BATCH_SIZE], pad_id)
                sums.is_real_BT = batch["attention_mask"].bool().to(device)
                decoder(
                    input_ids=batch["input_ids"].to(device),
                    attention_mask=batch["attention_mask"].to(device),
                    use_cache=False,
                )
    finally:
        for hook in hooks:
            hook.remove()
    return sums.importance(decoder)


class _Sums:
    """Running sums over real tokens, in float32, filled by hooks."""

    def __init__(self, model: Any) -> None:
        config = model.config
        num_layers, num_heads = config.num_hidden_layers, config.num_attention_heads
        self._num_groups = config.num_key_value_heads
        device = model.device
        self.is_real_BT = torch.empty(0)
        self._num_heads = num_heads
        self._num_tokens = 0
        self._layers_L = torch.zeros(num_layers, device=device)
        self._hidden_D = torch.zeros(config.hidden_size, device=device)
        self._heads_LH = torch.zeros(num_layers, num_heads, device=device)
        self._mlp_LF = torch.zeros(num_layers, config.intermediate_size, device=device)

    def attach(self, decoder: Any) -> list[Any]:
        """Hook a decoder. No hook returns a tensor: it would replace the activation."""
        hooks = [decoder.norm.register_forward_hook(self._see_norm)]
        for index, layer in enumerate(decoder.layers):
            hooks += [
                layer.register_forward_hook(self._see_layer(index)),
                layer.input_layernorm.register_forward_hook(self._see_norm),
                layer.post_attention_layernorm.register_forward_hook(self._see_norm),
                layer.self_attn.o_proj.register_forward_pre_hook(self._see_heads(index)),
                layer.mlp.down_proj.register_forward_pre_hook(self._see_mlp(index)),
            ]
        return hooks

    def importance(self, decoder: Any) -> Importance:
        columns_LF = torch.stack(
            [layer.mlp.down_proj.weight.float().norm(dim=0) for layer in decoder.layers]
        )
        num_layers = len(self._layers_L)
        mean_square_LF = self._mlp_LF / self._num_tokens
        return Importance(
            layers_L=(self._layers_L / self._num_tokens).cpu(),
            hidden_D=self._hidden_D.cpu(),
            heads_LGQ=self._heads_LH.view(num_layers, self._num_groups, -1).cpu(),
            mlp_LF=(mean_square_LF.sqrt() * columns_LF).detach().cpu(),
        )

    def _real(self, x_BTD: Tensor) -> Tensor:
        return x_BTD[self.is_real_BT].float()

    def _see_norm(self, module: Any, inputs: Any, output_BTD: Tensor) -> None:  # noqa: ARG002
        self._hidden_D += self._real(output_BTD).abs().sum(0)

    def _see_layer(self, index: int) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Tensor, ...], output: Any) -> None:  # noqa: ARG001
            before_ND = self._real(inputs[0])
            after_ND = self._real(output[0] if isinstance(output, tuple) else output)
            self._layers_L[index] += (1 - cosine_similarity(before_ND, after_ND, dim=-1)).sum()
            self._num_tokens += len(before_ND) if index == 0 else 0

        return hook

    def _see_heads(self, index: int) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:  # noqa: ARG001
            output_NE = self._real(inputs[0])
            heads_NHK = output_NE.view(len(output_NE), self._num_heads, -1)
            self._heads_LH[index] += heads_NHK.norm(dim=-1).sum(0)

        return hook

    def _see_mlp(self, index: int) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:  # noqa: ARG001
            self._mlp_LF[index] += self._real(inputs[0]).square().sum(0)

        return hook
