"""Private rounds that somebody wants to learn more from than they cost."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import client.trainer
from client.answers import MAX_BEGUN
from client.batches import encode_records
from client.chain import LedgerError
from client.ledger import Ledger, read_ledger
from client.model import load_tokenizer
from client.randomness import RandomStream
from client.reasons import REFUSED, SITE_ERROR
from client.records import read_records
from client.round import Answer
from federation.accountant import PrivacyEvent
from federation.adapter import Adapter, LowRank, initial_adapter
from federation.base_model import model_digest
from federation.wire import encode, open_update
from tests.client.policy_example import changed
from tests.client.test_gate import HEAD, NUM_RECORDS, Box, update_of
from tests.conftest import write_records

SENTENCE = "the site failed in this private round; its own log says why"
DIVERGES = changed(HEAD, training__learning_rate=1e18)
WILD = {"training__max_learning_rate": 1e18}


@pytest.fixture
def box(tiny_model: Path, tmp_path: Path) -> Box:
    return Box(tiny_model, tmp_path)


@pytest.fixture
def drawn_from(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """Return a list to which every step adds how many records it draws from, and its rate."""
    seen: list[tuple[int, float]] = []
    chosen = RandomStream.chosen

    def noting(self: RandomStream, count: int, rate: float) -> list[int]:
        seen.append((count, rate))
        return chosen(self, count, rate)

    monkeypatch.setattr(RandomStream, "chosen", noting)
    return seen


def with_long_prompts(box: Box, num_short: int) -> None:
    """Let all but the first records have prompts of more than 32 tokens."""
    prompts = [f"Hi {n}?" if n < num_short else f"{'Why so ' * 12}{n}" for n in range(NUM_RECORDS)]
    lines = [
        json.dumps({"prompt": prompt, "response": f"alpha beta {number}."})
        for number, prompt in enumerate(prompts)
    ]
    box.site.data.write_text("\n".join(lines) + "\n")


def message_with(box: Box, **numbers: float) -> bytes:
    """Return an adapter of which the first number of a factor is another."""
    made = initial_adapter(box.base_model, rank=4, alpha=8.0, targets="attention", seed=0)
    first = sorted(made.modules)[0]
    factors = made.modules[first]
    for name, number in numbers.items():
        getattr(factors, name)[0, 0] = number
    modules: dict[str, LowRank] = {**made.modules, first: factors}
    adapter = Adapter(made.rank, made.alpha, modules)
    return encode(adapter, dtype="float32", base_model=model_digest(box.base_model))


def stages_and_events(box: Box) -> list[tuple[str, PrivacyEvent]]:
    return [(row.stage, row.event) for row in read_ledger(box.ledger).rows]


@pytest.mark.parametrize("max_tokens", [16, 32, 64])
def test_a_limit_on_tokens_changes_neither_what_is_drawn_from_nor_what_is_charged(
    box: Box, drawn_from: list[tuple[int, float]], max_tokens: int
) -> None:
    with_long_prompts(box, num_short=6)
    tokenizer = load_tokenizer(box.base_model)
    records = read_records(box.site.data)
    fitting = [e for e in encode_records(records, tokenizer, 32, keeps_all=True) if e.num_learned]
    assert len(fitting) == 6
    reply = box.ask(changed(HEAD, training__max_tokens=max_tokens, training__batch_size=6))
    assert reply.head["code"] == 0
    assert drawn_from == [(NUM_RECORDS, 6 / NUM_RECORDS)] * 2
    assert stages_and_events(box) == [("update", PrivacyEvent(2.0, 6 / NUM_RECORDS, 2))]


def test_no_limit_on_tokens_and_no_batch_makes_a_round_tell_how_long_prompts_are(box: Box) -> None:
    with_long_prompts(box, num_short=6)
    said = set()
    for server_round, max_tokens in enumerate((8, 16, 24, 32, 64), start=1):
        training = {"training__max_tokens": max_tokens, "training__batch_size": 8}
        reply = box.ask(changed(HEAD | {"server_round": server_round}, **training))
        said.add((reply.head["code"], reply.head["num_bytes"], *reply.head["metrics"]))
    assert len(said) == 1


def test_a_round_that_fails_after_its_draw_is_charged_and_never_drawn_again(
    box: Box, drawn_from: list[tuple[int, float]]
) -> None:
    first = box.ask(DIVERGES, **WILD)
    assert (first.update, first.head) == (None, {"code": SITE_ERROR, "reason": SENTENCE})
    event = PrivacyEvent(2.0, 4 / NUM_RECORDS, 2)
    assert stages_and_events(box) == [("failed", event)]
    num_draws = len(drawn_from)
    assert num_draws == 2
    for _ in range(3):
        assert box.ask(DIVERGES, **WILD) == first
    assert len(drawn_from) == num_draws
    assert stages_and_events(box) == [("failed", event)]
    # The cause is in the site's own log; the run goes on with another round.
    (failure,) = [values for name, values in box.said if name == "private_round_failed"]
    assert "lower the learning rate" in failure["reason"]
    assert update_of(box.ask(HEAD | {"server_round": 2}))
    assert [stage for stage, _ in stages_and_events(box)] == ["failed", "update"]


def test_a_failed_round_is_asked_again_with_other_settings_in_vain(box: Box) -> None:
    box.ask(DIVERGES, **WILD)
    reply = box.ask(HEAD, **WILD)
    assert (reply.update, reply.head["code"]) == (None, REFUSED)
    assert "replay" in reply.head["reason"]


def test_a_failure_that_a_kill_kept_from_the_ledger_is_charged_before_it_is_told(
    box: Box, monkeypatch: pytest.MonkeyPatch, drawn_from: list[tuple[int, float]]
) -> None:
    def die(*_: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(Ledger, "append", die)
        box.ask(DIVERGES, **WILD)
    assert stages_and_events(box) == []
    assert box.ask(DIVERGES, **WILD).head["reason"] == SENTENCE
    assert [stage for stage, _ in stages_and_events(box)] == ["failed"]
    assert len(drawn_from) == 2


def test_a_private_round_that_fails_before_its_draw_says_the_same_and_costs_nothing(
    box: Box, drawn_from: list[tuple[int, float]]
) -> None:
    wild = message_with(box, b_OR=1.1e6)
    assert box.ask(HEAD, wild).head == {"code": SITE_ERROR, "reason": SENTENCE}
    (failure,) = [values for name, values in box.said if name == "private_round_failed"]
    assert "a site trains weights of at most 1e+06" in failure["reason"]
    assert (stages_and_events(box), drawn_from) == ([], [])
    assert update_of(box.ask(HEAD, message_with(box, b_OR=1e6)))


def killed_in_its_draw(box: Box, monkeypatch: pytest.MonkeyPatch, head: dict[str, Any]) -> None:
    def die(*_: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(RandomStream, "chosen", die)
        box.ask(head)


def test_a_round_whose_trainer_is_killed_again_and_again_is_charged_and_drawn_no_more(
    box: Box, monkeypatch: pytest.MonkeyPatch, drawn_from: list[tuple[int, float]]
) -> None:
    other = changed(HEAD, training__seed=7)
    for number in range(MAX_BEGUN):
        # Whatever is asked in the round: each is a draw from the same records.
        killed_in_its_draw(box, monkeypatch, other if number % 2 else HEAD)
    assert stages_and_events(box) == []
    for _ in range(2):
        assert box.ask(HEAD).head == {"code": SITE_ERROR, "reason": SENTENCE}
        assert stages_and_events(box) == [("failed", PrivacyEvent(2.0, 4 / NUM_RECORDS, 2))]
    assert "replay" in box.ask(other).head["reason"]
    assert drawn_from == []
    given_up = [values for name, values in box.said if name == "private_round_given_up"]
    assert [values["server_round"] for values in given_up] == [1]
    assert update_of(box.ask(HEAD | {"server_round": 2}))


def test_a_round_that_is_killed_a_few_times_is_answered_and_charged_once(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(MAX_BEGUN - 1):
        killed_in_its_draw(box, monkeypatch, HEAD)
    first = update_of(box.ask(HEAD))
    assert update_of(box.ask(HEAD)) == first
    assert [stage for stage, _ in stages_and_events(box)] == ["update"]
    names = {path.name for path in (box.site.state / "answers" / HEAD["run"]).iterdir()}
    assert names == {"1.json", "1.update"}


def test_rounds_without_noise_are_begun_as_often_as_it_takes(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, is_open = changed(HEAD, training__noise_multiplier=0.0), {"privacy__required": False}
    trained = client.trainer.answer_received

    def dying(*arguments: object, **options: object) -> Answer:
        trained(*arguments, **options)  # type: ignore[arg-type]
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(client.trainer, "answer_received", dying)
        for _ in range(MAX_BEGUN + 1):
            with pytest.raises(SystemExit):
                box.ask(plain, **is_open)
    assert update_of(box.ask(plain, **is_open))


def test_a_ledger_that_takes_no_row_tells_nobody_whether_the_training_went_well(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise LedgerError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "append", full)
        went_well = box.ask(HEAD)
        failed = box.ask(DIVERGES | {"server_round": 2}, **WILD)
    assert went_well.head == failed.head == {"code": SITE_ERROR, "reason": SENTENCE}
    assert went_well.update is failed.update is None
    assert "the disk is full" in str(box.said)
    # It is charged, and leaves, once there is a row.
    assert update_of(box.ask(HEAD))
    assert [stage for stage, _ in stages_and_events(box)] == ["update"]


def test_a_round_without_noise_says_what_is_wrong(box: Box) -> None:
    plain = changed(HEAD, training__noise_multiplier=0.0)
    open_to_it = {"privacy__required": False}
    reply = box.ask(plain, message_with(box, a_RI=-1.1e6), **open_to_it)
    assert "holds 1.1e+06: a site trains weights of at most 1e+06" in reply.head["reason"]
    assert read_ledger(box.ledger).rows == []


def test_a_clip_norm_below_the_smallest_is_no_request(box: Box) -> None:
    reply = box.ask(changed(HEAD, training__record_clip_norm=1e-30))
    assert (reply.update, reply.head["code"]) == (None, SITE_ERROR)
    assert "record_clip_norm" in reply.head["reason"]
    assert read_ledger(box.ledger).rows == []


def test_a_message_is_not_opened_for_a_run_that_is_not_allowed(box: Box) -> None:
    damaged = box.message[:-1] + bytes([box.message[-1] ^ 1])
    reply = box.ask(HEAD | {"run": "cd" * 16}, damaged)
    assert (reply.head["code"], "runs.allowed" in reply.head["reason"]) == (REFUSED, True)
    reply = box.ask(HEAD, damaged)
    assert (reply.head["code"], "checksum" in reply.head["reason"]) == (SITE_ERROR, True)


def test_a_stranger_learns_neither_this_sites_base_nor_what_adapters_it_holds(box: Box) -> None:
    stranger = HEAD | {"run": "cd" * 16}
    path = box.directory / "reference"
    path.write_bytes(box.message)
    reference = open_update(path)
    other = encode(reference.adapter(), dtype="float32", base_model="e" * 64)
    change = encode(
        reference.adapter(), dtype="int8", base_model=reference.base_model, reference=reference
    )
    base = reference.base_model[:16]
    for message, rule in ((other, "models.base"), (change, "runs.allowed")):
        reply = box.ask(stranger, message)
        assert (reply.head["code"], rule in reply.head["reason"]) == (REFUSED, True)
        assert base not in reply.head["reason"]
    assert "does not hold adapter" in box.ask(HEAD, change).head["reason"]
    judged = [values["rule"] for name, values in box.said if name == "judged"]
    assert judged == ["models.base", "runs.allowed"]


def test_terms_of_a_secure_sum_without_a_stage_let_no_update_leave(
    box: Box, drawn_from: list[tuple[int, float]]
) -> None:
    terms = {"cohort": 5, "threshold": 4, "clip": 1.0, "bits": 32}
    claimed = {key: value for key, value in HEAD.items() if key != "cohort"} | {"secure_sum": terms}
    reply = box.ask(claimed, aggregation__secure_sum_required=True)
    assert (reply.update, reply.head["code"]) == (None, SITE_ERROR)
    assert "no stage of it" in reply.head["reason"]
    assert (stages_and_events(box), drawn_from) == ([], [])


def test_what_leaves_is_no_longer_than_what_was_allowed(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = client.trainer.answer_received

    def longer(*arguments: object, **options: object) -> Answer:
        answer = made(*arguments, **options)  # type: ignore[arg-type]
        return replace(answer, update=answer.update + b"x")

    monkeypatch.setattr(client.trainer, "answer_received", longer)
    reply = box.ask(HEAD)
    assert (reply.update, reply.head["code"]) == (None, SITE_ERROR)
    assert stages_and_events(box) == []


def test_nothing_is_drawn_where_the_training_would_cost_something_else_than_was_judged(
    box: Box, drawn_from: list[tuple[int, float]]
) -> None:
    box.fingerprinted = write_records(box.directory / "more.jsonl", NUM_RECORDS + 1)
    assert box.ask(HEAD).head == {"code": SITE_ERROR, "reason": SENTENCE}
    (failure,) = [values for name, values in box.said if name == "private_round_failed"]
    assert failure["error"] == "AssertionError"
    assert (stages_and_events(box), drawn_from) == ([], [])


def test_a_message_longer_than_its_header_says_is_not_opened(box: Box) -> None:
    reply = box.ask(HEAD, box.message + bytes(1 << 20))
    assert (reply.update, reply.head["code"]) == (None, SITE_ERROR)
    assert "bytes of tensors, its header says" in reply.head["reason"]
    assert stages_and_events(box) == []
