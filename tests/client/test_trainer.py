"""The trainer: what it answers in process, and as a process behind its socket."""

import grp
import json
import os
import queue
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest

from client import trainer_link, trainer_service
from client.answers import Answers, Kept
from client.reasons import REFUSED, SITE_ERROR, Refused
from client.round import RoundRequest, answer_round
from client.settings import TrainingSettings
from client.site import Site
from client.site_settings import SiteSettings
from client.trainer import Question, Reply, Trainer, read_head
from client.trainer_link import (
    CHUNK_BYTES,
    HEAD_BYTES,
    METHOD,
    LinkError,
    TrainerLostError,
    ask,
    read_object,
    read_parts,
    request_head,
    write_parts,
)
from client.trainer_pb2 import Part
from federation.adapter import initial_adapter
from federation.base_model import model_digest
from federation.errors import UserError
from federation.wire import REFERENCE_MISSING, content_digest, encode, open_update
from tests.client.test_daemon import SITE
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


def test_a_head_of_flower_records_becomes_tables() -> None:
    record = {"server_round": 2, "secure_sum.cohort": 3, "secure_sum.bits": 24, "a": 1, "a.b": 2}
    head = request_head(record, {"num_steps": 4}, "ef")
    assert head["secure_sum"] == {"cohort": 3, "bits": 24}
    assert (head["training"], head["bundle"], head["a.b"]) == ({"num_steps": 4}, "ef", 2)


# As a process


class Process:
    """`site_trainer.py` and its socket."""

    def __init__(self, base_model: Path, **settings: Any) -> None:
        # A socket's path has room for 107 bytes; pytest's directories may be longer.
        self.directory = Path(tempfile.mkdtemp(prefix="fedge-"))
        write_records(self.directory / "data.jsonl", 12)
        values = {
            "superlink": "127.0.0.1:1",
            "root_certificate": "ca.crt",
            "node_key": "node",
            "base_model": str(base_model),
            "data": "data.jsonl",
            "policy": "policy.toml",
            "state": "state",
            "name": "bank",
            "log": "site.log",
            **settings,
        }
        lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
        (self.directory / "site.toml").write_text("\n".join(lines) + "\n")
        self.socket = self.directory / "state" / "socket" / "trainer"
        self.start()

    def start(self) -> None:
        script = Path(__file__).with_name("site_trainer.py")
        command = [sys.executable, str(script), "--config", str(self.directory / "site.toml")]
        self.popen = subprocess.Popen(
            command, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )

    def wait_until_ready(self) -> "Process":
        while "trainer_ready" not in self.events():
            assert self.popen.poll() is None, self.popen.stderr
            time.sleep(0.02)
        return self

    def events(self) -> list[str]:
        log = self.directory / "site.log"
        lines = log.read_text().splitlines() if log.is_file() else []
        return [json.loads(line)["event"] for line in lines]

    def end(self) -> int:
        self.popen.terminate()
        code = self.popen.wait(300)
        assert self.popen.stderr is not None
        self.popen.stderr.close()
        return code


@pytest.fixture(scope="module")
def process(tiny_model: Path) -> Iterator[Process]:
    """A trainer process that the tests share; each asks another round."""
    made = Process(tiny_model, max_message_bytes=4 << 20).wait_until_ready()
    yield made
    assert made.end() == 0
    shutil.rmtree(made.directory)


def test_the_socket_is_its_owners_alone_and_gives_the_answer_in_chunks(
    process: Process, tiny_model: Path
) -> None:
    assert process.socket.stat().st_mode & 0o777 == 0o600
    assert process.socket.parent.stat().st_mode & 0o777 == 0o700
    assert (process.directory / "state").stat().st_mode & 0o777 == 0o700
    message = message_of(tiny_model)
    first = ask(process.socket, head_of(), memoryview(message))
    assert first.code == 0
    path = process.directory / "update"
    path.write_bytes(first.update)
    assert open_update(path).rank == 4
    assert ask(process.socket, head_of(), memoryview(message)) == first
    assert list((process.directory / "state" / "spool").iterdir()) == []
    rows = (process.directory / "state" / "ledger.jsonl").read_text().splitlines()
    assert [json.loads(row)[1] for row in rows] == [1]


