"""The deployment example without starting anything: its certificates, its proxy, its mistakes."""

import inspect
import re
import shutil
import ssl
import stat
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "deployment"))

from certificates import (
    issue_server_certificate,
    make_authority,
    make_node_key,
    make_shared_secret,
)

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
