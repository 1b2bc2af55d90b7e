"""The trainer's process: a socket with one method, and one question at a time behind it.

gRPC's threads take messages in and give answers out; the main thread answers, so that the training
has the process as a command has it. A caller that dies while its question is answered changes
nothing: the answer is on disk, and whoever asks again gets it.

SIGTERM lets the question in hand be answered, up to ``drain_s``; then the process leaves, as it
would leave from a kill.
"""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import shutil
import signal
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.claim import claim
from client.ledger import LEDGER
from client.process import end_with, keep_to_itself
from client.round import settle
from client.site_log import SiteLog
from client.site_settings import SiteSettings
from client.trainer import Gate, KeyOf, Reply, Trainer
from client.trainer_link import (
    CHUNK_BYTES,
    METHOD,
    LinkError,
    read_parts,
    spool,
    write_parts,
)
from federation.errors import FedgeError, UserError

if TYPE_CHECKING:
    from client.trainer_pb2 import Part

CALLS = 4
"""Calls at the same time; more are refused. One is answered, the others wait for it."""
READ_S = 120.0
"""How long a caller may take to send its question, from its own memory."""
WRITE_S = 120.0
"""And to read its answer. Who takes longer holds a place of `CALLS`, and is cut off."""

OpenGate = Callable[[SiteSettings, Callable[..., None]], contextlib.AbstractContextManager[Gate]]


@dataclass(frozen=True)
class _Call:
    """A question that was taken in."""

    head: bytes
    directory: Path
    """Holds the message, and is the answer's scratch directory."""
    is_wanted: Callable[[], bool]
    reply: futures.Future[Reply] = field(default_factory=futures.Future)

    @property
    def message(self) -> Path:
        return self.directory / "message"


def run_trainer(
    settings: SiteSettings,
    open_gate: OpenGate,
    *,
    parent: int | None = None,
    key_of: KeyOf | None = None,
) -> None:
    """Serve until SIGTERM.

    Args:
        settings: Of the site.
        open_gate: Opens the site's policy and ledger, for as long as the trainer lives.
        parent: Process with which this one ends, or None.
        key_of: See `client.trainer.Trainer`; for tests.

    Raises:
        UserError: Another trainer has the state or the socket, or the gate does not open.
        FedgeError: The gate did open before, and a file of it is missing.
    """
    keep_to_itself()
    log = SiteLog("trainer", settings.log, settings.log_level)
    calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()  # a signal handler may put
    leaving, closed = threading.Event(), threading.Event()

    def leave(*_: object) -> None:
        if leaving.is_set():
            return
        leaving.set()
        log.say("leaving")
        calls.put(None)
        drained = threading.Timer(settings.drain_s, os._exit, [1])
        drained.daemon = True
        drained.start()

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)
    if parent is not None:
        end_with(parent)
    with (
        claim(
            settings.state,
            "trainer",
            wait_s=settings.drain_s,
            is_wanted=lambda: not leaving.is_set(),
        ),
        _spool_directory(settings.state) as spools,
        _opened(settings, open_gate, log.say) as gate,
        _listening(settings, spools, calls, closed),
    ):
        trainer = Trainer(settings.site, gate, log.say, key_of=key_of)
        log.say("trainer_ready")
        _answer_calls(trainer, calls, leaving)
        closed.set()
    log.say("trainer_left")


def _opened(
    settings: SiteSettings, open_gate: OpenGate, say: Callable[..., None]
) -> contextlib.AbstractContextManager[Gate]:
    """Open the gate.

    Raises:
        UserError: It does not open.
        FedgeError: A file is missing that an earlier life of this trainer had: a disk that is
            mounted late comes by itself, so a service is to be started again.
    """
    try:
        return open_gate(settings, say)
    except UserError as error:
        is_first = not (settings.state / LEDGER).exists()
        missing = [path.name for path in (settings.policy, settings.data) if _is_missing(path)]
        if is_first or not missing:
            raise
        raise FedgeError(
            f"{error}; {missing[0]} was there when this trainer ran before: if its disk is mounted "
            "late, wait"
        ) from None