def test_nothing_but_the_one_method_is_there(process: Process) -> None:
    with grpc.insecure_channel(f"unix:{process.socket}") as channel:
        for method in (
            "/fedge.Trainer/Data",
            "/fedge.Trainer/answer",
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            "/grpc.health.v1.Health/Check",
            "/",
        ):
            call = channel.unary_unary(method)
            with pytest.raises(grpc.RpcError) as caught:
                call(b"", timeout=10)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def raw(process: Process, parts: list[Part]) -> tuple[Any, str]:
    """Send parts as they are; return the status and its text."""
    with grpc.insecure_channel(f"unix:{process.socket}") as channel:
        method = channel.stream_stream(
            METHOD,
            request_serializer=Part.SerializeToString,
            response_deserializer=Part.FromString,
        )
        call = method(iter(parts), timeout=30)
        with pytest.raises(grpc.RpcError):
            list(call)
        return call.code(), call.details()


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ([], "the first part holds no head"),
        ([Part()], "the first part holds no head"),
        ([Part(chunk=b"x")], "the first part holds no head"),
        ([Part(head=b"x" * (HEAD_BYTES + 1))], "the head has 65537 bytes, at most 65536 are read"),
        ([Part(head=b"{}"), Part(head=b"{}")], "a part after the head is no chunk of at most"),
        ([Part(head=b"{}"), Part(chunk=b"x" * (CHUNK_BYTES + 1))], "is no chunk of at most"),
        (
            [Part(head=b"{}"), *[Part(chunk=b"x" * CHUNK_BYTES)] * 5],
            "the message has more than 4194304 bytes, this site's largest",
        ),
    ],
)
def test_parts_out_of_bounds_are_refused_and_leave_nothing(
    process: Process, parts: list[Part], sentence: str
) -> None:
    code, text = raw(process, parts)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert sentence in text
    assert list((process.directory / "state" / "spool").iterdir()) == []


def test_a_question_without_a_message_is_an_answer_too(process: Process) -> None:
    answer = ask(process.socket, head_of(50), memoryview(b""))
    assert answer.code == SITE_ERROR
    assert str(process.directory) not in str(answer.head)


def test_a_caller_that_dies_in_mid_round_does_not_lose_the_answer(
    process: Process, tiny_model: Path
) -> None:
    message = message_of(tiny_model)
    before = process.events().count("answered")
    long = head_of(2, training=TRAINING | {"num_steps": 100})
    spool = process.directory / "state" / "spool"
    seen: list[float] = []

    def is_wanted() -> bool:
        """Say no a moment after the whole question was taken in."""
        if not seen and any(
            path.stat().st_size == len(message) for path in spool.glob("*/message")
        ):
            seen.append(time.monotonic())
        return not seen or time.monotonic() < seen[0] + 0.1

    with pytest.raises(TrainerLostError, match="cancelled"):
        ask(process.socket, long, memoryview(message), is_wanted=is_wanted)
    answer = ask(process.socket, long, memoryview(message))
    assert answer.code == 0
    new = [
        json.loads(line)["is_new"]
        for line in (process.directory / "site.log").read_text().splitlines()
        if '"answered"' in line
    ][before:]
    assert sum(new) == 1, "it was trained once"


