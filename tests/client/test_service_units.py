"""systemd's units of a site: what they promise, and that systemd and our own command take them."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from client.service_units import GROUP, NODE, TRAINER
from client.site_directory import NewSite, make_site
from tests.client.test_cli import run
from tests.conftest import write_records

CLIENT = Path(sys.executable).with_name("client")
needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="no systemd on this machine"
)


def make(directory: Path, **known: str) -> NewSite:
    return make_site(directory, known=known, client=CLIENT)


def unit_of(site: NewSite, name: str) -> dict[str, list[str]]:
    """Return the values of each key of a unit, in order."""
    values: dict[str, list[str]] = {}
    for line in (site.directory / "systemd" / f"{name}.service").read_text().splitlines():
        key, separator, value = line.partition("=")
        if separator and not line.startswith("#"):
            values.setdefault(key, []).append(value)
    return values


def test_site_toml_and_units_name_the_same_places(tmp_path: Path) -> None:
    site = make(tmp_path / "site")
    settings, trainer, node = site.settings, unit_of(site, TRAINER), unit_of(site, NODE)
    assert not settings.is_child
    assert settings.socket == Path("/run", *trainer["RuntimeDirectory"], "trainer")
    assert settings.state == Path("/var/lib", *trainer["StateDirectory"])
    assert settings.memory == Path("/var/lib", *node["StateDirectory"])
    assert trainer["StateDirectoryMode"] == node["StateDirectoryMode"] == ["0700"]
    for unit in (trainer, node):
        assert unit["SupplementaryGroups"] == [settings.socket_group]
        assert int(unit["TimeoutStopSec"][0]) > settings.drain_s
    assert trainer["User"] != node["User"]
    assert not (tmp_path / "site" / "state").exists()


def test_the_trainer_has_no_network_and_the_node_no_records(tmp_path: Path) -> None:
    site = make(tmp_path / "site", data="/srv/records.jsonl", base_model="/srv/base")
    trainer, node = unit_of(site, TRAINER), unit_of(site, NODE)
    assert trainer["PrivateNetwork"] == ["yes"]
    assert trainer["RestrictAddressFamilies"] == ["AF_UNIX"]
    assert trainer["InaccessiblePaths"] == [f"-{site.settings.node_key}"]
    (hidden,) = node["InaccessiblePaths"]
    assert hidden.split() == [
        "-/srv/records.jsonl",
        "-/srv/base",
        f"-{site.settings.policy}",
        f"-{site.settings.state}",
    ]
    for unit in (trainer, node):
        assert unit["NoNewPrivileges"] == ["yes"]
        assert unit["CapabilityBoundingSet"] == [""]
        assert unit["ProtectSystem"] == ["strict"]
        assert "ReadWritePaths" not in unit
    assert "FLWR_TELEMETRY_ENABLED=0" in " ".join(node["Environment"])


def test_the_commands_are_ours_and_take_these_options(tmp_path: Path) -> None:
    """Each is started with a site.toml that is not there: it gets as far as to say so."""
    site = make(tmp_path / "site")
    for name, command in ((TRAINER, "trainer"), (NODE, "daemon")):
        words = shlex.split(unit_of(site, name)["ExecStart"][0])
        assert words[:2] == [str(CLIENT), command]
        assert words[-1] == str(site.directory / "site.toml")
        started = [sys.executable, "-m", "client.cli", *words[1:-1], str(tmp_path / "none.toml")]
        done = subprocess.run(started, capture_output=True, text=True, check=False)
        assert (done.returncode, "none.toml does not exist" in done.stderr) == (2, True)


def test_a_home_directory_is_opened_for_reading_only_where_it_is_needed(tmp_path: Path) -> None:
    elsewhere = make(tmp_path / "a", data="/srv/records.jsonl", base_model="/srv/base")
    at_home = make(tmp_path / "b", data="/home/site/records.jsonl")
    # This test's own Python may lie in a home directory.
    expected = "read-only" if re.match("/(home|root)/", str(CLIENT)) else "yes"
    assert unit_of(elsewhere, TRAINER)["ProtectHome"] == [expected]
    assert unit_of(at_home, TRAINER)["ProtectHome"] == ["read-only"]


@needs_systemd
@pytest.mark.parametrize("name", ["site", "a site", "50% $HOME", 'the "bank"'])
def test_systemd_takes_the_units_as_they_are(tmp_path: Path, name: str) -> None:
    site = make(tmp_path / name, data=f"/srv/{name}/records.jsonl")
    if not CLIENT.is_file():
        pytest.skip("the console script is not installed")
    units = [str(site.directory / "systemd" / f"{each}.service") for each in (TRAINER, NODE)]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units],
        capture_output=True,
        text=True,
        check=False,
    )
    ours = [line for line in done.stderr.splitlines() if "fedge-" in line]
    assert not ours, done.stderr


@needs_systemd
def test_systemd_counts_them_among_the_well_protected(tmp_path: Path) -> None:
    """Its scale goes from 0 to 10; a service without any protection has 9.6."""
    site = make(tmp_path / "site")
    for name, most in ((TRAINER, 1.2), (NODE, 2.0)):
        unit = str(site.directory / "systemd" / f"{name}.service")
        done = subprocess.run(
            ["systemd-analyze", "security", "--offline=true", "--no-pager", unit],
            capture_output=True,
            text=True,
            check=False,
        )
        found = re.search(r"exposure level for \S+: ([0-9.]+)", done.stdout)
        if found is None:
            pytest.skip("this systemd does not look at files")
        assert float(found[1]) <= most, done.stdout


@pytest.mark.skipif(shutil.which("systemd-sysusers") is None, reason="no systemd-sysusers")
def test_the_users_share_the_group_and_nothing_else(tmp_path: Path) -> None:
    site = make(tmp_path / "site")
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    users = site.directory / "systemd" / "fedge.conf"
    subprocess.run(["systemd-sysusers", f"--root={root}", str(users)], check=True)
    groups = {
        line.split(":")[0]: line.split(":")[3]
        for line in (root / "etc" / "group").read_text().splitlines()
    }
    assert set(groups[GROUP].split(",")) == {TRAINER, NODE}
    assert (groups[TRAINER], groups[NODE]) == ("", "")


def test_the_command_writes_them_and_says_what_root_types(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    data = write_records(tmp_path / "my records.jsonl", 3)
    words = ["--data", data, "--base-model", tiny_model, "--systemd"]
    assert run(monkeypatch, "init", tmp_path / "site", *words) == 0
    printed = capsys.readouterr().out
    assert f"chown {TRAINER} '{data}' && chmod 600 '{data}'" in printed
    assert f"systemctl enable --now {TRAINER} {NODE}" in printed
    names = {path.name for path in (tmp_path / "site" / "systemd").iterdir()}
    assert names == {f"{TRAINER}.service", f"{NODE}.service", "fedge.conf"}
    for wrong in ([*words, "--state", "state"], ["--systemd"], [*words[:2], "--systemd"]):
        assert run(monkeypatch, "init", tmp_path / "other", *wrong) == 2
        assert "--systemd needs --data and --base-model" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
