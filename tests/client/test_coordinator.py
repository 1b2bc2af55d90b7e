"""The coordinator as a site sees it: certificates, a real TLS server, two clocks."""

import contextlib
import re
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from client import coordinator
from client.coordinator import Answer, ask_superlink, read_certificates
from federation.errors import UserError
from tests.client.checks import level

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "deployment"))

from certificates import issue_server_certificate, make_authority

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


def test_a_certificate_that_ends_is_said_before_it_does(tmp_path: Path) -> None:
    found = read_certificates(make_authority(tmp_path))
    made = found[0].not_before
    assert level(coordinator.check_certificate(found, made + timedelta(days=1))) == "ok"
    assert level(coordinator.check_certificate(found, made + timedelta(days=340))) == "warn"
    ended = coordinator.check_certificate(found, made + timedelta(days=400))
    assert (level(ended), "it has ended" in ended.found) == ("fail", True)
    early = coordinator.check_certificate(found, made - timedelta(days=1))
    assert (level(early), early.fix) == ("fail", "set this machine's clock")
    assert level(coordinator.check_certificate("why", made)) == "fail"


def test_a_servers_own_certificate_is_no_ca(tmp_path: Path) -> None:
    make_authority(tmp_path)
    path = issue_server_certificate(tmp_path, "proxy", ["localhost"])
    check = coordinator.check_certificate(read_certificates(path), datetime.now(UTC))
    assert (level(check), "not only of a CA" in check.found) == ("warn", True)


@pytest.mark.parametrize("content", ["", "hello", "-----BEGIN CERTIFICATE-----\nx\n"])
def test_a_file_without_a_certificate_is_said_to_be_one(tmp_path: Path, content: str) -> None:
    (tmp_path / "ca.crt").write_text(content)
    with pytest.raises(UserError, match=r"ca\.crt holds no certificate in PEM"):
        read_certificates(tmp_path / "ca.crt")


@contextlib.contextmanager
def serving(
    directory: Path, *, status: int = 401, host: str = "127.0.0.1", behind_s: float = 0.0
) -> Iterator[int]:
    """Answer every POST over TLS, with a clock of its own; yield the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def date_time_string(self, timestamp: float | None = None) -> str:
            moment = datetime.now(UTC) - timedelta(seconds=behind_s)
            return moment.strftime("%a, %d %b %Y %H:%M:%S GMT")

        def log_message(self, *_: object) -> None:
            pass

    if not (directory / "ca.crt").exists():
        make_authority(directory)
    certificate = issue_server_certificate(directory, f"s{len(list(directory.iterdir()))}", [host])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_suffix(".key"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign,assignment]
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(directory: Path, port: int, host: str = "127.0.0.1") -> Answer:
    return ask_superlink(f"{host}:{port}", directory / "ca.crt", 5.0)


def test_a_superlink_behind_tls_answers_401_and_says_the_time(tmp_path: Path) -> None:
    with serving(tmp_path) as port:
        answer = ask(tmp_path, port)
    now = datetime.now(UTC)
    assert answer.status == 401
    assert level(coordinator.check_superlink("here", answer, now)) == "ok"
    assert answer.ahead_s is not None
    assert abs(answer.ahead_s) < 2
    assert level(coordinator.check_clock(answer.ahead_s)) == "ok"
    soon = coordinator.check_superlink("here", answer, now + timedelta(days=350))
    assert (level(soon), "its certificate ends on" in soon.found) == ("warn", True)


def test_a_clock_that_is_ahead_is_seen_from_the_date_of_the_answer(tmp_path: Path) -> None:
    with serving(tmp_path, behind_s=60) as port:
        answer = ask(tmp_path, port)
    check = coordinator.check_clock(answer.ahead_s)
    assert level(check) == "fail"
    assert re.match(r"(59|60|61) s ahead of the coordinator", check.found)


@pytest.mark.parametrize(
    ("ahead_s", "expected"),
    [(None, "skip"), (1, "ok"), (4, "warn"), (6, "fail"), (-100, "ok"), (-200, "warn")],
)
def test_a_clock_may_be_behind_more_than_ahead(ahead_s: float | None, expected: str) -> None:
    assert level(coordinator.check_clock(ahead_s)) == expected
    assert level(coordinator.check_clock(-301)) == "fail"


def test_another_host_and_another_ca_are_not_trusted(tmp_path: Path) -> None:
    with serving(tmp_path, host="fleet.example") as port:
        answer = ask(tmp_path, port)
        make_authority(tmp_path / "other")
        stranger = ask(tmp_path / "other", port)
    assert "IP address mismatch" in answer.tls_error
    assert stranger.tls_error
    for each in (answer, stranger):
        assert level(coordinator.check_superlink("here", each, NOW)) == "fail"


@pytest.mark.parametrize(
    ("status", "expected"),
    [(403, "fail"), (404, "fail"), (502, "warn"), (500, "warn"), (0, "warn")],
)
def test_what_is_no_superlink_is_said(status: int, expected: str) -> None:
    check = coordinator.check_superlink("here", Answer(status=status), NOW)
    assert level(check) == expected


def test_a_closed_port_an_unknown_name_and_no_tls_are_told_apart(tmp_path: Path) -> None:
    make_authority(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        threading.Thread(target=lambda: answer_plainly(server), daemon=True).start()
        assert "no TLS there" in ask(tmp_path, port).tls_error
    assert "refused" in ask(tmp_path, port).error
    assert "name" in ask(tmp_path, 443, "no-such-host.invalid").error
    assert "root_certificate" in ask(tmp_path / "nowhere", 443).error
    failed = coordinator.check_superlink("here", ask(tmp_path, port), NOW)
    assert (level(failed), "let TCP out" in failed.fix) == ("fail", True)


def answer_plainly(server: socket.socket) -> None:
    caller, _ = server.accept()
    with caller:
        caller.recv(4096)
        caller.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
