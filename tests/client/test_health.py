"""What a site says of itself, to a watchdog and to a user: real sockets, real locks, two users."""

import contextlib
import http.client
import json
import os
import socket
import tempfile
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from client import daemon
from client import health as health_module
from client.claim import claim
from client.health import MAX_WATCHERS, Health, Status, health_endpoint, read_status
from client.site_log import SiteLog
from client.site_settings import load_site
from client.status import describe, site_status
from federation.errors import UserError
from tests.client.test_cli import run
from tests.client.test_daemon import write_site
from tests.client.test_peer import grpc_server, leave_behind


def request(port: int, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, body


def test_the_endpoint_says_503_unless_trainer_and_coordinator_are_there(tmp_path: Path) -> None:
    health = Health(Status(os.getpid()), tmp_path / "status.json")
    with health_endpoint("127.0.0.1:0", lambda: health.status) as port:
        assert request(port, "/healthz")[0] == 503
        health.update(is_trainer_up=True)
        assert request(port, "/healthz")[0] == 503
        health.update(is_connected=True, server_round=3, run="7")
        status, body = request(port, "/healthz")
        assert status == 200
        assert json.loads(body)["status"] == "ok"
        assert json.loads(body)["server_round"] == 3
        assert request(port, "/status.json")[0] == 404
        with (
            pytest.raises(UserError, match="choose another port"),
            health_endpoint(f"127.0.0.1:{port}", lambda: health.status),
        ):
            pass
    assert read_status(tmp_path / "status.json") == health.status


def test_whoever_connects_and_says_nothing_takes_no_more_than_a_few_threads_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health_module, "IDLE_S", 1.0)
    health = Health(Status(1, is_connected=True, is_trainer_up=True), tmp_path / "status.json")
    with (
        contextlib.ExitStack() as stack,
        health_endpoint("127.0.0.1:0", lambda: health.status) as port,
    ):
        before = threading.active_count()
        idle = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(60)
        ]
        for connection in idle[MAX_WATCHERS:]:
            connection.settimeout(10)
            assert connection.recv(1) == b"", "there is no thread left for it"
        assert threading.active_count() <= before + MAX_WATCHERS
        for connection in idle[:MAX_WATCHERS]:
            connection.settimeout(10)
            assert connection.recv(1) == b"", "it said nothing"
        assert answers_soon(port)


def answers_soon(port: int) -> bool:
    deadline = time.monotonic() + 10  # a thread gives its place back after the connection
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            return request(port, "/healthz")[0] == 200
    return False


def test_however_many_ask_the_endpoint_the_trainer_is_asked_once_a_second(
    tmp_path: Path,
) -> None:
    settings = load_site(write_site(tmp_path, trainer="socket"))
    health = Health(Status(1, is_connected=True), tmp_path / "status.json")
    life = daemon._Life(settings, SiteLog("daemon", tmp_path / "log"), health, threading.Event())
    seen = []

    def greet(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                seen.append(time.monotonic())
                connection.sendall(b"x")
                connection.close()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(settings.socket))
        listener.listen(100)
        thread = threading.Thread(target=greet, args=[listener])
        thread.start()
        with health_endpoint("127.0.0.1:0", life.status) as port:
            end = time.monotonic() + 1.5
            num_asked = 0
            while time.monotonic() < end:
                assert request(port, "/healthz")[0] == 200
                num_asked += 1
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert num_asked > 10
    assert 1 <= len(seen) <= 3
    assert all(b - a >= 0.9 for a, b in pairwise(seen))


def test_the_endpoint_asks_the_trainer_and_not_the_file_of_its_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "PROBE_S", 0.0)
    settings = load_site(write_site(tmp_path, trainer="socket"))
    health = Health(Status(1, is_connected=True, is_trainer_up=True), tmp_path / "status.json")
    life = daemon._Life(settings, SiteLog("daemon", tmp_path / "log"), health, threading.Event())
    with health_endpoint("127.0.0.1:0", life.status) as port:
        leave_behind(settings.socket)
        status, body = request(port, "/healthz")
        assert (status, json.loads(body)["is_trainer_up"]) == (503, False)
        settings.socket.unlink()
        with grpc_server(settings.socket):
            assert request(port, "/healthz")[0] == 200
        assert request(port, "/healthz")[0] == 503


