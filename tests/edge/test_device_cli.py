import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edge.agent import Outcome
from edge.cli import main
from edge.device import poll, poll_until_terminated
from edge.errors import EdgeError, SettingsError
from edge.settings import DeviceSettings, read_device_settings
from tests.edge.artefacts import Chain, flip_bit, write_build, write_chain

Edge = Callable[..., tuple[int, str, str]]


@pytest.fixture
def edge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Edge:
    """Run `edge` with these arguments in an empty directory: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EDGE_KEY_PASSPHRASE", raising=False)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edge", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def write_device(root: Path, **changes: object) -> Path:
    values = {"device_dir": "device", "registry": "registry", "public_keys": ["keys/public.pem"]}
    config = root / "device.toml"
    lines = [f"{name} = {json.dumps(value)}\n" for name, value in (values | changes).items()]
    config.write_text("".join(lines))
    return config


@pytest.fixture
def device(edge: Edge, tmp_path: Path, builds: Path) -> Path:
    """A device that runs a real GGUF build, set up with the commands a user would type."""
    assert edge("keygen", "--out", "keys")[0] == 0
    push = ("push", builds / "gguf-f16", "registry:stable", "--key", "keys/private.pem")
    assert edge(*push)[0] == 0
    config = write_device(tmp_path)
    assert edge("agent", "--config", config, "--once")[0] == 0
    return config


def test_a_real_build_reaches_the_device_and_generates(
    edge: Edge, device: Path, builds: Path, tmp_path: Path
) -> None:
    push = ("push", builds / "gguf-q4_k", "registry:stable", "--key", "keys/private.pem")
    assert edge(*push)[0] == 0
    code, out, _ = edge("agent", "--config", device, "--once", "--json")
    outcome = json.loads(out)
    assert code == 0
    assert (outcome["action"], outcome["sequence"], outcome["build"]) == (
        "installed",
        2,
        "gguf:q4_k",
    )
    assert 1 <= outcome["probe"]["num_tokens"] <= 16
    assert (tmp_path / "device" / "current").resolve().parent.name == outcome["digest"]
    code, out, _ = edge(
        "run", tmp_path / "device" / "current", "--prompt", "the heart", "--max-tokens", 4, "--json"
    )
    assert code == 0
    assert json.loads(out)["num_tokens"] >= 1
    code, out, _ = edge("rollback", "--config", device, "--json")
    assert (code, json.loads(out)["build"], json.loads(out)["sequence"]) == (0, "gguf:f16", 1)


def test_an_onnx_build_is_probed_by_its_own_runtime(edge: Edge, device: Path, builds: Path) -> None:
    push = ("push", builds / "onnx-fp32", "registry:stable", "--key", "keys/private.pem")
    assert edge(*push)[0] == 0
    code, out, err = edge("agent", "--config", device, "--once")
    assert (code, out.split(": ")[0]) == (0, "installed"), err


def test_a_build_that_no_runtime_loads_is_refused_in_one_sentence(
    edge: Edge, device: Path, tmp_path: Path
) -> None:
    before = (tmp_path / "device" / "current").readlink()
    write_build(tmp_path / "noise")
    edge("push", "noise", "registry:stable", "--key", "keys/private.pem")
    code, out, err = edge("agent", "--config", device, "--once", "--json")
    assert (code, out) == (1, "")
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: release 2 of stable (gguf:q4_k")
    assert "its probe failed" in last
    assert (tmp_path / "device" / "current").readlink() == before


def test_an_attack_is_one_sentence_and_exit_code_1(
    edge: Edge, device: Path, tmp_path: Path
) -> None:
    assert edge("keygen", "--out", "other")[0] == 0
    build = write_build(tmp_path / "noise")
    before = (tmp_path / "device" / "current").readlink()
    push = ("push", build, "registry:stable", "--key", "other/private.pem", "--sequence", 9)
    assert edge(*push)[0] == 0
    code, out, err = edge("agent", "--config", device, "--once")
    assert (code, out) == (1, "")
    assert err.startswith("error: the release is signed by ")
    assert err.count("\n") == 1
    assert (tmp_path / "device" / "current").readlink() == before


# Verify -------------------------------------------------------------------------------------------


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return write_chain(tmp_path)


def test_verify_walks_back_to_every_update_and_the_package(edge: Edge, chain: Chain) -> None:
    code, out, err = edge("verify", chain.build, "--source", chain.root)
    assert (code, err) == (0, "")
    for digest in chain.updates.values():
        assert digest in out
    assert f"hashed in {chain.student}" in out
    assert "artefacts: 6, of which hashed on disk: 6" in out
    code, out, _ = edge("verify", chain.build, "--json")
    walk = json.loads(out)
    assert (code, walk["ok"], walk["problems"]) == (0, True, [])
    stages = [artefact["stage"] for artefact in walk["artefacts"]]
    assert stages == ["build", "distill", "fetch", "federate", "federate", "federate"]
    assert {
        material["sha256"]
        for artefact in walk["artefacts"]
        for material in artefact["materials"]
        if material["name"].startswith("update of site")
    } == set(chain.updates.values())


def test_verify_names_a_changed_byte_and_ends_1(edge: Edge, chain: Chain) -> None:
    flip_bit(chain.student / "model.safetensors")
    code, out, err = edge("verify", chain.build, "--source", chain.root, "--json")
    assert code == 1
    (problem,) = json.loads(out)["problems"]
    assert problem["file"] == "model.safetensors"
    assert "model.safetensors was changed, expected sha256" in err


def test_verify_of_the_devices_build_checks_its_signature(
    edge: Edge, device: Path, tmp_path: Path
) -> None:
    current = tmp_path / "device" / "current"
    code, out, _ = edge("verify", current, "--key", "keys/public.pem")
    assert code == 0
    assert out.strip().endswith("signature holds")
    code, out, _ = edge("verify", current)
    assert code == 0
    assert "signature not checked" in out
    edge("keygen", "--out", "other")
    code, _, err = edge("verify", current, "--key", "other/public.pem")
    assert code == 1
    assert "pinned keys" in err


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("lineage.json", "lineage.json is not the signed one"),
        ("model.gguf", "model.gguf was changed"),
        ("../release.dsse", "release.dsse does not hold"),
    ],
)
def test_one_changed_byte_on_the_device_is_named(
    edge: Edge, device: Path, tmp_path: Path, file: str, named: str
) -> None:
    path = tmp_path / "device" / "current" / file
    content = path.read_bytes()
    at = content.index(b'"stage": "build"') + 11 if file == "lineage.json" else len(content) // 2
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    assert path.read_bytes() != content
    code, _, err = edge("verify", tmp_path / "device" / "current")
    assert code == 1
    assert named in err


# Mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("verify", "nowhere"), "holds no lineage.json"),
        (("push", "nowhere", "registry:stable", "--key", "none.pem"), "none.pem cannot be read"),
        (("push", "nowhere", "registry", "--key", "none.pem"), "expected DIR:TAG"),
        (("agent", "--config", "none.toml", "--once"), "none.toml cannot be read"),
        (("rollback", "--config", "none.toml"), "none.toml cannot be read"),
    ],
)
def test_a_users_mistake_is_one_sentence_exit_2_and_nothing_written(
    edge: Edge, tmp_path: Path, arguments: tuple[str, ...], reason: str
) -> None:
    code, out, err = edge(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert reason in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device_dirs": "x"}, "unknown key 'device_dirs'"),
        ({"device_dir": 7}, "device_dir is 7, expected a text"),
        ({"public_keys": []}, r"public_keys is \[\]"),
        ({"public_keys": "key.pem"}, "expected a list"),
        ({"poll_interval_s": 0}, "poll_interval_s is 0"),
        ({"poll_interval_s": True}, "poll_interval_s is True"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    with pytest.raises(SettingsError, match=reason):
        read_device_settings(write_device(tmp_path, **changes))


def test_settings_are_read_relative_to_their_file(tmp_path: Path) -> None:
    config = write_device(tmp_path, channel="beta", poll_interval_s=60)
    assert read_device_settings(config) == DeviceSettings(
        device_dir=tmp_path / "device",
        registry=tmp_path / "registry",
        public_keys=(tmp_path / "keys" / "public.pem",),
        channel="beta",
        poll_interval_s=60.0,
    )
    config.write_text("device_dir = ")
    with pytest.raises(SettingsError, match="is not TOML"):
        read_device_settings(config)
    config.write_text('registry = "registry"\n')
    with pytest.raises(SettingsError, match="device_dir is missing"):
        read_device_settings(config)


# The loop -----------------------------------------------------------------------------------------


def test_the_loop_outlives_a_failed_check_and_spreads_its_waits() -> None:
    answers = iter([EdgeError("no registry"), Outcome("kept", None), EdgeError("no space")])
    seen: list[object] = []
    waits: list[float] = []
    draws = iter([0.0, 0.5, 1.0])

    def check() -> Outcome:
        answer = next(answers)
        if isinstance(answer, EdgeError):
            raise answer
        return answer

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        return len(waits) == 3

    poll(check, seen.append, seen.append, wait, 100.0, lambda: next(draws))
    assert [str(one) for one in seen] == ["no registry", "kept: no release yet", "no space"]
    assert waits == pytest.approx([80.0, 100.0, 120.0])


def test_sigterm_lets_the_check_under_way_finish() -> None:
    finished: list[Outcome] = []
    before = signal.getsignal(signal.SIGTERM)

    def check() -> Outcome:
        os.kill(os.getpid(), signal.SIGTERM)
        return Outcome("kept", None)

    poll_until_terminated(check, finished.append, pytest.fail, interval_s=600.0)
    assert [outcome.action for outcome in finished] == ["kept"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_runs_on_a_device_loads_no_torch_and_no_transformers() -> None:
    program = (
        "import sys, edge.agent, edge.device, edge.runtime, edge.verification\n"
        "print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
