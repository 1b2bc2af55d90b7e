"""What goes over the trainer's socket, and the side that asks."""

import json
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest

from client import trainer_link
from client.trainer import read_head
from client.trainer_link import (
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
from tests.client.test_trainer import head_of

ROOT = Path(__file__).parents[2]


def test_a_head_of_flower_records_becomes_tables() -> None:
    record = {"server_round": 2, "secure_sum.cohort": 3, "secure_sum.bits": 24, "a": 1, "a.b": 2}
    head = request_head(record, {"num_steps": 4}, "ef")
    assert head["secure_sum"] == {"cohort": 3, "bits": 24}
    assert (head["training"], head["bundle"], head["a.b"]) == ({"num_steps": 4}, "ef", 2)


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
