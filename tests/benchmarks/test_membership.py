import json
import subprocess
import sys
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

from benchmarks.membership import (
    advantage,
    area_under_curve,
    best_threshold,
    make_canaries,
    with_interval,
)
from benchmarks.processes import ROOT
from tests.conftest import write_records


def normal_scores(shift: float, num_pairs: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(7)
    return draw.normal(size=num_pairs) + shift, draw.normal(size=num_pairs)


def test_canaries_are_all_different_and_a_coin_says_which_of_a_pair_is_in() -> None:
    pairs, coins = make_canaries(100, seed=0)
    records = [each for pair in pairs for each in pair]
    assert len({record.prompt for record in records}) == 200
    assert len({record.response for record in records}) == 200
    assert 30 < sum(coins) < 70
    assert make_canaries(100, seed=0) == (pairs, coins)
    assert make_canaries(100, seed=1) != (pairs, coins)


def test_the_area_and_the_advantage_are_those_of_two_normal_distributions() -> None:
    members, others = normal_scores(1.0, 20_000)
    assert area_under_curve(members[:4000], others[:4000]) == pytest.approx(
        NormalDist().cdf(1 / 2**0.5), abs=0.01
    )
    expected = 2 * NormalDist().cdf(0.5) - 1  # at the threshold half way between the means
    assert advantage(members[:4000], others[:4000]) == pytest.approx(expected, abs=0.03)
    assert best_threshold(np.array([3.0, 2.0]), np.array([0.0, 1.0])) == 2.0


def test_an_attack_that_knows_nothing_is_at_chance_within_its_interval() -> None:
    """At a threshold that was best on the same pairs it would seem to know something."""
    members, others = normal_scores(0.0, 100)
    for measure, chance in ((area_under_curve, 0.5), (advantage, 0.0)):
        found = with_interval(measure, members, others)
        low, high = found["interval"]
        assert low <= chance <= high
        assert low <= found["value"] <= high


def test_the_interval_of_an_area_is_as_wide_as_theory_says() -> None:
    members, others = normal_scores(0.5, 100)
    low, high = with_interval(area_under_curve, members, others)["interval"]
    # Hanley and McNeil, Radiology 1982, for area .64 and 100 of each: a standard error of .039.
    assert (high - low) / (2 * 1.96) == pytest.approx(0.039, rel=0.15)


@pytest.mark.slow
def test_the_benchmarks_of_privacy_print_their_figures_as_one_json_line(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data" / "hospital"
    write_records(folder / "train.jsonl", 40)
    write_records(folder / "heldout.jsonl", 8, start=40)
    common = ["--data", str(folder.parent), "--model", str(tiny_model), "--steps", "3"]
    lines = {}
    for name, options in (
        ("private_training", ["--repeats", "1"]),
        ("membership", ["--canaries", "20", "--background", "20", "--rank", "4"]),
    ):
        command = [sys.executable, "-m", f"benchmarks.{name}", *common, *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        (line,) = done.stdout.splitlines()
        lines[name] = json.loads(line)
    assert {
        *("plain_tokens_per_s", "private_tokens_per_s"),
        *("plain_peak_bytes", "private_peak_bytes"),
    } <= lines["private_training"].keys()
    runs = [
        lines["membership"][name] for name in ("not private", "epsilon 8", "epsilon 2", "control")
    ]
    assert all(run["gain"]["advantage"].keys() == {"value", "interval"} for run in runs)
    assert runs[1]["noise_multiplier"] < runs[2]["noise_multiplier"]
