import io
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console

from federation import events
from federation.events import EventLog, EventLogError, read_events
from federation.status import summarise
from federation.tables import status_view

START = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)


def write(path: Path, *written: events.Event) -> Path:
    """Write a log of one event a second."""
    times = iter(START + timedelta(seconds=second) for second in range(1000))
    log = EventLog(path, now=lambda: next(times))
    for event in written:
        log.write(event)
    return path


def started(num_rounds: int = 3) -> events.RunStarted:
    return events.RunStarted("d" * 64, num_rounds, "products", 16, 1000)


def update(
    server_round: int, site: str, loss: float = 2.0, rounds_late: int = 0
) -> events.UpdateReceived:
    return events.UpdateReceived(
        server_round, site, f"name-{site}", "e" * 64, 100, 10, loss, 1.0, rounds_late
    )


def finished(server_round: int, num_updates: int = 2) -> events.RoundFinished:
    return events.RoundFinished(
        server_round, num_updates, 2.5, 0.01, 0.1, 4.0, f"round-{server_round:04d}"
    )


def later(seconds: float) -> Callable[[], datetime]:
    return lambda: START + timedelta(seconds=seconds)


def shown(summary: dict[str, object]) -> str:
    screen = io.StringIO()
    Console(width=200, file=screen).print(status_view(summary))
    return screen.getvalue()


def test_a_round_counts_what_was_asked_came_failed_and_travelled(tmp_path: Path) -> None:
    path = write(
        tmp_path / "events.jsonl",
        started(),
        events.RoundStarted(1, ["a", "b", "c"], 500),
        update(1, "a"),
        events.SiteFailed(1, "b", "disk full"),
        update(1, "c"),
        finished(1),
        events.RoundStarted(2, ["a", "b", "c"], 50, in_full=["b"], num_bytes_in_full=500),
        update(2, "c", loss=1.5),
    )
    summary = summarise(path, now=later(67))
    (row,) = summary["rounds"]
    assert (row["num_asked"], row["num_updates"], row["num_failed"], row["num_late"]) == (
        3,
        2,
        1,
        0,
    )
    assert (row["bytes_down"], row["bytes_up"], row["train_loss"]) == (1500, 200, 2.5)
    assert summary["current"]["waiting_for"] == ["a", "b"]
    assert summary["current"]["bytes_down"] == 50 + 500 + 50
    assert (summary["bytes_down"], summary["bytes_up"]) == (2100, 300)
    assert (summary["state"], summary["rounds_done"], summary["idle_s"]) == ("running", 1, 60.0)


def test_a_site_shows_how_far_behind_it_is(tmp_path: Path) -> None:
    path = write(
        tmp_path / "events.jsonl",
        started(),
        events.RoundStarted(1, ["a", "b", "c"], 500),
        update(1, "a"),
        update(1, "b", loss=3.0),
        finished(1),
        events.RoundStarted(2, ["a", "b", "c"], 500),
        update(2, "a", loss=1.0),
        finished(2, 1),
    )
    rows = {row["site"]: row for row in summarise(path)["site_rows"]}
    assert {name: row["rounds_behind"] for name, row in rows.items()} == {"a": 0, "b": 1, "c": 2}
    assert {name: row["last_round"] for name, row in rows.items()} == {"a": 2, "b": 1, "c": 0}
    assert (rows["a"]["last_loss"], rows["b"]["last_loss"], rows["c"]["last_loss"]) == (1, 3, None)
    assert (rows["a"]["num_updates"], rows["a"]["bytes_up"], rows["a"]["bytes_down"]) == (
        2,
        200,
        1000,
    )


