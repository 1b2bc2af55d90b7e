"""Who is at a trainer's socket: real sockets, real gRPC servers, a process that was stopped."""

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from client.peer import peer_at

SERVER = """
import sys, time
from concurrent import futures
import grpc
server = grpc.server(futures.ThreadPoolExecutor(1))
server.add_insecure_port("unix:" + sys.argv[1])
server.start()
print("listening", flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def grpc_server(path: Path) -> Iterator[None]:
    """Hold a socket as a trainer does, for the time of a block."""
    server = grpc.server(futures.ThreadPoolExecutor(1))
    server.add_insecure_port(f"unix:{path}")
    server.start()
    try:
        yield
    finally:
        server.stop(None).wait()


def leave_behind(path: Path) -> None:
    """Leave what a killed process leaves: the socket's file, and nobody behind it."""
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
        killed.listen()


def test_a_server_that_runs_answers(tmp_path: Path) -> None:
    with grpc_server(tmp_path / "trainer"):
        assert peer_at(tmp_path / "trainer") == "answers"


def test_a_file_that_a_kill_left_is_nobody(tmp_path: Path) -> None:
    assert peer_at(tmp_path / "trainer") == "absent"
    leave_behind(tmp_path / "trainer")
    assert (tmp_path / "trainer").exists()
    assert peer_at(tmp_path / "trainer") == "absent"
    (tmp_path / "file").write_text("no socket")
    assert peer_at(tmp_path / "file") == peer_at(tmp_path / "file" / "below") == "absent"


def test_a_process_that_was_stopped_answers_no_more_until_it_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "trainer"
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, str(path)], stdout=subprocess.PIPE
    ) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"listening\n"
        try:
            assert peer_at(path) == "answers"
            os.kill(server.pid, signal.SIGSTOP)
            assert peer_at(path, 0.2) == "silent"
            os.kill(server.pid, signal.SIGCONT)
            assert peer_at(path, 10) == "answers"
        finally:
            server.kill()


def test_a_queue_that_is_full_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "trainer"
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket(socket.AF_UNIX))
        full.bind(str(path))
        full.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(str(path))
        assert peer_at(path, 0.2) == "silent"


def test_a_process_without_a_descriptor_left_cannot_tell(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with grpc_server(tmp_path / "trainer"):
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))  # as many are open already
        try:
            found = peer_at(tmp_path / "trainer")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert found == "silent"
        assert peer_at(tmp_path / "trainer") == "answers"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_a_socket_of_another_user_is_forbidden() -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trainer"
        with grpc_server(path):
            for closed in (path, path.parent):
                path.parent.chmod(0o755)
                path.chmod(0o777)
                closed.chmod(0o700)
                os.seteuid(65534)
                try:
                    assert peer_at(path) == "forbidden", closed
                finally:
                    os.seteuid(0)
