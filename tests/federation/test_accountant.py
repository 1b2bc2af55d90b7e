import math
import subprocess
import sys

import numpy as np
import pytest

from federation.accountant import (
    MOST_NOISE,
    ORDERS,
    BudgetError,
    PrivacyEvent,
    divergence_of_step,
    epsilon_of,
    noise_for,
)


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "delta", "published"),
    [
        # opacus 1.6, tests/accountants_test.py, test_rdp_accountant.
        (1.5, 0.04, 2250, 1e-5, 7.32911117143),
        # TensorFlow Privacy, analysis/compute_dp_sgd_privacy_test.py: Test0, Test1 (60 000 records
        # in batches of 150 for 15 epochs; 100 000 in batches of 100 for 30 epochs) ...
        (1.3, 150 / 60_000, 6000, 1e-5, 0.7242234026109595),
        (1.0, 100 / 100_000, 30_000, 1e-7, 1.4154988495444842),
        # ... no_microbatching_no_subsampling_rdp and no_microbatching_with_subsampling_rdp ...
        (0.7, 1.0, 2, 1e-5, 10.8602036),
        (0.7, 0.01, 120, 1e-5, 3.2392676),
        # ... and the printed statement: 10 000 records in batches of 64 for 5 epochs with noise 2
        # and microbatches, which double the sensitivity.
        (1.0, 64 / 10_000, 782, 1e-6, 1.616),
        # google/differential-privacy, dp_accounting/rdp/rdp_privacy_accountant_test.py: the noise
        # that gives one Gaussian step exactly (1, 1e-6).
        (4.530877117, 1.0, 1, 1e-6, 1.0),
    ],
)
def test_epsilon_is_the_published_one_to_one_percent(noise, rate, steps, delta, published):
    assert epsilon_of([PrivacyEvent(noise, rate, steps)], delta) == pytest.approx(
        published, rel=0.01
    )


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "published"),
    [
        # Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, section 3.2 and 5:
        # q = 0.01, sigma = 4, 10 000 steps (100 epochs), the moments accountant.
        (4.0, 0.01, 10_000, 1.26),
        # TensorFlow Privacy's MNIST tutorial, in batches of 250 of 60 000, 15 epochs.
        (1.3, 250 / 60_000, 3600, 1.18),
        # tensorflow/privacy, tutorials/README.md: batches of 256 of 60 000; 60, 30, 10 epochs.
        (1.12, 256 / 60_000, 14_063, 2.92),
        (0.6, 256 / 60_000, 7032, 9.74),
        (1.2, 256 / 60_000, 2344, 1.20),
        # Bu et al., "Deep Learning with Gaussian Differential Privacy", HDSR 2020, figure 4:
        # the moments accountant after 20 and 70 epochs.
        (1.3, 256 / 60_000, 4688, 1.34),
        (0.7, 256 / 60_000, 16_407, 8.68),
    ],
)
def test_our_divergence_with_the_older_conversion_gives_the_older_papers_epsilon(
    noise, rate, steps, published
):
    # Until 2020 the field went from Rényi to (epsilon, delta) by Mironov's proposition 3, which is
    # looser; the divergences are the same.
    orders = np.array(ORDERS)
    divergence = steps * divergence_of_step(noise, rate)
    older = (divergence + math.log(1e5) / (orders - 1)).min()
    assert older == pytest.approx(published, rel=0.01)
    assert epsilon_of([PrivacyEvent(noise, rate, steps)], 1e-5) < older


