import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.chain import head_path
from client.ledger import read_ledger
from federation.accountant import PrivacyEvent, epsilon_of
from federation.errors import FedgeError, UserError
from tests.client.ledgers import RUN, data_set, entry, fill, open_ledger
from tests.client.test_cli import run
from tests.client.test_ledger import tamper
from tests.matrices import ROOT


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    fill(tmp_path / "state" / "ledger.db", 3)
    return tmp_path / "state" / "ledger.db"


@pytest.fixture
def genuine(tmp_path: Path) -> Path:
    """The same, with the epsilons of the real accountant."""
    fill(tmp_path / "state" / "ledger.db", 3, epsilon_of=epsilon_of)
    return tmp_path / "state" / "ledger.db"


def test_show_prints_every_release_as_a_table_and_as_json(monkeypatch, capsys, filled):
    with open_ledger(filled) as ledger:
        ledger.append(entry(9, run="77" * 16))
    assert run(monkeypatch, "ledger", "show", filled, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert [row["server_round"] for row in shown["rows"]] == [1, 2, 3, 9]
    assert shown["rows"][0]["sha256"] == entry(1).sha256
    assert sum(shown["data_sets"].values()) == 10 + 9 + 8
    assert run(monkeypatch, "ledger", "show", filled) == 0
    table = capsys.readouterr().out
    assert "2026-11-24 12:00" in table
    assert "16.001" in table
    assert RUN[:8] in table
    assert run(monkeypatch, "ledger", "show", filled, "--run", "7777") == 0
    assert RUN[:8] not in capsys.readouterr().out


def test_a_site_toml_leads_to_the_ledger_and_to_the_limit(monkeypatch, capsys, filled):
    site = filled.parents[1] / "site.toml"
    site.write_text('state = "state"\npolicy = "policy.toml"\n')
    site.with_name("policy.toml").write_text("[privacy]\nepsilon = 8.0\n")
    assert run(monkeypatch, "ledger", "show", site) == 0
    assert "4.001 of 8" in capsys.readouterr().out
    monkeypatch.setenv("HOME", str(site.parent))  # as load_site reads them
    elsewhere = site.parent / "elsewhere" / "site.toml"
    elsewhere.parent.mkdir()
    elsewhere.write_text('state = "~/state"\npolicy = "~/policy.toml"\n')
    for place in (elsewhere, "~/elsewhere/site.toml"):
        assert run(monkeypatch, "ledger", "show", place) == 0
        assert "4.001 of 8" in capsys.readouterr().out
    site.write_text('data = "a.jsonl"\n')
    assert run(monkeypatch, "ledger", "show", site) == 2
    assert "`state` is missing" in capsys.readouterr().err


def test_verify_says_yes_or_names_the_first_broken_row(monkeypatch, capsys, genuine):
    assert run(monkeypatch, "ledger", "verify", genuine) == 0
    assert "6 rows hold together, 3 of them releases" in capsys.readouterr().out
    assert run(monkeypatch, "ledger", "verify", genuine, "--json") == 0
    assert json.loads(capsys.readouterr().out)["count"] == 6
    tamper(genuine, "UPDATE rows SET body = replace(body, '4096', '4097') WHERE number = 4")
    for command in ("verify", "show"):
        assert run(monkeypatch, "ledger", command, genuine) == 1
        assert "row 4 is broken" in capsys.readouterr().err


def test_verify_computes_every_epsilon_anew(monkeypatch, capsys, tmp_path):
    """A program that undercounts writes a chain without a fault."""
    path = tmp_path / "ledger.db"
    with open_ledger(path, epsilon_of=epsilon_of) as book:
        book.append(entry(1))
    with open_ledger(path, epsilon_of=lambda events, delta: epsilon_of(events[-1:], delta)) as book:
        # It shares one record with the first, and has as many.
        book.append(entry(2, data_set=data_set(1, *range(70, 79))))
    rows = read_ledger(path).rows
    assert rows[0].epsilon == pytest.approx(rows[1].epsilon)
    assert run(monkeypatch, "ledger", "verify", path) == 1
    both = epsilon_of([row.event for row in rows], rows[1].delta)
    expected = (
        f"row 4 says epsilon {rows[1].epsilon:.6g}, and the rows up to it amount to {both:.6g}"
    )
    assert expected in capsys.readouterr().err


def test_verify_takes_data_sets_that_share_nothing_apart(monkeypatch, tmp_path):
    path = tmp_path / "ledger.db"
    with open_ledger(path, epsilon_of=epsilon_of) as book:
        alone = book.append(entry(1, data_set=data_set(1, 2)))
        assert book.append(entry(2, data_set=data_set(3, 4))).epsilon == alone.epsilon
        book.append(entry(3, event=PrivacyEvent(0.0, 0.5, 4), data_set=data_set(3, 5)))
    assert run(monkeypatch, "ledger", "verify", path) == 0


def test_verify_sees_a_sampling_rate_that_is_not_the_batch_over_the_records(
    monkeypatch, capsys, tmp_path
):
    """A program that charged less than it drew: its epsilons fit its rates."""
    path = tmp_path / "ledger.db"
    with open_ledger(path, epsilon_of=epsilon_of) as book:
        book.append(entry(1))
        book.append(entry(2, event=PrivacyEvent(1.0, 0.05, 4)))
    assert run(monkeypatch, "ledger", "verify", path) == 1
    assert "row 3 says sampling rate 0.05, and 1 of its 10 records are 0.1" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("content", [None, "", "some text"])
def test_verify_of_something_else_is_the_users_mistake(monkeypatch, capsys, tmp_path, content):
    place = tmp_path / "thing.db"
    if content is not None:
        place.write_text(content)
    assert run(monkeypatch, "ledger", "verify", place) == 2
    assert "is not a ledger" in capsys.readouterr().err


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk, and not in every container")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill_up(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_a_full_disk_is_no_damaged_ledger(monkeypatch, capsys, small_disk):
    """To put an older one back from a backup would give budget back."""
    fill_up(small_disk)
    with pytest.raises(FedgeError, match="cannot be made .*: free some space there") as full:
        open_ledger(small_disk / "ledger.db")
    assert full.value.exit_code == 1  # a service is started again
    (small_disk / "filler").unlink()
    fill(small_disk / "ledger.db", 1)
    fill_up(small_disk)
    assert run(monkeypatch, "ledger", "show", small_disk / "ledger.db") == 1
    said = capsys.readouterr().err
    assert "cannot be opened" in said
    assert "look for a full disk" in said
    (small_disk / "filler").unlink()
    assert run(monkeypatch, "ledger", "show", small_disk / "ledger.db") == 0


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_a_ledger_of_another_user_is_not_called_damaged():
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        fill(Path(name) / "ledger.db", 1)
        os.seteuid(65534)
        try:
            with pytest.raises(UserError, match="may not be read by this user"):
                read_ledger(Path(name) / "ledger.db")
        finally:
            os.seteuid(0)


def test_a_noted_head_convicts_a_history_that_was_made_up(monkeypatch, capsys, genuine, tmp_path):
    assert run(monkeypatch, "ledger", "show", genuine, "--head", "--json") == 0
    noted = json.loads(capsys.readouterr().out)["hash"]
    with open_ledger(genuine, epsilon_of=epsilon_of) as ledger:
        ledger.append(entry(4))
    assert run(monkeypatch, "ledger", "verify", genuine, "--noted", noted) == 0
    # Both files made anew, with less in them.
    fill(tmp_path / "new" / "ledger.db", 2, epsilon_of=epsilon_of)
    capsys.readouterr()
    assert run(monkeypatch, "ledger", "verify", tmp_path / "new" / "ledger.db") == 0
    assert run(monkeypatch, "ledger", "verify", tmp_path / "new" / "ledger.db", "--noted", noted)
    assert "another history" in capsys.readouterr().err


def test_a_lost_head_file_is_made_anew_as_its_message_says(monkeypatch, capsys, filled):
    head = head_path(filled)
    content = head.read_text()
    head.unlink()
    assert run(monkeypatch, "ledger", "verify", filled) == 1
    assert f"show {filled} --head" in capsys.readouterr().err
    assert run(monkeypatch, "ledger", "show", filled, "--head", "--json") == 0
    head.write_text(capsys.readouterr().out)
    assert json.loads(content) == json.loads(head.read_text())
    assert read_ledger(filled).head.count == 6


def test_help_comes_without_the_libraries_that_are_slow_to_load():
    code = (
        "import sys; sys.argv = ['client', 'ledger', '--help']\n"
        "from client import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "print({'torch', 'numpy', 'opacus', 'flwr', 'sqlite3'} & set(sys.modules))"
    )
    start = time.monotonic()
    printed = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT)
    assert time.monotonic() - start < 5  # .2 s; a loaded machine may take longer
    assert "show" in printed
    assert printed.endswith("set()\n")
