"""Messages that are made to end a site's node: each ends as an error, and the next one is taken."""

import contextlib
import json
import math
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flwr.app import Array
from flwr.supernode.fleet_http_client import FleetHttpClient

from client import daemon, flower
from client.daemon import _Life, _serve
from client.fleet import MAX_LIVES
from client.flower import MAX_TTL_S, _bound_responses, _up_to, expiry_of
from client.health import Health, Status
from client.in_hand import InHand, Memory
from client.reasons import SITE_ERROR
from client.site_log import SiteLog
from client.site_settings import load_site
from client.superlink import FleetError
from client.trainer_link import LinkError, ask, request_head
from federation.grid_sites import bytes_of
from tests.client.test_daemon import write_site
from tests.client.test_fleet import node_of

HEADERS = [
    b"",
    b"\x93NUMPY\x01\x00\xff\xff",
    b"\x93NUMPY\x01\x00\x10\x00{'descr': [[[[[[",
    b"\x93NUMPY\x01\x00\x00\x27" + (b"{'descr': " + b"(" * 9900).ljust(9983) + b"\n",
    b"\x93NUMPY\x01\x00\x46\x00"
    + b"{'descr': {1:2}, 'fortran_order': False, 'shape': (3,), }".ljust(69)
    + b"\n",
]
"""What numpy's own reader raises TokenError, SyntaxError, MemoryError and others for."""


def malformed(data: bytes) -> Array:
    return Array(dtype="uint8", shape=(1,), stype="numpy.ndarray", data=data)


