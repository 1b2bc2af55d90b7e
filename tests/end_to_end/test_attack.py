"""An app that tries to get at a site's records, against both kinds of node (`tests/attack`).

It knows everything that an insider could tell it: where the records, the policy, the ledger and the
socket lie. What it got comes home as its "update", and is held to what it may get.
"""

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from client.ledger import LEDGER, read_ledger
from federation.adapter import initial_adapter
from federation.base_model import model_digest
from federation.wire import encode
from tests.conftest import write_records, write_tiny_model
from tests.end_to_end.test_resident_nodes import is_finished
from tests.other_user import as_user, why_not
from tests.policies import policy_text, toml_text

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "deployment"))

from certificates import make_node_key
from topology import CONNECTION, Deployment, deployment

ROOT = Path(__file__).parents[2]
ATTACK = ROOT / "tests" / "attack"
TRAINER, NODE, BETWEEN = 64001, 64002, 64003
"""Users, and the group that both are in. None of them has a name or anything of its own here."""
RUN = "ab" * 16
SECRET, TOPIC = "hunter2-secret", "zebrafish"
"""A word of the daemon's and the trainer's environment, and one that stands in every record."""
TRAINING = {"num_steps": 2, "batch_size": 4, "max_tokens": 64, "dtype": "float32"}
PRIVATE = TRAINING | {"noise_multiplier": 2.0, "record_clip_norm": 0.5}
HEAD: dict[str, Any] = {
    "run": RUN,
    "bundle": "",
    "server_round": 1,
    "uplink": "float32",
    "downlink": "float32",
    "trains": "B",
    "aggregation": "alternating",
    "cohort": 3,
    "training": PRIVATE,
    "metrics": ["seconds"],
}
"""The one question that the policy allows."""
REFUSED: dict[str, Any] = {
    "without noise": HEAD | {"training": TRAINING},
    "little noise": HEAD | {"training": PRIVATE | {"noise_multiplier": 0.1}},
    "both factors": HEAD | {"trains": "AB"},
    "the loss": HEAD | {"metrics": ["train_loss"]},
    "the count": HEAD | {"metrics": ["num-examples"]},
    "another run": HEAD | {"run": "cd" * 16},
    "a path for a run": HEAD | {"run": "../../private"},
    "a path for data": HEAD | {"data": "data.jsonl"},
    "many steps": HEAD | {"training": PRIVATE | {"num_steps": 10**6}},
    "NaN": json.dumps(HEAD).replace("2.0", "NaN"),
    "twice": json.dumps(HEAD)[:-1] + ', "metrics": ["seconds", "train_loss"]}',
    "no JSON": "{",
}
POLICY = policy_text(
    runs__allowed=[RUN],
    adapter__modules=["model.layers.*"],
    adapter__max_alpha=16.0,
    traffic__uplink=["float32"],
    traffic__max_round_bytes=1_000_000,
    traffic__max_run_bytes=5_000_000,
    aggregation__kinds=["alternating"],
    aggregation__secure_sum_required=False,
    privacy__max_record_clip_norm=1.0,
    privacy__epsilon=8.0,
    privacy__delta=1e-3,
    metrics__allowed=["seconds"],
)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not())]


