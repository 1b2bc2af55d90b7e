"""Error feedback: what the blocks of an int8 or int4 message round away is sent in a later round.

    to_send   = trained + residual
    message   = encode(to_send, reference=received)
    residual' = to_send - decode(message)

So over the rounds the sum of what was sent is the sum of what was to be sent but for one residual,
however coarse the blocks are (Seide et al., Interspeech 2014; Karimireddy et al.,
arXiv:1901.09847). Without it a small change beside a large one never arrives.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import add, sub
from pathlib import Path
from typing import Any

from federation.adapter import Adapter, LowRank
from federation.wire import Update, encode, open_update


def encode_with_feedback(
    trained: Adapter,
    residual: Adapter | None,
    received: Update,
    *,
    dtype: str,
    factors: str,
    scratch: Path,
) -> tuple[bytes, Adapter]:
    """Return the message of a round and the residual that the next one starts with.

    Args:
        trained: The factors after training: the first slices of ``received``, or all.
        residual: What is still to be sent, of the same shapes; None = nothing.
        received: The adapter that the site was sent.
        dtype: "int8" or "int4".
        factors: "AB", or the one factor to send: the other's residual stays as it is.
        scratch: Directory for the message while it is decoded.

    Raises:
        WireError: A factor is not finite.
    """
    before = residual or _zeros(trained)
    to_send = _combine(add, trained, before, factors, other=trained)
    message = encode(
        to_send, dtype=dtype, base_model=received.base_model, reference=received, factors=factors
    )
    path = scratch / "update"
    path.write_bytes(message)
    sent = open_update(path, reference=received).adapter()
    return message, _combine(sub, to_send, sent, factors, other=before)


def _combine(
    operation: Callable[[Any, Any], Any],
    left: Adapter,
    right: Adapter,
    factors: str,
    *,
    other: Adapter,
) -> Adapter:
    """Apply an operation to the named factors of two adapters; the rest comes from ``other``."""
    modules = {}
    for name, one in left.modules.items():
        two, rest = right.modules[name], other.modules[name]
        modules[name] = LowRank(
            operation(one.b_OR, two.b_OR) if "B" in factors else rest.b_OR,
            operation(one.a_RI, two.a_RI) if "A" in factors else rest.a_RI,
        )
    return Adapter(left.rank, left.alpha, modules)


def _zeros(adapter: Adapter) -> Adapter:
    import torch

    modules = {
        name: LowRank(torch.zeros_like(f.b_OR), torch.zeros_like(f.a_RI))
        for name, f in adapter.modules.items()
    }
    return Adapter(adapter.rank, adapter.alpha, modules)
