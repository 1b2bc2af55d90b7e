"""A real deployment: SuperLink, SuperExec, nginx, stock SuperNodes and daemons over TLS, tiny."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from federation.adapter import read_adapter
from federation.status import summarise
from tests.conftest import write_records, write_tiny_model

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "deployment"))

from topology import CONNECTION, Deployment, Site, deployment, start_superlink

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "deployment"
pytestmark = pytest.mark.slow

TINY = 'adapter.rank=4 training.num_steps=2 training.dtype="float32" training.max_tokens=64'


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model and the text of two sites."""
    directory = tmp_path_factory.mktemp("inputs")
    write_tiny_model(directory / "base")
    for name in ("bank", "clinic"):
        write_records(directory / f"{name}.jsonl", 30, topic=name)
    return directory


@pytest.fixture(scope="module")
def made(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """One deployment with two sites for the tests that share it."""
    sites = [
        Site(
            name,
            f'data="{inputs / name}.jsonl" base_model="{inputs / "base"}" name="{name}"',
        )
        for name in ("bank", "clinic")
    ]
    home = tmp_path_factory.mktemp("deployment")
    with deployment(home, sites, Console(stderr=True)) as running:
        yield running


def start_run(made: Deployment, inputs: Path, out: Path) -> str:
    """Submit a run of three rounds and return its id; it goes on by itself."""
    return submit(
        made,
        f'base_model="{inputs / "base"}" out="{out}" num_rounds=3 num_sites=2 '
        f"round_timeout_s=120 {TINY}",
    )


def submit(made: Deployment, config: str) -> str:
    """Submit a run with these settings and return its id."""
    command = ["flwr", "run", str(ROOT), CONNECTION, "-c", config, "--format", "json"]
    started = made.services.call(command, made.variables("coordinator"))
    return str(started["run-id"])


def status_of_run(made: Deployment, run: str) -> str:
    """Return what Flower says of a run: "running", "finished:completed", …"""
    (status,) = {row["status"] for row in made.flwr("ls")["runs"] if row["run-id"] == run}
    return str(status)


def test_three_rounds_complete(made: Deployment, inputs: Path, tmp_path: Path) -> None:
    run = start_run(made, inputs, tmp_path / "run")
    made.services.wait_until(
        lambda: status_of_run(made, run).startswith("finished"), "the end of the run", 240
    )
    assert status_of_run(made, run) == "finished:completed"
    summary = summarise(tmp_path / "run" / "events.jsonl")
    assert summary["state"] == "finished"
    names = [sorted(site["name"] for site in row["sites"]) for row in summary["rounds"]]
    assert names == [["bank", "clinic"]] * 3
    assert read_adapter(tmp_path / "run" / "adapter").rank == 4


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/control/list-runs",
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/v1/runtime/pull-messages",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/health",
        "/docs",
        "/openapi.json",
        "/",
        # Spellings that a proxy and the server behind it might read differently.
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/%2e%2e/control/list-runs",
        "/v1/fleet/..%2fcontrol%2flist-runs",
        "//v1/control/list-runs",
        "/v1/Fleet/pull-messages",
        "/v1/fleet/pull-messages/../../control/list-runs",
        "/v1/fleet/pull-messages%2f..%2f..%2fcontrol%2flist-runs",
        "/v1/fleet/pull-messages;/v1/control/list-runs",
    ],
)
def test_the_sites_port_refuses(made: Deployment, path: str) -> None:
    assert made.status_of("POST", path) in (400, 403, 404)
    assert made.status_of("GET", path) in (400, 403, 404)


def test_the_control_api_answers_the_coordinator_itself(made: Deployment) -> None:
    """Else the refusals above would say nothing: the same requests pass on the SuperLink's port."""
    assert made.flwr("ls")["success"]
    assert made.num_online() == 2


def test_the_sites_port_lets_fleet_requests_through_and_they_need_a_signature(
    made: Deployment,
) -> None:
    for name in ("activate-node", "pull-messages", "push-object", "get-fab"):
        assert made.status_of("POST", f"/v1/fleet/{name}") == 401
        assert made.status_of("GET", f"/v1/fleet/{name}") == 403


def test_an_unregistered_key_is_refused(made: Deployment) -> None:
    name = made.start_site(Site("stranger", ""), is_registered=False)
    code, log = made.services.wait_for_end(name, 60)
    assert code != 0
    assert "Failed to activate SuperNode" in log
    assert made.num_online() == 2


