import argparse
from pathlib import Path

import pytest

from benchmarks.private_training import measure_rounds


def test_a_trainer_that_ends_at_its_start_ends_the_measurement_with_its_error(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = argparse.Namespace(model=tiny_model, rounds=2, round_steps=1, batch_size=4, factors="B")
    with pytest.raises(RuntimeError, match="the trainer ended with 2 before it could be asked"):
        measure_rounds(asked, tmp_path / "nothing.jsonl")
    assert "nothing.jsonl" in capfd.readouterr().err