def test_the_loop_asks_the_trainer_too(tmp_path: Path) -> None:
    settings = load_site(write_site(tmp_path, trainer="socket"))
    health = Health(Status(1), tmp_path / "status.json")
    life = daemon._Life(settings, SiteLog("daemon", tmp_path / "log"), health, threading.Event())
    with grpc_server(settings.socket):
        daemon._keep_up(life, None)
        assert health.status.is_trainer_up
    leave_behind(settings.socket)
    daemon._keep_up(life, None)
    assert not health.status.is_trainer_up


def test_of_a_stock_supernode_only_its_process_is_known(tmp_path: Path) -> None:
    settings = load_site(write_site(tmp_path, node="supernode", allow_same_user=True))
    with claim(settings.memory, "daemon"):
        status = Status(7, node="supernode", is_connected=None, is_supernode_up=True)
        Health(status, settings.memory / "status.json")
        result = site_status(settings)
    assert (result["is_connected"], result["is_supernode_up"]) == (None, True)
    assert "the SuperNode runs; its log says whether it is connected" in describe(result)
    assert replace(status, is_trainer_up=True).is_well
    assert not replace(status, is_trainer_up=True, is_supernode_up=False).is_well
    down = describe({**result, "is_supernode_up": False})
    assert "the SuperNode does not run" in down


# Status


def test_status_is_read_from_disk_and_believed_while_the_lock_is_held(tmp_path: Path) -> None:
    settings = load_site(write_site(tmp_path, name="bank"))
    assert site_status(settings)["is_running"] is False
    assert describe(site_status(settings)).startswith("the daemon does not run")
    with claim(settings.memory, "daemon"):
        health = Health(Status(os.getpid()), settings.memory / "status.json")
        health.update(is_connected=True, is_trainer_up=True, is_busy=True, server_round=2, run="9")
        result = site_status(settings)
        assert (result["is_running"], result["server_round"]) == (True, 2)
        assert "answers round 2 of run 9" in describe(result)
        assert result["is_trainer_up"] is False, "nobody listens, whatever the file says"
        settings.socket.parent.mkdir()
        with grpc_server(settings.socket):
            assert site_status(settings)["is_trainer_up"] is True
        (settings.memory / "status.json").write_text('{"pid": 1, "of_another_version": 2}')
        with pytest.raises(UserError, match="no status of this version's: start the daemon again"):
            site_status(settings)
    after = site_status(settings)
    assert (after["is_running"], after["is_connected"], after["pid"]) == (False, False, 0)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_another_user_is_told_that_the_state_is_not_for_him(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        config = write_site(directory)
        settings = load_site(config)
        with claim(settings.memory, "daemon"):
            Health(Status(os.getpid()), settings.memory / "status.json")
            (directory / "state").chmod(0o700)
            os.seteuid(65534)
            try:
                codes = [
                    run(monkeypatch, "status", "--config", config, "--json", *words)
                    for words in ([], ["--part", "trainer"])
                ]
            finally:
                os.seteuid(0)
    said = capsys.readouterr()
    assert codes == [2, 2]
    assert said.out == ""
    lines = said.err.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert "may not be read by user nobody: run this as root" in line


def test_of_the_trainers_half_only_the_trainer_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = write_site(tmp_path, trainer="socket")
    words = ("status", "--config", config, "--part", "trainer")
    assert run(monkeypatch, *words) == 1
    assert capsys.readouterr().out.split() == ["trainer", "down:", "its", "log", "says", "why"]
    with grpc_server(tmp_path / "socket"):
        assert run(monkeypatch, *words, "--json") == 0
    assert json.loads(capsys.readouterr().out)["is_trainer_up"] is True
    assert run(monkeypatch, "status", "--config", config, "--part", "node") == 2
    assert "--part is 'node': expected trainer or both" in capsys.readouterr().err