def test_a_removed_site_is_shut_out_at_once(made: Deployment) -> None:
    before = {node["node-id"] for node in made.flwr("supernode", "ls")["nodes"]}
    name = made.start_site(Site("leaver", ""))
    (node,) = {node["node-id"] for node in made.flwr("supernode", "ls")["nodes"]} - before
    made.services.wait_until(lambda: made.num_online() == 3, "the leaver's connection", 60)
    made.flwr("supernode", "unregister", node)
    made.services.wait_for_end(name, 60)
    assert made.num_online() == 2


def test_a_run_outlives_a_superlink_that_is_killed_and_started_again(
    made: Deployment, inputs: Path, tmp_path: Path
) -> None:
    run = start_run(made, inputs, tmp_path / "run")
    events = tmp_path / "run" / "events.jsonl"
    made.services.wait_until(
        lambda: events.is_file() and summarise(events)["rounds_done"] >= 1, "the first round", 120
    )
    psutil.Process(made.services.pid("superlink")).kill()
    assert made.services.wait_for_end("superlink", 10)[0] == -signal.SIGKILL
    start_superlink(made)
    made.services.wait_until(
        lambda: status_of_run(made, run).startswith("finished"), "the end of the run", 240
    )
    assert status_of_run(made, run) == "finished:completed"
    assert summarise(events)["rounds_done"] == 3
    assert summarise(events)["failures"] == []


def test_a_killed_serverapp_ends_the_run_as_failed_and_another_goes_on_with_it(
    made: Deployment, inputs: Path, tmp_path: Path
) -> None:
    run = start_run(made, inputs, tmp_path / "run")
    events = tmp_path / "run" / "events.jsonl"
    made.services.wait_until(
        lambda: events.is_file() and summarise(events)["rounds_done"] >= 1, "the first round", 120
    )
    (server_app,) = [
        process
        for process in psutil.Process(made.services.pid("superexec")).children()
        if any("flwr-serverapp" in word for word in process.cmdline())
    ]
    server_app.kill()
    made.services.wait_until(
        lambda: status_of_run(made, run).startswith("finished"), "the end of the run", 180
    )
    assert status_of_run(made, run) == "finished:failed"
    assert summarise(events)["rounds_done"] < 3
    assert read_adapter(tmp_path / "run" / "adapter").rank == 4
    run = submit(made, f'resume="{tmp_path / "run"}"')
    made.services.wait_until(
        lambda: status_of_run(made, run).startswith("finished"), "the end of the resumed run", 240
    )
    assert status_of_run(made, run) == "finished:completed"
    assert summarise(events)["rounds_done"] == 3


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory with a path that is short enough for a site's socket below it."""
    directory = Path(tempfile.mkdtemp(prefix="fedge-"))
    yield directory
    shutil.rmtree(directory)


def example(inputs: Path, out: Path, *words: str) -> list[str]:
    """Return the command of the example, with a tiny model and two sites."""
    command = [sys.executable, str(EXAMPLE / "run.py"), "--out", str(out), "--json"]
    command += ["--base-model", str(inputs / "base"), "--set", TINY, *words]
    for name in ("bank", "clinic"):
        command += ["--data", f"{name}={inputs / name}.jsonl"]
    return command


def test_sigterm_ends_everything_that_the_example_started(inputs: Path, short_path: Path) -> None:
    process = subprocess.Popen(
        example(inputs, short_path / "out"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    seen = dict[int, psutil.Process]()
    assert process.stderr is not None
    for line in process.stderr:
        if "flwr-serverapp" in line or "round 1" in line:
            break
    for child in psutil.Process(process.pid).children(recursive=True):
        seen[child.pid] = child
    assert len(seen) >= 7  # SuperLink, SuperExec, nginx and its worker, two daemons, flwr log
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert printed == ""
    _, alive = psutil.wait_procs(list(seen.values()), timeout=10)
    assert not alive


@pytest.mark.parametrize("node", ["resident", "supernode"])
def test_the_example_prints_one_json_object(inputs: Path, short_path: Path, node: str) -> None:
    done = subprocess.run(
        example(inputs, short_path / "out", "--rounds", "1", "--node", node),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    result = json.loads(done.stdout)
    assert result["state"] == "finished"
    assert read_adapter(Path(result["adapter"])).rank == 4
    assert result["port"]["POST /v1/control/start-run"] == 403
    assert result["port"]["POST /v1/fleet/pull-messages"] == 401
    for site in result["left"].values():
        assert (site["rounds"], site["verdicts"]) == (1, {"allowed": 1})
    assert sum(site["bytes"] for site in result["left"].values()) == result["bytes_up"]
