from pathlib import Path

import pytest

from federation.settings import FederationSettings, load_settings
from tests.federation.runs import Settings


@pytest.fixture
def settings(tiny_model: Path, tmp_path: Path) -> Settings:
    """Return a maker of settings: keyword arguments change the default run of three sites."""

    def make(**changes: object) -> FederationSettings:
        values: dict[str, object] = {
            "base_model": str(tiny_model),
            "out": str(tmp_path / "run"),
            "num_rounds": 2,
            "num_sites": 3,
            "adapter": {"rank": 4, "alpha": 8.0},
            "round_timeout_s": 5.0,
        }
        return load_settings(FederationSettings, values | changes, "the test")

    return make