@pytest.mark.parametrize("data", HEADERS)
def test_a_malformed_array_is_no_array_of_bytes_and_nothing_else(data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - numpy has words of its own
        bytes_of(malformed(data))


def test_a_head_that_json_cannot_say_is_one_sentence(tmp_path: Path) -> None:
    for value in (b"poison", {1, 2}):
        head = request_head({"server_round": 1, "x": value}, {}, "c" * 64)
        with pytest.raises(LinkError, match="no text, number or list of them"):
            ask(tmp_path / "none", head, memoryview(b""))


@pytest.mark.parametrize("ttl", [math.nan, math.inf, -math.inf])
def test_a_message_that_never_ends_is_none(ttl: float) -> None:
    pulled: Any = SimpleNamespace(metadata=SimpleNamespace(created_at=1000.0, ttl=ttl))
    with pytest.raises(FleetError, match="no moment until which it counts"):
        expiry_of(pulled, 1000.0)


def test_a_message_counts_for_a_week_at_most() -> None:
    pulled: Any = SimpleNamespace(metadata=SimpleNamespace(created_at=9e9, ttl=9e9))
    assert expiry_of(pulled, 1000.0) == 1000.0 + MAX_TTL_S
    pulled.metadata.created_at, pulled.metadata.ttl = 990.0, 60.0
    assert expiry_of(pulled, 1000.0) == 1050.0


def test_objects_are_pulled_up_to_a_sum_of_bytes() -> None:
    pull = _up_to(10, lambda name: name.encode())
    assert pull("1234567890") == b"1234567890"
    with pytest.raises(FleetError, match="more than 10 bytes, this site's largest"):
        pull("1")


class _Server(BaseHTTPRequestHandler):
    """Answers a path with so many bytes, or packed ones."""

    def do_GET(self) -> None:
        size = int(self.path[1:] or 0)
        self.send_response(200)
        if not size:
            self.send_header("content-encoding", "gzip")
        self.end_headers()
        self.wfile.write(b"x" * size)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_answer_beyond_a_size_is_not_read_to_its_end(address: str) -> None:
    with httpx.Client() as client:
        _bound_responses(client, 1000)
        assert client.headers["accept-encoding"] == "identity"
        assert len(client.get(f"{address}/1000").content) == 1000
        with pytest.raises(FleetError, match="an answer of the SuperLink has over"):
            client.get(f"{address}/1001")
        with pytest.raises(FleetError, match="nobody asked it to pack"):
            client.get(f"{address}/0")


def test_the_client_of_flwr_holds_the_http_client_that_is_bounded() -> None:
    made = FleetHttpClient.from_server_address("localhost:1", True, None, [])
    assert isinstance(made._client, httpx.Client)
    made.close()


# Against a real SuperLink


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from tests.superlink import LocalSuperlink

    made = LocalSuperlink(tmp_path_factory.mktemp("superlink"))
    yield made
    made.close()


@pytest.fixture
def life(superlink: Any, tmp_path: Path) -> Iterator[_Life]:
    """A daemon's loop in a thread; its trainer, started apart, hangs up on whoever calls."""
    directory = Path(tempfile.mkdtemp(prefix="fedge-"))  # a socket's path is short
    trainer = socket.socket(socket.AF_UNIX)
    trainer.bind(str(directory / "trainer"))
    trainer.listen()
    trainer.settimeout(0.2)
    path = write_site(
        tmp_path,
        superlink=superlink.address,
        root_certificate=str(superlink.certificate),
        node_key=str(superlink.node_key),
        trainer=str(directory / "trainer"),
        node_state=str(superlink.directory / "memory"),
        max_message_bytes=1 << 20,
        log="site.log",
    )
    settings = load_site(path)
    settings.memory.mkdir(exist_ok=True)
    health = Health(Status(0), tmp_path / "status.json")
    made = _Life(settings, SiteLog("daemon", settings.log), health, threading.Event())
    ended: list[BaseException | None] = []

    def serve() -> None:
        try:
            _serve(made, None)
            ended.append(None)
        except BaseException as error:
            ended.append(error)

    def hang_up() -> None:
        while not made.stop.is_set():
            with contextlib.suppress(TimeoutError):
                trainer.accept()[0].close()

    threads = [threading.Thread(target=target) for target in (serve, hang_up)]
    for thread in threads:
        thread.start()
    yield made
    made.leave()
    made.drained_at = 0.0
    for thread in threads:
        thread.join(60)
    trainer.close()
    shutil.rmtree(directory)
    assert ended == [None], "the loop left because it was told to"


def reply_to(superlink: Any, message_id: str) -> Any:
    deadline = time.monotonic() + 30
    while (taken := superlink.take_reply(message_id)) is None:
        assert time.monotonic() < deadline, "no reply"
        threading.Event().wait(0.05)
    return taken[0]


def poisons() -> dict[str, dict[str, Any]]:
    return {
        "bytes in a record": {"said": {"x": b"poison"}},
        "no array": {"content": malformed(HEADERS[3])},
        "too large": {"content": bytes(3 << 20)},
        "infinite": {"ttl": math.inf},
        "a long group": {"kind": "query", "group": "\x1b[31m" * 5000},
    }


@pytest.mark.slow
def test_a_poisoned_message_ends_as_an_error_or_is_let_go_and_the_next_one_is_answered(
    superlink: Any, life: _Life, tmp_path: Path
) -> None:
    for poison in poisons().values():
        superlink.send(**{"content": b"adapter", **poison})
    error = reply_to(superlink, superlink.send(b"adapter", kind="query")).error
    assert (error.code, error.reason) == (
        SITE_ERROR,
        "this site answers train messages, not 'query'",
    )
    events = [json.loads(line) for line in (tmp_path / "site.log").read_text().splitlines()]
    lost = [event["reason"] for event in events if event["event"] == "message_lost"]
    assert any("more than" in reason for reason in lost)
    assert all(len(str(event.get("group", ""))) <= 40 for event in events)
    assert not any("\x1b" in str(event.get("group")) for event in events)


@pytest.mark.slow
def test_a_message_that_ends_a_trainer_again_and_again_is_answered_with_an_error(
    superlink: Any, life: _Life
) -> None:
    error = reply_to(superlink, superlink.send(b"adapter")).error
    assert (error.code, error.reason) == (
        SITE_ERROR,
        f"the trainer ended {daemon.MAX_LOST} times while it answered",
    )


@pytest.mark.slow
def test_whatever_an_answer_raises_is_a_constant_error(
    superlink: Any, life: _Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("text of the message")

    monkeypatch.setattr(daemon, "_answer_of", fail)
    error = reply_to(superlink, superlink.send(b"adapter")).error
    assert (error.code, error.reason) == (SITE_ERROR, "this site's node cannot read the message")


@pytest.mark.slow
def test_a_message_that_ends_one_life_after_the_other_is_answered_with_an_error(
    superlink: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    message_id = superlink.send(b"adapter")
    memory = Memory(superlink.directory / "memory")
    with node_of(superlink) as node:
        assert node.receive() is not None
        hand = memory.in_hand()
        assert hand is not None
        assert node.note_lost(node.receive()) == 1  # type: ignore[arg-type]
    for lives in range(1, MAX_LIVES + 1):
        with node_of(superlink) as node:
            again = memory.in_hand()
            assert isinstance(again, InHand)
            assert (again.lives, again.lost) == (lives, 1)
    monkeypatch.setattr(flower.FlowerClient, "fetch", None)  # what ended them is not fetched again
    with node_of(superlink) as node:
        assert node.receive() is None
    assert memory.in_hand() is None
    error = reply_to(superlink, message_id).error
    assert error.reason == "this site's node ended with it, again and again"
