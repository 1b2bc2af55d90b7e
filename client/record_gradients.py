"""One gradient a record, of the linear maps that are trained, and their sum with a bound on each.

LoRA's factors are plain linear maps, so the gradient of one record is one product: what came back
through the map times what went in, summed over the record's tokens. An autograd function in the
place of the map makes it in the backward pass, where both are at hand, also when activations are
recomputed; the gradient of the whole batch, which nobody wants, is not made.

Shape letters: B records, T tokens, O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from federation.errors import FedgeError

if TYPE_CHECKING:
    from torch import Tensor


_ROUNDING = 1e-9
"""Relative: what a norm in float64 may be off by, and more. `client.privacy.CLIP_SLACK` has room
for it."""


class PrivacyError(FedgeError):
    """The gradient of one record cannot be told from that of the others."""


class RecordGradients:
    """The gradients of the records that went through the model since ``take``."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        """Begin with none.

        Args:
            weights: What is trained, [O, I] each.
        """
        self.weights = list(weights)
        self._sums_BOI: list[Tensor | None] = [None] * len(self.weights)

    def add(self, index: int, gradient_BOI: Tensor) -> None:
        """Add what one use of a weight gave: a map may stand in two places."""
        before_BOI = self._sums_BOI[index]
        self._sums_BOI[index] = gradient_BOI if before_BOI is None else before_BOI + gradient_BOI

    def take(self) -> list[Tensor]:
        """Return the gradients [B, O, I] in the order of the weights, float32, and forget them.

        Raises:
            PrivacyError: A weight had no part in the loss.
        """
        taken, self._sums_BOI = self._sums_BOI, [None] * len(self.weights)
        if any(gradient is None for gradient in taken):
            raise PrivacyError(
                "a trained factor got no gradient: train factors that the model uses in every pass"
            )
        return [gradient for gradient in taken if gradient is not None]


@contextmanager
def record_gradients(model: Any) -> Iterator[RecordGradients]:
    """Let the trained linear maps of a model give one gradient a record while the block runs.

    In the block a backward pass leaves ``.grad`` of the trained weights alone. The loss must be a
    sum over records in which each has its own term.

    Raises:
        PrivacyError: Something else than linear maps without a bias is trained.
    """
    from torch.nn import Linear

    maps = [m for m in model.modules() if isinstance(m, Linear) and m.weight.requires_grad]
    known = {id(m.weight) for m in maps}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in known:
            raise PrivacyError(
                f"{name} is trained: private training bounds the gradients of linear maps only; "
                "train LoRA factors without a bias"
            )
    gradients = RecordGradients(list({id(m.weight): m.weight for m in maps}.values()))
    place = {id(weight): index for index, weight in enumerate(gradients.weights)}
    for each in maps:
        # On the instance, so that it hides the class's method and goes with `del`.
        vars(each)["forward"] = _recording(each.weight, gradients, place[id(each.weight)])
    try:
        yield gradients
    finally:
        for each in maps:
            del vars(each)["forward"]


def clipped_sum(gradients_BOI: Sequence[Tensor], bound: float) -> tuple[list[Tensor], Tensor]:
    """Return the sum of the records' gradients, none of them longer than ``bound``.

    A record's gradient is one vector over all weights and is shortened as a whole (Abadi et al.,
    arXiv:1607.00133). One that is not finite counts as zero.

    Norms, scales and sums are float64. In float32 the square of 1e-23 is 0: a record of many such
    numbers would have no length and pass a bound below it as it is. What is shortened is measured
    again, and a record that is still longer than the bound counts as zero.

    Args:
        gradients_BOI: A tensor a weight, float32. They are changed.
        bound: L2 norm, > 0.

    Returns:
        The sums [O, I] and the norms [B] before, both float64; inf or NaN where a gradient is.
    """
    import torch

    norms_B = _norms(gradients_BOI)
    is_finite_B = norms_B.isfinite()
    if not is_finite_B.all():
        for gradient in gradients_BOI:
            gradient[~is_finite_B] = 0.0
    scales_B = torch.where(is_finite_B, (bound / norms_B).clamp(max=1.0), 0.0)
    # The comparison is False for NaN.
    is_short_B = _norms(gradients_BOI, scales_B) <= bound * (1 + _ROUNDING)
    scales_B = torch.where(is_short_B, scales_B, 0.0)
    return [torch.einsum("boi,b->oi", g.double(), scales_B) for g in gradients_BOI], norms_B


def _norms(gradients_BOI: Sequence[Tensor], scales_B: Tensor | None = None) -> Tensor:
    """Return the L2 norm [B], float64, of each record's gradient times its scale."""
    import torch

    squares = []
    for gradient_BOI in gradients_BOI:  # one weight at a time: float64 is twice as large
        wide_BOI = gradient_BOI.double()
        if scales_B is not None:
            wide_BOI = wide_BOI.mul_(scales_B[:, None, None])
        squares.append(wide_BOI.square_().sum(dim=(1, 2)))
    return torch.stack(squares).sum(dim=0).sqrt()


def _recording(
    weight_OI: Tensor, gradients: RecordGradients, index: int
) -> Callable[[Tensor], Tensor]:
    """Return the forward pass of a linear map that leaves its records' gradients behind."""
    import torch

    class LinearPerRecord(torch.autograd.Function):
        """A linear map whose weight has a gradient for each record and none for their sum."""

        @staticmethod
        def forward(ctx: Any, x_BTI: Tensor, weight_OI: Tensor) -> Tensor:
            narrow_OI = weight_OI.detach().to(x_BTI.dtype)
            ctx.save_for_backward(x_BTI, narrow_OI)
            return x_BTI @ narrow_OI.mT

        @staticmethod
        def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, None]:
            (back_BTO,) = outputs
            x_BTI, narrow_OI = ctx.saved_tensors
            # In float32 over a bfloat16 base too: a sum over tokens that is rounded to 8 bits
            # would lose more than the product costs.
            gradients.add(index, back_BTO.mT.float() @ x_BTI.float())
            return (back_BTO @ narrow_OI if ctx.needs_input_grad[0] else None), None

    def forward(x_BTI: Tensor) -> Tensor:
        device = x_BTI.device.type
        if torch.is_autocast_enabled(device):
            x_BTI = x_BTI.to(torch.get_autocast_dtype(device))
        result: Tensor = LinearPerRecord.apply(x_BTI, weight_OI)  # type: ignore[no-untyped-call]
        return result

    return forward
