"""The trainer: what it answers, in this process."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from client.answers import Answers, Kept
from client.reasons import REFUSED, SITE_ERROR, Refused
from client.round import RoundRequest, answer_round
from client.settings import TrainingSettings
from client.site import Site
from client.trainer import Question, Reply, Trainer
from federation.adapter import initial_adapter
from federation.base_model import model_digest
from federation.wire import REFERENCE_MISSING, content_digest, encode, open_update
from tests.conftest import write_records

TRAINING = {"num_steps": 2, "batch_size": 2, "max_tokens": 64, "dtype": "float32"}
RUN = "ab" * 8
ROOT = Path(__file__).parents[2]


def head_of(server_round: int = 1, **more: Any) -> dict[str, Any]:
    return {"server_round": server_round, "run": RUN, "training": TRAINING, "bundle": "", **more}


def message_of(base_model: Path, seed: int = 0) -> bytes:
    adapter = initial_adapter(base_model, rank=4, alpha=8.0, targets="attention", seed=seed)
    return encode(adapter, dtype="float32", base_model=model_digest(base_model))


class Bench:
    """A trainer in this process, with lists for a ledger and a log."""

    data_set = "d" * 64

    def __init__(self, base_model: Path, directory: Path) -> None:
        data = write_records(directory / "data.jsonl", 12)
        self.directory = directory
        self.site = Site(base_model, data, "bank", directory / "state", None)
        self.asked: list[Question] = []
        self.noted: list[tuple[int, str]] = []
        self.said: list[tuple[str, dict[str, Any]]] = []
        self.trainer = Trainer(self.site, self, lambda e, **v: self.said.append((e, v)))

    def admit(self, *_: object) -> None:
        pass

    def allow(self, question: Question) -> None:
        self.asked.append(question)
        if question.settings.num_steps > 8:
            raise Refused("max_steps", f"{question.settings.num_steps} steps, at most 8")

    def release(self, question: Question, measured: Mapping[str, float]) -> dict[str, float]:
        wanted = question.head.get("metrics", list(measured))
        return {name: measured[name] for name in wanted if name in measured}

    def record(self, question: Question, kept: Kept) -> None:
        answer = self.site.state / "answers" / question.request.run / f"{kept.server_round}.update"
        assert answer.is_file(), "what is noted as spent is on disk"
        if (kept.server_round, kept.sha256) not in self.noted:
            self.noted.append((kept.server_round, kept.sha256))

    def ask(self, head: dict[str, Any] | bytes, message: bytes) -> Reply:
        path = self.directory / "message"
        path.write_bytes(message)
        scratch = Path(tempfile.mkdtemp(dir=self.directory))
        content = head if isinstance(head, bytes) else json.dumps(head).encode()
        return self.trainer.answer(content, path, scratch)


@pytest.fixture
def bench(tiny_model: Path, tmp_path: Path) -> Bench:
    return Bench(tiny_model, tmp_path)


def update_of(reply: Reply) -> bytes:
    assert reply.update is not None, reply.head
    return reply.update.read_bytes()


def test_the_answer_is_what_the_round_gives_and_a_second_ask_is_read_from_disk(
    bench: Bench, tiny_model: Path
) -> None:
    message = message_of(tiny_model)
    first = bench.ask(head_of(), message)
    path = bench.directory / "oracle"
    path.write_bytes(message)
    oracle = answer_round(
        path,
        Site(tiny_model, bench.site.data, "", bench.directory / "other", None),
        TrainingSettings(**TRAINING),  # type: ignore[arg-type]
        RoundRequest(1, run=RUN),
    )
    assert update_of(first) == oracle.update
    assert first.head["metrics"]["num-examples"] == 12
    assert first.head["metrics"]["train_loss"] == oracle.train_loss
    assert first.head["site"] == "bank"
    again = bench.ask(head_of(bundle="cd" * 32), message)
    assert again.head == first.head, "the seconds too: nothing was trained"
    assert update_of(again) == oracle.update
    assert [values["is_new"] for event, values in bench.said if event == "answered"] == [
        True,
        False,
    ]
    assert len(bench.noted) == 1
    assert [question.is_repeated for question in bench.asked] == [False, True]


def test_the_rounds_after_the_first_load_nothing_again_and_say_what_they_took(
    bench: Bench, tiny_model: Path
) -> None:
    from client import round as site_round

    caches = (site_round.resident_model, site_round._digest, site_round._examples)
    misses = []
    for server_round in range(1, 4):
        assert bench.ask(head_of(server_round), message_of(tiny_model)).head["code"] == 0
        misses.append([cache.cache_info().misses for cache in caches])
    assert misses[0] == misses[1] == misses[2]
    said = [values for event, values in bench.said if event == "answered"]
    assert len({values["num_model_loads"] for values in said}) == 1
    assert all(0 < values["training_s"] < values["seconds"] for values in said)


def test_the_policy_sees_what_the_message_itself_says(bench: Bench, tiny_model: Path) -> None:
    message = message_of(tiny_model)
    bench.ask(head_of(), message)
    (question,) = bench.asked
    assert question.base_model == model_digest(tiny_model)
    assert (question.rank, question.alpha, question.num_bytes) == (4, 8.0, len(message))
    assert {name.rpartition(".")[2] for name in question.shapes} == {
        *("q_proj", "k_proj", "v_proj", "o_proj")
    }
    path = bench.directory / "message"
    assert question.adapter == open_update(path).sha256_of_content


def test_what_is_refused_is_not_trained_not_kept_and_not_noted(
    bench: Bench, tiny_model: Path
) -> None:
    reply = bench.ask(head_of(training=TRAINING | {"num_steps": 9}), message_of(tiny_model))
    assert reply.head == {"code": REFUSED, "reason": "max_steps: 9 steps, at most 8"}
    assert reply.update is None
    assert not bench.site.state.exists()
    assert bench.noted == []


def test_a_round_cannot_be_asked_anew_with_another_adapter_or_other_settings(
    bench: Bench, tiny_model: Path
) -> None:
    message = message_of(tiny_model)
    bench.ask(head_of(), message)
    for head, other in (
        (head_of(), message_of(tiny_model, seed=1)),
        (head_of(training=TRAINING | {"seed": 1}), message),
        (head_of(trains="B"), message),
        (head_of(uplink="bfloat16"), message),
    ):
        reply = bench.ask(head, other)
        assert reply.head["code"] == REFUSED
        assert reply.head["reason"].startswith("replay: round 1 of this run was answered for")
    assert len(bench.noted) == 1


def test_a_residual_of_a_training_that_never_left_is_not_sent_with_the_next_one(
    bench: Bench, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between the residual and the answer: the round was not charged, and left nothing."""

    def die(*_: object, **__: object) -> None:
        raise SystemExit

    asked = head_of(uplink="int8")
    with monkeypatch.context() as patch:
        patch.setattr(Answers, "keep", die)
        with pytest.raises(SystemExit):
            bench.ask(asked, message_of(tiny_model))
    assert (bench.site.state / f"run-{RUN}" / "state.json").is_file()
    for server_round, seed in ((1, 1), (2, 2)):
        (bench.directory / "fresh").mkdir()
        fresh = Bench(tiny_model, bench.directory / "fresh")
        if server_round == 2:
            fresh.ask(asked, message_of(tiny_model, 1))
        head = head_of(server_round, uplink="int8")
        message = message_of(tiny_model, seed)
        assert update_of(bench.ask(head, message)) == update_of(fresh.ask(head, message))
        shutil.rmtree(bench.directory / "fresh")


