"""kill -9 of everything that a site runs, in private rounds whose updates carry error feedback.

Every run is held to one in this process that nobody disturbed: the same noise, from the same keys
(`tests.client.seeded_site`), gives the same adapter, bit for bit. What was charged is read back
from the ledgers. The moments come from a seed, which is printed with them.
"""

import contextlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from client.ledger import LEDGER, read_ledger
from client.site import Site as ClientSite
from federation.accountant import PrivacyEvent, epsilon_of
from federation.rounds import run_rounds
from federation.settings import FederationSettings, load_settings
from federation.status import summarise
from tests.client.seeded_site import key_of
from tests.conftest import write_records, write_tiny_model
from tests.end_to_end.test_resident_nodes import InProcess, assert_same

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "deployment"))

from certificates import make_node_key
from topology import CONNECTION, Deployment, deployment

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
NAMES = ("bank", "clinic")
NUM_RECORDS, NUM_ROUNDS, DELTA = 30, 5, 1e-3
KILLS = 5
"""Of one kind of process and one site in a run: ten of a kind."""
EVENT = PrivacyEvent(noise_multiplier=1.5, sampling_rate=8 / NUM_RECORDS, steps=4)
"""What each round spends of each site's records."""
SETTINGS: dict[str, Any] = {
    "num_rounds": NUM_ROUNDS,
    "num_sites": 2,
    "quorum": 2,
    "round_timeout_s": 300.0,
    "round_attempts": 40,
    "metrics": "seconds",
    "adapter.rank": 4,
    "training.num_steps": EVENT.steps,
    "training.batch_size": 8,
    "training.noise_multiplier": EVENT.noise_multiplier,
    "training.record_clip_norm": 0.5,
    "training.dtype": "float32",
    "training.max_tokens": 64,
    "wire.uplink": "int8",
    "wire.downlink": "int8",
}
"""int8 both ways: a site owes what it rounded away, and holds what it was sent."""
POLICY = f"""
[models]
base = ["any"]
[runs]
allowed = ["any"]
bundles = ["any"]
[adapter]
modules = ["*"]
max_rank = 8
max_alpha = 64
[training]
max_steps = 8
max_learning_rate = 0.01
max_batch = 8
max_tokens = 64
max_rounds = 9
[traffic]
uplink = ["int8"]
max_round_bytes = 10_000_000
max_run_bytes = 100_000_000
[aggregation]
kinds = ["products"]
secure_sum_required = false
min_cohort = 2
[privacy]
required = true
noise_floor = {EVENT.noise_multiplier}
max_record_clip_norm = 0.5
epsilon = 1000.0
delta = {DELTA}
one_factor_only = false
[metrics]
allowed = ["seconds"]
"""


