"""A run is signed by the command, started by its file, and judged by a site, in this process."""

import json
import math
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from flwr.app import Error, Message
from flwr.common.config import parse_config_args

from client.ledger import Spent
from client.policy import Policy
from client.request import SiteRequest, parse_request, with_facts
from client.trainer_link import request_head
from client.verdict import Verdict, judge
from federation import server_app
from federation.accountant import epsilon_of
from federation.app_bundle import bundle_digest, run_config
from federation.base_model import model_digest
from federation.grid_sites import bytes_of
from federation.run_signature import difference, parse_description
from federation.wire import open_update
from tests.federation.test_app_bundle import write_app
from tests.federation.test_cli import run
from tests.simulated import LocalGrid

CONFIG: dict[str, Any] = {
    "num_rounds": 2,
    "num_sites": 3,
    "quorum": 3,
    "round_attempts": 1,
    "aggregation": "alternating",
    "metrics": "",
    "adapter.rank": 4,
    "training.num_steps": 2,
    "training.batch_size": 4,
    "training.max_tokens": 64,
    "training.noise_multiplier": 2.0,
}


@dataclass(frozen=True)
class FlowerRun:
    """What flwr knows of a run."""

    fab_hash: str


class AskedOnly(LocalGrid):
    """A grid whose sites answer nothing: what they are asked is what a test looks at."""

    def __init__(self, config: dict[str, Any], bundle: str) -> None:
        super().__init__([{}] * 3, config)
        self.run = FlowerRun(bundle)
        self.asked: list[Message] = []
        self.answer = self.take

    def take(self, message: Message, _: object) -> Message:
        self.asked.append(message)
        return Message(Error(1003, "not now"), reply_to=message)

    def request(self, bundle: str, tmp_path: Path) -> SiteRequest:
        """Return the first request as a site's trainer reads it."""
        records = self.asked[0].content
        head = request_head(dict(records["round"]), dict(records["training"]), bundle)
        path = tmp_path / "message"
        path.write_bytes(bytes_of(records["adapter"]["adapter"]))
        update = open_update(path)
        return with_facts(
            parse_request(json.dumps(head).encode()),
            shapes=update.shapes(),
            rank=update.rank,
            alpha=update.alpha,
            base_model=update.base_model,
            content_digest=update.sha256_of_content,
        )


@dataclass
class Coordinator:
    """Who signs and starts runs."""

    directory: Path
    base_model: Path
    command: Callable[..., int]
    app: Path

    def key(self, name: str = "coordinator") -> str:
        assert self.command("keygen", "--out", self.directory / name) == 0
        return (self.directory / f"{name}.pub").read_text().strip()

    @property
    def config(self) -> dict[str, Any]:
        where = {"base_model": str(self.base_model), "out": str(self.directory / "run")}
        return CONFIG | where

    def sign(self, config: dict[str, Any], name: str = "run.toml", *more: object) -> int:
        given = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
        given = given.replace("=NaN", "=nan").replace("=Infinity", "=inf")  # as TOML says them
        key, out = self.directory / "coordinator", self.directory / name
        return self.command("sign", self.app, "--key", key, "--out", out, "-c", given, *more)

    def start(self, overrides: dict[str, Any] | None = None, bundle: str = "") -> AskedOnly:
        """Start the file's run as flwr does, up to the first question; end as the run does."""
        given = parse_config_args([str(self.directory / "run.toml")])
        values = run_config(self.app, [])[1] | given | (overrides or {})
        grid = AskedOnly(values, bundle or bundle_digest(self.app))
        with pytest.raises(SystemExit):
            server_app.main(grid, grid.server_context)
        return grid


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_app(tmp_path_factory.mktemp("project") / "app")


@pytest.fixture
def coordinator(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, app: Path
) -> Coordinator:
    return Coordinator(tmp_path, tiny_model, lambda *words: run(monkeypatch, *words), app)


