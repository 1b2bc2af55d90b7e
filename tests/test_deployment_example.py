"""The deployment example without starting anything: its certificates, its proxy, its mistakes."""

import inspect
import re
import shutil
import ssl
import stat
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from client.ledger import Spent
from client.policy import Policy
from client.policy_template import policy_template
from client.request import parse_request
from client.site_template import site_template
from client.verdict import judge
from federation.accountant import epsilon_of
from federation.errors import UserError
from federation.run_signature import canonical_json
from federation.settings import FederationSettings, load_settings
from tests.client.policy_example import BASE, BUNDLE, OTHER, OTHER_RUN, REQUEST, RUN, changed

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "deployment"))

from certificates import (
    issue_server_certificate,
    make_authority,
    make_node_key,
    make_shared_secret,
)
from daemons import allowances, with_values
from processes import STARTED_FOR, end_left_behind, end_trees
from services import ServiceError, Services

EXAMPLE = Path(__file__).parents[1] / "examples" / "deployment"


def shake_hands(ca: Path, certificate: Path, host: str) -> None:
    """Let a client that trusts ``ca`` and a server with ``certificate`` meet in memory."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    trusting = ssl.create_default_context(cafile=str(ca))
    trusting.verify_flags |= ssl.VERIFY_X509_STRICT
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(certificate, certificate.with_suffix(".key"))
    client = trusting.wrap_bio(to_client, to_server, server_hostname=host)
    server = serving.wrap_bio(to_server, to_client, server_side=True)
    waiting = [client, server]
    while waiting:
        side = waiting.pop(0)
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            waiting.append(side)


def test_a_client_of_the_ca_trusts_the_servers_it_signed(tmp_path: Path) -> None:
    ca = make_authority(tmp_path)
    server = issue_server_certificate(tmp_path, "proxy", ["127.0.0.1", "fleet.example"])
    shake_hands(ca, server, "127.0.0.1")
    shake_hands(ca, server, "fleet.example")


def test_it_trusts_no_other_host_and_no_other_ca(tmp_path: Path) -> None:
    ca = make_authority(tmp_path)
    server = issue_server_certificate(tmp_path, "proxy", ["fleet.example"])
    with pytest.raises(ssl.SSLCertVerificationError, match="not valid for"):
        shake_hands(ca, server, "other.example")
    stranger = make_authority(tmp_path / "elsewhere")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(stranger, server, "fleet.example")


def test_a_server_cannot_sign_for_others(tmp_path: Path) -> None:
    from cryptography import x509

    make_authority(tmp_path)
    server = issue_server_certificate(tmp_path, "proxy", ["localhost"])
    certificate = x509.load_pem_x509_certificate(server.read_bytes())
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_private_keys_are_readable_by_their_owner_only_and_never_replaced(tmp_path: Path) -> None:
    make_authority(tmp_path)
    key = make_node_key(tmp_path)
    secret = make_shared_secret(tmp_path / "secret")
    for path in (tmp_path / "ca.key", key, secret):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        make_node_key(tmp_path)


def test_a_node_key_is_what_flower_and_ssh_read(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.serialization import (
        load_ssh_private_key,
        load_ssh_public_key,
    )

    key = make_node_key(tmp_path)
    private = load_ssh_private_key(key.read_bytes(), password=None)
    public = load_ssh_public_key((tmp_path / "node.pub").read_bytes())
    assert private.public_key() == public
    assert public.curve.name == "secp384r1"


def test_the_proxy_knows_every_path_that_a_registered_supernode_uses() -> None:
    """Read from Flower itself: a new version with another path must fail here, not at a site."""
    from flwr.supernode.fleet_http_client import FleetHttpClient

    used = set(re.findall(r'path="(/v1/fleet/[a-z-]+)"', inspect.getsource(FleetHttpClient)))
    (location,) = re.findall(r'location ~ "\^(.*)\$"', (EXAMPLE / "nginx.conf").read_text())
    allowed = {path for path in used if re.fullmatch(location, path)}
    assert used - allowed == {"/v1/fleet/register-node", "/v1/fleet/unregister-node"}
    assert len(allowed) == location.count("|") + 1


def test_the_proxy_knows_no_path_of_the_other_apis() -> None:
    from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

    (location,) = re.findall(r'location ~ "\^(.*)\$"', (EXAMPLE / "nginx.conf").read_text())
    allowed = {path for _, path in PROTOBUF_REQUEST_TYPES if re.fullmatch(location, path)}
    assert allowed
    assert all(path.startswith("/v1/fleet/") for path in allowed)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--base-model", "nowhere"], "nowhere/config.json does not exist: run `python examples/"),
        (["--data", "bank"], "--data bank: expected NAME=FILE.jsonl"),
        (["--node", "stock"], "--node stock: expected resident or supernode"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    command = [sys.executable, EXAMPLE / "run.py", "--out", tmp_path / "out", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {sentence}")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the guide's commands need openssl")
def test_the_guides_certificates_are_ones_that_clients_trust(tmp_path: Path) -> None:
    guide = Path(__file__).parents[1] / "docs" / "running-across-institutions.md"
    (block,) = re.findall(
        r"<!-- tested: certificates -->\n```bash\n(.*?)```", guide.read_text(), re.DOTALL
    )
    subprocess.run(["bash", "-euc", block], cwd=tmp_path, check=True, capture_output=True)
    shake_hands(tmp_path / "ca.crt", tmp_path / "proxy.crt", "fleet.example.org")
    shake_hands(tmp_path / "ca.crt", tmp_path / "superlink.crt", "127.0.0.1")
    for secret in (*tmp_path.glob("*.key"), tmp_path / "superexec.secret"):
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600


def announced(**settings: Any) -> dict[str, Any]:
    """Return the run.json of a run of two sites."""
    values = {"base_model": "base", "out": "out", "num_sites": 2, "quorum": 2, **settings}
    return {
        "run": RUN,
        "settings": load_settings(FederationSettings, values, "a test").model_dump(),
    }


def refused_by(policy: Policy, **changes: Any) -> str:
    """Return the rule by which a policy refuses a plain round of the run, or ""."""
    plain = {key: value for key, value in REQUEST.items() if key != "secure_sum"}
    plain |= {"uplink": "float32", "trains": "AB", "aggregation": "products", "cohort": 2}
    plain |= {"training": {"num_steps": 2, "max_tokens": 96}}
    plain |= {"metrics": ["num-examples", "train_loss", "seconds"]}
    request = parse_request(canonical_json(changed(plain, **changes)))
    moment = datetime(2026, 11, 24, tzinfo=UTC)
    verdict = judge(request, policy, Spent((), 1000, {}), moment, epsilon_of)
    return "" if verdict.is_allowed else verdict.rule


def test_a_site_of_the_example_allows_the_run_that_was_announced_and_no_other() -> None:
    text = policy_template(base_models=[BASE])
    edited = with_values(text, allowances(announced(), BUNDLE, "resident"), "policy.toml")
    before = load_settings(Policy, tomllib.loads(text), "policy.toml")
    policy = load_settings(Policy, tomllib.loads(edited), "policy.toml")
    assert refused_by(before) == "runs.allowed"
    assert refused_by(policy) == ""
    assert refused_by(policy, run=OTHER_RUN) == "runs.allowed"
    assert refused_by(policy, bundle=OTHER) == "runs.bundles"
    assert refused_by(policy, adapter__base_model=OTHER) == "models.base"
    assert refused_by(policy, aggregation="krum") == "aggregation.kinds"
    assert refused_by(policy, uplink="int8") == "traffic.uplink"
    assert refused_by(policy, cohort=1) == "aggregation.min_cohort"
    assert refused_by(policy, training__num_steps=1000) == "training.max_steps"
    stock = with_values(text, allowances(announced(), BUNDLE, "supernode"), "policy.toml")
    assert refused_by(load_settings(Policy, tomllib.loads(stock), ""), bundle="") == ""


def test_a_site_of_the_example_keeps_requiring_noise_of_a_run_that_has_it() -> None:
    run = announced(**{"training.noise_multiplier": 1.0})
    assert allowances(run, BUNDLE, "resident")["privacy.required"] is True


def test_values_are_changed_in_their_table_and_comments_stay() -> None:
    text = "# Top.\n[a]\n# Of a.\nx = 1\n# y = 2\n\n[b]\nx = 3\n"
    edited = with_values(text, {"a.x": [True], "a.y": 'Zo\u00eb "Z"', "b.x": "\U0001f600"}, "f")
    assert tomllib.loads(edited) == {
        "a": {"x": [True], "y": 'Zo\u00eb "Z"'},
        "b": {"x": "\U0001f600"},
    }
    assert "# Top." in edited
    assert "# Of a." in edited
    with pytest.raises(UserError, match="site.toml has no c: expected what `client init` writes"):
        with_values(site_template(), {"name": "clinic", "c": 1}, "site.toml")


def sleeper(directory: Path, variables: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a process that starts another one, and wait until both are there."""
    child = "import time; print('up', flush=True); time.sleep(600)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=variables, cwd=directory, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    return process


