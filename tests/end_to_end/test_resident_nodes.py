"""Sites as resident nodes on a real SuperLink over TLS, with kills, held to a run in process."""

import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from client.ledger import LEDGER, read_ledger
from client.round import RoundRequest, answer_round
from client.settings import TrainingSettings
from client.site import Site as ClientSite
from federation.accountant import PrivacyEvent, epsilon_of
from federation.adapter import read_adapter
from federation.rounds import run_rounds
from federation.settings import FederationSettings, load_settings
from federation.sites import Reply, Request
from federation.status import summarise
from tests.client.policy_example import opened_template
from tests.conftest import write_records, write_tiny_model
from tests.policies import UNPROTECTED, policy_text, toml_text

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "deployment"))

from certificates import make_node_key
from topology import CONNECTION, Deployment, deployment, start_superlink

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
NAMES = ("bank", "clinic")
SETTINGS: dict[str, Any] = {
    "num_sites": 2,
    "quorum": 2,
    "round_timeout_s": 300.0,
    "adapter.rank": 4,
    "training.num_steps": 2,
    "training.dtype": "float32",
    "training.max_tokens": 64,
    "wire.uplink": "int8",
    "wire.downlink": "int8",
}
"""int8 both ways: error feedback and references make a site's state matter."""
POLICY = policy_text(
    traffic__uplink=["int8"],
    aggregation__kinds=["products"],
    aggregation__min_cohort=2,
    **UNPROTECTED,
)
"""Lets these runs in; the ranks of others may be too high."""


