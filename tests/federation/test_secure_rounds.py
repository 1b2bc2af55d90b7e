"""Rounds that are secure sums, through real trainers, policies and ledgers of four tiny sites."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from federation.adapter import Adapter, read_adapter
from federation.events import SumOpened
from federation.rounds import run_rounds
from federation.settings import FederationSettings, load_settings
from tests.federation.runs import dense, events
from tests.secure_sites import SecureSites
from tests.simulated import Ticks

TRAINING = {"num_steps": 2, "batch_size": 4, "max_tokens": 64, "dtype": "float32"}
CLIP, RANK = 4e-3, 4
BOUND = CLIP / (2**15 - 1) * RANK**0.5
"""On a number of B @ A: each of R numbers of B is rounded by less than a step, and A's rows are
orthonormal."""
Make = Callable[..., FederationSettings]


@pytest.fixture
def settings(tiny_model: Path, tmp_path: Path) -> Make:
    def make(**changes: Any) -> FederationSettings:
        table = {"enabled": True, "threshold": 3, "clip": CLIP, "stage_timeout_s": 5.0}
        values: dict[str, Any] = {
            "base_model": str(tiny_model),
            "out": str(tmp_path / "run"),
            "num_rounds": 1,
            "num_sites": 4,
            "aggregation": "alternating",
            "metrics": "seconds,train_loss",
            "adapter": {"rank": RANK, "alpha": 8.0, "targets": "attention"},
            "training": TRAINING,
            "round_timeout_s": 5.0,
            "secure_sum": table | changes.pop("secure_sum", {}),
        }
        return load_settings(FederationSettings, values | changes, "the test")

    return make


@pytest.fixture
def sites(tiny_model: Path, tmp_path: Path) -> Iterator[SecureSites]:
    with SecureSites(tiny_model, tmp_path / "sites") as made:
        yield made


def run(sites: SecureSites, settings: FederationSettings) -> Path:
    clock = Ticks()
    return run_rounds(sites, settings, clock=clock, sleep=clock.sleep)


def distance(one: Adapter, other: Adapter) -> float:
    """Return the largest difference of a number of the products: QR turns the factors."""
    pairs = [(dense(one.modules[name]), dense(other.modules[name])) for name in one.modules]
    return max(float(np.abs(a - b).max()) for a, b in pairs)


def test_a_secure_round_gives_the_alternating_average(
    settings: Make, sites: SecureSites, tiny_model: Path, tmp_path: Path
) -> None:
    secure = read_adapter(run(sites, settings()))
    (opened,) = events(settings(), SumOpened)
    assert opened.sites == ["a", "b", "c", "d"]
    plain_settings = settings(secure_sum={"enabled": False}, out=str(tmp_path / "plain"))
    open_policy = {
        "aggregation__secure_sum_required": False,
        "aggregation__min_cohort": 1,
    }
    with SecureSites(tiny_model, tmp_path / "open", **open_policy) as others:
        plain = read_adapter(run(others, plain_settings))
    assert 0 < distance(secure, plain) < BOUND
