"""The policy's file while the trainer lives: an edit counts, a broken one lets nobody in."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.fingerprint import fingerprint, read_secret
from client.gate import SiteGate
from client.ledger import Ledger, read_ledger
from client.policy_file import SETTLED_S, PolicyFile, policy_state
from client.reasons import REFUSED, Refused
from client.round import site_records
from client.trainer import Trainer
from federation.base_model import model_digest
from federation.settings import SettingsError
from tests.client.test_gate import HEAD, LIMITS, Box

RUN, OTHER = "ab" * 16, "cd" * 16


class Officer:
    """Somebody who edits a policy, and sleeps as long as the test has it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.said: list[tuple[str, dict[str, Any]]] = []
        self.slept: list[float] = []
        self.at_sleep: list[Callable[[], None]] = []
        self.write(f'[runs]\nallowed = ["{RUN}"]\n')
        os.utime(path, (0, 0))
        self.file = PolicyFile(path, self.say, sleep=self.sleep)

    def say(self, event: str, **values: Any) -> None:
        self.said.append((event, values))

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        if self.at_sleep:
            self.at_sleep.pop(0)()

    def write(self, text: str) -> None:
        self.path.write_text(text)

    def allowed(self) -> tuple[str, ...]:
        return self.file.current().runs.allowed

    def refusal(self) -> str:
        with pytest.raises(Refused) as caught:
            self.file.current()
        assert caught.value.rule == "policy"
        return str(caught.value)


@pytest.fixture
def officer(tmp_path: Path) -> Officer:
    return Officer(tmp_path / "policy.toml")


def test_an_edit_counts_from_the_next_question_and_is_in_the_log_with_its_digest(
    officer: Officer,
) -> None:
    assert officer.allowed() == (RUN,)
    officer.write(f'[runs]\nallowed = ["{OTHER}"]\n')
    assert officer.allowed() == (OTHER,)
    assert officer.allowed() == (OTHER,)
    assert [event for event, _ in officer.said] == ["policy_read", "policy_read"]
    digest = hashlib.sha256(officer.path.read_bytes()).hexdigest()
    assert officer.said[-1][1] == {"digest": digest}
    assert officer.file.digest == digest
    assert officer.slept == [SETTLED_S]


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        ("[runs", "is not TOML"),
        (f'[runs]\nalowed = ["{OTHER}"]\n', "unknown setting 'runs.alowed'"),
        ("[privacy]\nnoise_floor = 0\n", "noise_floor is 0"),
        ("\udcff", "is not TOML"),
    ],
    ids=["cut off", "misspelt", "impossible", "no text"],
)
def test_a_broken_policy_lets_nobody_in_until_it_is_mended(
    officer: Officer, broken: str, fault: str
) -> None:
    officer.path.write_bytes(broken.encode(errors="surrogateescape"))
    for _ in range(2):
        assert "its own officer must mend it" in officer.refusal()
    # What is wrong stands in the site's log, once, and does not leave.
    events = [values for event, values in officer.said if event == "policy_invalid"]
    assert [fault in values["reason"] for values in events] == [True]
    assert fault not in officer.refusal()
    assert str(officer.path.parent) not in str(events)
    assert policy_state(officer.path).startswith("refuses everything: policy.toml")
    officer.write(f'[runs]\nallowed = ["{OTHER}"]\n')
    assert officer.allowed() == (OTHER,)
    assert policy_state(officer.path) == f"in force, sha256 {officer.file.digest[:16]}…"


def test_a_policy_that_is_gone_lets_nobody_in_and_the_same_one_put_back_does(
    officer: Officer,
) -> None:
    content = officer.path.read_text()
    officer.path.unlink()
    assert "cannot be read" in officer.refusal()
    assert "cannot be read" in policy_state(officer.path)
    officer.write(content)
    assert officer.allowed() == (RUN,)
    assert [event for event, _ in officer.said] == ["policy_read", "policy_invalid", "policy_read"]


