"""Sites whose processes are killed, and what such a kill is held to.

A kill counts if it met a living process. `Site.kill` stops the process first: one that is stopped
ends by nothing but the kill.
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

from client.answers import MAX_BEGUN
from federation.accountant import PrivacyEvent
from tests.end_to_end.test_resident_nodes import site_values
from tests.policies import policy_text, toml_text

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "deployment"))

from certificates import make_node_key
from topology import CONNECTION, Deployment

ROOT = Path(__file__).parents[2]
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
POLICY = policy_text(
    traffic__uplink=["int8"],
    aggregation__kinds=["products"],
    aggregation__secure_sum_required=False,
    aggregation__min_cohort=2,
    privacy__noise_floor=EVENT.noise_multiplier,
    privacy__max_record_clip_norm=0.5,
    privacy__epsilon=1000.0,
    privacy__delta=DELTA,
    privacy__one_factor_only=False,
    metrics__allowed=["seconds"],
)


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

    def may_be_killed_in_its_draw(self) -> bool:
        """Return whether the round in hand would be begun anew, and not be given up, after a kill.

        Of one that is not begun too: it is begun once at most before the kill.
        """
        files = (self.directory / "state").glob("answers/*/*.begun")
        with contextlib.suppress(FileNotFoundError):  # its answer is there by now
            return all(int(file.read_text()) < MAX_BEGUN - 1 for file in files)
        return True

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
        is_met = any(end(victim) for victim in self.processes(kind)[:1])
        if is_met:
            self.kills.append((kind, server_round))
        if kind == "daemon":
            self.made.services.wait_for_end(self.program, 10)
            self.start()
        return is_met


def end(process: psutil.Process) -> bool:
    """Kill a process; return whether it lived until then."""
    try:
        process.suspend()  # it ends by itself no more
        is_met = process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        process.kill()
    except psutil.NoSuchProcess:
        return False
    return is_met


@dataclass
class Hunt:
    """Kills of one site's shims, each at a moment drawn inside a shim's life.

    A shim lives for the moment that one message takes. The first ones are left alone: how long they
    lived is what the moments of the next ones are drawn from, until one lives less.
    """

    site: Killed
    draw: random.Random
    lives_s: list[float]
    """Whole lives that were seen, at all sites of the run."""
    shim: psutil.Process | None = None
    """Lives, or lived when it was last looked at."""
    born: float = 0.0
    moment: float = float("inf")
    """When it is to die, in the time of `time.monotonic`."""

    def look(self, is_due: bool, server_round: int) -> None:
        """Kill the shim if its moment is there; ``is_due`` says whether a new one is to die."""
        now = time.monotonic()
        if self.shim is not None and not is_alive(self.shim):
            self.lives_s.append(now - self.born)
            self.shim = None
        if self.shim is None:
            self.shim = next(iter(self.site.processes("shim")), None)
            self.born = now
            is_due = is_due and bool(self.lives_s)
            self.moment = now + self.draw.uniform(0, min(self.lives_s)) if is_due else float("inf")
        elif now >= self.moment:
            if end(self.shim):
                self.site.kills.append(("shim", server_round))
            self.shim = None


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process runs, or could."""
    try:
        return bool(process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD))
    except psutil.NoSuchProcess:
        return False


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
    values = site_values(site.made, inputs, site.name) | {"node": node, "allow_same_user": True}
    (site.directory / "site.toml").write_text(toml_text(values))
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
