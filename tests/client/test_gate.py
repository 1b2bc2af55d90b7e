"""The trainer behind a real policy and a real ledger: what is refused, charged and answered."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from client.answers import Answers
from client.fingerprint import fingerprint, read_secret
from client.gate import SiteGate
from client.ledger import LEDGER, Ledger, read_ledger
from client.policy import Policy
from client.reasons import REFUSED, SITE_ERROR
from client.round import site_records
from client.site import Site
from client.site_state import KEPT_S
from client.trainer import Reply, Trainer
from federation.accountant import PrivacyEvent, epsilon_of
from federation.adapter import initial_adapter
from federation.base_model import model_digest
from federation.wire import encode
from tests.client.policy_example import changed
from tests.client.test_signed_runs import SIGNER
from tests.client.test_signed_runs import signed as signed_request
from tests.conftest import write_records
from tests.policies import policy_tree

NUM_RECORDS = 40
RUN = "ab" * 16
PRIVATE = {
    "num_steps": 2,
    "batch_size": 4,
    "max_tokens": 64,
    "dtype": "float32",
    "noise_multiplier": 2.0,
    "record_clip_norm": 0.5,
}
HEAD: dict[str, Any] = {
    "run": RUN,
    "bundle": "c" * 64,
    "server_round": 1,
    "uplink": "float32",
    "downlink": "float32",
    "trains": "B",
    "aggregation": "alternating",
    "cohort": 3,
    "training": PRIVATE,
    "metrics": ["seconds"],
}
LIMITS = policy_tree(
    runs={"allowed": [RUN], "bundles": ["c" * 64]},
    adapter__modules=["model.layers.*"],
    adapter__max_alpha=16.0,
    traffic={"uplink": ["float32"], "max_round_bytes": 1_000_000, "max_run_bytes": 5_000_000},
    aggregation={"kinds": ["alternating"], "secure_sum_required": False, "min_cohort": 3},
    privacy={"noise_floor": 1.0, "max_record_clip_norm": 1.0, "epsilon": 8.0, "delta": 1e-3},
    metrics__allowed=["seconds"],
)


class Box:
    """One site: its trainer in this process, its policy and its ledger on disk."""

    def __init__(self, base_model: Path, directory: Path) -> None:
        self.base_model, self.directory = base_model, directory
        data = write_records(directory / "data.jsonl", NUM_RECORDS)
        self.site = Site(base_model, data, "bank", directory / "state", None)
        self.site.state.mkdir()
        self.message = self.message_of(0)
        self.said: list[tuple[str, dict[str, Any]]] = []
        self.fingerprinted: Path | None = None
        """What the ledger charges, if it is not the site's data."""

    def message_of(self, seed: int) -> bytes:
        adapter = initial_adapter(
            self.base_model, rank=4, alpha=8.0, targets="attention", seed=seed
        )
        return encode(adapter, dtype="float32", base_model=model_digest(self.base_model))

    def ask(
        self,
        head: dict[str, Any] | bytes,
        message: bytes | None = None,
        *,
        knows_bundle: bool = True,
        **limits: Any,
    ) -> Reply:
        """Ask a trainer that begins its life with this question."""
        base = {"models": {"base": [model_digest(self.base_model)]}}
        policy = Policy.model_validate(changed({**LIMITS, **base}, **limits))
        ledger = Ledger.open(self.ledger)
        records = site_records(self.fingerprinted or self.site.data)
        data_set = fingerprint(records, read_secret(self.site.state))
        path = self.directory / "message"
        path.write_bytes(self.message if message is None else message)
        scratch = Path(tempfile.mkdtemp(dir=self.directory))

        def say(event: str, **values: Any) -> None:
            self.said.append((event, values))

        now = datetime(2026, 11, 24, 12, tzinfo=UTC)
        with SiteGate(
            policy, ledger, data_set, say=say, now=lambda: now, knows_bundle=knows_bundle
        ) as gate:
            content = head if isinstance(head, bytes) else json.dumps(head).encode()
            return Trainer(self.site, gate, say).answer(content, path, scratch)

    @property
    def ledger(self) -> Path:
        return self.site.state / LEDGER


@pytest.fixture
def box(tiny_model: Path, tmp_path: Path) -> Box:
    return Box(tiny_model, tmp_path)


def update_of(reply: Reply) -> bytes:
    assert reply.update is not None, reply.head
    return reply.update.read_bytes()


def test_what_leaves_is_in_the_ledger_with_its_cost(box: Box) -> None:
    reply = box.ask(HEAD)
    update = update_of(reply)
    (row,) = read_ledger(box.ledger).rows
    assert (row.run, row.server_round, row.stage) == (RUN, 1, "update")
    assert row.num_bytes == len(update)
    assert row.event == PrivacyEvent(2.0, 4 / NUM_RECORDS, 2)
    assert row.epsilon == pytest.approx(epsilon_of([row.event], 1e-3))
    assert row.metrics == reply.head["metrics"]
    assert set(row.metrics) == {"seconds"}
    assert float(f"{row.metrics['seconds']:.3g}") == row.metrics["seconds"]


