"""Exact averaging against a dense float64 oracle."""

import itertools

import numpy as np
import pytest
import torch

from federation.adapter import LowRank
from federation.aggregation import AggregationError, average_factors, average_products


def clients(
    ranks: list[int],
    out: int = 40,
    inn: int = 56,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> list[LowRank]:
    """Adapters as they are after some steps: A near a shared start, B small and different."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(max(ranks), inn, generator=generator, dtype=torch.float64)
    return [
        LowRank(
            (0.1 * torch.randn(out, rank, generator=generator, dtype=torch.float64)).to(dtype),
            (
                start[:rank]
                + 0.2 * torch.randn(rank, inn, generator=generator, dtype=torch.float64)
            ).to(dtype),
        )
        for rank in ranks
    ]


def dense_mean(updates: list[LowRank], weights: list[float]) -> np.ndarray:
    total = sum(weights)
    return sum(
        w / total * (u.b_OR.double() @ u.a_RI.double()).numpy()
        for u, w in zip(updates, weights, strict=True)
    )


def dense_best(mean: np.ndarray, rank: int) -> np.ndarray:
    u, s, vh = np.linalg.svd(mean, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def product(factors: LowRank) -> np.ndarray:
    return (factors.b_OR.double() @ factors.a_RI.double()).numpy()


@pytest.mark.parametrize("count", range(1, 17))
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_average_is_the_best_approximation_of_the_mean(count: int, rank: int) -> None:
    ranks = list(itertools.islice(itertools.cycle([4, 2, 8, 1]), count))
    updates = clients(ranks, seed=count)
    weights = [float(10 + 7 * index) for index in range(count)]
    averaged, error = average_products(updates, weights, rank)
    mean = dense_mean(updates, weights)
    expected = dense_best(mean, rank)
    assert averaged.b_OR.shape == (40, rank)
    assert averaged.a_RI.shape == (rank, 56)
    assert np.linalg.norm(product(averaged) - expected) <= 1e-6 * np.linalg.norm(expected)
    tail = np.linalg.norm(mean - expected) / np.linalg.norm(mean)
    assert error == pytest.approx(tail, rel=1e-6, abs=1e-7)


def test_float32_factors_lose_no_more_than_their_own_rounding() -> None:
    updates = clients([16] * 8, out=300, inn=5000, dtype=torch.float32)
    weights = [float(index + 1) for index in range(8)]
    averaged, _ = average_products(updates, weights, 16)
    expected = dense_best(dense_mean(updates, weights), 16)
    assert averaged.b_OR.dtype == torch.float32
    assert np.linalg.norm(product(averaged) - expected) <= 1e-6 * np.linalg.norm(expected)


def test_full_rank_is_exact_where_averaging_factors_is_not() -> None:
    updates, weights = clients([3, 3, 3]), [1.0, 5.0, 2.0]
    mean = dense_mean(updates, weights)
    exact, error = average_products(updates, weights, 9)
    usual, usual_error = average_factors(updates, weights, 3)
    assert np.linalg.norm(product(exact) - mean) <= 1e-12 * np.linalg.norm(mean)
    assert error < 1e-9
    distance = np.linalg.norm(product(usual) - mean) / np.linalg.norm(mean)
    assert distance > 0.1
    assert usual_error == pytest.approx(distance, rel=1e-9)


def test_zero_b_leaves_a_as_it_was() -> None:
    a = torch.randn(4, 56, dtype=torch.float64)
    updates = [LowRank(torch.zeros(40, 4, dtype=torch.float64), a) for _ in range(3)]
    averaged, error = average_products(updates, [1, 2, 3], 4)
    assert not averaged.b_OR.any()
    assert error == 0.0
    torch.testing.assert_close(averaged.a_RI, a)


def test_one_client_gets_its_own_factors_back() -> None:
    (update,) = clients([4])
    averaged, error = average_products([update], [3], 4)
    torch.testing.assert_close(averaged.b_OR, update.b_OR)
    torch.testing.assert_close(averaged.a_RI, update.a_RI)
    assert error < 1e-9


def test_identical_clients_get_their_own_factors_back() -> None:
    (update,) = clients([4])
    averaged, _ = average_products([update] * 5, [1, 2, 3, 4, 5], 4)
    torch.testing.assert_close(averaged.b_OR, update.b_OR, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(averaged.a_RI, update.a_RI, rtol=1e-5, atol=1e-8)


def test_gauge_is_the_mean_a_on_the_kept_row_space() -> None:
    updates, weights = clients([4, 4, 4]), [1.0, 2.0, 3.0]
    averaged, _ = average_products(updates, weights, 4)
    mean_a = sum(w / 6 * u.a_RI for w, u in zip(weights, updates, strict=True)).numpy()
    _, _, vh = np.linalg.svd(dense_mean(updates, weights))
    kept = vh[:4]
    np.testing.assert_allclose(averaged.a_RI.numpy(), mean_a @ kept.T @ kept, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("broken", ["opposite", "one zero", "equal rows", "all zero", "zero a"])
def test_degenerate_updates_stay_finite_and_exact(broken: str) -> None:
    first, second = clients([4, 4])
    if broken == "opposite":  # the mean update is zero, the mean A too
        second = LowRank(first.b_OR, -first.a_RI)
    elif broken == "one zero":
        second = LowRank(torch.zeros_like(second.b_OR), second.a_RI)
    elif broken == "equal rows":
        first = LowRank(first.b_OR, first.a_RI[:1].expand(4, -1))
        second = LowRank(second.b_OR, first.a_RI)
    elif broken == "all zero":
        first = second = LowRank(torch.zeros_like(first.b_OR), torch.zeros_like(first.a_RI))
    else:
        first = LowRank(first.b_OR, torch.zeros_like(first.a_RI))
        second = LowRank(second.b_OR, torch.zeros_like(second.a_RI))
    averaged, error = average_products([first, second], [1, 1], 4)
    expected = dense_best(dense_mean([first, second], [1, 1]), 4)
    assert averaged.b_OR.shape == (40, 4)
    assert averaged.a_RI.shape == (4, 56)
    assert np.isfinite(product(averaged)).all()
    scale = max(float(np.linalg.norm(expected)), 1e-3)
    assert np.linalg.norm(product(averaged) - expected) <= 1e-6 * scale
    assert 0 <= error <= 1


@pytest.mark.parametrize("gauge", [1e-8, 1e-4, 1e4, 1e8])
def test_the_gauge_in_which_a_client_sends_its_update_does_not_matter(gauge: float) -> None:
    updates, weights = clients([4, 4, 4]), [1.0, 2.0, 3.0]
    expected = dense_best(dense_mean(updates, weights), 6)
    first, second, third = updates
    sent = [
        LowRank(first.b_OR * gauge, first.a_RI / gauge),
        LowRank(second.b_OR / gauge, second.a_RI * gauge),
        third,
    ]
    averaged, error = average_products(sent, weights, 6)
    assert np.linalg.norm(product(averaged) - expected) <= 1e-6 * np.linalg.norm(expected)
    mean = dense_mean(updates, weights)
    tail = np.linalg.norm(mean - expected) / np.linalg.norm(mean)
    assert error == pytest.approx(tail, rel=1e-6)


def test_a_client_that_did_not_move_does_not_hide_a_tiny_step_of_another() -> None:
    first, second = clients([4, 4])
    still = LowRank(torch.zeros_like(first.b_OR), first.a_RI)
    tiny = LowRank(second.b_OR * 1e-20, second.a_RI)
    averaged, _ = average_products([still, tiny], [1, 1], 4)
    expected = dense_mean([still, tiny], [1, 1])
    assert np.linalg.norm(product(averaged) - expected) <= 1e-6 * np.linalg.norm(expected)


def test_out_by_in_is_never_allocated() -> None:
    """A 20,000 x 20,000 float32 matrix would be 1.6 GB; the factors here are 6 MB."""
    updates = clients([4] * 4, out=20_000, inn=20_000, dtype=torch.float32)
    dense_numel = 20_000 * 20_000
    largest = 0

    class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for item in result if isinstance(result, tuple | list) else [result]:
                if isinstance(item, torch.Tensor):
                    largest = max(largest, item.numel())
            return result

    with LargestTensor():
        average_products(updates, [1, 1, 1, 1], 4)
    assert 0 < largest <= dense_numel / 1000


def test_impossible_weights_and_shapes_are_refused() -> None:
    updates = clients([2, 2])
    with pytest.raises(AggregationError, match="positive sum"):
        average_products(updates, [0, 0], 2)
    with pytest.raises(AggregationError, match="positive sum"):
        average_products(updates, [3, -1], 2)
    with pytest.raises(AggregationError, match="1 weights for 2 updates"):
        average_products(updates, [1], 2)
    other = LowRank(torch.zeros(41, 2, dtype=torch.float64), updates[0].a_RI)
    with pytest.raises(AggregationError, match="different shapes"):
        average_factors([updates[0], other], [1, 1], 2)
