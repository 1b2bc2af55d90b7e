"""Exact averaging against a dense float64 oracle."""

import itertools

import numpy as np
import pytest
import torch

from federation.adapter import LowRank
from federation.aggregation import (
    AggregationError,
    average_factors,
    average_products,
    products,
)


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
    average = average_products(updates, weights, rank)
    mean = dense_mean(updates, weights)
    expected = dense_best(mean, rank)
    assert average.factors.b_OR.shape == (40, rank)
    assert average.factors.a_RI.shape == (rank, 56)
    assert np.linalg.norm(product(average.factors) - expected) <= 1e-6 * np.linalg.norm(expected)
    tail = np.linalg.norm(mean - expected) / np.linalg.norm(mean)
    assert average.error == pytest.approx(tail, rel=1e-6, abs=1e-7)


def test_float32_factors_lose_no_more_than_their_own_rounding() -> None:
    updates = clients([16] * 8, out=300, inn=5000, dtype=torch.float32)
    weights = [float(index + 1) for index in range(8)]
    average = average_products(updates, weights, 16)
    expected = dense_best(dense_mean(updates, weights), 16)
    assert average.factors.b_OR.dtype == torch.float32
    assert np.linalg.norm(product(average.factors) - expected) <= 1e-6 * np.linalg.norm(expected)


def test_full_rank_is_exact_where_averaging_factors_is_not() -> None:
    updates, weights = clients([3, 3, 3]), [1.0, 5.0, 2.0]
    mean = dense_mean(updates, weights)
    average = average_products(updates, weights, 9)
    usual, usual_error = average_factors(updates, weights, 3)
    assert np.linalg.norm(product(average.factors) - mean) <= 1e-12 * np.linalg.norm(mean)
    assert average.error < 1e-9
    distance = np.linalg.norm(product(usual) - mean) / np.linalg.norm(mean)
    assert distance > 0.1
    assert usual_error == pytest.approx(distance, rel=1e-9)


def test_zero_b_leaves_a_as_it_was() -> None:
    a = torch.randn(4, 56, dtype=torch.float64)
    updates = [LowRank(torch.zeros(40, 4, dtype=torch.float64), a) for _ in range(3)]
    average = average_products(updates, [1, 2, 3], 4)
    assert not average.factors.b_OR.any()
    assert average.error == 0.0
    torch.testing.assert_close(average.factors.a_RI, a)


def test_one_client_gets_its_own_factors_back() -> None:
    (update,) = clients([4])
    average = average_products([update], [3], 4)
    torch.testing.assert_close(average.factors.b_OR, update.b_OR)
    torch.testing.assert_close(average.factors.a_RI, update.a_RI)
    assert average.error < 1e-9


