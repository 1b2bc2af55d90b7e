"""What the server makes of the average: FedAvgM and FedAdam (Reddi et al., arXiv:2003.00295).

The change from what the sites were sent to their average is taken as the negative of a gradient,
and a server optimizer steps along it. Each factor, B and A, is a parameter of its own: moments of
the product would have the size of the out x in matrix. That has a price: the moments are in the
gauge of the factors, so an aggregation that turns the gauge from round to round (an orthonormal
factor, a balanced split) makes the old moments meaningless; one that keeps it does not.

The state is a dict of plain tensors a module, ready for safetensors. Sums are float64; what is kept
has the dtype of the factors.

Shape letters: O out features, I in features, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from federation.adapter import LowRank
from federation.aggregation.errors import AggregationError

if TYPE_CHECKING:
    from torch import Tensor


def server_step(
    origin: LowRank,
    average: LowRank,
    state: Mapping[str, Tensor] | None,
    *,
    kind: str,
    learning_rate: float,
    momentum: float,
    beta_2: float,
    tau: float,
    trains: str = "AB",
) -> tuple[LowRank, dict[str, Tensor]]:
    """Return the next adapter of one module, and the optimizer's next state.

    With d = average - x, for each factor x:

    - "none": x = average.
    - "fedavgm": m = momentum * m + d, x = x + learning_rate * m, as `torch.optim.SGD` and Flower.
    - "fedadam": m = momentum * m + (1 - momentum) * d, v = beta_2 * v + (1 - beta_2) * d**2,
      x = x + learning_rate * m / (sqrt(v) + tau). As in Algorithm 2 of the paper, v starts at
      tau**2 and there is **no bias correction**. Flower's FedAdam starts v at 0 and corrects the
      bias by the number of the round.

    Ranks may change between rounds: the origin and the moments follow the average, slices that they
    lack start as in the first round, surplus ones are dropped.

    Args:
        origin: What the sites were sent.
        average: What became of it, at the same scale.
        state: What the round before returned: `b_momentum` [O, R] and `a_momentum` [R, I], for
            fedadam also `b_second_moment` and `a_second_moment`. None or empty in the first round.
        kind: "none", "fedavgm" or "fedadam".
        learning_rate: Step along the change, > 0.
        momentum: Decay of the first moment (beta_1), in [0, 1).
        beta_2: Decay of fedadam's second moment, in [0, 1).
        tau: fedadam's floor under the root of the second moment, > 0.
        trains: The factors that the round trained: "AB", "A" or "B". The other one is the
            average's and its moments wait: momentum must not move a factor that sites keep frozen.

    Returns:
        Factors of the average's rank and dtype, and the state.

    Raises:
        AggregationError: A factor or a moment is not finite in the dtype of the factors.
    """
    if kind not in ("none", "fedavgm", "fedadam"):
        raise ValueError(f"{kind!r} is no server optimizer")
    if kind == "none":
        return average, {}
    factors, new_state = {}, {}
    for name, rank_dim, x, mean in (
        ("b", 1, origin.b_OR, average.b_OR),
        ("a", 0, origin.a_RI, average.a_RI),
    ):
        first = _like(mean, (state or {}).get(f"{name}_momentum"), rank_dim, 0.0)
        second = _like(mean, (state or {}).get(f"{name}_second_moment"), rank_dim, tau**2)
        start = _like(mean, x, rank_dim, 0.0)
        change = mean.double() - start
        is_trained = name.upper() in trains
        if kind == "fedavgm":
            first = momentum * first + change if is_trained else first
            step = learning_rate * first
        else:
            first = momentum * first + (1 - momentum) * change if is_trained else first
            second = beta_2 * second + (1 - beta_2) * change.square() if is_trained else second
            step = learning_rate * first / (second.sqrt() + tau)
            new_state[f"{name}_second_moment"] = _narrowed(second, mean)
        new_state[f"{name}_momentum"] = _narrowed(first, mean)
        factors[name] = _narrowed(start + step, mean) if is_trained else mean
    return LowRank(factors["b"], factors["a"]), new_state


def _like(shape: Tensor, values: Tensor | None, rank_dim: int, missing: float) -> Tensor:
    """Return float64 values of that shape: ranks that are there, and ``missing`` for the others."""
    import torch

    fitted = torch.full(shape.shape, missing, dtype=torch.float64)
    if values is not None:
        width = min(fitted.shape[rank_dim], values.shape[rank_dim])
        fitted.narrow(rank_dim, 0, width).copy_(values.narrow(rank_dim, 0, width))
    return fitted


def _narrowed(values: Tensor, like: Tensor) -> Tensor:
    """Return the values in the dtype of ``like``.

    Raises:
        AggregationError: A value is too large for it.
    """
    import torch

    narrow = values.to(like.dtype)
    if not bool(torch.isfinite(narrow).all()):
        raise AggregationError(
            f"the server optimizer came to {values.abs().max():.3g}, too large for {like.dtype}: "
            "a site's change is out of all bounds; set robust.clip_norm or a robust aggregation"
        )
    return narrow