@pytest.mark.parametrize(
    ("rate", "noise"),
    [(0.01, 2.5), (0.04, 1.5), (0.5, 0.7), (0.9, 5.0), (1e-4, 1.0), (1.0, 1.3), (0.2, 0.2)],
)
def test_the_divergence_is_the_integral_that_defines_it(rate, noise):
    x = np.linspace(-40 * noise, 64 + 40 * noise, 400_001)  # trapezoids: exact for smooth tails
    log_p = -(x**2) / (2 * noise**2) - math.log(noise * math.sqrt(2 * math.pi))
    with np.errstate(divide="ignore"):
        log_ratio = np.logaddexp(
            np.log1p(-rate) if rate < 1 else -np.inf,
            math.log(rate) + (2 * x - 1) / (2 * noise**2),
        )
    for order in (1.1, 1.5, 2.0, 3.3, 8.0, 31.0):
        logs = log_p + order * log_ratio
        top = logs.max()
        integral = math.log(np.trapezoid(np.exp(logs - top), x)) + top
        ours = divergence_of_step(noise, rate)[ORDERS.index(order)]
        assert ours == pytest.approx(integral / (order - 1), rel=1e-6, abs=1e-11)


def test_the_divergence_is_that_of_dp_accounting():
    # google/differential-privacy, rdp_privacy_accountant_test.py,
    # test_compute_rdp_poisson_sampled_gaussian, 50 steps. It bounds the orders that are no whole
    # numbers by their neighbours; ours are the integrals themselves (the test above).
    ours = {order: 50 * divergence_of_step(2.5, 0.01)[ORDERS.index(order)] for order in ORDERS}
    assert [ours[5], ours[50]] == pytest.approx([2.18075656e-03, 2.38460375e-02])
    assert 0.96 * 6.70579741e-04 < ours[1.5] < 6.70579741e-04
    assert 0.99 * 1.08548710e-03 < ours[2.5] < 1.08548710e-03


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "tight", "most"),
    [
        # The numerical PRV accountant of Gopi et al. (arXiv:2106.02848), delta 1e-6, as
        # opacus/tests/prv_accountant.py has it from github.com/microsoft/prv_accountant.
        (0.8, 0.001, 1000, 0.4777712661, 3.1),
        (3.0, 0.001, 50_000, 0.3096941611, 1.12),
        (1.5, 0.05, 100, 1.9538531356, 1.16),
        (1.5, 0.05, 20_000, 38.306617914, 1.12),
        (2.0, 0.2, 100, 5.6720556088, 1.12),
        (0.8, 0.2, 100, 24.333664177, 1.12),
    ],
)
def test_epsilon_is_never_below_the_tight_one(noise, rate, steps, tight, most):
    ours = epsilon_of([PrivacyEvent(noise, rate, steps)], 1e-6)
    assert tight <= ours <= most * tight


def test_nothing_spent_is_zero_and_no_noise_is_infinite():
    assert epsilon_of([], 1e-5) == 0
    assert epsilon_of([PrivacyEvent(0, 0.1, 0), PrivacyEvent(0, 0, 8)], 1e-5) == 0
    assert epsilon_of([PrivacyEvent(1.0, 0.1, 5), PrivacyEvent(0, 0.1, 1)], 1e-5) == math.inf
    assert epsilon_of([PrivacyEvent(1e-9, 1e-9, 1)], 1e-5) == math.inf


def test_different_events_add_up_in_any_order_and_in_any_cut():
    a, b = PrivacyEvent(1.1, 0.02, 300), PrivacyEvent(2.0, 1.0, 3)
    cut = [PrivacyEvent(1.1, 0.02, 100), b, PrivacyEvent(1.1, 0.02, 200)]
    assert epsilon_of([a, b], 1e-5) == epsilon_of(cut, 1e-5) == epsilon_of([b, a], 1e-5)
    orders = np.array(ORDERS)
    total = 300 * divergence_of_step(1.1, 0.02) + 3 * divergence_of_step(2.0, 1.0)
    by_hand = total + np.log1p(-1 / orders) - (math.log(1e-5) + np.log(orders)) / (orders - 1)
    assert epsilon_of([a, b], 1e-5) == pytest.approx(by_hand.min())
    assert epsilon_of([a, b], 1e-5) > max(epsilon_of([a], 1e-5), epsilon_of([b], 1e-5))