def test_what_a_killed_example_left_behind_is_ended_and_nothing_else(tmp_path: Path) -> None:
    ours, others = tmp_path / "ours", tmp_path / "others"
    ours.mkdir()
    mine = sleeper(tmp_path, {STARTED_FOR: str(ours)})
    theirs = sleeper(tmp_path, {STARTED_FOR: str(others)})
    try:
        assert end_left_behind(ours) == 2
        mine.wait(10)
        assert theirs.poll() is None
        assert end_left_behind(ours) == 0
        assert end_left_behind(others) == 2
    finally:
        end_trees([mine, theirs])
        for process in (mine, theirs):
            process.communicate()


def test_a_drained_program_ends_as_it_likes_and_a_bad_end_is_said(tmp_path: Path) -> None:
    services = Services(tmp_path / "logs", Console(quiet=True), {})
    for name, code in (("good", 0), ("bad", 3)):
        leave = f"lambda *_: (print('leaving', flush=True), sys.exit({code}))"
        python = (
            f"import signal, sys, time; signal.signal(signal.SIGTERM, {leave}); "
            "print('ready', flush=True); time.sleep(600)"
        )
        services.start(name, [sys.executable, "-c", python], {})
    logs = {name: tmp_path / "logs" / f"{name}.log" for name in ("good", "bad")}
    try:
        services.wait_until(
            lambda: all("ready" in log.read_text() for log in logs.values()), "", 60
        )
        services.drain(["good"], 60)
        assert logs["good"].read_text() == "ready\nleaving\n"
        with pytest.raises(ServiceError, match="bad ended with exit code 3: ready leaving"):
            services.drain(["bad"], 60)
    finally:
        services.end()
