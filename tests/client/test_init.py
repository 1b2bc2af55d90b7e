"""`client init`: what it writes, what it leaves alone, and what it says is left to do."""

import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from client.policy import read_policy
from client.policy_template import policy_template
from client.site_directory import make_site
from client.site_settings import SiteSettings, load_site
from client.site_template import site_template
from federation.base_model import model_digest
from federation.errors import UserError
from federation.settings import SettingsError, read_toml
from tests.client.test_cli import run

SIGNER = "5e" * 32


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_site_loads_with_all_that_was_said(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--superlink", "fleet.example:443", "--root-certificate", "given/ca.crt"]
    words += ["--base-model", tiny_model, "--data", "given/records.jsonl", "--name", "clinic"]
    assert run(monkeypatch, "init", "site", *words, "--signer", SIGNER, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    settings = load_site(tmp_path / "site" / "site.toml")
    assert settings.superlink == "fleet.example:443"
    assert settings.root_certificate == tmp_path / "given" / "ca.crt"
    assert settings.site.data == tmp_path / "given" / "records.jsonl"
    assert settings.site.base_model == tiny_model
    assert settings.site.state == tmp_path / "site" / "state"
    assert settings.name == "clinic"
    policy = read_policy(settings.policy)
    assert policy.models.base == (model_digest(tiny_model),)
    assert policy.runs.signers == (SIGNER,)
    assert said["base_models"] == list(policy.models.base)
    assert not any("Fill in" in step or "Let runs in" in step for step in said["next"])
    assert said["public_key"] == (tmp_path / "site" / "node.pub").read_text().strip()


def test_the_key_is_what_flower_and_ssh_read_and_nobody_else_can(tmp_path: Path) -> None:
    made = make_site(tmp_path / "site", known={})
    key = made.settings.node_key
    private = load_ssh_private_key(key.read_bytes(), password=None)
    public = load_ssh_public_key(key.with_suffix(".pub").read_bytes())
    assert private.public_key() == public
    assert public.curve.name == "secp384r1"
    assert mode_of(key) == 0o600
    assert mode_of(made.settings.state) == 0o700
    assert mode_of(tmp_path / "site" / "site.toml") == 0o644


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen")
def test_the_fingerprint_is_the_one_that_ssh_prints(tmp_path: Path) -> None:
    made = make_site(tmp_path / "site", known={})
    done = subprocess.run(
        ["ssh-keygen", "-l", "-f", tmp_path / "site" / "node.pub"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[1] == made.fingerprint


def test_for_docker_it_is_two_halves_and_makes_no_state(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(monkeypatch, "init", tmp_path / "site", "--docker", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    settings = load_site(tmp_path / "site" / "site.toml")
    assert (str(settings.socket), settings.socket_group) == ("/run/fedge/trainer", "fedge")
    assert "docker compose up -d" in said["next"][-1]
    assert not any("client daemon" in step for step in said["next"])
    assert not (tmp_path / "site" / "state").exists()


def test_without_a_word_it_says_what_to_fill_in_and_allows_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(monkeypatch, "init", tmp_path / "site") == 0
    printed = capsys.readouterr().out
    assert "Fill in superlink, root_certificate, base_model, data in" in printed
    assert "flwr supernode register node.pub CONNECTION --name SITE" in printed
    load_site(tmp_path / "site" / "site.toml")
    assert read_policy(tmp_path / "site" / "policy.toml").models.base == ()


def test_a_path_that_leads_nowhere_is_the_first_thing_to_mend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["--data", tmp_path / "recrods.jsonl", "--root-certificate", tmp_path / "ca.crt"]
    (tmp_path / "ca.crt").touch()
    assert run(monkeypatch, "init", tmp_path / "site", *words) == 0
    printed = capsys.readouterr().out
    assert f"Bring what is not there yet: data, {tmp_path / 'recrods.jsonl'}.\n" in printed
    assert run(monkeypatch, "init", tmp_path / "box", "--docker", *words) == 0
    assert "not there yet" not in capsys.readouterr().out  # they are paths of the container


def test_the_template_names_every_setting_and_its_default() -> None:
    text = site_template()
    lines = [line.removeprefix("# ") for line in text.splitlines()]
    for name, field in SiteSettings.model_fields.items():
        (line,) = [line for line in lines if line.startswith(f"{name} = ")]
        # A new site gets a key of its own, whatever a file without the line means.
        is_ordinary = not field.is_required() and name != "identity_key"
        if is_ordinary and f"\n{name} = " in text:
            value = line.partition(" = ")[2]
            default = field.default
            shown = str(default) if name == "trainer" else default
            assert json.loads(value.replace("_", "") if value[0] != '"' else value) == shown


@pytest.mark.parametrize(
    "name", ['the "bank"', "back\\slash", "Klinik Süd", "😀", "a\tb", "del\x7f", "@state@"]
)
def test_a_name_is_written_as_it_was_said(tmp_path: Path, name: str) -> None:
    made = make_site(tmp_path / "site", known={"name": name})
    assert load_site(tmp_path / "site" / "site.toml").name == made.settings.name == name


def test_the_policy_template_keeps_its_comments_beside_a_digest() -> None:
    plain, filled = policy_template(), policy_template(base_models=["ab" * 32])
    changed = set(filled.splitlines()) - set(plain.splitlines())
    assert changed == {f'base = ["{"ab" * 32}"]'}


@pytest.mark.parametrize("taken", ["site.toml", "policy.toml", "node", "node.pub", "identity"])
def test_nothing_is_overwritten_and_nothing_is_left_half_made(tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).write_text("mine")
    with pytest.raises(UserError, match=f"{taken} exists already, and nothing is overwritten"):
        make_site(tmp_path, known={})
    assert (tmp_path / taken).read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == [taken]


def test_a_dangling_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "node").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="node exists already"):
        make_site(tmp_path, known={})
    assert not (tmp_path / "elsewhere").exists()


def test_what_stood_in_the_directory_stays_beside_the_site(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("mine")
    (tmp_path / "state").mkdir(mode=0o750)
    (tmp_path / "state" / "ledger.db").write_text("old")
    make_site(tmp_path, known={})
    assert (tmp_path / "ca.crt").read_text() == "mine"
    assert (tmp_path / "state" / "ledger.db").read_text() == "old"
    assert mode_of(tmp_path / "state") == 0o750


def test_an_error_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        make_site(tmp_path / "new", known={"state": "/proc/none/state"})
    assert not list(tmp_path.iterdir())
    (tmp_path / "systemd").write_text("in the way")
    with pytest.raises(UserError, match="systemd cannot be written"):
        make_site(tmp_path, known={}, client=Path("/opt/fedge/bin/client"))
    assert [path.name for path in tmp_path.iterdir()] == ["systemd"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--superlink", "https://fleet"], "setting 'superlink' is 'https://fleet'"),
        (["--name", "n" * 65], "setting 'name' is"),
        (["--state", "s" * 101], "choose a shorter state or trainer"),
        (
            ["--signer", "abc"],
            "setting 'runs.signers.0' is 'abc': expected 64 hex digits (0-9, a-f)",
        ),
        (["--base-model", "nowhere"], "nowhere does not exist"),
        (["--data", "a\udcff.jsonl"], "not UTF-8"),
        (["--docker", "--systemd", "--data", "a", "--base-model", "b"], "--docker takes no"),
    ],
)
def test_a_wrong_word_is_one_sentence_and_makes_nothing(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: list[str],
    sentence: str,
) -> None:
    assert run(monkeypatch, "init", tmp_path / "site", *words) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_directory_of_somebody_else_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        make_site(tmp_path / "file" / "site", known={})


def test_the_umask_does_not_matter(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        made = make_site(tmp_path / "site", known={})
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "site" / "policy.toml") == 0o644
    assert mode_of(made.settings.node_key) == 0o600


def test_values_come_back_from_toml_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text(site_template(node_state="here", socket_group="link"))
    values = read_toml(path)
    assert (values["node_state"], values["socket_group"]) == ("here", "link")
    with pytest.raises(SettingsError):
        make_site(tmp_path / "other", known={"superlink": "no port"})