@dataclass
class Institution:
    """One site: its directory, and its daemon as the deployment's program."""

    name: str
    directory: Path
    made: Deployment
    starts: int = 0

    def start(self) -> None:
        self.starts += 1
        config = str(self.directory / "site.toml")
        self.made.services.start(
            self.program,
            [sys.executable, "-m", "client.cli", "daemon", "--config", config],
            {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )

    @property
    def program(self) -> str:
        return f"daemon-{self.name}"

    def pid(self) -> int:
        return self.made.services.pid(self.program)

    def events(self) -> list[dict[str, Any]]:
        log = self.directory / "site.log"
        text = log.read_text() if log.is_file() else ""
        return [json.loads(line) for line in text.splitlines()]

    def count(self, event: str) -> int:
        return sum(row["event"] == event for row in self.events())

    def kill_daemon(self) -> None:
        """Kill the daemon and start it again, as systemd does."""
        psutil.Process(self.pid()).kill()
        self.made.services.wait_for_end(self.program, 10)
        self.start()

    def kill_trainer(self) -> None:
        for child in psutil.Process(self.pid()).children():
            child.kill()


@dataclass
class InProcess:
    """The same sites without a network: what they answer is the oracle."""

    base_model: Path
    sites: dict[str, ClientSite]
    scratch: Path
    replies: list[Reply] = field(default_factory=list)
    key_of: Callable[[str], Callable[[RoundRequest], bytes]] | None = None
    """Key of a private round's random numbers, by site and round."""

    def wait_for(self, count: int, timeout_s: float) -> list[str]:
        return sorted(self.sites)

    def send(self, sites: Sequence[str], request: Request) -> None:
        for name in sites:
            scratch = Path(tempfile.mkdtemp(dir=self.scratch))
            message = shutil.copy(request.message, scratch / "message")
            asked = RoundRequest(
                request.server_round,
                request.uplink,
                request.downlink,
                request.trains,
                request.run,
            )
            answer = answer_round(
                Path(message),
                self.sites[name],
                load_settings(TrainingSettings, request.training, "training"),
                asked,
                key=self.key_of(name)(asked) if self.key_of else None,
            )
            self.replies.append(
                Reply(
                    name,
                    request.server_round,
                    update=answer.update,
                    num_examples=answer.num_examples,
                    train_loss=answer.train_loss,
                    seconds=0.0,
                )
            )

    def receive(self) -> Reply | None:
        return self.replies.pop(0) if self.replies else None


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    write_tiny_model(directory / "base")
    for name in NAMES:
        write_records(directory / f"{name}.jsonl", 30, topic=name)
    return directory


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    home = tmp_path_factory.mktemp("deployment")
    with deployment(home, [], Console(stderr=True)) as running:
        yield running


@pytest.fixture(scope="module")
def institutions(made: Deployment, inputs: Path) -> Iterator[list[Institution]]:
    """Two sites whose daemons run; their directories have short paths, for the sockets."""
    root = Path(tempfile.mkdtemp(prefix="fedge-"))
    sites = [new_institution(made, inputs, root / name, POLICY) for name in NAMES]
    made.services.wait_until(lambda: made.num_online() == 2, "the connection of both", 120)
    yield sites
    made.services.end([site.program for site in sites])
    shutil.rmtree(root)


def new_institution(
    made: Deployment, inputs: Path, directory: Path, policy: str, **more: Any
) -> Institution:
    """Return a registered site whose daemon was started; it is called as its directory is."""
    name = directory.name
    key = make_node_key(directory)
    made.flwr("supernode", "register", str(key.with_suffix(".pub")))
    (directory / "site.toml").write_text(toml_text(site_values(made, inputs, name) | more))
    (directory / "policy.toml").write_text(policy)
    site = Institution(name, directory, made)
    site.start()
    return site


def site_values(made: Deployment, inputs: Path, name: str) -> dict[str, Any]:
    """Return what the site.toml of a site of the deployment says."""
    return {
        "superlink": f"127.0.0.1:{made.sites_port}",
        "root_certificate": str(made.certificates / "ca.crt"),
        "node_key": "node",
        "base_model": str(inputs / "base"),
        "data": str(inputs / f"{name}.jsonl"),
        "policy": "policy.toml",
        "state": "state",
        "name": name,
        "log": "site.log",
        "drain_s": 120.0,
    }


def submit(made: Deployment, inputs: Path, out: Path, num_rounds: int, **more: Any) -> str:
    values = SETTINGS | {"base_model": str(inputs / "base"), "out": str(out)}
    config = " ".join(f"{key}={json.dumps(value)}" for key, value in (values | more).items())
    command = ["flwr", "run", str(ROOT), CONNECTION, "-c", f"{config} num_rounds={num_rounds}"]
    started = made.services.call([*command, "--format", "json"], made.variables("coordinator"))
    return str(started["run-id"])


def is_finished(made: Deployment, run: str) -> bool:
    (status,) = {row["status"] for row in made.flwr("ls")["runs"] if row["run-id"] == run}
    return str(status).startswith("finished")


def wait_for_event(made: Deployment, run: str, site: Institution, event: str) -> None:
    """Wait until a site logs an event once more, or the run is over; "" waits for nothing."""
    before = site.count(event)
    made.services.wait_until(
        lambda: not event or site.count(event) > before or is_finished(made, run),
        f"the next {event} of {site.name}",
        400,
    )


def expected(inputs: Path, out: Path, num_rounds: int) -> Path:
    """Return the adapter of an undisturbed run in this process."""
    sites = {
        name: ClientSite(
            inputs / "base", inputs / f"{name}.jsonl", name, out.parent / "state" / name, None
        )
        for name in NAMES
    }
    scratch = out.parent / "scratch"
    scratch.mkdir()
    values = SETTINGS | {
        "base_model": str(inputs / "base"),
        "out": str(out),
        "num_rounds": num_rounds,
    }
    settings = load_settings(FederationSettings, values, "the test")
    return run_rounds(InProcess(inputs / "base", sites, scratch), settings)


def assert_same(one: Path, other: Path) -> None:
    import torch

    first, second = read_adapter(one), read_adapter(other)
    for name, factors in first.modules.items():
        assert torch.equal(factors.b_OR, second.modules[name].b_OR), name
        assert torch.equal(factors.a_RI, second.modules[name].a_RI), name


def test_three_rounds_give_the_bits_of_a_run_in_process_and_load_the_model_once(
    made: Deployment, institutions: list[Institution], inputs: Path, tmp_path: Path
) -> None:
    run = submit(made, inputs, tmp_path / "run", 3)
    made.services.wait_until(lambda: is_finished(made, run), "the end of the run", 400)
    summary = summarise(tmp_path / "run" / "events.jsonl")
    assert summary["state"] == "finished"
    assert summary["failures"] == []
    print("seconds a round:", [round(row["seconds"], 2) for row in summary["rounds"]])
    assert_same(tmp_path / "run" / "adapter", expected(inputs, tmp_path / "oracle", 3))
    for site in institutions:
        assert site.count("child_started") == 1
        assert site.count("replied") == 3


@pytest.mark.parametrize("seed", [0, 1])
def test_kills_of_trainers_and_daemons_change_no_bit_and_charge_nothing_twice(
    made: Deployment, institutions: list[Institution], inputs: Path, tmp_path: Path, seed: int
) -> None:
    draw = random.Random(seed)  # noqa: S311 - which kill comes when is no secret
    num_rounds, num_kills = 5, 5
    run = submit(made, inputs, tmp_path / "run", num_rounds)
    kills = []
    for _ in range(num_kills):
        site = draw.choice(institutions)
        event = draw.choice(["asked", "answered", "replied", ""])
        wait_for_event(made, run, site, event)
        if is_finished(made, run):
            break
        time.sleep(draw.uniform(0, 0.4))
        kill = draw.choice([site.kill_daemon, site.kill_trainer])
        kills.append((site.name, event, kill.__name__))
        kill()
    print("kills:", kills)
    made.services.wait_until(lambda: is_finished(made, run), "the end of the run", 500)
    summary = summarise(tmp_path / "run" / "events.jsonl")
    assert summary["state"] == "finished", summary
    assert len(kills) >= 3
    assert_same(tmp_path / "run" / "adapter", expected(inputs, tmp_path / "oracle", num_rounds))
    run_id = json.loads((tmp_path / "run" / "run.json").read_text())["run"]
    for site in institutions:
        rows = read_ledger(site.directory / "state" / LEDGER).rows
        assert [row.server_round for row in rows if row.run == run_id] == [1, 2, 3, 4, 5]


def test_a_round_above_the_sites_bound_is_refused_with_its_rule(
    made: Deployment, institutions: list[Institution], inputs: Path, tmp_path: Path
) -> None:
    more = {"adapter.rank": 9, "round_attempts": 1}
    run = submit(made, inputs, tmp_path / "run", 1, **more)
    made.services.wait_until(lambda: is_finished(made, run), "the end of the run", 300)
    events = (tmp_path / "run" / "events.jsonl").read_text()
    assert "(adapter.max_rank): rank is 9, at most 8 is allowed" in events


def test_a_superlink_that_is_killed_and_started_again_loses_no_reply(
    made: Deployment, institutions: list[Institution], inputs: Path, tmp_path: Path
) -> None:
    run = submit(made, inputs, tmp_path / "run", 3)
    before = institutions[0].count("asked")
    made.services.wait_until(
        lambda: institutions[0].count("asked") > before + 1, "the second round", 300
    )
    psutil.Process(made.services.pid("superlink")).kill()
    made.services.wait_for_end("superlink", 10)
    start_superlink(made)
    made.services.wait_until(lambda: is_finished(made, run), "the end of the run", 400)
    summary = summarise(tmp_path / "run" / "events.jsonl")
    assert (summary["state"], summary["failures"]) == ("finished", [])
    assert_same(tmp_path / "run" / "adapter", expected(inputs, tmp_path / "oracle", 3))


def test_sigterm_answers_the_round_in_hand_and_leaves_with_its_trainer(
    made: Deployment, institutions: list[Institution], inputs: Path, tmp_path: Path
) -> None:
    site = institutions[0]
    run = submit(made, inputs, tmp_path / "run", 3)
    before = site.count("asked"), site.count("replied")
    made.services.wait_until(lambda: site.count("asked") > before[0], "the first round", 300)
    daemon = psutil.Process(site.pid())
    children = daemon.children()
    daemon.terminate()
    code, _ = made.services.wait_for_end(site.program, 180)
    assert code == 0
    assert site.count("replied") == before[1] + 1
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive
    site.start()
    made.services.wait_until(lambda: is_finished(made, run), "the end of the run", 400)
    summary = summarise(tmp_path / "run" / "events.jsonl")
    assert (summary["state"], summary["failures"]) == ("finished", [])


def test_a_stock_supernode_is_a_shim_to_the_same_trainer(
    made: Deployment, institutions: list[Institution], inputs: Path, tmp_path: Path
) -> None:
    """The app of the run is executed there, and holds nothing but the trainer's socket."""
    site = institutions[1]
    made.services.end([site.program])
    # After a reply the lease is only shortened: it counts as connected for 20 s more.
    made.services.wait_until(lambda: made.num_online() == 1, "the end of the old lease", 60)
    config = site.directory / "site.toml"
    before = config.read_text()
    config.write_text(before + 'node = "supernode"\nallow_same_user = true\n')
    site.start()
    made.services.wait_until(
        lambda: site.count("daemon_ready") >= 2 and made.num_online() == 2, "both nodes", 120
    )
    trained = site.count("answered")
    run = submit(made, inputs, tmp_path / "run", 2)
    made.services.wait_until(lambda: is_finished(made, run), "the end of the run", 500)
    summary = summarise(tmp_path / "run" / "events.jsonl")
    assert (summary["state"], summary["failures"]) == ("finished", [])
    assert_same(tmp_path / "run" / "adapter", expected(inputs, tmp_path / "oracle", 2))
    assert site.count("answered") == trained + 2
    programs = [" ".join(child.cmdline()) for child in psutil.Process(site.pid()).children()]
    assert any("flower-supernode" in program for program in programs)
    made.services.end([site.program])
    config.write_text(before)
    site.start()


def test_a_private_run_goes_on_without_the_site_whose_budget_is_spent(
    made: Deployment, institutions: list[Institution], inputs: Path, tmp_path: Path
) -> None:
    made.services.end([site.program for site in institutions])
    cost = PrivacyEvent(noise_multiplier=2.0, sampling_rate=4 / 30, steps=2)
    one, two = (epsilon_of([cost] * rounds, 1e-6) for rounds in (1, 2))
    budgets = {"archive": 8.0, "court": 8.0, "school": (one + two) / 2}
    root = Path(tempfile.mkdtemp(prefix="fedge-"))
    private = []
    for name, budget in budgets.items():
        write_records(inputs / f"{name}.jsonl", 30, topic=name)
        private.append(new_institution(made, inputs, root / name, opened_template(budget)))
    made.services.wait_until(lambda: made.num_online() == 3, "the connection of three", 120)
    more = {
        "num_sites": 3,
        "round_attempts": 1,
        "aggregation": "alternating",
        "metrics": "",
        "wire.uplink": "float32",
        "wire.downlink": "float32",
        "training.batch_size": 4,
        "training.noise_multiplier": 2.0,
    }
    run = submit(made, inputs, tmp_path / "run", 3, **more)
    made.services.wait_until(lambda: is_finished(made, run), "the end of the run", 400)
    summary = summarise(tmp_path / "run" / "events.jsonl")
    assert summary["state"] == "finished", summary
    assert [row["num_updates"] for row in summary["rounds"]] == [3, 2, 2]
    assert {row["train_loss"] for row in summary["rounds"]} == {None}
    assert [failure["server_round"] for failure in summary["failures"]] == [2, 3]
    assert all("(privacy.epsilon)" in failure["reason"] for failure in summary["failures"])
    for site, rounds in zip(private, (3, 3, 1), strict=True):
        rows = read_ledger(site.directory / "state" / LEDGER).rows
        assert [(row.server_round, row.event) for row in rows] == [
            (server_round, cost) for server_round in range(1, rounds + 1)
        ]
        assert {tuple(row.metrics) for row in rows} == {()}
    made.services.end([site.program for site in private])
    shutil.rmtree(root)
    for site in institutions:
        site.start()
    made.services.wait_until(lambda: made.num_online() == 2, "the return of both", 120)
