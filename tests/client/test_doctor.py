"""`client doctor`: each check over facts, over real files, and over a real TLS server."""

import contextlib
import json
import os
import re
import socket
import ssl
import sys
import threading
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from client import coordinator, doctor, machine, site_files
from client.check import Check, exit_code
from client.claim import claim
from client.coordinator import Answer, ask_superlink, read_certificates
from client.doctor import examine
from client.fingerprint import SECRET, fingerprint, read_secret
from client.health import Health, Status
from client.ledger import LEDGER, Ledger
from client.machine import SWITCHES, TESTED, Gpus
from client.policy import Policy, read_policy
from client.records import read_records
from client.site_directory import make_site
from client.site_files import Model, Place, Records, look
from client.site_settings import load_site
from federation.base_model import model_digest
from tests.client.ledgers import entry
from tests.client.test_cli import run
from tests.conftest import write_records

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "deployment"))

from certificates import issue_server_certificate, make_authority

ROOT = Path(__file__).parents[2]
NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
GIB = 1 << 30


def level(check: Check) -> str:
    """Return the level; what must be changed says how."""
    assert check.fix or check.level in ("ok", "skip"), check
    return check.level


# The machine


def test_the_tested_set_is_the_one_of_the_constraints() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    assert pins | TESTED == pins
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = extras["dependencies"] + extras["optional-dependencies"]["server"]
    needs += extras["optional-dependencies"]["client"]
    names = {re.split(r"[^a-z0-9-]", need)[0] for need in needs} - {"fedge"}
    assert set(TESTED) == names


def test_this_environment_is_the_tested_one() -> None:
    assert level(machine.check_packages(machine.installed_versions(TESTED))) == "ok"
    assert level(machine.check_python()) == "ok"


def test_another_version_is_a_warning_and_a_missing_one_an_error() -> None:
    other = machine.check_packages({**TESTED, "torch": "2.12.0"})
    assert (level(other), "torch 2.12.0 (tested: 2.13.0)" in other.found) == ("warn", True)
    assert level(machine.check_packages({**TESTED, "torch": "2.13.0+cpu"})) == "ok"
    gone = machine.check_packages({**TESTED, "torch": None, "flwr": None})
    assert (level(gone), gone.found) == ("fail", "missing: flwr, torch")
    assert machine.installed_versions(["no-such-package"]) == {"no-such-package": None}
    assert level(machine.check_python((3, 10))) == level(machine.check_python((3, 14))) == "fail"


def test_root_is_a_warning() -> None:
    assert (level(machine.check_user(0)), level(machine.check_user(1000))) == ("warn", "ok")


def test_the_switches_are_named_as_they_would_be_typed() -> None:
    assert level(machine.check_environment(SWITCHES)) == "ok"
    check = machine.check_environment({**SWITCHES, "FLWR_TELEMETRY_ENABLED": "1"})
    assert (level(check), check.fix) == ("warn", "export FLWR_TELEMETRY_ENABLED=0")


