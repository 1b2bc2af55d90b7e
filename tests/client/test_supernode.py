"""A stock SuperNode beside the trainer: what it is given, and as whom it is not started."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.site_settings import load_site
from client.supernode import PASSED_ON, refuse_shared_user, supernode_command, supernode_environment
from federation.errors import UserError
from tests.client.test_daemon import run_client, write_site
from tests.other_user import as_user, why_not

ROOT = Path(__file__).parents[2]
TRAINER, NODE = 64001, 64002
"""Two users without a name."""


def test_the_stock_supernode_gets_the_socket_and_nothing_of_the_site(tmp_path: Path) -> None:
    settings = load_site(
        write_site(tmp_path, name='the "bank"', node="supernode", trainer="socket")
    )
    command = supernode_command(settings, 9100)
    assert command[-2:] == ["--node-config", f'trainer="{settings.socket}" name="the bank"']
    assert str(settings.data) not in " ".join(command)
    assert command[command.index("--superlink") + 1] == "flower.example:443"


def test_the_stock_supernode_gets_no_variable_that_may_be_a_secret(tmp_path: Path) -> None:
    own = {name: "x" for name in PASSED_ON if name != "FLWR_HOME"}
    secret = {"HF_TOKEN": "t", "HTTPS_PROXY": "http://user:password@proxy", "LD_PRELOAD": "l.so"}
    made = supernode_environment({**own, **secret, "PATH": "/bin"}, tmp_path / "node")
    assert not secret.keys() & made.keys()
    assert own.items() <= made.items()
    assert made["FLWR_HOME"] == str(tmp_path / "node" / "flower")
    assert made["PATH"].endswith(f"{os.pathsep}/bin")


def test_code_of_a_run_beside_a_trainer_of_the_same_user_must_be_asked_for(tmp_path: Path) -> None:
    (tmp_path / "socket").touch()
    apart = load_site(write_site(tmp_path, node="supernode", trainer="socket"))
    who = "the daemon runs as root" if os.geteuid() == 0 else "runs as the same user as the daemon"
    with pytest.raises(UserError, match=who):
        refuse_shared_user(apart)
    meant = load_site(write_site(tmp_path, node="supernode", allow_same_user=True))
    refuse_shared_user(meant)
    done = run_client("daemon", "--config", str(write_site(tmp_path, node="supernode")))
    assert done.returncode == 2
    assert 'node is "supernode" and trainer "child"' in done.stderr


@pytest.fixture
def site() -> Iterator[Path]:
    """A site.toml of two users below /tmp; the trainer's socket is there, and somebody listens."""
    directory = Path(tempfile.mkdtemp(prefix="fedge-"))
    directory.chmod(0o755)
    for name in ("records", "state", "node"):
        (directory / name).mkdir()
    (directory / "records" / "data.jsonl").write_text("{}")
    (directory / "policy.toml").touch()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(directory / "socket"))
        listening.listen()
        theirs = ("records", "records/data.jsonl", "state", "socket")
        for path, user in (*((each, TRAINER) for each in theirs), ("node", NODE)):
            os.chown(directory / path, user, user)
        for name in ("records", "state"):
            (directory / name).chmod(0o700)
        more = {"data": "records/data.jsonl", "node_state": "node/state"}
        yield write_site(directory, node="supernode", trainer="socket", **more)
    shutil.rmtree(directory)


def refusal(config: Path, user: int) -> str:
    """Start the daemon as a user; return what it says. It must end by itself, with 2."""
    command = [sys.executable, "-m", "client.cli", "daemon", "--config", str(config)]
    needed = [Path(sys.prefix), Path(sys.base_prefix), ROOT, config]
    done = subprocess.run(
        as_user(user, [user], command, needed),
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(config.parent)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_a_supernode_is_not_started_by_the_trainers_user_or_one_who_reaches_what_is_his(
    site: Path,
) -> None:
    directory = site.parent
    os.chown(directory / "node", TRAINER, TRAINER)
    assert "runs as the same user as the daemon" in refusal(site, TRAINER)
    shutil.rmtree(directory / "node")
    (directory / "node").mkdir()
    os.chown(directory / "node", NODE, NODE)
    directory.joinpath("records").chmod(0o755)
    assert "may read data (data.jsonl)" in refusal(site, NODE)


def said_to_the_node(site: Path) -> str:
    """Return why a SuperNode of the node's user is refused, or ""."""
    settings = load_site(site)
    os.seteuid(NODE)
    try:
        refuse_shared_user(settings, site)
    except UserError as error:
        return str(error)
    finally:
        os.seteuid(0)
    return ""


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


@as_root
@pytest.mark.parametrize(
    ("place", "mode", "deed"),
    [
        ("node", 0o755, ""),
        ("records", 0o755, "read data (data.jsonl)"),
        ("records", 0o733, "read data (data.jsonl)"),
        ("state", 0o711, "enter state (state)"),
        ("policy.toml", 0o666, "change policy (policy.toml)"),
        ("site.toml", 0o666, "change the settings (site.toml)"),
        (".", 0o777, "replace data (data.jsonl, by way of "),
        # As in /tmp: each may make files, and rename its own only.
        (".", 0o1777, ""),
    ],
)
def test_each_right_of_the_node_is_named(site: Path, place: str, mode: int, deed: str) -> None:
    (site.parent / place).chmod(mode)
    said = said_to_the_node(site)
    assert (f"the daemon's user may {deed}" in said) if deed else (said == ""), said


@as_root
def test_a_state_that_can_be_renamed_would_begin_every_budget_anew(site: Path) -> None:
    parent = site.parent / "below"
    parent.mkdir()
    (site.parent / "state").rename(parent / "state")
    site.write_text(site.read_text().replace('"state"', '"below/state"'))
    assert said_to_the_node(site) == ""
    parent.chmod(0o777)
    assert "may replace state (state)" in said_to_the_node(site)
    parent.chmod(0o755)
    os.chown(parent, NODE, NODE)  # who owns it gives himself the right
    assert "may replace state (state)" in said_to_the_node(site)
    (parent / "state").rmdir()
    parent.chmod(0o1777)
    os.chown(parent, 0, 0)
    assert "may replace state (state)" in said_to_the_node(site), "it can be made there"


@as_root
def test_a_link_is_as_safe_as_what_leads_to_it(site: Path) -> None:
    directory = site.parent
    (directory / "open").mkdir()
    (directory / "open" / "data.jsonl").symlink_to(directory / "records" / "data.jsonl")
    site.write_text(site.read_text().replace('"records/data.jsonl"', '"open/data.jsonl"'))
    assert said_to_the_node(site) == ""
    (directory / "open").chmod(0o777)
    assert "may replace data (data.jsonl)" in said_to_the_node(site)
