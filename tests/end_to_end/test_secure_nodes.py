"""Secure sums over resident nodes and a stock SuperNode, on a real SuperLink over TLS, with kills.

The same sites in this process are the oracle: keys and masks are drawn anew, and they vanish.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from client.identity import new_identity, public_identity
from client.ledger import LEDGER, read_ledger
from federation.events import SumOpened, read_events
from federation.rounds import run_rounds
from federation.settings import FederationSettings, load_settings
from federation.status import summarise
from tests.conftest import write_records, write_tiny_model
from tests.end_to_end.test_resident_nodes import (
    Institution,
    assert_same,
    is_finished,
    new_institution,
    submit,
)
from tests.policies import policy_text
from tests.secure_sites import NUM_RECORDS, SecureSites

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "deployment"))

from topology import Deployment, deployment

pytestmark = pytest.mark.slow
NAMES = "abcd"
SETTINGS: dict[str, Any] = {
    "num_sites": 4,
    "quorum": 1,
    "round_timeout_s": 300.0,
    "aggregation": "alternating",
    "metrics": "",
    "wire.uplink": "float32",
    "wire.downlink": "float32",
    "adapter.rank": 4,
    "training.num_steps": 2,
    "training.batch_size": 4,
    "training.dtype": "float32",
    "training.max_tokens": 64,
    "secure_sum.enabled": True,
    "secure_sum.clip": 4e-3,
    "secure_sum.stage_timeout_s": 120.0,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    write_tiny_model(directory / "base")
    for index, name in enumerate(NAMES):  # as `SecureSites` has them
        write_records(directory / f"{name}.jsonl", NUM_RECORDS, topic=name, start=100 * index)
    return directory


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployment(tmp_path_factory.mktemp("deployment"), [], Console(stderr=True)) as running:
        yield running


@pytest.fixture(scope="module")
def institutions(made: Deployment, inputs: Path) -> Iterator[list[Institution]]:
    """Four sites; the last runs a stock SuperNode beside its trainer."""
    root = Path(tempfile.mkdtemp(prefix="fedge-"))
    keys = [new_identity(root / name / "identity") for name in NAMES]
    policy = policy_text(
        traffic__uplink=["float32"],
        aggregation__kinds=["alternating"],
        aggregation__cohort=[public_identity(key) for key in keys],
        privacy__required=False,
    )
    sites = []
    for name in NAMES:
        node = "supernode" if name == NAMES[-1] else "resident"
        more = {"identity_key": "identity", "node": node, "allow_same_user": True}
        sites.append(new_institution(made, inputs, root / name, policy, **more))
    made.services.wait_until(lambda: made.num_online() == 4, "the connection of all", 240)
    yield sites
    made.services.end([site.program for site in sites])
    shutil.rmtree(root)


def expected(inputs: Path, directory: Path, num_rounds: int) -> Path:
    """Return the adapter of the same sites in this process."""
    values = SETTINGS | {
        "base_model": str(inputs / "base"),
        "out": str(directory / "oracle"),
        "num_rounds": num_rounds,
    }
    limits = {"metrics__digits": 3}
    with SecureSites(inputs / "base", directory / "sites", NAMES, **limits) as sites:
        return run_rounds(sites, load_settings(FederationSettings, values, "the test"))


def opened(out: Path) -> list[SumOpened]:
    return [event for _, event in read_events(out / "events.jsonl") if isinstance(event, SumOpened)]


def assert_charged_once(institutions: list[Institution], out: Path, rounds: list[int]) -> None:
    run = json.loads((out / "run.json").read_text())["run"]
    for site in institutions:
        rows = [r for r in read_ledger(site.directory / "state" / LEDGER).rows if r.run == run]
        assert {(row.stage, row.steps > 0) for row in rows} == {
            ("trained", True),
            ("secure", False),
        }
        assert [row.server_round for row in rows if row.steps] == rounds


def count_stage(site: Institution, stage: str) -> int:
    return sum(row["event"] == "answered" and row.get("stage") == stage for row in site.events())


def test_kills_of_sites_between_the_stages_change_no_bit_of_the_sum(
    made: Deployment, institutions: list[Institution], inputs: Path, tmp_path: Path
) -> None:
    run = submit(made, inputs, tmp_path / "run", 2, **SETTINGS)
    for site, stage, kill in [
        (institutions[0], "share", institutions[0].kill_daemon),
        (institutions[1], "mask", institutions[1].kill_trainer),
        (institutions[2], "advertise", institutions[2].kill_daemon),
    ]:
        before = count_stage(site, stage)
        made.services.wait_until(
            lambda site=site, stage=stage, before=before: (
                count_stage(site, stage) > before or is_finished(made, run)
            ),
            f"stage {stage} of {site.name}",
            400,
        )
        kill()
    made.services.wait_until(lambda: is_finished(made, run), "the end of the run", 500)
    summary = summarise(tmp_path / "run" / "events.jsonl")
    assert (summary["state"], summary["failures"]) == ("finished", []), summary
    assert [len(event.sites) for event in opened(tmp_path / "run")] == [4, 4]
    assert_same(tmp_path / "run" / "adapter", expected(inputs, tmp_path, 2))
    assert_charged_once(institutions, tmp_path / "run", [1, 2])


def test_a_killed_serverapp_gives_the_attempt_up_and_the_next_one_has_another_number(
    made: Deployment, institutions: list[Institution], inputs: Path, tmp_path: Path
) -> None:
    site = institutions[0]
    before = count_stage(site, "advertise")
    run = submit(made, inputs, tmp_path / "run", 1, **SETTINGS)
    made.services.wait_until(lambda: count_stage(site, "advertise") > before, "the first keys", 300)
    (server_app,) = [
        process
        for process in psutil.Process(made.services.pid("superexec")).children()
        if any("flwr-serverapp" in word for word in process.cmdline())
    ]
    server_app.kill()
    made.services.wait_until(lambda: is_finished(made, run), "the end of the run", 240)
    attempts = [event.attempt for event in opened(tmp_path / "run")]
    again = submit(made, inputs, tmp_path / "run", 1, **SETTINGS, resume=str(tmp_path / "run"))
    made.services.wait_until(lambda: is_finished(made, again), "the end of the resumed run", 400)
    assert summarise(tmp_path / "run" / "events.jsonl")["state"] == "finished"
    attempts += [event.attempt for event in opened(tmp_path / "run")]
    assert attempts in ([2], [1], [1, 1])  # where it was killed: before the last stage, or in it
    assert_same(tmp_path / "run" / "adapter", expected(inputs, tmp_path, 1))
    assert_charged_once(institutions, tmp_path / "run", [1])
