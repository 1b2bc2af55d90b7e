"""The daemon's parts, each by itself; the whole of it is in tests/end_to_end."""

import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from client import child as child_module
from client.child import Child, ChildError
from client.claim import claim
from client.daemon import pause_s
from client.site_directory import make_site
from client.site_log import SiteLog
from client.site_settings import SiteSettings, load_site
from federation.errors import UserError
from federation.settings import SettingsError
from tests.client.test_coordinator import make_authority

SITE = {
    "superlink": "flower.example:443",
    "root_certificate": "ca.crt",
    "node_key": "node",
    "base_model": "base",
    "data": "data.jsonl",
    "policy": "policy.toml",
    "state": "state",
}


def write_site(directory: Path, **more: Any) -> Path:
    values = {**SITE, **more}
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if value is not None]
    path = directory / "site.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("since_answer_s", "expected_s"),
    [(0.0, 0.1), (2.0, 0.1), (10.0, 0.5), (60.0, 1.0), (float("inf"), 1.0)],
)
def test_a_node_looks_often_after_an_answer_and_seldom_while_nothing_comes(
    since_answer_s: float, expected_s: float
) -> None:
    assert pause_s(since_answer_s, 0.1, 1.0) == pytest.approx(expected_s)
    assert pause_s(since_answer_s, 2.0, 1.0) == max(2.0, pause_s(since_answer_s, 0.1, 2.0))


# Settings