def test_free_memory_is_what_a_containers_limit_leaves(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  900 kB\nMemAvailable:  800 kB\n")
    assert machine.available_memory(meminfo, tmp_path) == 800 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert machine.available_memory(meminfo, tmp_path) == 800 * 1024
    (tmp_path / "memory.max").write_text("5000\n")
    assert machine.available_memory(meminfo, tmp_path) == 4000
    assert machine.available_memory(tmp_path / "none", tmp_path) is None


@pytest.mark.parametrize(
    ("available", "weights", "expected"),
    [
        (8 * GIB, None, "ok"),
        (8 * GIB, 4 * GIB, "ok"),
        (7 * GIB, 4 * GIB, "warn"),
        (3 * GIB, 4 * GIB, "fail"),
        (None, 4 * GIB, "skip"),
    ],
)
def test_the_weights_have_to_fit_into_memory(
    available: int | None, weights: int | None, expected: str
) -> None:
    assert level(machine.check_memory(available, weights)) == expected


def test_a_gpu_is_named_with_its_memory_and_driver(tmp_path: Path) -> None:
    assert machine.find_gpus(tmp_path / "none") == Gpus()
    assert level(machine.check_gpu(Gpus(), None)) == "ok"
    seen = Gpus("580.1", "13.0", ("NVIDIA H100",), (80 * GIB,))
    check = machine.check_gpu(seen, 14 * GIB)
    assert level(check) == "ok"
    assert check.found.startswith("NVIDIA H100, 80.0 GiB, driver 580.1, CUDA 13.0")
    assert level(machine.check_gpu(seen, 90 * GIB)) == "fail"
    without = machine.check_gpu(Gpus("580.1"), None)
    assert (level(without), "without CUDA" in without.fix) == ("fail", True)
    assert "/dev/nvidia" in machine.check_gpu(Gpus("580.1", "13.0"), None).fix


def test_a_driver_without_a_device_is_found_as_such(tmp_path: Path) -> None:
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue\nGCC: 12\n")
    gpus = machine.find_gpus(driver)
    if not gpus.names:  # a machine with a GPU says more
        assert (gpus.driver, level(machine.check_gpu(gpus, None))) == ("580.95.05", "fail")


# What lies on the disk


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


# The coordinator


def test_a_certificate_that_ends_is_said_before_it_does(tmp_path: Path) -> None:
    found = read_certificates(make_authority(tmp_path))
    made = found[0].not_before
    assert level(coordinator.check_certificate(found, made + timedelta(days=1))) == "ok"
    assert level(coordinator.check_certificate(found, made + timedelta(days=340))) == "warn"
    ended = coordinator.check_certificate(found, made + timedelta(days=400))
    assert (level(ended), "it has ended" in ended.found) == ("fail", True)
    early = coordinator.check_certificate(found, made - timedelta(days=1))
    assert (level(early), early.fix) == ("fail", "set this machine's clock")
    assert level(coordinator.check_certificate("why", made)) == "fail"


def test_a_servers_own_certificate_is_no_ca(tmp_path: Path) -> None:
    make_authority(tmp_path)
    path = issue_server_certificate(tmp_path, "proxy", ["localhost"])
    check = coordinator.check_certificate(read_certificates(path), datetime.now(UTC))
    assert (level(check), "not only of a CA" in check.found) == ("warn", True)


@contextlib.contextmanager
def serving(
    directory: Path, *, status: int = 401, host: str = "127.0.0.1", behind_s: float = 0.0
) -> Iterator[int]:
    """Answer every POST over TLS, with a clock of its own; yield the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def date_time_string(self, timestamp: float | None = None) -> str:
            moment = datetime.now(UTC) - timedelta(seconds=behind_s)
            return moment.strftime("%a, %d %b %Y %H:%M:%S GMT")

        def log_message(self, *_: object) -> None:
            pass

    if not (directory / "ca.crt").exists():
        make_authority(directory)
    certificate = issue_server_certificate(directory, f"s{len(list(directory.iterdir()))}", [host])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_suffix(".key"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign,assignment]
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(directory: Path, port: int, host: str = "127.0.0.1") -> Answer:
    return ask_superlink(f"{host}:{port}", directory / "ca.crt", 5.0)


def test_a_superlink_behind_tls_answers_401_and_says_the_time(tmp_path: Path) -> None:
    with serving(tmp_path) as port:
        answer = ask(tmp_path, port)
    now = datetime.now(UTC)
    assert answer.status == 401
    assert level(coordinator.check_superlink("here", answer, now)) == "ok"
    assert answer.ahead_s is not None
    assert abs(answer.ahead_s) < 2
    assert level(coordinator.check_clock(answer.ahead_s)) == "ok"
    soon = coordinator.check_superlink("here", answer, now + timedelta(days=350))
    assert (level(soon), "its certificate ends on" in soon.found) == ("warn", True)


def test_a_clock_that_is_ahead_is_seen_from_the_date_of_the_answer(tmp_path: Path) -> None:
    with serving(tmp_path, behind_s=60) as port:
        answer = ask(tmp_path, port)
    check = coordinator.check_clock(answer.ahead_s)
    assert level(check) == "fail"
    assert re.match(r"(59|60|61) s ahead of the coordinator", check.found)


@pytest.mark.parametrize(
    ("ahead_s", "expected"),
    [(None, "skip"), (1, "ok"), (4, "warn"), (6, "fail"), (-100, "ok"), (-200, "warn")],
)
def test_a_clock_may_be_behind_more_than_ahead(ahead_s: float | None, expected: str) -> None:
    assert level(coordinator.check_clock(ahead_s)) == expected
    assert level(coordinator.check_clock(-301)) == "fail"


def test_another_host_and_another_ca_are_not_trusted(tmp_path: Path) -> None:
    with serving(tmp_path, host="fleet.example") as port:
        answer = ask(tmp_path, port)
        make_authority(tmp_path / "other")
        stranger = ask(tmp_path / "other", port)
    assert "IP address mismatch" in answer.tls_error
    assert stranger.tls_error
    for each in (answer, stranger):
        assert level(coordinator.check_superlink("here", each, NOW)) == "fail"


@pytest.mark.parametrize(
    ("status", "expected"),
    [(403, "fail"), (404, "fail"), (502, "warn"), (500, "warn"), (0, "warn")],
)
def test_what_is_no_superlink_is_said(status: int, expected: str) -> None:
    check = coordinator.check_superlink("here", Answer(status=status), NOW)
    assert level(check) == expected


def test_a_closed_port_an_unknown_name_and_no_tls_are_told_apart(tmp_path: Path) -> None:
    make_authority(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        threading.Thread(target=lambda: answer_plainly(server), daemon=True).start()
        assert "no TLS there" in ask(tmp_path, port).tls_error
    assert "refused" in ask(tmp_path, port).error
    assert "name" in ask(tmp_path, 443, "no-such-host.invalid").error
    assert "root_certificate" in ask(tmp_path / "nowhere", 443).error
    failed = coordinator.check_superlink("here", ask(tmp_path, port), NOW)
    assert (level(failed), "let TCP out" in failed.fix) == ("fail", True)


def answer_plainly(server: socket.socket) -> None:
    caller, _ = server.accept()
    with caller:
        caller.recv(4096)
        caller.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


# The whole


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
    names += ["node_key", "certificate", "superlink", "clock", "daemon", "socket"]
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
    made = make_site(tmp_path / "site", known={"trainer": str(path)})
    settings = made.settings
    assert doctor._peer_at(path) == "absent"
    assert level(doctor.check_socket(settings, "absent", ["node"])) == "warn"
    assert level(doctor.check_socket(settings, "absent", ["trainer"])) == "ok"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        assert doctor._peer_at(path) == "listening"
    assert level(doctor.check_socket(settings, "listening", ["node"])) == "ok"
    assert level(doctor.check_socket(settings, "forbidden", ["node"])) == "fail"
    group = settings.model_copy(update={"socket_group": "no-such-group"})
    assert "groupadd" in doctor.check_socket(group, "absent", ["node"]).fix


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
    assert levels["state"] == levels["ledger"] == "skip"


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