def test_questions_at_the_same_time_are_answered_one_after_the_other(
    process: Process, tiny_model: Path
) -> None:
    message = message_of(tiny_model)
    answers: dict[int, Any] = {}

    def go(server_round: int) -> None:
        answers[server_round] = ask(process.socket, head_of(server_round), memoryview(message))

    threads = [threading.Thread(target=go, args=[number]) for number in (3, 4, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[number].code for number in (3, 4, 5)] == [0, 0, 0]
    assert answers[3].update != answers[4].update, "each round draws its own records"


def test_callers_that_do_not_read_their_answers_are_cut_off(tmp_path: Path) -> None:
    directory = Path(tempfile.mkdtemp(prefix="fedge-"))
    update = directory / "update"
    update.write_bytes(bytes(16 << 20))  # more than a socket takes in by itself
    settings = SiteSettings(**{**SITE, "state": str(directory / "state")})
    settings.state.mkdir()
    calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
    closed = threading.Event()

    def answer_all() -> None:
        while (call := calls.get()) is not None:
            call.reply.set_result(Reply({"code": 0, "metrics": {}, "site": ""}, update))

    thread = threading.Thread(target=answer_all)
    thread.start()
    with (
        trainer_service._listening(settings, directory, calls, closed, write_s=0.5),
        grpc.insecure_channel(f"unix:{settings.socket}") as channel,
    ):
        method = channel.stream_stream(
            METHOD,
            request_serializer=Part.SerializeToString,
            response_deserializer=Part.FromString,
        )
        silent = [method(iter([Part(head=b"{}")])) for _ in range(trainer_service.CALLS)]
        for call in silent:
            assert next(call).WhichOneof("part") == "head"  # it has its answer, and reads no more
        with pytest.raises(TrainerLostError, match="resource_exhausted") as caught:
            ask(settings.socket, {}, memoryview(b""))
        assert not caught.value.was_asked
        deadline = time.monotonic() + 30
        while True:
            try:
                answer = ask(settings.socket, {}, memoryview(b""))
                break
            except TrainerLostError:
                assert time.monotonic() < deadline, "no place became free"
                threading.Event().wait(0.05)
        assert len(answer.update) == 16 << 20
        for call in silent:
            with pytest.raises(grpc.RpcError):
                list(call)
            assert call.code() is grpc.StatusCode.CANCELLED
        closed.set()
    calls.put(None)
    thread.join()
    shutil.rmtree(directory)


def test_a_socket_lies_in_no_directory_that_everybody_may_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    settings = SiteSettings(**SITE, trainer=tmp_path / "trainer")
    server = grpc.server(futures.ThreadPoolExecutor(1))
    with (
        pytest.raises(UserError, match="may be written by others"),
        trainer_service._socket(settings, server),
    ):
        pass


@pytest.mark.parametrize(("before", "after"), [(0o755, 0o755), (0o700, 0o710)])
def test_only_a_directory_that_is_closed_to_others_is_opened_for_the_group(
    before: int, after: int
) -> None:
    directory = Path(tempfile.mkdtemp(prefix="fedge-"))
    directory.chmod(before)
    group = grp.getgrgid(os.getegid()).gr_name
    settings = SiteSettings(**SITE, trainer=directory / "trainer", socket_group=group)
    server = grpc.server(futures.ThreadPoolExecutor(1))
    with trainer_service._socket(settings, server):
        assert settings.socket.stat().st_mode & 0o777 == 0o660
        assert directory.stat().st_mode & 0o777 == after
    server.stop(0).wait()
    directory.rmdir()


def test_a_second_trainer_does_not_take_the_place_of_the_first(
    process: Process, tiny_model: Path
) -> None:
    from client.claim import claim
    from client.site_settings import load_site
    from client.trainer_service import _socket
    from federation.errors import UserError

    settings = load_site(process.directory / "site.toml")
    with (
        pytest.raises(UserError, match="another trainer works in"),
        claim(settings.state, "trainer"),
    ):
        pass
    server = grpc.server(None)
    with pytest.raises(UserError, match="a trainer listens on"), _socket(settings, server):
        pass
    assert ask(process.socket, head_of(6), memoryview(message_of(tiny_model))).code == 0


def test_a_socket_in_a_directory_that_others_may_write_is_refused(tmp_path: Path) -> None:
    from client.site_settings import load_site
    from client.trainer_service import _socket
    from federation.errors import UserError
    from tests.client.test_daemon import write_site

    (tmp_path / "open").mkdir(mode=0o700)
    (tmp_path / "open").chmod(0o770)
    settings = load_site(write_site(tmp_path, trainer="open/trainer"))
    with pytest.raises(UserError, match="may be written by others"), _socket(settings, None):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a file to any group")
@pytest.mark.parametrize(("mode", "after"), [(0o700, 0o710), (0o710, 0o710), (0o755, 0o755)])
def test_the_group_of_the_socket_may_enter_a_directory_that_is_the_trainers_own(
    mode: int, after: int
) -> None:
    from client.site_settings import load_site
    from client.trainer_service import _socket
    from tests.client.test_daemon import write_site

    root = Path(tempfile.mkdtemp(prefix="fedge-"))
    (root / "run").mkdir()
    (root / "run").chmod(mode)
    settings = load_site(write_site(root, trainer="run/trainer", socket_group="64003"))
    with _socket(settings, grpc.server(futures.ThreadPoolExecutor(1))):
        made, directory = (root / "run" / "trainer").stat(), (root / "run").stat()
    assert (made.st_mode & 0o777, made.st_gid) == (0o660, 64003)
    assert directory.st_mode & 0o777 == after
    assert directory.st_gid == (os.getegid() if mode == 0o755 else 64003)
    shutil.rmtree(root)


@pytest.mark.slow
def test_sigterm_lets_the_question_in_hand_be_answered_and_a_stale_socket_is_replaced(
    tiny_model: Path,
) -> None:
    process = Process(tiny_model).wait_until_ready()
    try:
        message = message_of(tiny_model)
        got: list[Any] = []
        head = head_of(1, training=TRAINING | {"num_steps": 6})
        thread = threading.Thread(
            target=lambda: got.append(ask(process.socket, head, memoryview(message)))
        )
        thread.start()
        while not any((process.directory / "state" / "spool").glob("*/message")):
            time.sleep(0.01)
        time.sleep(0.2)  # it is in the main thread's hands
        assert process.end() == 0
        thread.join(300)
        assert got[0].code == 0
        assert not process.socket.exists()
        # A kill leaves the socket's file behind.
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(process.socket))
        (process.directory / "site.log").unlink()
        process.start()
        process.wait_until_ready()
        assert ask(process.socket, head, memoryview(message)) == got[0]
        assert process.end() == 0
    finally:
        process.popen.kill()
        shutil.rmtree(process.directory)


