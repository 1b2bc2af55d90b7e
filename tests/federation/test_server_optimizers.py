"""Server optimizers against numpy, round after round."""

from typing import Any

import numpy as np
import pytest
import torch

from federation.adapter import LowRank
from federation.aggregation import AggregationError
from federation.aggregation.server_optimizers import server_step

NUMBERS: dict[str, Any] = {"learning_rate": 0.3, "momentum": 0.9, "beta_2": 0.99, "tau": 1e-3}


def factors(seed: int, rank: int = 3, dtype: torch.dtype = torch.float64) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(8, rank, generator=generator, dtype=torch.float64)
    a = torch.randn(rank, 10, generator=generator, dtype=torch.float64)
    return LowRank(b.to(dtype), a.to(dtype))


def arrays(update: LowRank) -> list[np.ndarray]:
    return [update.b_OR.numpy(), update.a_RI.numpy()]


def numpy_fedavgm(x, averages, *, learning_rate, momentum, **_):
    """As Flower's FedAvgM writes it: a gradient is old minus new."""
    vector = None
    for average in averages:
        gradient = x - average
        vector = gradient if vector is None else momentum * vector + gradient
        x = x - learning_rate * vector
    return x


def numpy_fedadam(x, averages, *, learning_rate, momentum, beta_2, tau):
    m, v = np.zeros_like(x), np.full_like(x, tau**2)
    for average in averages:
        delta = average - x
        m = momentum * m + (1 - momentum) * delta
        v = beta_2 * v + (1 - beta_2) * delta**2
        x = x + learning_rate * m / (np.sqrt(v) + tau)
    return x


@pytest.mark.parametrize(
    ("kind", "oracle"), [("fedavgm", numpy_fedavgm), ("fedadam", numpy_fedadam)]
)
def test_several_rounds_equal_numpy(kind: str, oracle: Any) -> None:
    start, averages = factors(0), [factors(seed) for seed in range(1, 6)]
    x, state = start, None
    for average in averages:
        x, state = server_step(x, average, state, kind=kind, **NUMBERS)
    for index, got in enumerate(arrays(x)):
        means = [arrays(average)[index] for average in averages]
        np.testing.assert_allclose(got, oracle(arrays(start)[index], means, **NUMBERS), rtol=1e-12)


def test_none_and_a_momentum_of_zero_are_the_average() -> None:
    start, average = factors(0), factors(1)
    x, state = server_step(start, average, None, kind="none", **NUMBERS)
    assert x is average
    assert state == {}
    plain = {**NUMBERS, "learning_rate": 1.0, "momentum": 0.0}
    x, _ = server_step(start, average, None, kind="fedavgm", **plain)
    torch.testing.assert_close(x.b_OR, average.b_OR)
    torch.testing.assert_close(x.a_RI, average.a_RI)


def test_fedadam_moves_each_coordinate_by_the_size_of_its_sign() -> None:
    """Far above tau, the first step is (1 - b1) / sqrt(1 - b2) = 1 learning rate here."""
    start, average = factors(0), factors(1)
    x, _ = server_step(start, average, None, kind="fedadam", **{**NUMBERS, "tau": 1e-9})
    moved = (x.b_OR - start.b_OR).numpy()
    expected = 0.3 * np.sign((average.b_OR - start.b_OR).numpy())
    np.testing.assert_allclose(moved, expected, rtol=1e-4)


@pytest.mark.parametrize("kind", ["fedavgm", "fedadam"])
def test_sites_that_changed_nothing_leave_the_adapter(kind: str) -> None:
    start = factors(0)
    x, state = server_step(start, start, None, kind=kind, **NUMBERS)
    x, _ = server_step(x, x, state, kind=kind, **NUMBERS)
    assert torch.equal(x.b_OR, start.b_OR)
    assert torch.equal(x.a_RI, start.a_RI)


@pytest.mark.parametrize("kind", ["fedavgm", "fedadam"])
def test_a_rank_that_grows_and_shrinks_leaves_the_other_slices_alone(kind: str) -> None:
    ranks = [3, 5, 2, 4]
    averages = [factors(seed, rank=5) for seed in range(1, 5)]
    whole, whole_state = factors(0, rank=5), None
    x, state = LowRank(whole.b_OR[:, :3], whole.a_RI[:3]), None
    for rank, average in zip(ranks, averages, strict=True):
        cut = LowRank(average.b_OR[:, :rank], average.a_RI[:rank])
        x, state = server_step(x, cut, state, kind=kind, **NUMBERS)
        whole, whole_state = server_step(whole, average, whole_state, kind=kind, **NUMBERS)
        assert x.b_OR.shape == (8, rank)
        assert {
            len(tensor.mT) if "b_" in key else len(tensor) for key, tensor in state.items()
        } == {rank}
    torch.testing.assert_close(x.b_OR[:, :2], whole.b_OR[:, :2])  # never cut, so the same
    torch.testing.assert_close(x.a_RI[:2], whole.a_RI[:2])
    fresh, _ = server_step(
        LowRank(torch.zeros(8, 0).double(), torch.zeros(0, 10).double()),
        LowRank(averages[-1].b_OR[:, 2:4], averages[-1].a_RI[2:4]),
        None,
        kind=kind,
        **NUMBERS,
    )
    torch.testing.assert_close(
        x.b_OR[:, 2:], fresh.b_OR
    )  # cut and grown again: as in a first round
    torch.testing.assert_close(x.a_RI[2:], fresh.a_RI)


@pytest.mark.parametrize("kind", ["fedavgm", "fedadam"])
def test_a_frozen_factor_is_not_moved_by_its_momentum(kind: str) -> None:
    x, state = server_step(factors(0), factors(1), None, kind=kind, **NUMBERS)
    average = LowRank(factors(2).b_OR, x.a_RI)
    moved, after = server_step(x, average, state, kind=kind, trains="B", **NUMBERS)
    assert torch.equal(moved.a_RI, x.a_RI)
    assert not torch.equal(moved.b_OR, average.b_OR)
    for key, tensor in state.items():
        assert torch.equal(tensor, after[key]) == key.startswith("a_")


@pytest.mark.parametrize("kind", ["fedavgm", "fedadam"])
def test_the_state_keeps_the_dtype_and_the_arguments_keep_their_values(kind: str) -> None:
    start, average = factors(0, dtype=torch.float32), factors(1, dtype=torch.float32)
    _, state = server_step(start, average, None, kind=kind, **NUMBERS)
    kept = {key: tensor.clone() for key, tensor in state.items()}
    x, after = server_step(start, average, state, kind=kind, **NUMBERS)
    assert {tensor.dtype for tensor in (x.b_OR, x.a_RI, *after.values())} == {torch.float32}
    assert all(torch.equal(state[key], kept[key]) for key in kept)
    assert torch.equal(start.b_OR, factors(0, dtype=torch.float32).b_OR)


def test_a_step_that_overflows_is_refused() -> None:
    start = factors(0, dtype=torch.float32)
    huge = LowRank(torch.full_like(start.b_OR, 1e30), start.a_RI)
    with pytest.raises(AggregationError, match=r"too large for torch.float32: .*clip_norm"):
        server_step(start, huge, None, kind="fedadam", **NUMBERS)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="'adam' is no server optimizer"):
        server_step(factors(0), factors(1), None, kind="adam", **NUMBERS)