@dataclass
class Killed:
    """One site, its processes, and what became of them."""

    name: str
    directory: Path
    made: Deployment
    kills: list[tuple[str, int]] = field(default_factory=list)
    """Kind of process, and the round that was under way."""
    seen: int = 0
    """Lines of the log that were looked at."""

    def start(self) -> None:
        script = ROOT / "tests" / "client" / "seeded_site.py"
        self.made.services.start(
            self.program,
            [sys.executable, str(script), "daemon", "--config", str(self.directory / "site.toml")],
            {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )

    @property
    def program(self) -> str:
        return f"seeded-{self.name}"

    def is_at_work(self) -> bool:
        """Return whether a round's work went on here since the last look."""
        log = self.directory / "site.log"
        lines = log.read_text().splitlines() if log.is_file() else []
        new, self.seen = lines[self.seen :], len(lines)
        events = {json.loads(line)["event"] for line in new}
        return bool(events & {"asked", "judged", "answered", "replied"} or self.processes("shim"))

    def processes(self, kind: str) -> list[psutil.Process]:
        """Return the living processes of one kind: "daemon", "trainer", "supernode", "shim"."""
        daemon = psutil.Process(self.made.services.pid(self.program))
        if kind == "daemon":
            return [daemon]
        word = {"trainer": "trainer", "supernode": "quick_supernode", "shim": "flwr-clientapp"}
        found = []
        for child in daemon.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if any(word[kind] in part for part in child.cmdline()):
                    found.append(child)
        return found

    def kill(self, kind: str, server_round: int) -> bool:
        """Kill one process; a daemon is started again, as systemd does. Return whether one died."""
        victims = self.processes(kind)
        for victim in victims[:1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
                self.kills.append((kind, server_round))
        if kind == "daemon":
            self.made.services.wait_for_end(self.program, 10)
            self.start()
        return bool(victims)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    write_tiny_model(directory / "base")
    for name in NAMES:
        write_records(directory / f"{name}.jsonl", NUM_RECORDS, topic=name)
    return directory


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployment(tmp_path_factory.mktemp("made"), [], Console(stderr=True)) as running:
        yield running


@contextlib.contextmanager
def started(made: Deployment, inputs: Path, node: str) -> Iterator[list[Killed]]:
    """Yield two new sites that run; their directories have short paths, for the sockets."""
    root = Path(tempfile.mkdtemp(prefix="fedge-"))
    sites = [Killed(name, root / name, made) for name in NAMES]
    try:
        for site in sites:
            key = make_node_key(site.directory)
            made.flwr("supernode", "register", str(key.with_suffix(".pub")))
            write_site(site, inputs, node)
            site.start()
        made.services.wait_until(lambda: made.num_online() == 2, "the connection of both", 120)
        yield sites
    finally:
        for site in sites:  # the daemon alone, as its service does: it ends the others
            psutil.Process(made.services.pid(site.program)).terminate()
            made.services.wait_for_end(site.program, 60)
        made.services.wait_until(lambda: made.num_online() == 0, "that both have left", 120)
        shutil.rmtree(root)


def write_site(site: Killed, inputs: Path, node: str) -> None:
    values = {
        "superlink": f"127.0.0.1:{site.made.sites_port}",
        "root_certificate": str(site.made.certificates / "ca.crt"),
        "node_key": "node",
        "base_model": str(inputs / "base"),
        "data": str(inputs / f"{site.name}.jsonl"),
        "policy": "policy.toml",
        "state": "state",
        "name": site.name,
        "log": "site.log",
        "drain_s": 120.0,
        "node": node,
        "allow_same_user": True,
    }
    # JSON writes true and strings as TOML does.
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    (site.directory / "site.toml").write_text("\n".join(lines) + "\n")
    (site.directory / "policy.toml").write_text(POLICY)


@dataclass
class Run:
    """One run of the coordinator."""

    made: Deployment
    out: Path

    def is_over(self) -> bool:
        """Read it from its own events: asking Flower costs seconds of this machine."""
        return any(f'"{kind}"' in self._events() for kind in ("RunFinished", "RunFailed"))

    def server_round(self) -> int:
        """Return the round that is under way, from 1 on."""
        return 1 + self._events().count('"RoundFinished"')

    def _events(self) -> str:
        events = self.out / "events.jsonl"
        return events.read_text() if events.is_file() else ""


def submit(made: Deployment, inputs: Path, out: Path) -> Run:
    values = SETTINGS | {"base_model": str(inputs / "base"), "out": str(out)}
    config = " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
    command = ["flwr", "run", str(ROOT), CONNECTION, "-c", config, "--format", "json"]
    made.services.call(command, made.variables("coordinator"))
    return Run(made, out)


def undisturbed(inputs: Path, out: Path) -> Path:
    """Return the adapter of a run in this process with the same noise."""
    sites = {
        name: ClientSite(
            inputs / "base", inputs / f"{name}.jsonl", name, out.parent / "states" / name, None
        )
        for name in NAMES
    }
    scratch = out.parent / "scratch"
    scratch.mkdir(parents=True)
    values = SETTINGS | {"base_model": str(inputs / "base"), "out": str(out)}
    settings = load_settings(FederationSettings, values, "the test")
    return run_rounds(InProcess(inputs / "base", sites, scratch, key_of=key_of), settings)


def check(run: Run, sites: list[Killed], oracle: Path) -> None:
    """Hold a finished run to the undisturbed one, and its charges to one a round and site."""
    summary = summarise(run.out / "events.jsonl")
    assert summary["state"] == "finished", summary
    assert_same(run.out / "adapter", oracle)
    run_id = json.loads((run.out / "run.json").read_text())["run"]
    for site in sites:
        rows = read_ledger(site.directory / "state" / LEDGER).rows  # which checks the chain
        mine = [row for row in rows if row.run == run_id]
        assert [row.server_round for row in mine] == [1, 2, 3, 4, 5], site.name
        assert {row.event for row in mine} == {EVENT}
        spent = epsilon_of([EVENT] * len(rows), DELTA)
        assert rows[-1].epsilon == pytest.approx(spent), "all rounds of all runs, each once"


def check_kills(sites: list[Killed], kinds: tuple[str, ...]) -> None:
    for kind in kinds:
        rounds = [server_round for site in sites for done, server_round in site.kills]
        assert sum(done == kind for site in sites for done, _ in site.kills) >= 10, kind
        assert len(set(rounds)) >= 3, "they are spread over the run"


def kill_in_every_round(
    run: Run, sites: list[Killed], kinds: tuple[str, ...], seed: int, longest_s: float
) -> None:
    """Kill each kind ``KILLS`` times a site while that site works, at random moments of all rounds.

    A moment begins with an event in the site's log, or with a new shim, and lasts ``longest_s``. A
    kill that did not come to pass is made up for later: they may run a round ahead.
    """
    deadline = time.monotonic() + 900
    draw = random.Random(seed)  # noqa: S311 - which kill comes when is no secret
    while not run.is_over():
        assert time.monotonic() < deadline, "the run does not end"
        now = run.server_round()
        for site in sites:
            done = [kind for kind, _ in site.kills]
            due = [kind for kind in kinds if done.count(kind) < min(now + 1, KILLS)]
            if site.is_at_work() and due and draw.random() < 0.6:
                time.sleep(draw.uniform(0, longest_s))
                site.kill(draw.choice(due), now)
        run.made.services.check()
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("node", "kinds", "longest_s"),
    [
        ("resident", ("trainer", "daemon"), 0.4),
        ("supernode", ("shim",), 3.0),
        ("supernode", ("supernode",), 5.0),
    ],
)
def test_what_a_site_runs_may_die_in_every_round_and_nothing_is_lost_or_charged_twice(
    made: Deployment,
    inputs: Path,
    tmp_path: Path,
    node: str,
    kinds: tuple[str, ...],
    longest_s: float,
) -> None:
    oracle = undisturbed(inputs, tmp_path / "undisturbed" / "run")
    seed = 1
    with started(made, inputs, node) as sites:
        run = submit(made, inputs, tmp_path / "run")
        begun = time.monotonic()
        kill_in_every_round(run, sites, kinds, seed, longest_s)
        print("seed", seed, [site.kills for site in sites], round(time.monotonic() - begun), "s")
        check(run, sites, oracle)
        check_kills(sites, kinds)
