"""What tests of runs of secure sums share: settings, and servers that are killed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from federation.rounds import run_rounds
from federation.settings import FederationSettings, load_settings
from tests.secure_sites import SecureSites
from tests.simulated import Ticks

TRAINING = {"num_steps": 2, "batch_size": 4, "max_tokens": 64, "dtype": "float32"}
SHORT = TRAINING | {"num_steps": 1}
PRIVATE = SHORT | {"noise_multiplier": 4.0, "record_clip_norm": 0.5}
"""With noise a site may help to open two sums over one adapter: one was lost, say."""
CLIP, RANK = 4e-3, 4
Make = Callable[..., FederationSettings]


def secure_settings(base_model: Path, **changes: Any) -> FederationSettings:
    """Return the settings of a run of four sites; keyword arguments change them and say ``out``."""
    table = {"enabled": True, "threshold": 3, "clip": CLIP, "stage_timeout_s": 5.0}
    values: dict[str, Any] = {
        "base_model": str(base_model),
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


def private_sites(base_model: Path, directory: Path, names: str = "abcd") -> SecureSites:
    """Return sites whose policies let runs with noise in too."""
    limits = {"privacy__max_record_clip_norm": 1.0, "privacy__epsilon": 100.0}
    limits |= {"privacy__one_factor_only": False}
    return SecureSites(base_model, directory, names, **limits)


def run(sites: SecureSites, settings: FederationSettings) -> Path:
    """Run all rounds on a clock of their own."""
    clock = Ticks()
    return run_rounds(sites, settings, clock=clock, sleep=clock.sleep)


def die() -> None:
    """End the server where it stands."""
    raise SystemExit


def once(action: Callable[[], None]) -> Callable[[], None]:
    """Return what acts the first time only."""
    actions = iter([action])

    def act() -> None:
        next(actions, lambda: None)()

    return act