def test_a_round_asked_twice_is_trained_and_charged_once(box: Box) -> None:
    first = update_of(box.ask(HEAD))
    # Another life of the trainer: noise drawn anew would give other bytes.
    assert update_of(box.ask(HEAD)) == first
    assert len(read_ledger(box.ledger).rows) == 1


def test_an_answer_whose_spend_a_kill_prevented_is_charged_before_it_leaves(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(Ledger, "append", die)
        box.ask(HEAD)
    assert read_ledger(box.ledger).rows == []
    (kept,) = (box.site.state / "answers" / RUN).glob("*.update")
    before = kept.read_bytes()
    assert update_of(box.ask(HEAD)) == before
    assert len(read_ledger(box.ledger).rows) == 1


def test_a_round_whose_answer_is_gone_is_refused_and_not_trained_again(box: Box) -> None:
    budget = {"privacy__epsilon": 1.001 * epsilon_of([PrivacyEvent(2.0, 4 / NUM_RECORDS, 2)], 1e-3)}
    first = update_of(box.ask(HEAD, **budget))
    # Weeks later another run is answered, and the updates of this one go.
    old = box.site.state / "answers" / RUN / "1.update"
    os.utime(old, (0, time.time() - KEPT_S - 60))
    Answers(box.site.state, "cd" * 16).keep(
        1, question="q", adapter="a", update=b"x", metrics={}, data_set=""
    )
    assert not old.exists()
    for _ in range(2):
        reply = box.ask(HEAD, **budget)
        assert (reply.update, reply.head["code"]) == (None, REFUSED)
        assert "replay" in reply.head["reason"]
        assert "round 1 of this run was answered" in reply.head["reason"]
        # Or somebody took the answers away, or put the state back without them.
        shutil.rmtree(box.site.state / "answers", ignore_errors=True)
    assert "its answer is not kept" in reply.head["reason"]
    assert [row.num_bytes for row in read_ledger(box.ledger).rows] == [len(first)]


def test_an_answer_is_sent_again_under_another_delta_and_with_more_records(box: Box) -> None:
    first = update_of(box.ask(HEAD))
    assert update_of(box.ask(HEAD, privacy__delta=1e-4)) == first
    write_records(box.site.data, NUM_RECORDS + 5)
    site_records.cache_clear()
    assert update_of(box.ask(HEAD)) == first
    assert len(read_ledger(box.ledger).rows) == 1


def test_an_answer_that_was_never_charged_is_not_charged_to_other_records(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "append", die)
        with pytest.raises(SystemExit):
            box.ask(HEAD)
    write_records(box.site.data, 2 * NUM_RECORDS)
    site_records.cache_clear()
    reply = box.ask(HEAD)
    assert (reply.update, reply.head["code"]) == (None, REFUSED)
    assert reply.head["reason"].startswith("data_set: this site's records changed")
    assert read_ledger(box.ledger).rows == []


def test_a_run_that_goes_on_with_another_bundle_gets_the_same_answer(box: Box) -> None:
    first = update_of(box.ask(HEAD, runs__bundles=["any"]))
    assert update_of(box.ask(HEAD | {"bundle": "d" * 64}, runs__bundles=["any"])) == first
    assert len(read_ledger(box.ledger).rows) == 1


def test_a_bundle_that_the_runs_own_app_names_is_none(box: Box) -> None:
    """A stock SuperNode lets the app of the run speak for itself."""
    reply = box.ask(HEAD, knows_bundle=False)
    assert reply.head["code"] == REFUSED
    assert "(runs.bundles): bundle not said" in reply.head["reason"]
    update_of(box.ask(HEAD, knows_bundle=False, runs__bundles=["any"]))
    assert [row.bundle for row in read_ledger(box.ledger).rows] == [""]


def test_a_site_that_trains_fewer_slices_holds_the_message_s_rank_to_the_signed_one(
    box: Box,
) -> None:
    box.site = replace(box.site, rank=2)
    head = HEAD | {"num_rounds": 2}
    described: dict[str, Any] = {
        **{name: head[name] for name in ("run", "bundle", "aggregation", "uplink", "downlink")},
        **{name: head[name] for name in ("training", "metrics", "cohort", "num_rounds")},
        "base_model": model_digest(box.base_model),
        "factors": "one",
        "alpha": 8.0,
        "modules": [f"model.layers.*.self_attn.{name}_proj" for name in "koqv"],
        "num_modules": 8,
        "secure_sum": None,
        "not_after": "2026-12-24T12:00:00Z",
    }

    def ask(rank: int) -> Reply:
        ranks = {"rank": rank, "min_rank": rank, "max_rank": rank}
        signed = signed_request(head, SIGNER, described | ranks)
        signers = [SIGNER.public_key().public_bytes_raw().hex()]
        return box.ask(signed, runs={"signers": signers})

    for rank in (2, 8):
        reply = ask(rank)
        assert f"rank is 4, signed is {rank}" in reply.head["reason"]
    update_of(ask(4))


def test_a_budget_that_ends_in_the_middle_of_a_run_ends_this_sites_part(box: Box) -> None:
    one = epsilon_of([PrivacyEvent(2.0, 4 / NUM_RECORDS, 2)], 1e-3)
    two = epsilon_of([PrivacyEvent(2.0, 4 / NUM_RECORDS, 2)] * 2, 1e-3)
    budget = {"privacy__epsilon": (one + two) / 2}
    assert box.ask(HEAD, **budget).head["code"] == 0
    second = box.ask(HEAD | {"server_round": 2}, box.message_of(1), **budget)
    assert second.update is None
    assert second.head["code"] == REFUSED
    assert "privacy.epsilon" in second.head["reason"]
    assert len(read_ledger(box.ledger).rows) == 1
    # The same records under another name and in another order are the same data set.
    lines = box.site.data.read_text().splitlines(keepends=True)
    renamed = box.directory / "other.jsonl"
    renamed.write_text("".join(reversed(lines)))
    box.site = Site(box.base_model, renamed, "bank", box.site.state, None)
    again = box.ask(HEAD | {"server_round": 2, "run": RUN}, box.message_of(1), **budget)
    assert "privacy.epsilon" in again.head["reason"]


HOSTILE: list[tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = [
    ("runs.allowed", lambda head: head | {"run": "cd" * 16}),
    ("runs.bundles", lambda head: head | {"bundle": "d" * 64}),
    ("training.max_steps", lambda head: changed(head, training__num_steps=9)),
    ("training.max_batch", lambda head: changed(head, training__batch_size=9)),
    ("training.max_learning_rate", lambda head: changed(head, training__learning_rate=0.011)),
    ("training.max_rounds", lambda head: head | {"server_round": 10}),
    ("traffic.uplink", lambda head: head | {"uplink": "bfloat16"}),
    ("aggregation.kinds", lambda head: head | {"aggregation": "products"}),
    ("aggregation.min_cohort", lambda head: head | {"cohort": 2}),
    ("privacy.required", lambda head: changed(head, training__noise_multiplier=0.0)),
    ("privacy.noise_floor", lambda head: changed(head, training__noise_multiplier=0.9)),
    ("privacy.max_record_clip_norm", lambda head: changed(head, training__record_clip_norm=1.1)),
    ("privacy.one_factor_only", lambda head: head | {"trains": "AB"}),
    ("metrics.allowed", lambda head: head | {"metrics": ["train_loss"]}),
]


@pytest.mark.parametrize(("rule", "spoil"), HOSTILE, ids=[rule for rule, _ in HOSTILE])
def test_nothing_leaves_and_nothing_is_charged_when_a_rule_is_broken(
    box: Box, rule: str, spoil: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    reply = box.ask(spoil(HEAD))
    assert reply.update is None
    assert (reply.head["code"], rule in reply.head["reason"]) == (REFUSED, True)
    assert read_ledger(box.ledger).rows == []
    assert not (box.site.state / "answers").exists()
    judged = [values for event, values in box.said if event == "judged"]
    assert [(values["is_allowed"], values["rule"]) for values in judged] == [(False, rule)]


@pytest.mark.parametrize(
    "head",
    [
        {key: value for key, value in HEAD.items() if key != "aggregation"},
        HEAD | {"server_round": True},
        HEAD | {"more": 1},
        HEAD | {"run": "…" * 32},
        changed(HEAD, training__learning_rate=1e400),
    ],
    ids=["a field is missing", "a boolean", "a field too many", "no ASCII", "infinite"],
)
def test_what_is_no_request_is_answered_with_an_error_and_nothing_else(
    box: Box, head: dict[str, Any]
) -> None:
    reply = box.ask(head)
    assert (reply.update, reply.head["code"]) == (None, SITE_ERROR)
    assert read_ledger(box.ledger).rows == []


def test_a_key_that_is_said_twice_is_no_request(box: Box) -> None:
    twice = json.dumps(HEAD)[:-1] + f', "run": "{RUN}"}}'
    reply = box.ask(twice.encode())
    assert (reply.update, reply.head["code"]) == (None, SITE_ERROR)
    assert "twice" in reply.head["reason"]


def test_answers_are_closed_to_other_users_in_a_state_directory_that_was_open(box: Box) -> None:
    box.site.state.chmod(0o755)
    update_of(box.ask(HEAD))
    assert (box.site.state / "answers").stat().st_mode & 0o777 == 0o700