def test_a_half_written_policy_is_waited_for_and_never_used(officer: Officer) -> None:
    """Its first half would be a policy too, one without quiet hours."""
    whole = (
        f'[runs]\nallowed = ["{OTHER}"]\n[[quiet_hours.windows]]\nfrom = "00:00"\nto = "00:00"\n'
    )
    officer.write(whole[:50])
    officer.at_sleep = [lambda: officer.write(whole)]
    assert len(officer.file.current().quiet_hours.windows) == 1
    assert officer.slept == [SETTLED_S, SETTLED_S]
    assert len(officer.said) == 2


def test_a_policy_that_is_half_written_when_a_trainer_starts_is_waited_for_too(
    officer: Officer,
) -> None:
    first = f'[runs]\nallowed = ["{OTHER}"]\n'
    whole = first + '[[quiet_hours.windows]]\nfrom = "00:00"\nto = "00:00"\n'
    officer.write(first)
    officer.at_sleep = [lambda: officer.write(whole)]
    started = PolicyFile(officer.path, officer.say, sleep=officer.sleep)
    assert officer.slept == [SETTLED_S, SETTLED_S]
    assert len(started.current().quiet_hours.windows) == 1
    # One that was left alone for longer than that, however short, is read at once.
    then = time.time() - SETTLED_S
    os.utime(officer.path, (then, then))
    PolicyFile(officer.path, officer.say, sleep=officer.sleep)
    assert officer.slept == [SETTLED_S, SETTLED_S]


def test_a_policy_that_is_written_all_the_time_lets_nobody_in(officer: Officer) -> None:
    def write() -> None:
        officer.write(f"# {len(officer.slept)}\n")

    write()
    officer.at_sleep = [write] * 1000
    officer.refusal()
    assert "is written all the time" in officer.said[-1][1]["reason"]


def test_a_trainer_does_not_start_with_a_broken_policy(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    with pytest.raises(SettingsError, match="cannot be read"):
        PolicyFile(path, lambda *_, **__: None)
    path.write_text("[runs")
    with pytest.raises(SettingsError, match="is not TOML"):
        PolicyFile(path, lambda *_, **__: None)


def toml_of(policy: dict[str, Any]) -> str:
    """Return tables of plain values as TOML, which writes them as JSON does."""
    return "".join(
        f"[{table}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
        for table, values in policy.items()
    )


def test_one_life_of_a_trainer_lets_a_run_in_when_its_policy_is_edited(
    officer: Officer, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "site").mkdir()
    box = Box(tiny_model, tmp_path / "site")
    models = {"models": {"base": [model_digest(tiny_model)]}}
    open_text = toml_of(LIMITS | models)
    closed_text = open_text.replace(HEAD["run"], OTHER)
    ledger = Ledger.open(box.ledger)
    data_set = fingerprint(site_records(box.site.data), read_secret(box.site.state))
    message = tmp_path / "message"
    message.write_bytes(box.message)

    officer.write(closed_text)
    with SiteGate(officer.file, ledger, data_set, say=officer.say) as gate:
        trainer = Trainer(box.site, gate, officer.say)

        def ask(text: str) -> tuple[int, str]:
            officer.write(text)
            scratch = tmp_path / f"scratch-{len(officer.said)}"
            scratch.mkdir()
            reply = trainer.answer(json.dumps(HEAD).encode(), message, scratch)
            return int(reply.head["code"]), str(reply.head.get("reason"))

        code, reason = ask(closed_text)
        assert (code, "runs.allowed" in reason) == (REFUSED, True)
        assert ask(open_text)[0] == 0
        judged = [values for event, values in officer.said if event == "judged"]
        assert judged[-1]["policy"] == hashlib.sha256(open_text.encode()).hexdigest()[:16]
        code, reason = ask(open_text + "more")
        assert (code, reason.split(":")[0]) == (REFUSED, "policy")
        assert len(read_ledger(box.ledger).rows) == 1
        assert ask(open_text)[0] == 0
        # The same answer again, from disk.
        assert len(read_ledger(box.ledger).rows) == 1