def test_numbers_that_the_run_does_not_ask_for_stay(bench: Bench, tiny_model: Path) -> None:
    reply = bench.ask(head_of(metrics=["seconds", "records"]), message_of(tiny_model))
    assert set(reply.head["metrics"]) == {"seconds"}


@pytest.mark.parametrize(
    ("head", "sentence"),
    [
        (b"", "the head is no JSON object in UTF-8"),
        (b"[1]", "the head is no JSON object in UTF-8"),
        (b"\xff{}", "the head is no JSON object in UTF-8"),
        (b'{"server_round": NaN}', "the head is no JSON object in UTF-8"),
        (b"[" * 50_000, "the head is no JSON object in UTF-8"),
        ({"training": {}}, "the head's server_round is no whole number from 1 on"),
        ({"server_round": True, "training": {}}, "the head's server_round is no whole number"),
        ({"server_round": 1, "training": [1]}, "the head says no table of training settings"),
        (head_of(metrics="seconds"), "the head's metrics are no list of names"),
        (head_of(training={"steps": 3}), "unknown setting 'steps'; known here"),
        (head_of(uplink="int3"), "the round's uplink is 'int3', this site knows"),
        (head_of(run="../../up"), "expected 1 to 64 hex digits, by which a site keeps"),
    ],
)
def test_a_head_that_is_none_is_answered_in_one_sentence(
    bench: Bench, tiny_model: Path, head: Any, sentence: str
) -> None:
    reply = bench.ask(head, message_of(tiny_model))
    assert reply.head["code"] == SITE_ERROR
    assert sentence in reply.head["reason"]
    assert not bench.site.state.exists()


def test_a_change_that_this_site_cannot_read_is_asked_for_whole(
    bench: Bench, tiny_model: Path
) -> None:
    adapter = initial_adapter(tiny_model, rank=4, alpha=8.0, targets="attention", seed=0)
    path = bench.directory / "held"
    path.write_bytes(message_of(tiny_model))
    change = encode(
        adapter, dtype="int8", base_model=model_digest(tiny_model), reference=open_update(path)
    )
    reply = bench.ask(head_of(2, downlink="int8"), change)
    assert reply.head["code"] == REFERENCE_MISSING
    assert content_digest(adapter, model_digest(tiny_model))[:16] in reply.head["reason"]


def test_an_error_that_is_not_ours_leaves_as_its_type_only(
    bench: Bench, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Question) -> None:
        raise KeyError("the patient Jane Doe")

    monkeypatch.setattr(bench, "allow", broken)
    reply = bench.ask(head_of(), message_of(tiny_model))
    assert reply.head["reason"] == "the site failed with KeyError; its own log shows where"
    assert "Jane" not in json.dumps(bench.said)
    assert bench.said[-1][1]["where"][-1].startswith("test_trainer.py:")


def test_where_a_sites_files_lie_is_not_told(bench: Bench, tiny_model: Path) -> None:
    bench.site.data.unlink()
    reply = bench.ask(head_of(), message_of(tiny_model))
    assert "data.jsonl does not exist" in reply.head["reason"]
    assert bench.directory.name not in reply.head["reason"]