def policy_for(signer: str, base_model: str) -> Policy:
    """Return a policy that lets in what one signer signed, whatever its bundle."""
    values = {
        "models": {"base": [base_model]},
        "runs": {"signers": [signer]},
        "adapter": {"modules": ["model.layers.*"], "max_rank": 8, "max_alpha": 64},
        "training": {
            "max_steps": 8,
            "max_batch": 8,
            "max_tokens": 64,
            "max_learning_rate": 0.01,
            "max_rounds": 4,
        },
        "traffic": {
            "uplink": ["float32"],
            "max_round_bytes": 10_000_000,
            "max_run_bytes": 100_000_000,
        },
        "aggregation": {"kinds": ["alternating"], "secure_sum_required": False},
        "privacy": {"max_record_clip_norm": 1.0, "epsilon": 8.0, "delta": 1e-4},
    }
    return Policy.model_validate(values)


def verdict(request: SiteRequest, policy: Policy) -> Verdict:
    return judge(request, policy, Spent((), 1000, {}), datetime.now(UTC), epsilon_of)


def test_a_key_is_made_once_for_its_owner_alone_and_its_public_half_is_shown(
    coordinator: Coordinator, capsys: pytest.CaptureFixture[str]
) -> None:
    public = coordinator.key()
    assert capsys.readouterr().out.strip() == public
    path = coordinator.directory / "coordinator"
    assert path.stat().st_mode & 0o777 == 0o600
    key: Any = load_pem_private_key(path.read_bytes(), password=None)
    assert key.public_key().public_bytes_raw().hex() == public
    before = path.read_bytes()
    assert coordinator.command("keygen", "--out", path) == 2
    assert "exists already and is not overwritten" in capsys.readouterr().err
    assert path.read_bytes() == before
    # Nor is what is left of a key whose private half was taken away.
    path.rename(path.with_name("elsewhere"))
    assert coordinator.command("keygen", "--out", path) == 2
    assert "coordinator.pub exists already" in capsys.readouterr().err
    assert not path.exists()


def test_a_run_that_was_signed_is_let_in_by_a_site_that_was_told_the_key_alone(
    coordinator: Coordinator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    public, digest = coordinator.key(), model_digest(coordinator.base_model)
    capsys.readouterr()
    assert coordinator.sign(coordinator.config, "run.toml", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["signer"], shown["base_model"], shown["num_modules"]) == (public, digest, 14)
    assert shown["training"]["noise_multiplier"] == 2.0
    grid = coordinator.start()
    bundle = bundle_digest(coordinator.app)
    request = grid.request(bundle, tmp_path)
    assert request.run == shown["run"]
    judged = verdict(request, policy_for(public, digest))
    assert (judged.rule, judged.is_allowed) == ("allowed", True), judged.reason
    # The signature is one that anybody can check who knows the format.
    text = b"fedge run description, version 3\n" + request.description.encode()
    Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(
        bytes.fromhex(request.signature), text
    )
    stranger = policy_for("e" * 64, digest)
    assert verdict(request, stranger).rule == "runs.allowed"
    unsigned = request.model_copy(update={"signature": "", "description": ""})
    assert verdict(unsigned, policy_for(public, digest)).rule == "runs.allowed"
    other = request.model_copy(update={"run": "f" * 32})
    assert "run is" in verdict(other, policy_for(public, digest)).reason


@pytest.mark.parametrize(
    "kind",
    [
        {"aggregation": "products", "adapter.energy": 0.9, "wire.uplink": "int8"},
        {"aggregation": "factors", "adapter.targets": "attention", "wire.downlink": "int8"},
        {"aggregation": "krum", "robust.num_byzantine": 0, "metrics": "seconds,train_loss"},
        {"secure_sum.enabled": True, "secure_sum.clip": 1},
        {"secure_sum.enabled": True, "aggregation": "factors", "secure_sum.max_examples": 100},
        {"training.learning_rate": 1, "training.noise_multiplier": 0, "adapter.alpha": 1e-5},
    ],
    ids=str,
)
def test_what_a_site_is_asked_is_what_was_signed_whatever_the_kind_of_run(
    coordinator: Coordinator, tmp_path: Path, kind: dict[str, Any]
) -> None:
    coordinator.key()
    assert coordinator.sign(coordinator.config | {"round_timeout_s": 1.0} | kind) == 0
    request = coordinator.start().request(bundle_digest(coordinator.app), tmp_path)
    assert request.adapter is not None
    signed = parse_description(request.description)
    assert difference(signed, request.described(request.adapter)) == ""
    assert (signed.secure_sum is None) == (request.secure_sum is None)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"num_rounds": 3}, "num_rounds is 3, signed is 2"),
        ({"training.num_steps": 3}, "training.num_steps is 3, signed is 2"),
        ({"training.noise_multiplier": 0.5}, "training.noise_multiplier is 0.5, signed is 2.0"),
        ({"adapter.rank": 8}, "rank is 8, signed is 4"),
        ({"adapter.targets": "attention"}, "modules is"),
        ({"metrics": "seconds"}, 'metrics is ["seconds"], signed is []'),
        ({"quorum": 2}, "cohort is 2, signed is 3"),
        ({"aggregation": "factors"}, 'aggregation is "factors", signed is "alternating"'),
        ({"secure_sum.enabled": True}, "secure_sum"),
        ({"signed.signature": ""}, "signed.description stands without signed.signature"),
        ({"signed.description": "{}"}, "no description of a run that this version can read"),
    ],
    ids=str,
)
def test_a_run_with_other_settings_than_those_signed_does_not_start(
    coordinator: Coordinator,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    fault: str,
) -> None:
    coordinator.key()
    assert coordinator.sign(coordinator.config) == 0
    capsys.readouterr()
    grid = coordinator.start(change)
    assert grid.asked == []
    said = capsys.readouterr().err
    assert fault in said
    assert "federation sign" in said
    assert not (coordinator.directory / "run").exists()


