import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from client.answers import KEPT_ROUNDS, MAX_BEGUN, Answers, noted_rounds
from client.reasons import Refused
from client.site_state import KEPT_S, SiteStateError
from federation.wire import WireError

METRICS = {"num-examples": 12, "train_loss": 1.25}


def keep(answers: Answers, server_round: int, update: bytes, question: str = "q") -> None:
    answers.keep(server_round, question=question, adapter="ad" * 32, update=update, metrics=METRICS)


def test_an_answer_is_found_again_by_another_process_and_by_its_question_only(
    tmp_path: Path,
) -> None:
    assert Answers(tmp_path, "a1").find(1, "q") is None
    keep(Answers(tmp_path, "a1"), 1, b"update")
    again = Answers(tmp_path, "a1")
    kept = again.find(1, "q")
    assert kept is not None
    assert again.path(kept).read_bytes() == b"update"
    assert (dict(kept.metrics), kept.num_bytes) == (METRICS, 6)
    assert Answers(tmp_path, "b2").find(1, "q") is None
    with pytest.raises(Refused, match=r"replay: round 1 of this run was answered for adapter adad"):
        again.find(1, "another question")


def test_updates_of_old_rounds_go_and_their_rounds_are_not_answered_anew(tmp_path: Path) -> None:
    answers = Answers(tmp_path, "a1")
    for number in range(1, 6):
        keep(answers, number, bytes([number]))
    names = sorted(path.name for path in (tmp_path / "answers" / "a1").iterdir())
    assert names == ["1.json", "2.json", "3.json", "4.json", "4.update", "5.json", "5.update"]
    assert KEPT_ROUNDS == 2
    assert answers.find(4, "q") is not None
    for number in (1, 2, 3):
        with pytest.raises(
            Refused, match=f"replay: round {number} .* kept for 2 rounds and some weeks only"
        ):
            answers.find(number, "q")


def test_the_updates_of_a_run_that_asks_no_more_go_and_its_rounds_are_not_answered_anew(
    tmp_path: Path,
) -> None:
    keep(Answers(tmp_path, "a1"), 1, b"update")
    old = tmp_path / "answers" / "a1" / "1.update"
    os.utime(old, (0, old.stat().st_mtime - KEPT_S - 60))
    keep(Answers(tmp_path, "b2"), 1, b"update")
    assert [path.name for path in old.parent.iterdir()] == ["1.json"]
    with pytest.raises(Refused, match="replay: round 1 .* kept for 2 rounds and some weeks only"):
        Answers(tmp_path, "a1").find(1, "q")


def test_an_answer_is_noted_once_the_ledger_has_it(tmp_path: Path) -> None:
    answers = Answers(tmp_path, "a1")
    keep(answers, 1, b"update")
    keep(answers, 2, b"update")
    kept = answers.find(1, "q")
    assert kept is not None
    assert (kept.is_noted, answers.is_noted(1), answers.is_noted(7)) == (False, False, False)
    answers.note(kept)
    assert answers.is_noted(1)
    assert answers.find(1, "q") == replace(kept, is_noted=True)
    assert list(noted_rounds(tmp_path)) == [("a1", 1)]


def test_a_round_is_begun_once_more_in_every_life_until_it_has_an_answer(tmp_path: Path) -> None:
    for count in range(3):
        assert Answers(tmp_path, "a1").num_begun(2) == count
        Answers(tmp_path, "a1").note_begun(2)
    assert (tmp_path / "answers").stat().st_mode & 0o777 == 0o700
    answers = Answers(tmp_path, "a1")
    keep(answers, 1, b"update")
    assert [answers.num_begun(number) for number in (1, 2, 3)] == [0, 3, 0]
    (tmp_path / "answers" / "a1" / "2.begun").write_text("of")
    assert answers.num_begun(2) == MAX_BEGUN
    keep(answers, 2, b"update")
    assert answers.num_begun(2) == 0


@pytest.mark.parametrize("run", ["", "../up", "AB", "a" * 65, "a/b", "a\n"])
def test_a_run_that_is_no_hex_id_gets_no_directory(tmp_path: Path, run: str) -> None:
    with pytest.raises(WireError, match="expected 1 to 64 hex digits"):
        Answers(tmp_path, run)


def test_what_is_damaged_is_said_and_never_sent(tmp_path: Path) -> None:
    answers = Answers(tmp_path, "a1")
    keep(answers, 1, b"update")
    path = tmp_path / "answers" / "a1" / "1.update"
    path.write_bytes(b"uqdate")
    with pytest.raises(SiteStateError, match="is damaged"):
        answers.find(1, "q")
    path.with_suffix(".json").write_text('{"server_round": 1}')
    with pytest.raises(SiteStateError, match="is damaged"):
        answers.find(1, "q")


def test_a_kill_at_any_change_of_the_file_system_leaves_the_answer_or_none(tmp_path: Path) -> None:
    """The child counts its own changes, as the audit events of CPython tell them, and dies."""
    changes = {"os.rename", "os.remove", "os.mkdir", "os.chmod", "os.unlink"}
    outcomes = set()
    for last in range(1, 100):
        shutil.rmtree(tmp_path / "site", ignore_errors=True)
        keep(Answers(tmp_path / "site", "a1"), 1, b"first")
        child = os.fork()
        if child == 0:
            _keep_and_die(tmp_path / "site", changes, last)
        _, status = os.waitpid(child, 0)
        answers = Answers(tmp_path / "site", "a1")
        kept = answers.find(2, "q")
        outcomes.add(kept is not None)
        if kept is None:
            keep(answers, 2, b"second")
            kept = answers.find(2, "q")
        assert kept is not None
        assert answers.path(kept).read_bytes() == b"second"
        assert answers.find(1, "q") is not None
        keep(answers, 3, b"third")
        names = {path.name for path in (tmp_path / "site" / "answers" / "a1").iterdir()}
        assert names == {"1.json", "2.json", "2.update", "3.json", "3.update"}
        if os.WEXITSTATUS(status) == 0:
            assert last > 4
            break
    assert outcomes == {True, False}


def _keep_and_die(site: Path, changes: set[str], last: int) -> None:
    import sys

    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        is_open = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT
        if event in changes or is_open:
            count += 1
            if count == last:
                os._exit(9)

    try:
        sys.addaudithook(hook)
        keep(Answers(site, "a1"), 2, b"second")
    except BaseException:
        os._exit(3)
    os._exit(0)


def test_the_description_of_an_answer_holds_names_and_numbers_only(tmp_path: Path) -> None:
    keep(Answers(tmp_path, "a1"), 1, b"update")
    values = json.loads((tmp_path / "answers" / "a1" / "1.json").read_text())
    assert set(values) == {
        *("server_round", "question", "adapter", "sha256", "num_bytes", "metrics"),
        *("num_examples", "data_set", "event", "is_noted"),
    }
