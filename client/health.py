"""How a site's daemon is: in memory, on disk for `client status`, on loopback for a watchdog."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from federation.atomic import write_atomically
from federation.errors import UserError

MAX_WATCHERS = 8
"""Connections to /healthz at a time; one more is closed. Every local user may connect, and each
connection is a descriptor and a thread of the daemon."""
IDLE_S = 5.0
"""How long a connection may say nothing."""


@dataclass(frozen=True)
class Status:
    """What a daemon knows of itself. Names and numbers only."""

    pid: int
    node: str = "resident"
    """Kind of node."""
    is_connected: bool | None = False
    """Whether the SuperLink answered the last request; None = a stock SuperNode has the connection,
    and tells nobody how it is."""
    is_supernode_up: bool | None = None
    """Whether the stock SuperNode's process runs; None = there is none."""
    is_trainer_up: bool = False
    """Whether the trainer takes connections."""
    run: str = ""
    """Of the message in hand, or of the last one."""
    server_round: int = 0
    is_busy: bool = False
    """Whether a message is in hand."""
    num_answered: int = 0
    num_refused: int = 0
    """Errors that were sent as answers, refusals among them."""
    last_answer_at: str = ""
    """Time in UTC."""
    restarts: int = 0
    """How often a child was started again in this life of the daemon."""

    @property
    def is_well(self) -> bool:
        """Whether a message could be answered, as far as this side knows."""
        node = self.is_supernode_up if self.is_connected is None else self.is_connected
        return self.is_trainer_up and bool(node)


class ClosedError(UserError):
    """What is asked for is another user's."""

    def __init__(self, path: Path) -> None:
        """Say whose ``path`` is, and how to read it all the same."""
        me, owner = _user_name(os.geteuid()), owner_of(path)
        other = "" if owner == "root" else f"user {owner} (sudo -u {owner} …) or "
        super().__init__(f"{path} may not be read by user {me}: run this as {other}root")


class Health:
    """The status of a daemon that runs."""

    def __init__(self, status: Status, path: Path) -> None:
        """Write the first status to ``path``."""
        self._lock = threading.Lock()
        self._status = status
        self._path = path
        self._write()

    @property
    def status(self) -> Status:
        """As it is now."""
        return self._status

    def update(self, **changes: Any) -> None:
        """Change values of the status; on disk when this returns, if anything is new."""
        with self._lock:
            changed = replace(self._status, **changes)
            if changed != self._status:
                self._status = changed
                self._write()

    def _write(self) -> None:
        write_atomically(self._path, json.dumps(asdict(self._status), indent=2))


def read_status(path: Path) -> Status | None:
    """Return what a daemon wrote last; None = none wrote here.

    Raises:
        ClosedError: This user may not read it.
        UserError: It cannot be read, or another version wrote it.
    """
    try:
        return Status(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError:
        raise ClosedError(path) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its disk") from None
    except (ValueError, TypeError):
        raise UserError(
            f"{path} is no status of this version's: start the daemon again with this installation"
        ) from None


def owner_of(path: Path) -> str:
    """Return whose a path is, or the first directory above it that this user may see."""
    for place in (path, *path.absolute().parents):
        with contextlib.suppress(OSError):
            return _user_name(place.stat().st_uid)
    return "root"


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"#{uid}"


class _Server(ThreadingHTTPServer):
    """Takes no more connections at a time than it may."""

    daemon_threads = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._places = threading.BoundedSemaphore(MAX_WATCHERS)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, *_: object) -> None:  # whoever connects may fill no log
        pass


@contextlib.contextmanager
def health_endpoint(address: str, status: Callable[[], Status]) -> Iterator[int]:
    """Answer GET /healthz on loopback for the time of a block; yield the port.

    200 while the trainer takes connections and the SuperLink answers (of a stock SuperNode: while
    its process runs), 503 else; the body is the status. ``MAX_WATCHERS`` are heard at a time.

    Args:
        address: HOST:PORT; port 0 takes a free one.
        status: Asked for every request.

    Raises:
        UserError: The port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = IDLE_S

        def do_GET(self) -> None:
            now = status()
            if self.path != "/healthz":
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            body = json.dumps({"status": "ok" if now.is_well else "down", **asdict(now)}).encode()
            self.send_response(HTTPStatus.OK if now.is_well else HTTPStatus.SERVICE_UNAVAILABLE)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:  # a watchdog asks every few seconds
            pass

    host, _, port = address.rpartition(":")
    try:
        server = _Server((host.strip("[]"), int(port)), Handler)
    except OSError as error:
        raise UserError(f"health {address}: {error.strerror}: choose another port") from None
    threading.Thread(target=server.serve_forever, name="health", daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