def test_a_run_with_another_bundle_than_the_one_signed_does_not_start(
    coordinator: Coordinator, capsys: pytest.CaptureFixture[str]
) -> None:
    coordinator.key()
    assert coordinator.sign(coordinator.config) == 0
    capsys.readouterr()
    assert coordinator.start(bundle="d" * 64).asked == []
    assert "bundle is dddddddddddddddd…, signed is" in capsys.readouterr().err


def test_a_run_that_goes_on_later_is_signed_anew_under_its_own_id(
    coordinator: Coordinator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    public, digest = coordinator.key(), model_digest(coordinator.base_model)
    assert coordinator.sign(coordinator.config) == 0
    first = coordinator.start().request(bundle_digest(coordinator.app), tmp_path)
    # Its sites refused, so the run ended; it goes on with another bundle.
    resumed = {"resume": str(coordinator.directory / "run")}
    (coordinator.directory / "run.toml").unlink()
    assert coordinator.sign(resumed, "run.toml", "--days", 3) == 0
    # One that the check before the run refuses is not kept.
    described = coordinator.directory / "run" / "run.json"
    before = described.read_bytes()
    assert coordinator.start(bundle="d" * 64).asked == []
    assert described.read_bytes() == before
    second = coordinator.start().request(bundle_digest(coordinator.app), tmp_path)
    assert second.run == first.run
    assert second.description != first.description
    assert second.settings_digest == first.settings_digest
    assert verdict(second, policy_for(public, digest)).is_allowed
    # What was signed last is what an unsigned resumption goes on with.
    (coordinator.directory / "run.toml").write_text(f"resume = {json.dumps(resumed['resume'])}\n")
    third = coordinator.start().request(bundle_digest(coordinator.app), tmp_path)
    assert third.description == second.description


def test_whoever_holds_a_run_s_file_can_see_who_signed_what(
    coordinator: Coordinator, capsys: pytest.CaptureFixture[str]
) -> None:
    public = coordinator.key()
    assert coordinator.sign(coordinator.config) == 0
    signed = capsys.readouterr().out
    path = coordinator.directory / "run.toml"
    assert coordinator.command("verify", path, "--signer", public) == 0
    verified = capsys.readouterr().out
    assert "training.noise_multiplier" in verified
    (run_id,) = re.findall(r"\brun +([0-9a-f]{32})", verified)
    assert run_id in signed
    assert coordinator.command("verify", path, "--signer", "e" * 64) == 2
    assert "did not sign this" in capsys.readouterr().err
    path.write_text(path.read_text().replace('\\"num_rounds\\":2', '\\"num_rounds\\":3'))
    assert coordinator.command("verify", path, "--signer", public) == 2
    assert coordinator.command("verify", path, "--signer", "abc") == 2
    assert "expected 64 hex digits" in capsys.readouterr().err


def test_a_signature_holds_for_the_days_that_were_asked(
    coordinator: Coordinator, capsys: pytest.CaptureFixture[str]
) -> None:
    coordinator.key()
    capsys.readouterr()
    before = datetime.now(UTC).replace(microsecond=0)
    assert coordinator.sign(coordinator.config, "run.toml", "--json", "--days", 3) == 0
    end = datetime.fromisoformat(json.loads(capsys.readouterr().out)["not_after"])
    assert before <= end - timedelta(days=3) <= datetime.now(UTC)


@pytest.mark.parametrize(
    ("change", "words", "fault"),
    [
        ({}, ("--key", "nowhere"), "signing key nowhere cannot be read"),
        ({}, ("--out", "run.sig"), "expected a name that ends in .toml"),
        ({"num_round": 3}, (), "num_round"),
        ({"num_rounds": 0}, (), "'num_rounds' is 0"),
        ({"base_model": "/nowhere"}, (), "/nowhere does not exist"),
        ({"training.learning_rate": math.nan}, (), "training.learning_rate is NaN: expected a fin"),
        ({"training.proximal_mu": math.inf}, (), "training.proximal_mu is Infinity: expected"),
    ],
    ids=str,
)
def test_what_cannot_be_signed_is_said_in_one_sentence(
    coordinator: Coordinator,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    words: tuple[str, ...],
    fault: str,
) -> None:
    coordinator.key()
    capsys.readouterr()
    assert coordinator.sign(coordinator.config | change, "run.toml", *words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert fault in said
    assert said.count("\n") == 1
    assert not (coordinator.directory / "run.toml").exists()


def test_a_signed_run_s_file_is_not_overwritten(
    coordinator: Coordinator, capsys: pytest.CaptureFixture[str]
) -> None:
    coordinator.key()
    assert coordinator.sign(coordinator.config) == 0
    before = (coordinator.directory / "run.toml").read_text()
    assert coordinator.sign(coordinator.config) == 2
    assert "is not overwritten" in capsys.readouterr().err
    assert (coordinator.directory / "run.toml").read_text() == before


def test_the_guide_s_commands_sign_a_run_that_starts(
    coordinator: Coordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = (Path(__file__).parents[2] / "docs/running-across-institutions.md").read_text()
    pattern = r"<!-- tested: signed run -->\n```bash\n(.*?)```"
    (block,) = re.findall(pattern, guide, re.DOTALL)
    signs, verifies, starts = block.splitlines()
    public = coordinator.key()
    monkeypatch.chdir(tmp_path)
    here = {"/srv/models/base": str(coordinator.base_model), "/srv/runs/3": str(tmp_path / "run")}
    for path, ours in here.items():
        signs = signs.replace(path, ours)
    words = shlex.split(signs)[1:]
    assert words[:2] == ["sign", "."]
    assert coordinator.command("sign", coordinator.app, *words[2:]) == 0
    words = shlex.split(verifies.replace("$(cat coordinator.pub)", public))[1:]
    assert coordinator.command(*words) == 0
    assert shlex.split(starts)[-2:] == ["-c", "run.toml"]
    grid = coordinator.start({"round_attempts": 1, "num_sites": 3})
    assert len(grid.asked) == 3
    policy = policy_for(public, model_digest(coordinator.base_model))
    request = grid.request(bundle_digest(coordinator.app), tmp_path)
    assert verdict(request, policy).rule not in ("runs.allowed", "runs.bundles")