def test_epsilon_grows_with_rate_and_steps_and_falls_with_noise_and_delta():
    base = epsilon_of([PrivacyEvent(1.0, 0.05, 100)], 1e-5)
    assert epsilon_of([PrivacyEvent(1.0, 0.06, 100)], 1e-5) > base
    assert epsilon_of([PrivacyEvent(1.0, 0.05, 101)], 1e-5) > base
    assert epsilon_of([PrivacyEvent(1.1, 0.05, 100)], 1e-5) < base
    assert epsilon_of([PrivacyEvent(1.0, 0.05, 100)], 1e-4) < base


def test_the_ends_of_the_ranges_give_bounds_and_no_errors():
    for rate in (1e-12, 1e-6, 0.01, 0.99, 1.0):
        previous = math.inf
        for noise in (0.01, 0.3, 2.0, 100.0, MOST_NOISE, 1e9):
            epsilon = epsilon_of([PrivacyEvent(noise, rate, 10)], 1e-6)
            assert 0 <= epsilon <= previous
            previous = epsilon
    # Many steps are one Gaussian of mu = rate * sqrt(steps) / noise: 0.01 and 3.2 of it.
    few = epsilon_of([PrivacyEvent(100.0, 0.1, 100)], 1e-6)
    many = epsilon_of([PrivacyEvent(100.0, 0.1, 10_000_000)], 1e-6)
    assert 0 < few < 0.1
    assert 10 < many < 40
    assert epsilon_of([PrivacyEvent(1.0, 1e-9, 10**9)], 1e-6) < 0.3


def test_noise_for_meets_the_target_closely_and_from_below():
    # opacus 1.6, tests/accountants_test.py, test_get_noise_multiplier_rdp_epochs and _steps; its
    # tolerance is 0.01 of epsilon.
    assert noise_for(8, 1e-5, 0.04, 2250) == pytest.approx(1.416, rel=0.002)
    noise = noise_for(8, 1e-5, 0.04, 2000)
    assert noise == pytest.approx(1.3562, rel=0.002)
    assert epsilon_of([PrivacyEvent(noise, 0.04, 2000)], 1e-5) <= 8
    assert epsilon_of([PrivacyEvent(noise * 0.998, 0.04, 2000)], 1e-5) > 8


def test_noise_for_counts_what_was_spent_before():
    before = [PrivacyEvent(1.0, 0.01, 500)]
    noise = noise_for(3, 1e-5, 0.02, 400, before)
    assert noise > noise_for(3, 1e-5, 0.02, 400)
    assert epsilon_of([*before, PrivacyEvent(noise, 0.02, 400)], 1e-5) <= 3
    with pytest.raises(BudgetError, match=r"epsilon .* of 1 .* is spent"):
        noise_for(1, 1e-5, 0.02, 400, before)
    with pytest.raises(BudgetError, match="epsilon inf of 8"):
        noise_for(8, 1e-5, 0.02, 400, [PrivacyEvent(0, 0.5, 1)])
    assert noise_for(1e9, 1e-5, 0.02, 4) < 0.01


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: PrivacyEvent(math.nan, 0.1, 1),
        lambda: PrivacyEvent(math.inf, 0.1, 1),
        lambda: PrivacyEvent(-1, 0.1, 1),
        lambda: PrivacyEvent(1, 1.1, 1),
        lambda: PrivacyEvent(1, math.nan, 1),
        lambda: PrivacyEvent(1, 0.1, -1),
        lambda: PrivacyEvent(1, 0.1, 1.5),
        lambda: epsilon_of([], 0),
        lambda: epsilon_of([], math.nan),
        lambda: noise_for(0, 1e-5, 0.1, 1),
        lambda: noise_for(math.inf, 1e-5, 0.1, 1),
        lambda: noise_for(1, 1e-5, 0, 1),
        lambda: noise_for(1, 1e-5, 0.1, 0),
    ],
)
def test_a_number_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        wrong()


def test_the_import_is_light():
    code = (
        "import sys, federation.accountant; print({'torch', 'numpy', 'opacus'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