@pytest.mark.parametrize("kept", [True, False])
def test_a_late_update_counts_once_and_is_no_update_of_the_round_it_comes_in(
    tmp_path: Path, kept: bool
) -> None:
    folded = [update(2, "b", rounds_late=1)] if kept else []
    path = write(
        tmp_path / "events.jsonl",
        started(),
        events.RoundStarted(1, ["a", "b"], 500),
        update(1, "a"),
        events.SiteFailed(1, "b", "no reply within 5 s"),
        finished(1, 1),
        events.RoundStarted(2, ["a", "b"], 500),
        events.SiteLate(2, "b", 1, kept),
        *folded,
        update(2, "a"),
    )
    summary = summarise(path)
    current = summary["current"]
    assert (current["num_late"], current["waiting_for"]) == (1, ["b"])
    b = next(row for row in summary["site_rows"] if row["site"] == "b")
    assert (b["num_late"], b["num_failed"], b["last_round"], b["rounds_behind"]) == (1, 1, 1, 0)


def test_a_second_attempt_adds_its_bytes_and_forgives_the_failure(tmp_path: Path) -> None:
    path = write(
        tmp_path / "events.jsonl",
        started(),
        events.RoundStarted(1, ["a", "b"], 500),
        events.SiteFailed(1, "a", "crash"),
        events.SiteFailed(1, "b", "crash"),
        events.RoundStarted(1, ["a", "b"], 500, attempt=2),
        update(1, "a"),
        events.SiteFailed(1, "b", "crash"),
        finished(1, 1),
    )
    (row,) = summarise(path)["rounds"]
    assert (row["attempt"], row["bytes_down"], row["num_failed"]) == (2, 2000, 1)


def test_a_resumed_run_is_running_again_and_repeats_the_round_in_flight(tmp_path: Path) -> None:
    first = [
        started(),
        events.RoundStarted(1, ["a", "b"], 500),
        update(1, "a"),
        update(1, "b"),
        finished(1),
        events.RoundStarted(2, ["a", "b"], 500),
        update(2, "a"),
    ]
    path = write(tmp_path / "events.jsonl", *first, events.RunFailed("killed by hand"))
    assert summarise(path)["state"] == "failed"
    write(
        path,
        started(),
        events.RunResumed(2),
        events.RoundStarted(2, ["a", "b"], 500),
        update(2, "b"),
    )
    summary = summarise(path)
    assert (summary["state"], summary["resumed"], summary["rounds_done"]) == ("running", 1, 1)
    assert "reason" not in summary
    assert summary["current"]["waiting_for"] == ["a"]
    assert summary["current"]["num_updates"] == 1
    # What travelled before the kill did travel.
    assert (summary["current"]["bytes_down"], summary["current"]["bytes_up"]) == (2000, 200)


def test_a_round_whose_last_event_a_kill_prevented_is_done_and_has_its_row(tmp_path: Path) -> None:
    log = [
        started(2),
        events.RoundStarted(1, ["a", "b"], 500),
        update(1, "a", loss=1.0),
        events.UpdateReceived(1, "b", "name-b", "e" * 64, 100, 30, 2.0, 1.0),
        finished(1),
        events.RoundStarted(2, ["a", "b"], 500),
        update(2, "b", loss=9.0, rounds_late=1),
        update(2, "a", loss=1.0),
        events.UpdateReceived(2, "b", "name-b", "e" * 64, 100, 30, 2.0, 1.0),
    ]
    ending = [events.RunFinished(2, 9.0, "round-0002")]
    whole = write(tmp_path / "whole.jsonl", *log, finished(2), *ending)
    killed = write(tmp_path / "killed.jsonl", *log, events.RunResumed(3), *ending)
    summary = summarise(killed)
    assert (summary["state"], summary["rounds_done"], summary["current"]) == ("finished", 2, None)
    expected, seen = summarise(whole)["rounds"], summary["rounds"]
    assert seen[0] == expected[0]
    unknown = {"aggregation_error", "aggregation_seconds", "seconds"}
    assert expected[1].keys() - seen[1].keys() == unknown
    weighted = {"num_updates": 2, "train_loss": (10 * 1.0 + 30 * 2.0) / 40}
    assert seen[1] == {k: v for k, v in expected[1].items() if k not in unknown} | weighted
    assert "finished: round 2 of 2" in shown(summary)
    assert "1.7500" in shown(summary)
    assert "not known" in shown(summary)