def _is_missing(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # it is there, and not for this user
        return False
    return False


def _answer_calls(
    trainer: Trainer, calls: queue.SimpleQueue[_Call | None], leaving: threading.Event
) -> None:
    while not leaving.is_set():
        call = calls.get()
        if call is None:
            return
        if not call.is_wanted():
            call.reply.cancel()
            continue
        call.reply.set_result(trainer.answer(call.head, call.message, call.directory))
        settle()


@contextlib.contextmanager
def _spool_directory(state: Path) -> Iterator[Path]:
    """Yield an empty directory for messages in flight; what a kill left there is removed."""
    directory = state / "spool"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(mode=0o700)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _listening(
    settings: SiteSettings,
    spools: Path,
    calls: queue.SimpleQueue[_Call | None],
    closed: threading.Event,
    *,
    read_s: float = READ_S,
    write_s: float = WRITE_S,
) -> Iterator[None]:
    """Serve the socket for the time of a block; the answers under way go out before it ends.

    Args:
        settings: Of the site.
        spools: Directory for the messages in flight.
        calls: Where the questions go.
        closed: Set when no more of them are answered.
        read_s: How long a caller may take to send its question.
        write_s: And to read its answer.
    """
    import grpc

    from client.trainer_pb2 import Part

    def answer(parts: Iterator[Part], context: Any) -> Iterator[Part]:
        directory = spools / secrets.token_hex(8)
        try:
            directory.mkdir(mode=0o700)
            reply = _ask(parts, context, directory)
            with _cut_off_after(write_s, context):
                yield from _reply_parts(reply)
        except LinkError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except futures.CancelledError:
            context.abort(grpc.StatusCode.CANCELLED, "nobody waits for the answer")
        except (
            OSError,
            RuntimeError,
        ) as error:  # grpc would send its text, with paths of this site
            context.abort(grpc.StatusCode.INTERNAL, type(error).__name__)
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _ask(parts: Iterator[Part], context: Any, directory: Path) -> Reply:
        with _cut_off_after(read_s, context):
            head, chunks = read_parts(parts)
            call = _Call(head, directory, context.is_active)
            with call.message.open("wb") as file:
                spool(chunks, file, settings.max_message_bytes)
        calls.put(call)
        while not closed.is_set():
            with contextlib.suppress(TimeoutError):
                return call.reply.result(timeout=0.5)
        raise futures.CancelledError

    handler = grpc.stream_stream_rpc_method_handler(
        answer, request_deserializer=Part.FromString, response_serializer=Part.SerializeToString
    )
    service, _, method = METHOD.strip("/").partition("/")
    server = grpc.server(
        futures.ThreadPoolExecutor(CALLS, "call"),
        handlers=[grpc.method_handlers_generic_handler(service, {method: handler})],
        maximum_concurrent_rpcs=CALLS,
    )
    with _socket(settings, server):
        yield
        server.stop(grace=60).wait()


@contextlib.contextmanager
def _cut_off_after(seconds: float, context: Any) -> Iterator[None]:
    """Cancel a call whose other end takes longer than this block may."""
    slow = threading.Timer(seconds, context.cancel)
    slow.daemon = True
    slow.start()
    try:
        yield
    finally:
        slow.cancel()


@contextlib.contextmanager
def _socket(settings: SiteSettings, server: Any) -> Iterator[None]:
    """Start a server on the site's socket, closed to all but its owner or one group.

    Raises:
        UserError: Another trainer listens there, its directory is open to all, or the group is
            unknown.
    """
    path = settings.socket
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory = path.parent.stat()
    mode = directory.st_mode
    # Not in /tmp either: while no trainer listens, anybody could put a socket of that name there.
    if mode & 0o002 or (mode & 0o020 and not mode & stat.S_ISVTX):
        raise UserError(
            f"{path.parent} may be written by others, who could put their own socket in the place "
            "of the trainer's: run `chmod go-w` on it, or choose another directory"
        )
    if path.exists() and not _is_stale(path):
        raise UserError(f"a trainer listens on {path} already: end it, or choose another socket")
    path.unlink(missing_ok=True)
    before = os.umask(0o177)  # no moment in which anybody else could connect
    try:
        server.add_insecure_port(f"unix:{path}")
    finally:
        os.umask(before)
    if settings.socket_group:
        name = settings.socket_group
        group = int(name) if name.isdecimal() else name
        try:
            shutil.chown(path, group=group)
            if directory.st_uid == os.geteuid() and not mode & 0o007:  # else not ours to close
                shutil.chown(path.parent, group=group)
                path.parent.chmod(0o710)
        except (LookupError, OSError) as error:
            raise UserError(
                f"socket_group {settings.socket_group!r}: {error}: name a group that the "
                "trainer's user is a member of"
            ) from None
        path.chmod(0o660)
    server.start()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _is_stale(path: Path) -> bool:
    """Return whether nobody listens on a socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
        return False


def _reply_parts(reply: Reply) -> Iterator[Part]:
    import json

    head = json.dumps(dict(reply.head)).encode()
    if reply.update is None:
        yield from write_parts(head, [])
        return
    with reply.update.open("rb") as file:
        yield from write_parts(head, iter(lambda: file.read(CHUNK_BYTES), b""))
