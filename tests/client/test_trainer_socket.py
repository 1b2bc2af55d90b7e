"""The trainer's socket: who may enter its directory, and how long a caller may take."""

import grp
import os
import queue
import shutil
import tempfile
import threading
import time
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest

from client import trainer_service
from client.site_settings import SiteSettings
from client.trainer import Reply
from client.trainer_link import (
    METHOD,
    TrainerLostError,
    ask,
)
from client.trainer_pb2 import Part
from federation.errors import UserError
from tests.client.test_daemon import SITE


def test_callers_that_do_not_read_their_answers_are_cut_off() -> None:
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


@pytest.mark.parametrize("mode", [0o1777, 0o770])
def test_a_socket_lies_in_no_directory_that_everybody_may_write(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    settings = SiteSettings(**SITE, trainer=tmp_path / "trainer")
    server = grpc.server(futures.ThreadPoolExecutor(1))
    with (
        pytest.raises(UserError, match="may be written by others"),
        trainer_service._socket(settings, server),
    ):
        pass


@pytest.mark.parametrize(("before", "after"), [(0o755, 0o755), (0o700, 0o710), (0o710, 0o710)])
def test_only_a_directory_that_is_closed_to_others_is_opened_for_the_group(
    before: int, after: int
) -> None:
    directory = Path(tempfile.mkdtemp(prefix="fedge-"))
    directory.chmod(before)
    # Only root gives a file to any group.
    group = 64003 if os.geteuid() == 0 else os.getegid()
    settings = SiteSettings(**SITE, trainer=directory / "trainer", socket_group=str(group))
    server = grpc.server(futures.ThreadPoolExecutor(1))
    with trainer_service._socket(settings, server):
        made, around = settings.socket.stat(), directory.stat()
    assert (made.st_mode & 0o777, made.st_gid) == (0o660, group)
    assert around.st_mode & 0o777 == after
    assert around.st_gid == (os.getegid() if before == 0o755 else group)
    server.stop(0).wait()
    directory.rmdir()


def test_the_group_of_the_socket_may_be_named() -> None:
    directory = Path(tempfile.mkdtemp(prefix="fedge-"))
    group = grp.getgrgid(os.getegid())
    settings = SiteSettings(**SITE, trainer=directory / "trainer", socket_group=group.gr_name)
    server = grpc.server(futures.ThreadPoolExecutor(1))
    with trainer_service._socket(settings, server):
        assert settings.socket.stat().st_gid == group.gr_gid
    server.stop(0).wait()
    directory.rmdir()