def test_a_lost_sum_has_no_updates_in_it_whatever_came_and_is_among_the_failures(
    tmp_path: Path,
) -> None:
    lost = [
        events.RoundStarted(1, ["a", "b"], 500),
        update(1, "a"),
        update(1, "b"),
        events.SumLost(1, "no honest vector", ["a", "b"]),
    ]
    again = [events.RoundStarted(2, ["a", "b"], 500), update(2, "a"), update(2, "b")]
    summary = summarise(
        write(tmp_path / "killed.jsonl", started(), *lost, events.RunResumed(2), *again)
    )
    (row,) = summary["rounds"]
    assert (row["server_round"], row["num_updates"], row["train_loss"]) == (1, 0, None)
    assert summary["current"]["num_updates"] == 2
    assert [each["reason"] for each in summary["failures"]] == ["no honest vector"]
    assert "no honest vector" in shown(summary)


def test_a_checkpoint_older_than_the_log_takes_the_log_back(tmp_path: Path) -> None:
    path = write(
        tmp_path / "events.jsonl", started(), finished(1), finished(2), events.RunResumed(2)
    )
    assert summarise(path)["rounds_done"] == 1
    write(path, finished(2), events.RunFinished(2, 9.0, "round-0002"))
    summary = summarise(path)
    assert [row["server_round"] for row in summary["rounds"]] == [1, 2]
    assert (summary["state"], summary["seconds"], summary["current"]) == ("finished", 9.0, None)


def test_a_log_without_a_beginning_or_an_end_is_read(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text("")
    empty = summarise(path)
    assert (empty["state"], empty["num_rounds"], empty["idle_s"]) == ("running", None, None)
    assert "round 0 of ?" in shown(empty)
    write(path, events.RoundStarted(1, ["a"], 500), update(1, "a"))
    with path.open("a") as file:
        file.write('{"time": "2026-11-22T12:00:09+00:00", "kind": "RoundFini')
    summary = summarise(path)
    assert summary["aggregation"] is None
    assert summary["current"]["num_updates"] == 1
    assert "name-a" in shown(summary)


def test_an_old_log_is_read(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    old = {
        "time": START.isoformat(),
        "kind": "RoundStarted",
        "server_round": 1,
        "sites": ["a"],
        "num_bytes": 5,
    }
    path.write_text(json.dumps(old) + "\n")
    ((_, event),) = read_events(path)
    assert event == events.RoundStarted(1, ["a"], 5)


def test_a_torn_line_is_cut_off_before_the_next_event(tmp_path: Path) -> None:
    path = write(tmp_path / "events.jsonl", started())
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:40])
    write(path, events.RunResumed(1))
    assert [type(event).__name__ for _, event in read_events(path)] == ["RunStarted", "RunResumed"]
    assert path.read_bytes().startswith(whole)


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        '{"kind": "RunFailed", "reason": "x"}',
        '{"time": "2026-11-22T12:00:00", "kind": "SiteSang"}',
        '{"time": "2026-11-22T12:00:00", "kind": "RunFailed", "cause": "x"}',
        "[1]",
        "\ufffd\x00",
    ],
)
def test_a_line_that_is_no_event_is_named(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "events.jsonl", started())
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(EventLogError, match="line 2 is no event") as caught:
        summarise(path)
    assert "\n" not in str(caught.value)


def test_a_site_cannot_write_over_the_screen_with_its_name_or_its_error(tmp_path: Path) -> None:
    hostile = "\x1b[2J[red]good[/red]\r"
    path = write(
        tmp_path / "events.jsonl",
        started(),
        events.RoundStarted(1, ["a"], 500),
        events.UpdateReceived(1, "a", hostile, "e" * 64, 100, 10, 2.0, 1.0),
        events.SiteFailed(1, "a", hostile),
    )
    text = shown(summarise(path))
    assert "\x1b" not in text
    assert "\r" not in text
    assert text.count("?[2J[red]good[/red]?") == 2
