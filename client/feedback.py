"""Error feedback: what the blocks of an int8 or int4 message round away is sent in a later round.

    to_send   = trained + residual
    message   = encode(to_send, reference=received)
    residual' = to_send - decode(message)

So over the rounds the sum of what was sent is the sum of what was to be sent but for one residual,
however coarse the blocks are (Seide et al., Interspeech 2014; Karimireddy et al.,
arXiv:1901.09847). Without it a small change beside a large one never arrives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from federation.adapter import Adapter, LowRank
from federation.wire import Factors, Update, encode, whole_rows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


def encode_with_feedback(
    trained: Adapter,
    residual: Factors | None,
    received: Update,
    *,
    dtype: str,
    factors: str,
) -> tuple[bytes, Adapter]:
    """Return the message of a round and the residual that the next one starts with.

    One walk over the adapter: each tensor is rounded and read back while it is in the cache.

    Args:
        trained: The factors after training: the first slices of ``received``, or all.
        residual: What is still to be sent, of the same shapes; None = nothing.
        received: The adapter that the site was sent.
        dtype: "int8" or "int4".
        factors: "AB", or the one factor to send: the other's residual stays as it is.

    Raises:
        WireError: A factor is not finite.
    """
    import torch

    left: dict[str, Tensor] = {}

    def keep(module: str, factor: str, rows_RC: Tensor, sent_RC: Tensor) -> None:
        left[f"{module}.{factor}"] = torch.sub(rows_RC, sent_RC, out=sent_RC)

    message = encode(
        trained if residual is None else _Sum(trained, residual),
        dtype=dtype,
        base_model=received.base_model,
        reference=received,
        factors=factors,
        sent=keep,
    )

    def rows_of(module: str, factor: str) -> Tensor:
        if factor in factors:
            return left[f"{module}.{factor}"]
        if residual is not None:
            return whole_rows(residual, module, factor)
        return torch.zeros_like(whole_rows(trained, module, factor))

    # B as rows, as it is written: a view here, and no copy there.
    modules = {name: LowRank(rows_of(name, "B").mT, rows_of(name, "A")) for name in trained.modules}
    return message, Adapter(trained.rank, trained.alpha, modules)


@dataclass(frozen=True)
class _Sum:
    """What was trained and what was still to be sent, a tensor at a time."""

    trained: Adapter
    residual: Factors

    @property
    def rank(self) -> int:
        return self.trained.rank

    @property
    def alpha(self) -> float:
        return self.trained.alpha

    def shapes(self) -> Mapping[str, tuple[int, int]]:
        return self.trained.shapes()

    def rows(self, module: str, factor: str, num_rows: int) -> Tensor:
        rows_RC = self.trained.rows(module, factor, num_rows)
        return rows_RC + whole_rows(self.residual, module, factor)[:num_rows]
