"""The trainer as a process behind its socket: one method, bounds, and callers that come and go."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from client.reasons import SITE_ERROR
from client.trainer_link import (
    CHUNK_BYTES,
    HEAD_BYTES,
    METHOD,
    TrainerLostError,
    ask,
)
from client.trainer_pb2 import Part
from federation.errors import UserError
from federation.wire import open_update
from tests.client.test_trainer import TRAINING, head_of, message_of
from tests.conftest import write_records

ROOT = Path(__file__).parents[2]


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


def test_a_second_trainer_does_not_take_the_place_of_the_first(
    process: Process, tiny_model: Path
) -> None:
    from client.claim import claim
    from client.site_settings import load_site
    from client.trainer_service import _socket

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
