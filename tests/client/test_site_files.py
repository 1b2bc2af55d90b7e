"""What lies on a site's disk: each check over facts and over real files."""

import os
from pathlib import Path

import pytest

from client import site_files
from client.policy import Policy
from client.site_directory import make_site
from client.site_files import Model, Place, Records, look
from federation.base_model import model_digest
from tests.client.checks import level
from tests.conftest import write_records

GIB = 1 << 30


def test_a_key_that_others_can_read_must_be_made_anew(tmp_path: Path) -> None:
    made = make_site(tmp_path / "site", known={})
    key = made.settings.node_key
    public = site_files.read_node_key(key)
    assert level(site_files.check_node_key(look(key), public, made.public_key)) == "ok"
    key.chmod(0o640)
    assert "chmod 600" in site_files.check_node_key(look(key), public, None).fix
    key.chmod(0o600)
    stranger = make_site(tmp_path / "other", known={}).public_key
    check = site_files.check_node_key(look(key), public, stranger)
    assert (level(check), check.found) == ("fail", "the public key beside it is another key's")
    key.write_text("not a key")
    wrong = site_files.attempt(lambda: site_files.read_node_key(key))
    assert "no OpenSSH private key" in site_files.check_node_key(look(key), wrong, None).found
    key.unlink()
    assert "ssh-keygen" in site_files.check_node_key(look(key), "", None).fix


def test_a_model_is_counted_from_its_headers_and_read_only_if_asked(tiny_model: Path) -> None:
    quick = site_files.read_model(tiny_model, is_quick=True)
    assert quick.digest == ""
    assert site_files.read_model(tiny_model, is_quick=False).digest == model_digest(tiny_model)
    from transformers import AutoModelForCausalLM

    parameters = AutoModelForCausalLM.from_pretrained(tiny_model).parameters()
    assert quick.num_parameters == sum(each.numel() for each in parameters)
    assert level(site_files.check_model(quick)) == "ok"


def test_the_digest_has_to_be_the_policys(tiny_model: Path) -> None:
    model = Model(1, "ab" * 32)
    none, any_one = Policy(), Policy.model_validate({"models": {"base": ["any"]}})
    own = Policy.model_validate({"models": {"base": ["ab" * 32]}})
    assert level(site_files.check_digest(model, own)) == "ok"
    assert level(site_files.check_digest(model, any_one)) == "warn"
    refused = site_files.check_digest(model, none)
    assert (level(refused), "ab" * 32 in refused.fix) == ("fail", True)
    for skipped in (site_files.check_digest("why", own), site_files.check_digest(model, "why")):
        assert level(skipped) == "skip"
    assert level(site_files.check_digest(Model(1, ""), own)) == "skip"


def test_of_the_records_only_their_number_is_said(tmp_path: Path) -> None:
    path = write_records(tmp_path / "records.jsonl", 5)
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    path.chmod(0o600)
    check = site_files.check_data(site_files.count_records(path), look(path))
    assert (level(check), check.found) == ("ok", "5 records, 1 more are not trained on")
    path.chmod(0o644)
    assert site_files.check_data(Records(5, 0), look(path)).fix == f"chmod o-r {path}"
    assert level(site_files.check_data(Records(0, 3), look(path))) == "fail"
    path.write_text('{"prompt": "a secret", "response"\n')
    broken = site_files.attempt(lambda: site_files.count_records(path))
    check = site_files.check_data(broken, look(path))
    assert level(check) == "fail"
    assert "records.jsonl:1" in check.found
    assert "secret" not in check.found + check.fix


PRIVACY = {"privacy": {"epsilon": 8.0, "delta": 1e-3, "noise_floor": 1.0}}
OPEN = {"models": {"base": ["any"]}, "runs": {"allowed": ["any"]}, **PRIVACY}


@pytest.mark.parametrize(
    ("values", "mode", "expected", "found"),
    [
        (OPEN, 0o644, "ok", "allows 1 runs by id, and those of 0 signers"),
        (OPEN, 0o664, "fail", "others can change what this site allows"),
        ({}, 0o644, "warn", "no base model is allowed"),
        ({**OPEN, "runs": {}}, 0o644, "warn", "nobody's run is allowed"),
        (OPEN | {"privacy": {**PRIVACY["privacy"], "delta": 0.01}}, 0o644, "fail", "all is refu"),
        (OPEN | {"privacy": {**PRIVACY["privacy"], "epsilon": 0.0}}, 0o644, "warn", "epsilon is 0"),
    ],
)
def test_a_policy_is_read_against_the_records(
    values: dict[str, object], mode: int, expected: str, found: str
) -> None:
    place = Place(Path("policy.toml"), is_there=True, mode=mode)
    check = site_files.check_policy(Policy.model_validate(values), place, Records(100, 0))
    assert (level(check), found in check.found) == (expected, True), check
    assert level(site_files.check_policy("why", place, Records(1, 0))) == "fail"


def test_a_state_directory_is_for_its_owner_only(tmp_path: Path) -> None:
    state = tmp_path / "state"
    uid = os.getuid()
    assert level(site_files.check_state(look(state), uid, "")) == "warn"
    state.mkdir(mode=0o700)
    good = look(state)
    assert level(site_files.check_state(good, uid, "")) in ("ok", "warn")  # warn where /tmp is one
    state.chmod(0o750)
    assert site_files.check_state(look(state), uid, "").fix == f"chmod 700 {state}"


@pytest.mark.parametrize(
    ("change", "expected", "words"),
    [
        ({}, "ok", "ext4"),
        ({"uid": 7}, "fail", "belongs to user id 7"),
        ({"is_writable": False}, "fail", "cannot be written"),
        ({"strays": ("run-ab",)}, "fail", "another file system (run-ab)"),
        ({"free_bytes": 600}, "fail", "free"),
        ({"filesystem": "nfs4"}, "warn", "nfs4"),
        ({"filesystem": "tmpfs"}, "warn", "lost with a restart"),
        ({"filesystem": "overlay"}, "warn", "lost with the container's end"),
    ],
)
def test_a_state_directory_keeps_what_must_be_kept(
    change: dict[str, object], expected: str, words: str
) -> None:
    facts: dict[str, object] = {"mode": 0o700, "uid": 1000, "is_writable": True}
    facts |= {"free_bytes": 10 * GIB, "filesystem": "ext4", "is_there": True}
    place = Place(Path("state"), **(facts | change))  # type: ignore[arg-type]
    policy = Policy.model_validate({"traffic": {"max_round_bytes": GIB}})
    check = site_files.check_state(place, 1000, policy)
    assert (level(check), words in check.found) == (expected, True), check
    assert level(site_files.check_state(place, 0, policy)) == "warn"


def test_the_file_system_is_that_of_the_longest_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    spaced = tmp_path / "a b"
    spaced.mkdir()
    lines = ["/dev/a / ext4 rw 0 0", f"/dev/b {tmp_path} xfs rw 0 0"]
    lines += [f"server:/x {str(spaced).replace(' ', chr(92) + '040')} nfs4 rw 0 0"]
    mounts.write_text("\n".join(lines) + "\n")
    assert look(spaced, mounts).filesystem == "nfs4"
    assert look(tmp_path, mounts).filesystem == "xfs"
    assert look(Path("/"), mounts).filesystem == "ext4"
    assert look(tmp_path, tmp_path / "none").filesystem == ""
