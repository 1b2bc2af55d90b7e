"""`client doctor`: every check of a site, in one order, over real files and a real TLS server."""

import contextlib
import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from client import doctor
from client.check import exit_code
from client.claim import claim
from client.doctor import examine
from client.fingerprint import SECRET, fingerprint, read_secret
from client.health import Health, Status
from client.ledger import LEDGER, Ledger
from client.machine import SWITCHES
from client.peer import peer_at
from client.policy import read_policy
from client.records import read_records
from client.site_directory import make_site
from client.site_settings import load_site
from federation.base_model import model_digest
from tests.client.checks import level
from tests.client.ledgers import entry
from tests.client.test_cli import run
from tests.client.test_coordinator import serving
from tests.client.test_peer import grpc_server, leave_behind
from tests.conftest import write_records

ROOT = Path(__file__).parents[2]


@pytest.fixture
def site(tmp_path: Path, tiny_model: Path) -> Iterator[Path]:
    """A site with all that it needs, and a coordinator that answers; its site.toml."""
    data = write_records(tmp_path / "records.jsonl", 20)
    data.chmod(0o600)
    with serving(tmp_path / "coordinator") as port:
        known = {
            "superlink": f"127.0.0.1:{port}",
            "root_certificate": str(tmp_path / "coordinator" / "ca.crt"),
            "base_model": str(tiny_model),
            "data": str(data),
        }
        make_site(
            tmp_path / "site",
            known=known,
            base_models=[model_digest(tiny_model)],
            signers=["5e" * 32],
        )
        yield tmp_path / "site" / "site.toml"


def test_a_site_with_all_that_it_needs_has_nothing_to_change(site: Path) -> None:
    policy = site.with_name("policy.toml")
    text = policy.read_text().replace("cohort = []", f'cohort = ["{"a" * 64}"]')
    policy.write_text(text)
    checks = {check.name: check for check in examine(site, variables=SWITCHES)}
    assert exit_code(checks.values()) == 0, checks
    machine_dependent = {"user", "memory", "gpu", "state"}
    assert {name: level(check) for name, check in checks.items() if check.level != "ok"}.keys() <= (
        machine_dependent
    )
    names = ["python", "packages", "user", "environment", "settings", "gpu", "memory"]
    names += ["base_model", "data", "policy", "digest", "identity", "state", "ledger"]
    names += ["node_key", "certificate", "superlink", "clock", "daemon", "supernode"]
    names += ["socket"]
    assert list(checks) == names


def test_each_half_looks_at_its_own(site: Path) -> None:
    settings = load_site(site)
    settings.site.data.unlink()
    node = {check.name for check in examine(site, parts=["node"], variables=SWITCHES)}
    assert "superlink" in node
    assert not {"data", "policy", "ledger", "gpu"} & node
    trainer = {check.name: check for check in examine(site, parts=["trainer"], variables=SWITCHES)}
    assert level(trainer["data"]) == "fail"
    assert not {"node_key", "superlink", "daemon"} & trainer.keys()


def test_the_command_prints_a_line_a_check_and_ends_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], site: Path
) -> None:
    assert run(monkeypatch, "doctor", "--config", site, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["is_well"]
    load_site(site).node_key.chmod(0o644)
    assert run(monkeypatch, "doctor", "--config", site, "--quick") == 2
    printed = capsys.readouterr().out
    assert "node_key" in printed
    assert "fail" in printed
    assert run(monkeypatch, "doctor", "--config", site, "--part", "half") == 2
    assert "expected node, trainer or both" in capsys.readouterr().err


def test_without_a_site_the_machine_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "doctor", "--json") == 0
    names = [check["name"] for check in json.loads(capsys.readouterr().out)["checks"]]
    assert names == ["python", "packages", "user", "environment", "gpu", "memory"]


def test_a_template_is_not_filled_in_until_it_is(tmp_path: Path) -> None:
    config = make_site(tmp_path / "site", known={"superlink": "fleet.example.org:444"}).directory
    config = config / "site.toml"
    check = doctor.check_settings(load_site(config), config)
    assert check.found == "not filled in: root_certificate, base_model, data"
    (tmp_path / "site" / "ca.crt").write_text("")
    (tmp_path / "site" / "base-model").mkdir()
    (tmp_path / "site" / "records.jsonl").write_text("")
    assert level(doctor.check_settings(load_site(config), config)) == "ok"
    broken = doctor.check_settings("site.toml: setting 'rank' is 0", config)
    assert (level(broken), "'rank'" in broken.found) == ("fail", True)


def test_a_daemon_that_runs_is_no_fault_and_a_taken_port_is(tmp_path: Path) -> None:
    made = make_site(tmp_path / "site", known={})
    with claim(made.settings.memory, "daemon"):
        health = Health(Status(os.getpid()), made.settings.memory / "status.json")
        health.update(is_connected=True)
        from client.status import site_status

        check = doctor.check_daemon(site_status(made.settings), "", is_port_free=False)
    assert (level(check), "connected" in check.found) == ("ok", True)
    taken = doctor.check_daemon(site_status(made.settings), "127.0.0.1:80", is_port_free=False)
    assert level(taken) == "fail"
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert not doctor._is_free(f"127.0.0.1:{server.getsockname()[1]}")
    assert doctor._is_free("127.0.0.1:0")