def test_nobody_at_the_socket_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(TrainerLostError, match="nobody listens"):
        ask(tmp_path / "none", head_of(), memoryview(b""))
    with pytest.raises(LinkError, match="the head has"):
        ask(tmp_path / "none", {"a": "x" * HEAD_BYTES}, memoryview(b""))


def test_an_app_asks_again_while_the_trainer_is_started_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(tempfile.mkdtemp(prefix="fedge-")) / "trainer"
    monkeypatch.setattr(trainer_link, "PATIENCE_S", 0.3)
    with pytest.raises(TrainerLostError, match="nobody listens"):
        trainer_link.ask_again(path, head_of(), memoryview(b""))
    monkeypatch.setattr(trainer_link, "PATIENCE_S", 60.0)
    lives: list[int] = []

    def answer(_: Any, context: Any) -> Iterator[Part]:
        lives.append(len(lives))
        if len(lives) < 3:
            context.abort(grpc.StatusCode.UNAVAILABLE, "it was killed")
        yield from write_parts(b'{"code": 0}', [b"update"])

    handler = grpc.stream_stream_rpc_method_handler(
        answer, request_deserializer=Part.FromString, response_serializer=Part.SerializeToString
    )
    service, _, method = METHOD.strip("/").partition("/")
    server = grpc.server(
        futures.ThreadPoolExecutor(1),
        handlers=[grpc.method_handlers_generic_handler(service, {method: handler})],
    )
    server.add_insecure_port(f"unix:{path}")
    starting = threading.Timer(0.5, server.start)
    starting.start()
    answered = trainer_link.ask_again(path, head_of(), memoryview(b"message"))
    server.stop(grace=5).wait()
    shutil.rmtree(path.parent)
    assert (answered.code, answered.update, lives) == (0, b"update", [0, 1, 2])


def test_parts_read_back_what_was_written() -> None:
    head, chunks = read_parts(write_parts(b'{"a": 1}', iter([b"x", b"yz"])))
    assert (read_object(head), list(chunks)) == ({"a": 1}, [b"x", b"yz"])
    assert read_head(json.dumps(head_of(7)).encode()).request.server_round == 7


def test_the_generated_code_is_that_of_the_proto_file(tmp_path: Path) -> None:
    from grpc_tools import protoc

    assert protoc.main(["", f"-I{ROOT}", f"--python_out={tmp_path}", "client/trainer.proto"]) == 0
    made = (tmp_path / "client" / "trainer_pb2.py").read_text()
    assert made == (ROOT / "client" / "trainer_pb2.py").read_text()


def test_the_asking_side_imports_neither_flwr_nor_torch_nor_the_trainer() -> None:
    code = (
        "import sys, client.trainer_link, client.trainer_pb2, grpc; "
        "heavy = {'flwr', 'torch', 'client.trainer', 'client.round'}; "
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
