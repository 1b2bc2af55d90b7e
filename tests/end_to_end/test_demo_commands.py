"""The demo's runner: what is done is not done again, what failed is, and order holds in lanes."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "four_institutions"))

from commands import CommandError, Commands, Job


def python(code: str) -> list[str]:
    return ["python", "-c", code]


def append(path: Path, word: str) -> list[str]:
    return python(f"open({str(path)!r}, 'a').write({word!r}); print('{{\"word\": \"{word}\"}}')")


@pytest.fixture
def commands(tmp_path: Path) -> Commands:
    return Commands(tmp_path / "commands.jsonl", Console(quiet=True))


def test_a_finished_command_is_not_run_again(commands: Commands, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    first = commands.run("a", append(trace, "a"))
    assert first.output == {"word": "a"}
    again = Commands(commands.record, Console(quiet=True))
    assert again.run("a", append(trace, "a")) == first
    assert trace.read_text() == "a"
    assert again.elapsed_s == first.elapsed_s


def test_a_finished_stage_is_not_done_again(commands: Commands) -> None:
    first = commands.perform("a", ["a", "stage"], lambda: {"word": "a"})
    again = Commands(commands.record, Console(quiet=True))
    assert again.perform("a", ["a", "stage"], lambda: {"word": "b"}) == first
    assert again.perform("a", ["another"], lambda: {"word": "b"}).output == {"word": "b"}


def test_another_command_of_that_name_is_run(commands: Commands, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    commands.run("a", append(trace, "a"))
    commands.run("a", append(trace, "b"))
    assert trace.read_text() == "ab"


def test_a_failed_command_and_a_failed_stage_are_not_remembered(commands: Commands) -> None:
    with pytest.raises(CommandError, match="exit code 3 of: python -c"):
        commands.run("a", python("raise SystemExit(3)"))

    def action() -> dict[str, Any]:
        raise CommandError("not finished")

    with pytest.raises(CommandError, match="not finished"):
        commands.perform("b", ["a", "stage"], action)
    assert not Commands(commands.record, Console(quiet=True)).finished


def test_a_line_that_a_kill_cut_off_is_forgotten(commands: Commands, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    commands.run("a", append(trace, "a"))
    with commands.record.open("a") as file:
        file.write('{"name": "b", "comm')
    again = Commands(commands.record, Console(quiet=True))
    again.run("b", append(trace, "b"))
    assert set(Commands(commands.record, Console(quiet=True)).finished) == {"a", "b"}
    assert all(json.loads(line) for line in commands.record.read_text().splitlines())


def test_a_half_made_output_is_removed_first(commands: Commands, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "half").write_text("")
    commands.run("a", python(f"import os; os.mkdir({str(out)!r})"), output=out)
    assert not list(out.iterdir())


def test_a_job_waits_for_the_one_it_needs(commands: Commands, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    wait = "import pathlib, time\nwhile not pathlib.Path({!r}).exists(): time.sleep(0.01)\n"
    beside = tmp_path / "beside"
    commands.run_in_lanes(
        {
            "first": Job(
                python(wait.format(str(beside)) + f"open({str(trace)!r}, 'a').write('1')")
            ),
            "beside": Job(python(f"open({str(beside)!r}, 'w')")),
            "second": Job(append(trace, "2"), after="first"),
        }
    )
    assert trace.read_text() == "12"


def test_memory_of_a_command_is_measured(commands: Commands) -> None:
    ballast = b"x" * 500_000_000  # a fork of this process must not be taken for the command
    code = "import time; block = bytearray(200_000_000); time.sleep(0.5)"
    assert 200e6 < commands.run("a", python(code)).peak_bytes < 400e6
    two = (
        f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {code!r}]); "
        "block = bytearray(200_000_000); child.wait()"
    )
    done = commands.run("b", python(two))
    assert done.peak_bytes < 400e6 < done.total_peak_bytes < 800e6
    assert len(ballast) == 500_000_000