@dataclass
class Attacked:
    """A site under attack; what is private is the trainer's, what the node needs is the node's."""

    directory: Path
    made: Deployment
    node: str
    is_shared: bool = False
    """Whether trainer and node are one user after all, by ``allow_same_user``."""

    @property
    def owner(self) -> int:
        """Whose the records are."""
        return NODE if self.is_shared else TRAINER

    @property
    def private(self) -> Path:
        return self.directory / "private"

    @property
    def state(self) -> Path:
        return self.private / "state"

    @property
    def socket(self) -> Path:
        above = self.state if self.is_shared else self.directory
        return above / "socket" / "trainer"

    def make(self) -> None:
        self.directory.chmod(0o755)
        self.state.mkdir(parents=True)
        (self.directory / "node").mkdir()
        (self.directory / "socket").mkdir(mode=0o700)
        for path in write_tiny_model(self.directory / "base").iterdir():
            path.chmod(0o644)  # a base model is public
        write_records(self.private / "data.jsonl", 40, topic=TOPIC)
        shutil.copy(self.made.certificates / "ca.crt", self.directory / "ca.crt")
        key = make_node_key(self.directory / "node")
        self.made.flwr("supernode", "register", str(key.with_suffix(".pub")))
        values = {
            "superlink": f"127.0.0.1:{self.made.sites_port}",
            "root_certificate": "ca.crt",
            "node_key": "node/node",
            "base_model": "base",
            "data": "private/data.jsonl",
            "policy": "policy.toml",
            "state": "private/state",
            "node_state": "node/state",
            "name": "bank",
            "node": self.node,
            "max_message_bytes": 32 << 20,
        }
        apart = {"trainer": "socket/trainer", "socket_group": str(BETWEEN)}
        values |= {"allow_same_user": True} if self.is_shared else apart
        (self.directory / "site.toml").write_text(toml_text(values))
        policy = self.directory / "policy.toml"
        policy.write_text(POLICY)
        policy.chmod(0o640)
        os.chown(policy, 0, self.owner)
        for top, user in ((self.private, self.owner), (self.directory / "node", NODE)):
            for path in (top, *top.rglob("*")):
                os.chown(path, user, user)
            top.chmod(0o700)
        os.chown(self.directory / "socket", TRAINER, TRAINER)

    def programs(self) -> dict[str, int]:
        """Return what is started, and as whom."""
        return {"daemon": NODE} if self.is_shared else {"trainer": TRAINER, "daemon": NODE}

    def start(self) -> None:
        for name, user in self.programs().items():
            home = self.state if name == "trainer" else self.directory / "node"
            config = str(self.directory / "site.toml")
            command = [sys.executable, "-m", "client.cli", name, "--config", config]
            needed = [Path(sys.prefix), Path(sys.base_prefix), ROOT, self.directory]
            self.made.services.start(
                f"{name}-{self.directory.name}",
                as_user(user, [user, BETWEEN], command, needed),
                {
                    "PYTHONPATH": str(ROOT),
                    "OMP_NUM_THREADS": "1",
                    "HOME": str(home),
                    "USER": name,
                    "LOGNAME": name,
                    "FEDGE_TEST_SECRET": SECRET,
                },
            )
        self.made.services.wait_until(lambda: self.made.num_online() == 1, "the node", 120)

    def pid(self, name: str) -> int:
        return self.made.services.pid(f"{name}-{self.directory.name}")

    def end(self) -> None:
        for name in reversed(self.programs()):  # itself alone, as its service does
            psutil.Process(self.pid(name)).terminate()
            self.made.services.wait_for_end(f"{name}-{self.directory.name}", 60)
        self.made.services.wait_until(lambda: self.made.num_online() == 0, "its leaving", 120)

    def told(self) -> dict[str, Any]:
        """Return all that an insider could tell."""
        files = [self.private / "data.jsonl", self.state / LEDGER, self.state / "fingerprint.key"]
        files += [path for path in self.state.rglob("*") if path.is_file()]
        files += [self.directory / "policy.toml", self.directory / "site.toml", self.socket]
        directories = [self.private, self.state, self.state / "answers", self.directory]
        directories += [self.directory / "socket", self.directory / "base", ROOT, Path("/")]
        return {
            "files": sorted(map(str, files)),
            "directories": [str(path) for path in directories],
            "socket": str(self.socket),
            "heads": REFUSED,
            "allowed": HEAD,
            "reads_only": self.is_shared,  # else it would end itself with what it ends
        }

    def fingerprint(self) -> dict[str, bytes]:
        """Return what must be the same after the attack."""
        kept = [self.private / "data.jsonl", self.directory / "policy.toml"]
        kept += [self.directory / "site.toml"]
        return {str(path): path.read_bytes() for path in kept}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployment(tmp_path_factory.mktemp("made"), [], Console(stderr=True)) as running:
        yield running


@pytest.fixture
def site(made: Deployment, request: pytest.FixtureRequest) -> Iterator[Attacked]:
    root = Path(tempfile.mkdtemp(prefix="fedge-"))
    attacked = Attacked(root, made, **request.param)
    attacked.make()
    attacked.start()
    yield attacked
    attacked.end()
    shutil.rmtree(root)


def attack(site: Attacked, directory: Path) -> list[dict[str, Any]]:
    """Run the attack; return what it sent home, one object a node."""
    base = site.directory / "base"
    for name, seed in (("adapter", 0), ("other", 1)):
        adapter = initial_adapter(base, rank=4, alpha=8.0, targets="attention", seed=seed)
        message = encode(adapter, dtype="float32", base_model=model_digest(base))
        (directory / name).write_bytes(message)
    values = {
        "told": json.dumps(site.told()),
        "adapter": str(directory / "adapter"),
        "other": str(directory / "other"),
        "run": RUN,
        "report": str(directory / "report.json"),
    }
    config = " ".join(f"{key}='{value}'" for key, value in values.items())
    command = ["flwr", "run", str(ATTACK), CONNECTION, "-c", config, "--format", "json"]
    run = str(site.made.services.call(command, site.made.variables("coordinator"))["run-id"])
    site.made.services.wait_until(lambda: is_finished(site.made, run), "the end of the run", 170)
    report: list[dict[str, Any]] = json.loads((directory / "report.json").read_text())
    return report


