"""How a command ends: one sentence and an exit code for what only the user can change."""

import errno
import os
from pathlib import Path

import pytest

from federation.atomic import write_atomically
from federation.command import run_command
from federation.errors import FedgeError, UserError
from federation.settings import SettingsError, read_toml
from tests.client.test_ledger_cli import fill_up, small_disk  # noqa: F401 - a fixture


def said_by(capsys: pytest.CaptureFixture[str], error: Exception) -> tuple[int, str]:
    def app() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        run_command(app)
    return int(str(end.value.code)), capsys.readouterr().err


def test_our_own_errors_are_one_sentence_and_their_exit_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert said_by(capsys, FedgeError("it failed")) == (1, "error: it failed\n")
    assert said_by(capsys, UserError("change it")) == (2, "error: change it\n")


@pytest.mark.parametrize(
    ("number", "way_out", "expected"),
    [
        (errno.EACCES, "run this as a user who may", 2),
        (errno.EROFS, "mount it so", 2),
        # It may have space again by itself: a service is started again.
        (errno.ENOSPC, "free some space there", 1),
        (errno.EDQUOT, "ask for a larger quota", 1),
    ],
)
def test_what_the_system_refuses_is_one_too(
    capsys: pytest.CaptureFixture[str], number: int, way_out: str, expected: int
) -> None:
    code, said = said_by(capsys, OSError(number, os.strerror(number), "/srv/x"))
    assert (code, said.count("\n")) == (expected, 1)
    assert said.startswith(f"error: /srv/x: {os.strerror(number)}: ")
    assert way_out in said


def test_another_fault_of_the_system_is_ours_to_look_into() -> None:
    def app() -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    with pytest.raises(OSError, match="Bad file descriptor"):
        run_command(app)


def test_a_full_disk_names_the_file_that_was_to_be_written(small_disk: Path) -> None:  # noqa: F811
    fill_up(small_disk)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(small_disk / "status.json", bytes(8192))
    assert caught.value.filename == str(small_disk / "status.json")
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_a_toml_that_is_no_file_and_one_of_another_user_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="none.toml does not exist: pass a TOML file"):
        read_toml(tmp_path / "none.toml")
    with pytest.raises(SettingsError, match="cannot be read .Is a directory.: pass a TOML file"):
        read_toml(tmp_path)
