from statistics import NormalDist

import numpy as np
import pytest

from client.randomness import RandomStream


def test_the_stream_is_aes_256_in_counter_mode() -> None:
    """The first block of a zero key: AES-256 of a zero block, NIST's AESAVS, appendix B."""
    words = RandomStream(bytes(32))._words(2)
    assert words.tobytes().hex() == "dc95c078a2408989ad48a21492842087"


def test_a_stream_never_repeats_and_without_a_key_nobody_can_repeat_it() -> None:
    stream = RandomStream(b"k" * 32)
    first, second = stream.normal(1000), stream.normal(1000)
    assert not np.intersect1d(first, second).size
    again = RandomStream(b"k" * 32)
    assert np.array_equal(
        np.concatenate([again.normal(1000), again.normal(1000)]), [*first, *second]
    )
    assert not np.array_equal(RandomStream().normal(10), RandomStream().normal(10))


def test_a_poisson_sample_takes_each_item_alone_with_its_rate() -> None:
    stream, num_items, num_draws, rate = RandomStream(b"p" * 32), 40, 5000, 0.15
    is_in = np.zeros((num_draws, num_items))
    for draw in range(num_draws):
        is_in[draw, stream.chosen(num_items, rate)] = 1
    deviation = (rate * (1 - rate) / num_draws) ** 0.5
    assert np.abs(is_in.mean(axis=0) - rate).max() < 4.5 * deviation
    # Independent items: the size of a sample has a binomial's variance, and no pair is correlated.
    expected = num_items * rate * (1 - rate)
    assert is_in.sum(axis=1).var() == pytest.approx(expected, rel=0.1)
    correlation = np.corrcoef(is_in.T) - np.eye(num_items)
    assert np.abs(correlation).max() < 5 / num_draws**0.5


@pytest.mark.parametrize(("rate", "count"), [(1.0, 1000), (1e-30, 0)])
def test_the_ends_of_the_rate_take_all_and_nothing(rate: float, count: int) -> None:
    assert len(RandomStream().chosen(1000, rate)) == count


def test_normal_numbers_have_the_normal_distribution() -> None:
    drawn = np.sort(RandomStream(b"n" * 32).normal(200_001))
    assert len(drawn) == 200_001
    expected = np.array([NormalDist().cdf(x) for x in drawn[::100]])
    steps = np.arange(0, len(drawn), 100) / len(drawn)
    # Kolmogorov's bound: exceeded with probability 2 exp(-2 * 1.95**2) = .001.
    assert np.abs(expected - steps).max() < 1.95 / len(drawn) ** 0.5
    assert (drawn**4).mean() == pytest.approx(3.0, abs=0.05)


def test_a_number_has_nothing_to_do_with_its_neighbour() -> None:
    drawn = RandomStream(b"c" * 32).normal(100_000)
    for distance in (1, 50_000 - 1, 50_000):  # 50 000: the other one of its pair
        here, there = drawn[: len(drawn) - distance], drawn[distance:]
        assert abs(np.corrcoef(here, there)[0, 1]) < 5 / len(here) ** 0.5
        assert abs(np.corrcoef(here**2, there**2)[0, 1]) < 5 / len(here) ** 0.5