def marks() -> set[Path]:
    """Return every trace of the attack's own code in the places where anybody may write."""
    places = [Path(tempfile.gettempdir()), Path("/var/tmp"), Path("/dev/shm")]  # noqa: S108
    return {path for place in places for path in place.glob("mallory-*")}


@pytest.mark.parametrize("site", [{"node": "resident"}], indirect=True)
def test_a_resident_node_never_runs_or_even_fetches_the_app_of_a_run(
    site: Attacked, tmp_path: Path
) -> None:
    before, left_before = site.fingerprint(), marks()
    (answer,) = attack(site, tmp_path)
    assert answer["error"][0] == 1001
    assert "the request's" in answer["error"][1], "it was judged, by its head"
    assert marks() == left_before
    assert not [path for path in site.directory.rglob("*") if "mallory" in path.name]
    asked = (site.made.services.logs / "nginx-access.log").read_text()
    assert "/v1/fleet/push-messages" in asked
    assert "/v1/fleet/get-fab" not in asked
    daemon = psutil.Process(site.pid("daemon"))
    assert daemon.children(recursive=True) == []
    opened = [row.path for row in daemon.memory_maps()] + [f.path for f in daemon.open_files()]
    assert not [path for path in opened if "attack" in Path(path).name]
    assert site.fingerprint() == before
    assert read_ledger(site.state / LEDGER).rows == []


def allowed(site: Attacked) -> list[str]:
    """Return patterns of the attempts that may succeed: none tells a secret or changes a thing."""
    here, temporary = re.escape(str(site.directory)), re.escape(tempfile.gettempdir())
    return [
        rf"(import:)?mark ({here}/node|{temporary})/mallory-\w+-\d+",  # its own, and everybody's
        rf"list ({here}|{here}/base|{re.escape(str(ROOT))}|/)",
        rf"read {here}/site\.toml",
        r"(import:)?cmdline (trainer|daemon) \d+",  # paths, no secret; it is anybody's to read
        r"raw \w+",  # HTTP/2's greeting
        r"parts (many chunks|half an adapter)|head .*|flood \d+|(other )?(answer|adapter|settings)",
    ]


def code_and_reason(parts: list[str]) -> tuple[int, str]:
    """Read an answer of the trainer as the attack wrote it down."""
    head = json.loads(parts[0][parts[0].index("{") :])
    return head["code"], str(head.get("reason", ""))


@pytest.mark.parametrize("site", [{"node": "supernode"}], indirect=True)
def test_the_app_of_a_run_gets_the_answers_that_the_policy_allows_and_nothing_else(
    site: Attacked, tmp_path: Path
) -> None:
    before, left_before, trainer = site.fingerprint(), marks(), site.pid("trainer")
    (home,) = attack(site, tmp_path)
    for path in marks() - left_before:
        path.unlink()
    got = home["got"]
    print(len(got), "attempts got something,", len(home["failed"]), "did not:")
    print("\n".join(f"{name}: {ascii(value)[:100]}" for name, value in got.items()))
    assert home["user"] == NODE
    patterns = allowed(site)
    assert [name for name in got if not any(re.fullmatch(p, name) for p in patterns)] == []
    assert not [word for word in (TOPIC, SECRET) if word in json.dumps(home)]
    assert set(home["node_config"]) == {"trainer", "name"}
    for name in REFUSED:
        code, reason = code_and_reason(got[f"head {name}"])
        assert code in (1001, 1003), (name, reason)
        assert str(site.directory) not in reason
    for name in ("other adapter", "other settings"):
        code, reason = code_and_reason(got[name])
        assert (code, reason.partition(":")[0]) == (1003, "replay")
    assert code_and_reason(got["answer"])[0] == 0
    (row,) = read_ledger(site.state / LEDGER).rows
    assert (row.run, row.server_round, set(row.metrics)) == (RUN, 1, {"seconds"})
    assert site.fingerprint() == before
    assert psutil.Process(trainer).is_running()
    assert list((site.state / "spool").iterdir()) == []
    assert site.socket.stat().st_uid == TRAINER


@pytest.mark.parametrize("site", [{"node": "supernode", "is_shared": True}], indirect=True)
def test_the_attack_does_get_the_records_where_trainer_and_node_are_one_user(
    site: Attacked, tmp_path: Path
) -> None:
    """Else the test above would show nothing. What a process keeps to itself, it keeps even so."""
    left_before = marks()
    (home,) = attack(site, tmp_path)
    for path in marks() - left_before:
        path.unlink()
    assert TOPIC in home["got"][f"read {site.private / 'data.jsonl'}"]
    assert SECRET not in json.dumps(home)