def test_identical_clients_get_their_own_factors_back() -> None:
    (update,) = clients([4])
    average = average_products([update] * 5, [1, 2, 3, 4, 5], 4)
    torch.testing.assert_close(average.factors.b_OR, update.b_OR, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(average.factors.a_RI, update.a_RI, rtol=1e-5, atol=1e-8)


def test_gauge_is_the_mean_a_on_the_kept_row_space() -> None:
    updates, weights = clients([4, 4, 4]), [1.0, 2.0, 3.0]
    average = average_products(updates, weights, 4)
    mean_a = sum(w / 6 * u.a_RI for w, u in zip(weights, updates, strict=True)).numpy()
    _, _, vh = np.linalg.svd(dense_mean(updates, weights))
    kept = vh[:4]
    np.testing.assert_allclose(
        average.factors.a_RI.numpy(), mean_a @ kept.T @ kept, rtol=1e-8, atol=1e-10
    )


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
    average = average_products([first, second], [1, 1], 4)
    expected = dense_best(dense_mean([first, second], [1, 1]), 4)
    assert average.factors.b_OR.shape == (40, 4)
    assert average.factors.a_RI.shape == (4, 56)
    assert np.isfinite(product(average.factors)).all()
    scale = max(float(np.linalg.norm(expected)), 1e-3)
    assert np.linalg.norm(product(average.factors) - expected) <= 1e-6 * scale
    assert 0 <= average.error <= 1


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
    average = average_products(sent, weights, 6)
    assert np.linalg.norm(product(average.factors) - expected) <= 1e-6 * np.linalg.norm(expected)
    mean = dense_mean(updates, weights)
    tail = np.linalg.norm(mean - expected) / np.linalg.norm(mean)
    assert average.error == pytest.approx(tail, rel=1e-6)


def test_a_client_that_did_not_move_does_not_hide_a_tiny_step_of_another() -> None:
    first, second = clients([4, 4])
    still = LowRank(torch.zeros_like(first.b_OR), first.a_RI)
    tiny = LowRank(second.b_OR * 1e-20, second.a_RI)
    average = average_products([still, tiny], [1, 1], 4)
    expected = dense_mean([still, tiny], [1, 1])
    assert np.linalg.norm(product(average.factors) - expected) <= 1e-6 * np.linalg.norm(expected)


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


def trained(count: int, drift: float, seed: int = 0) -> list[LowRank]:
    """Float32 adapters of sites that hardly moved from a shared start: B too is nearly the same."""
    generator = torch.Generator().manual_seed(seed)
    b, a = torch.randn(60, 8, generator=generator), torch.randn(8, 90, generator=generator)
    return [
        LowRank(
            b + drift * torch.randn(60, 8, generator=generator),
            a + drift * torch.randn(8, 90, generator=generator),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("drift", [0.3, 1e-2, 1e-4, 1e-6, 0.0])
@pytest.mark.parametrize("rank", [4, 8, 16])
def test_sites_that_hardly_moved_are_averaged_exactly(drift: float, rank: int) -> None:
    updates, weights = trained(6, drift), [3.0, 1.0, 2.0, 5.0, 1.0, 1.0]
    average = average_products(updates, weights, rank)
    expected = dense_best(dense_mean(updates, weights), rank)
    distance = np.linalg.norm(product(average.factors) - expected)
    assert distance <= 1e-6 * np.linalg.norm(expected)


def test_real_drift_needs_no_float64_products() -> None:
    """Sites a few percent apart are the usual case; it must be the fast one."""
    stack = products._stacked(trained(6, 0.03), [1.0] * 6, None, by_slice=True)
    assert not products.spectrum(stack).is_wide
    still = products._stacked(trained(6, 0.0), [1.0] * 6, None, by_slice=True)
    assert products.spectrum(still).is_wide


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_average_and_tail_together_are_the_whole_mean(dtype: torch.dtype) -> None:
    updates, weights = clients([4, 4, 4], dtype=dtype), [1.0, 2.0, 3.0]
    mean = dense_mean(updates, weights)
    average = average_products(updates, weights, 4, tail_rank=8)
    both = product(average.factors) + product(average.tail)
    assert np.linalg.norm(both - mean) <= 1e-6 * np.linalg.norm(mean)
    tail_norm = np.linalg.norm(product(average.tail)) / np.linalg.norm(mean)
    assert average.error == pytest.approx(tail_norm, rel=1e-5)
    short = average_products(updates, weights, 4, tail_rank=3)
    assert short.tail.a_RI.shape == (3, 56)
    expected = dense_best(mean, 7)
    both = product(short.factors) + product(short.tail)
    assert np.linalg.norm(both - expected) <= 1e-6 * np.linalg.norm(expected)


def test_a_tail_is_added_to_the_next_mean_in_full() -> None:
    updates, weights = clients([4, 4, 4]), [1.0, 2.0, 3.0]
    tail = clients([6], seed=9)[0]
    average = average_products(updates, weights, 18, tail=tail)
    expected = dense_mean(updates, weights) + product(tail)
    assert np.linalg.norm(product(average.factors) - expected) <= 1e-9 * np.linalg.norm(expected)


def test_nothing_is_lost_over_rounds_of_cuts_with_tails() -> None:
    """What is served plus what is carried is the sum of all that the sites ever asked for."""
    tail, asked, served = None, 0.0, 0.0
    for server_round in range(5):
        updates = clients([4, 4], seed=server_round)
        average = average_products(updates, [1.0, 1.0], 4, tail=tail, tail_rank=40)
        asked = asked + dense_mean(updates, [1.0, 1.0])
        served = served + product(average.factors)
        tail = average.tail
    missing = np.linalg.norm(served + product(tail) - asked)
    assert missing <= 1e-9 * np.linalg.norm(asked)
    assert np.linalg.norm(served - asked) > 0.1 * np.linalg.norm(asked)


def test_slices_count_by_the_clients_that_have_them_where_padding_shrinks_them() -> None:
    start = clients([8])[0]
    held = [LowRank(start.b_OR[:, :rank], start.a_RI[:rank]) for rank in (2, 8)]
    by_slice = padded = held
    for _ in range(5):
        kept = average_products(by_slice, [1, 1], 8, by_slice=True).factors
        by_slice = [LowRank(kept.b_OR[:, :rank], kept.a_RI[:rank]) for rank in (2, 8)]
        shrunk = average_products(padded, [1, 1], 8).factors
        padded = [LowRank(shrunk.b_OR[:, :rank], shrunk.a_RI[:rank]) for rank in (2, 8)]
    np.testing.assert_allclose(product(kept), product(start), rtol=1e-9, atol=1e-12)
    high = product(LowRank(shrunk.b_OR[:, 2:], shrunk.a_RI[2:]))
    before = product(LowRank(start.b_OR[:, 2:], start.a_RI[2:]))
    assert np.linalg.norm(high) < 0.1 * np.linalg.norm(before)


def test_a_rank_that_grew_gets_rows_of_the_size_of_the_others() -> None:
    updates = clients([4] * 4)
    average = average_products(updates, [1.0] * 4, 10)
    norms = average.factors.a_RI.norm(dim=1)
    assert float(norms[4:].min()) > 0.1 * float(norms[:4].min())
    expected = dense_best(dense_mean(updates, [1.0] * 4), 10)
    assert np.linalg.norm(product(average.factors) - expected) <= 1e-9 * np.linalg.norm(expected)


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_a_first_site_in_another_gauge_takes_no_digits_from_the_others(size: float) -> None:
    first, *others = trained(4, 0.05)
    sent = [LowRank(first.b_OR / size, first.a_RI * size), *others]
    average = average_products(sent, [1.0] * 4, 8)
    expected = dense_best(dense_mean([first, *others], [1.0] * 4), 8)
    distance = np.linalg.norm(product(average.factors) - expected)
    assert distance <= 1e-6 * np.linalg.norm(expected)