def test_a_trainer_apart_is_looked_for_at_its_socket(tmp_path: Path) -> None:
    path = tmp_path / "trainer"
    settings = make_site(tmp_path / "site", known={"trainer": str(path)}).settings
    assert level(doctor.check_socket(settings, "absent", ["node"])) == "warn"
    assert level(doctor.check_socket(settings, "absent", ["trainer"])) == "ok"
    with grpc_server(path):
        found = doctor.check_socket(settings, peer_at(path), ["node"])
    assert (level(found), "a trainer takes connections" in found.found) == ("ok", True)
    leave_behind(path)
    assert level(doctor.check_socket(settings, peer_at(path), ["node"])) == "warn"
    assert level(doctor.check_socket(settings, "forbidden", ["node"])) == "fail"
    assert level(doctor.check_socket(settings, "silent", ["node"])) == "fail"
    group = settings.model_copy(update={"socket_group": "no-such-group"})
    assert "groupadd" in doctor.check_socket(group, "absent", ["node"]).fix


def test_what_the_code_of_a_run_could_reach_is_said_before_it_runs(tmp_path: Path) -> None:
    made = make_site(tmp_path / "site", known={"trainer": str(tmp_path / "trainer")})
    config = tmp_path / "site" / "site.toml"
    check = doctor.check_supernode(made.settings, config)
    assert (level(check), "runs no code of a run" in check.found) == ("ok", True)
    stock = made.settings.model_copy(update={"node": "supernode"})
    open_one = stock.model_copy(update={"allow_same_user": True})
    assert level(doctor.check_supernode(open_one, config)) == "warn"
    expected = "skip" if os.geteuid() == 0 else "fail"  # root may all; else it is all ours
    assert level(doctor.check_supernode(stock, config)) == expected


def test_the_doctor_makes_no_file(site: Path) -> None:
    before = sorted(path for path in site.parent.rglob("*"))
    list(examine(site, variables=SWITCHES))
    assert sorted(path for path in site.parent.rglob("*")) == before
    assert read_policy(site.parent / "policy.toml").runs.signers == ("5e" * 32,)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_who_may_read_nothing_is_told_so_line_by_line(site: Path) -> None:
    settings = load_site(site)
    Ledger.open(settings.state / LEDGER).close()
    list(examine(site, variables=SWITCHES))  # imports what it needs
    site.parent.chmod(0o700)
    os.seteuid(65534)
    try:
        whole = {check.name: check for check in examine(site, variables=SWITCHES)}
        # As if site.toml itself could be read, and nothing that it names.
        halves = [*doctor._trainer_checks(settings, is_quick=True)]
        halves += doctor._node_checks(settings, is_quick=True)
    finally:
        os.seteuid(0)
    assert level(whole["settings"]) == "fail"
    levels = {check.name: level(check) for check in halves}
    for name in ("base_model", "data", "policy", "node_key", "certificate"):
        assert levels[name] == "fail", name
    for name in ("state", "ledger", "daemon"):
        assert levels[name] == "fail", name
    (daemon,) = [check for check in halves if check.name == "daemon"]
    assert "may not be read by user nobody: run this as root" in daemon.found


def test_the_guide_names_every_check(site: Path) -> None:
    guide = (ROOT / "docs" / "setting-up-a-site.md").read_text()
    (table,) = re.findall(r"\| check \|.*?\n\n", guide, re.DOTALL)
    named = set(re.findall(r"[a-z_]+", " ".join(re.findall(r"^\| ([a-z_, ]+) \|", table, re.M))))
    checks = {check.name for check in examine(site, variables=SWITCHES)}
    assert named == checks | {"check"}


def test_a_key_for_secure_sums_that_site_toml_names_has_to_be_there(site: Path) -> None:
    """Without it the trainer does not start, so a warning would not do."""
    load_site(site).identity.unlink()
    (check,) = [c for c in examine(site, variables=SWITCHES) if c.name == "identity"]
    assert (check.level, "does not exist" in check.found) == ("fail", True)
    assert "client identity" in check.fix


def test_a_ledger_is_verified_and_needs_its_secret(tmp_path: Path) -> None:
    state = tmp_path / "state"
    records = read_records(write_records(tmp_path / "records.jsonl", 3))
    data_set = fingerprint(records, read_secret(state))
    assert "nothing has left" in doctor._ledger_of(state).found
    with contextlib.closing(Ledger.open(state / LEDGER)) as ledger:
        ledger.append(entry(data_set=data_set))
    assert doctor._ledger_of(state).found.startswith("2 rows hold together")
    (state / SECRET).chmod(0o644)
    assert doctor._ledger_of(state).fix == f"chmod 600 {state / SECRET}"
    (state / SECRET).unlink()
    gone = doctor._ledger_of(state)
    assert (level(gone), "cannot tell that it knows a record" in gone.found) == ("fail", True)
    (state / f"{LEDGER}.head").unlink()
    assert level(doctor._ledger_of(state)) == "fail"