def test_paths_are_relative_to_the_file_and_the_rest_has_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/site")
    settings = load_site(write_site(tmp_path, data="~/records.jsonl", rank=4, log="logs/a.log"))
    assert settings.site.base_model == tmp_path / "base"
    assert settings.site.data == Path("/home/site/records.jsonl")
    assert settings.log == tmp_path / "logs" / "a.log"
    assert settings.is_child
    assert settings.socket == tmp_path / "state" / "socket" / "trainer"
    assert settings.memory == tmp_path / "state" / "node"
    assert settings.site.rank == 4
    apart = load_site(write_site(tmp_path, trainer="/run/fedge/trainer", node_state="mine"))
    assert not apart.is_child
    assert (apart.socket, apart.memory) == (Path("/run/fedge/trainer"), tmp_path / "mine")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"superlink": None}, "setting 'superlink' is missing"),
        (
            {"superlink": "https://flower.example"},
            "setting 'superlink' is 'https://flower.example'",
        ),
        ({"node": "other"}, "setting 'node' is 'other'"),
        ({"rank": 0}, "setting 'rank' is 0"),
        ({"superlink": "flower.example:70000"}, "expected HOST:PORT without https://"),
        ({"health": "0.0.0.0:80"}, "setting 'health' is '0.0.0.0:80'"),
        ({"health": "127.0.0.1:70000"}, "expected a port up to 65535"),
        ({"policy_file": "x"}, "unknown setting 'policy_file'; known here: allow_same_user,"),
        ({"state": "s" * 101}, "choose a shorter state or trainer"),
        ({"node": "supernode"}, "would run as the trainer's user, who reads this site's records"),
    ],
)
def test_a_setting_out_of_range_is_one_sentence(
    tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        load_site(write_site(tmp_path, **change))
    assert sentence in str(caught.value)
    assert str(caught.value).startswith("site.toml: ")


# One process a directory


def test_a_directory_is_held_by_one_process_until_that_dies(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from client.claim import claim\n"
        "with claim(Path(sys.argv[1]), 'daemon'): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "state")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with (
        pytest.raises(UserError, match="another daemon works in"),
        claim(tmp_path / "state", "daemon"),
    ):
        pass
    with claim(tmp_path / "state", "trainer"):
        pass
    holder.kill()
    holder.wait()
    holder.communicate()
    with claim(tmp_path / "state", "daemon", wait_s=5):
        assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700


# A program that is kept running


class Clock:
    """`time.monotonic` of client.child, set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(child_module, "time", made)
    return made


def ended(child: Child) -> None:
    """Wait until the process is gone; the daemon has not noticed yet."""
    assert child._process is not None
    child._process.wait(30)


def test_a_program_that_ends_is_started_again_more_and_more_slowly_and_then_given_up(
    clock: Clock,
) -> None:
    said: list[tuple[str, dict[str, Any]]] = []
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    child = Child("trainer", command, patience_s=5, say=lambda e, **v: said.append((e, v)))
    starts = []
    with pytest.raises(
        ChildError, match=r"the trainer ended with exit code 3, .* for 8 s: its log"
    ):
        for _ in range(200):
            before = child.restarts, child.is_running
            child.keep_up()
            if child.is_running or child.restarts > before[0]:
                starts.append(clock.now)
            ended_now = child._process is not None
            if ended_now:
                ended(child)
            clock.now += 0.25
    assert [round(b - a, 2) for a, b in pairwise(starts)][:3] == [
        0.75,
        1.25,
        2.25,
    ]
    assert {values.get("code") for event, values in said if event == "child_ended"} == {3}


def test_work_that_was_done_makes_the_count_start_anew(clock: Clock) -> None:
    command = [sys.executable, "-c", "raise SystemExit(1)"]
    child = Child("trainer", command, patience_s=2, say=lambda *_, **__: None)
    for _ in range(6):
        child.keep_up()
        if child._process is not None:
            ended(child)
        child.keep_up()
        child.note_work()
        clock.now += 3
    assert child.restarts >= 3


def test_two_ends_that_lie_far_apart_are_two_accidents(clock: Clock) -> None:
    command = [sys.executable, "-c", "raise SystemExit(1)"]
    child = Child("trainer", command, patience_s=60, say=lambda *_, **__: None)
    for _ in range(5):
        clock.now += 10
        child.keep_up()
        ended(child)
        clock.now += 3600  # it ran for an hour
        child.keep_up()
    assert child.restarts >= 4


def test_a_program_that_somebody_kills_is_not_given_up(clock: Clock) -> None:
    command = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    child = Child("SuperNode", command, patience_s=2, say=lambda *_, **__: None)
    for _ in range(5):
        clock.now += 20
        child.keep_up()
        ended(child)
        clock.now += 1  # it ran for less than its patience
        child.keep_up()
    assert child.restarts >= 4


def test_a_mistake_of_the_user_is_not_tried_again(clock: Clock) -> None:
    command = [sys.executable, "-c", "raise SystemExit(2)"]
    child = Child("trainer", command, patience_s=60, say=lambda *_, **__: None)
    child.keep_up()
    ended(child)
    with pytest.raises(ChildError, match="it needs a change that only you can make") as no:
        child.keep_up()
    assert no.value.exit_code == 2


def test_a_mistake_in_files_that_were_right_before_is_tried_for_a_while(clock: Clock) -> None:
    command = [sys.executable, "-c", "raise SystemExit(2)"]
    child = Child("trainer", command, patience_s=60, say=lambda *_, **__: None)
    child.note_work()  # it answered
    for _ in range(3):
        child.keep_up()
        ended(child)
        clock.now += 10
        child.keep_up()
        clock.now += 10  # longer than its pause
    child.keep_up()
    assert child.restarts == 3
    ended(child)
    clock.now += 30
    with pytest.raises(ChildError, match="it needs a change that only you can make") as no:
        child.keep_up()
    assert no.value.exit_code == 2


def test_a_program_that_does_not_end_is_made_to() -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    child = Child("trainer", [sys.executable, "-c", code], patience_s=1, say=lambda *_, **__: None)
    child.keep_up()
    process = child._process
    assert process is not None
    while b"SigIgn:\t0000000000000000" in Path(f"/proc/{process.pid}/status").read_bytes():
        time.sleep(0.01)
    child.end(0.3)
    assert process.returncode is not None
    assert not child.is_running


# Log


def test_the_log_is_one_object_a_line_and_below_its_level_nothing(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "site.log"
    SiteLog("daemon", path).say("asked", kind="train")
    SiteLog("trainer", path, "warning").say("answered")
    SiteLog("trainer", path, "warning").say("question_failed", code=1001)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["program"], line["level"], line["event"]) for line in lines] == [
        ("daemon", "info", "asked"),
        ("trainer", "warning", "question_failed"),
    ]
    assert lines[0]["kind"] == "train"


# The commands


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_site(tmp_path)


def run_client(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "client.cli", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_daemon_without_a_key_says_so_and_ends_with_2(config: Path) -> None:
    done = run_client("daemon", "--config", str(config))
    assert done.returncode == 2
    assert "error: node_key node: No such file or directory" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_daemon_whose_trainer_needs_a_change_ends_though_no_superlink_answers(
    tmp_path: Path,
) -> None:
    made = make_site(tmp_path / "site", known={"superlink": "127.0.0.1:1"})
    make_authority(made.directory)  # ca.crt, as the template names it
    done = run_client("daemon", "--config", str(made.directory / "site.toml"))
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2
    assert "records.jsonl does not exist or is not a file" in lines[0]  # the trainer's
    assert "the trainer ended with exit code 2: it needs a change" in lines[1]
    assert len(lines) == 2


def test_status_of_a_daemon_that_does_not_run_is_exit_1(config: Path) -> None:
    done = run_client("status", "--config", str(config), "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["is_running"] is False


def test_settings_are_frozen(config: Path) -> None:
    settings = load_site(config)
    with pytest.raises(ValueError, match="frozen"):
        settings.name = "other"  # type: ignore[misc]
    assert isinstance(settings, SiteSettings)
