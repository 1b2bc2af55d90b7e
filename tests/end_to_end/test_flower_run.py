"""`flwr run .` as a user types it: a SuperLink, two simulated sites, a tiny model."""

import subprocess
import sys
from pathlib import Path

import pytest

from federation.adapter import read_adapter
from federation.status import summarise
from tests.conftest import write_records, write_tiny_model
from tests.simulation import simulation

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_simulated_federation_through_a_real_superlink(tmp_path: Path) -> None:
    from processes import environment

    base = write_tiny_model(tmp_path / "base")
    for name in ("bank", "clinic"):
        write_records(tmp_path / "sites" / name / "train.jsonl", 30, topic=name)
    config = (
        f'base_model="{base}" out="{tmp_path / "run"}" simulated_sites="{tmp_path / "sites"}" '
        'num_rounds=2 num_sites=2 adapter.rank=4 training.num_steps=2 training.dtype="float32" '
        "training.max_tokens=64"
    )
    home = tmp_path / "flower"
    with simulation(home):
        subprocess.run(
            [Path(sys.executable).parent / "flwr", "run", str(ROOT), "--stream",
             "--federation-config", "num-supernodes=2 client-resources-num-cpus=1", "-c", config],
            env=environment({"FLWR_HOME": str(home)}),
            check=True,
            timeout=300,
        )  # fmt: skip
    summary = summarise(tmp_path / "run" / "events.jsonl")
    assert summary["state"] == "finished"
    names = [sorted(site["name"] for site in row["sites"]) for row in summary["rounds"]]
    assert names == [["bank", "clinic"]] * 2
    assert read_adapter(tmp_path / "run" / "adapter").rank == 4
