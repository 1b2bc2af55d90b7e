"""Signed runs over resident nodes on a real SuperLink with TLS; nobody edits a policy for a run."""

import json
import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from federation.app_bundle import bundle_digest
from federation.run_signature import parse_description
from federation.status import summarise
from tests.conftest import write_records, write_tiny_model
from tests.end_to_end.test_resident_nodes import (
    CONNECTION,
    NAMES,
    POLICY,
    ROOT,
    SETTINGS,
    Console,
    Deployment,
    Institution,
    deployment,
    is_finished,
    new_institution,
)
from tests.federation.test_app_bundle import write_app
from tests.federation.test_cli import run as run_command

pytestmark = pytest.mark.slow


class Federation:
    """Two sites that know one coordinator's key and no run, and that coordinator."""

    def __init__(self, made: Deployment, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made, self.home, self.monkeypatch = made, home, monkeypatch
        self.sites: list[Institution] = []

    def key(self, name: str) -> Path:
        path = self.home / name
        assert run_command(self.monkeypatch, "keygen", "--out", path) == 0
        return path

    def sign(self, key: Path, out: str, app: Path = ROOT, **more: Any) -> Path:
        """Return the file of a run that was signed."""
        values = SETTINGS | {
            "base_model": str(self.home / "base"),
            "out": str(self.home / out),
            "num_rounds": 1,
            "round_attempts": 1,
        }
        text = " ".join(f"{key}={json.dumps(value)}" for key, value in (values | more).items())
        file = self.home / f"{out}.toml"
        words = ("sign", app, "--key", key, "--out", file, "-c", text)
        assert run_command(self.monkeypatch, *words) == 0
        return file

    def start(self, file: Path, app: Path = ROOT) -> str:
        """Start a run, wait for its end, and return how it ended."""
        command = ["flwr", "run", str(app), CONNECTION, "-c", str(file), "--format", "json"]
        started = self.made.services.call(command, self.made.variables("coordinator"))
        run = str(started["run-id"])
        self.made.services.wait_until(lambda: is_finished(self.made, run), "the end of it", 300)
        (status,) = {r["status"] for r in self.made.flwr("ls")["runs"] if r["run-id"] == run}
        return str(status)

    def events(self, out: str) -> str:
        return (self.home / out / "events.jsonl").read_text()


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    home = tmp_path_factory.mktemp("inputs")
    write_tiny_model(home / "base")
    for name in NAMES:
        write_records(home / f"{name}.jsonl", 30, topic=name)
    root = Path(tempfile.mkdtemp(prefix="fedge-"))
    with (
        pytest.MonkeyPatch.context() as monkeypatch,
        deployment(tmp_path_factory.mktemp("deployment"), [], Console(stderr=True)) as made,
    ):
        made_here = Federation(made, home, monkeypatch)
        public = made_here.key("coordinator").with_suffix(".pub").read_text().strip()
        before = 'allowed = ["any"]\nbundles = ["any"]\n'
        assert POLICY.count(before) == 1
        policy = POLICY.replace(before, f'signers = ["{public}"]\n')
        made_here.sites = [new_institution(made, home, root / name, policy) for name in NAMES]
        made.services.wait_until(lambda: made.num_online() == 2, "the connection of both", 120)
        yield made_here
        made.services.end([site.program for site in made_here.sites])
    shutil.rmtree(root)


def test_a_signed_run_is_let_in_and_a_stranger_s_is_not(federation: Federation) -> None:
    file = federation.sign(federation.home / "coordinator", "signed")
    assert federation.start(file) == "finished:completed"
    assert summarise(federation.home / "signed" / "events.jsonl")["state"] == "finished"
    described = parse_description(tomllib.loads(file.read_text())["signed"]["description"])
    assert described.bundle == bundle_digest(ROOT)
    for site in federation.sites:
        judged = [row for row in site.events() if row["event"] == "judged"]
        assert {row["run"] for row in judged if row["is_allowed"]} == {described.run}

    stranger = federation.sign(federation.key("stranger"), "strange")
    assert federation.start(stranger) != "finished:completed"
    assert federation.events("strange").count("that no listed signer gave to this descr") >= 2


def test_a_setting_that_was_changed_since_is_noticed_by_the_server_s_own_app(
    federation: Federation,
) -> None:
    file = federation.sign(federation.home / "coordinator", "changed")
    text = file.read_text()
    assert text.count("training.num_steps = 2") == 1
    file.write_text(text.replace("training.num_steps = 2", "training.num_steps = 3"))
    asked = [site.count("asked") for site in federation.sites]
    assert federation.start(file) != "finished:completed"
    assert not (federation.home / "changed").exists()
    assert [site.count("asked") for site in federation.sites] == asked


def test_a_server_that_does_not_keep_to_what_was_signed_is_refused_by_the_sites(
    federation: Federation, tmp_path: Path
) -> None:
    """It has one signature, of its very own app, and no key; it tries what it likes."""
    app = write_app(tmp_path / "app")
    server = app / "federation" / "server_app.py"
    honest = "    if run.settings.signed.signature:\n"
    assert server.read_text().count(honest) == 1
    server.write_text(server.read_text().replace(honest, "    if False:\n"))
    file = federation.sign(federation.home / "coordinator", "steps", app)
    text = file.read_text()
    file.write_text(text.replace("training.num_steps = 2", "training.num_steps = 3"))
    assert federation.start(file, app) != "finished:completed"
    reason = "another description: training.num_steps is 3, signed is 2"
    assert federation.events("steps").count(reason) >= 2

    # The same signature for a run of another id: its directory draws one, whatever is signed.
    directory = app / "federation" / "run_directory.py"
    honest = "signed_id(settings) or secrets.token_hex(16)"
    assert directory.read_text().count(honest) == 1
    directory.write_text(directory.read_text().replace(honest, "secrets.token_hex(16)"))
    file = federation.sign(federation.home / "coordinator", "replayed", app)
    assert federation.start(file, app) != "finished:completed"
    assert federation.events("replayed").count("another description: run is") >= 2


def test_a_run_is_let_in_by_its_id_while_the_trainers_live(
    federation: Federation, tmp_path: Path
) -> None:
    file = federation.sign(federation.key("other"), "named")
    text = file.read_text()
    described = parse_description(tomllib.loads(text)["signed"]["description"])
    assert federation.start(file) != "finished:completed"
    lives = [site.count("trainer_ready") for site in federation.sites]
    for site in federation.sites:
        policy = site.directory / "policy.toml"
        named = policy.read_text().replace(
            "[runs]\n", f'[runs]\nallowed = ["{described.run}"]\nbundles = ["any"]\n'
        )
        policy.write_text(named)
    again = federation.home / "named-again.toml"
    again.write_text(f"resume = {json.dumps(str(federation.home / 'named'))}\n")
    assert federation.start(again) == "finished:completed"
    assert [site.count("trainer_ready") for site in federation.sites] == lives
    assert all(site.count("policy_read") >= 2 for site in federation.sites)
