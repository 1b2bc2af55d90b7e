"""The socket between a site's node and its trainer: framing, limits, and the asking side.

One question is one RPC (`trainer.proto`): a head of JSON, then the message's bytes in chunks; the
answer comes the same way. Light on purpose, and without flwr and torch: the app that a stock
SuperNode starts for every message imports this and nothing of the trainer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from client.peer import peer_at
from federation.errors import FedgeError

if TYPE_CHECKING:
    from client.trainer_pb2 import Part

METHOD = "/fedge.Trainer/Answer"
HEAD_BYTES = 64 << 10
"""Longest head, of a question and of an answer."""
CHUNK_BYTES = 1 << 20
"""Longest chunk; gRPC itself refuses messages above 4 MiB."""
MAX_LOST = 5
"""How many trainers one message may cost before it is answered with an error. More than a private
round is begun (`client.answers.MAX_BEGUN`), for some are lost before they begin it."""
PATIENCE_S = 60.0
"""How long an app waits for a trainer that is started again."""
LONGEST_PATH = 100
"""Bytes of a socket's path: Linux has room for 107."""


class LinkError(FedgeError):
    """What came over the socket is no question or no answer."""


class TrainerLostError(LinkError):
    """Nobody answers at the socket, or not any more: asked again, the question may be answered."""

    def __init__(self, message: str, *, was_asked: bool = False) -> None:
        """Say whether the trainer had the question: it may be the question that ended it."""
        super().__init__(message)
        self.was_asked = was_asked


@dataclass(frozen=True)
class Answered:
    """A trainer's answer."""

    head: Mapping[str, Any]
    """{"code": 0, "metrics": {…}, "site": NAME}, or {"code": …, "reason": …}."""
    update: bytes

    @property
    def code(self) -> int:
        """0, or the error's number."""
        return int(self.head.get("code", -1))


def request_head(
    round_record: Mapping[str, Any], training: Mapping[str, Any], bundle: str
) -> dict[str, Any]:
    """Return the question's head from the records of a Flower message.

    What a run says beside the known keys goes on to the trainer, which refuses what it does not
    know. Dotted keys, the only tables that a Flower record can hold, become tables.

    Args:
        round_record: server_round, run, formats and whatever else the run says of a round.
        training: Training settings.
        bundle: sha256 of the app bundle, or "" where the node cannot know it.
    """
    head = _nested(round_record)
    head["training"] = dict(training)
    head["bundle"] = bundle
    return head


def ask(
    socket: Path,
    head: Mapping[str, Any],
    message: memoryview,
    *,
    is_wanted: Callable[[], bool] = lambda: True,
) -> Answered:
    """Ask the trainer behind a socket and wait for its answer, however long it trains.

    Args:
        socket: Path of the trainer's socket.
        head: `request_head`.
        message: The adapter or its change, as it came.
        is_wanted: Asked now and then; the call is given up when it says no.

    Raises:
        TrainerLostError: Nobody listens there, the trainer ended in between, or was given up.
        LinkError: The question is none, or holds what JSON cannot say.
    """
    import grpc

    from client.trainer_pb2 import Part

    try:
        content = json.dumps(head).encode()
    except (TypeError, ValueError, RecursionError):  # Flower's records may hold bytes
        raise LinkError("the head holds a value that is no text, number or list of them") from None
    if len(content) > HEAD_BYTES:
        raise LinkError(f"the head has {len(content)} bytes, at most {HEAD_BYTES} are read")
    if peer_at(socket) in ("absent", "forbidden"):
        raise TrainerLostError("nobody listens at the trainer's socket")
    options = [("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(f"unix:{socket.absolute()}", options=options) as channel:
        method = channel.stream_stream(
            METHOD,
            request_serializer=Part.SerializeToString,
            response_deserializer=Part.FromString,
        )
        call = method(write_parts(content, chunks_of(message)))
        _watch(call, is_wanted)
        try:
            head_bytes, chunks = read_parts(call)
            answer = read_object(head_bytes)
            return Answered(answer, b"".join(chunks))
        except grpc.RpcError as error:
            if call.code() is grpc.StatusCode.INVALID_ARGUMENT:
                raise LinkError(f"the trainer cannot read the question: {call.details()}") from None
            name = str(call.code()).rpartition(".")[2].lower()
            # Busy with others, or told to leave: neither is the question's doing.
            was_asked = name not in ("resource_exhausted", "cancelled")
            reason = f"the trainer gave no answer ({name})"
            raise TrainerLostError(reason, was_asked=was_asked) from error


def ask_again(socket: Path, head: Mapping[str, Any], message: memoryview) -> Answered:
    """Ask, and ask again while the trainer is started anew: what it answered once stays answered.

    Raises:
        TrainerLostError: It ended ``MAX_LOST`` times, or nobody listened for ``PATIENCE_S``.
        LinkError: The question is none.
    """
    lost, quiet_since = 0, 0.0
    while True:
        try:
            return ask(socket, head, message)
        except TrainerLostError as error:
            now = time.monotonic()
            if error.was_asked or not quiet_since:
                lost, quiet_since = lost + error.was_asked, now
            if lost >= MAX_LOST or now - quiet_since > PATIENCE_S:
                raise
        time.sleep(0.2)


def write_parts(head: bytes, chunks: Iterable[bytes]) -> Iterator[Part]:
    """Yield the parts of a question or an answer."""
    from client.trainer_pb2 import Part

    yield Part(head=head)
    for chunk in chunks:
        yield Part(chunk=chunk)


def read_parts(parts: Iterator[Part]) -> tuple[bytes, Iterator[bytes]]:
    """Return the head and the chunks, which are read as they are taken.

    Raises:
        LinkError: The first part is no head or too long; later, that one is no chunk or too long.
    """
    first = next(iter(parts), None)
    if first is None or first.WhichOneof("part") != "head":
        raise LinkError("the first part holds no head")
    if len(first.head) > HEAD_BYTES:
        raise LinkError(f"the head has {len(first.head)} bytes, at most {HEAD_BYTES} are read")
    return first.head, _chunks(parts)


def read_object(head: bytes) -> dict[str, Any]:
    """Return the JSON object of a head.

    Raises:
        LinkError: It is none.
    """
    try:
        value = json.loads(head.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise LinkError("the head is no JSON object in UTF-8")
    return value


def spool(chunks: Iterator[bytes], file: BinaryIO, max_bytes: int) -> int:
    """Write chunks to a file as they come; return their number of bytes.

    Raises:
        LinkError: There are more than ``max_bytes``.
    """
    total = 0
    for chunk in chunks:
        total += len(chunk)
        if total > max_bytes:
            raise LinkError(f"the message has more than {max_bytes} bytes, this site's largest")
        file.write(chunk)
    return total


def chunks_of(content: memoryview) -> Iterator[bytes]:
    """Yield bytes in chunks."""
    for start in range(0, len(content), CHUNK_BYTES):
        yield bytes(content[start : start + CHUNK_BYTES])


def _chunks(parts: Iterator[Part]) -> Iterator[bytes]:
    for part in parts:
        if part.WhichOneof("part") != "chunk" or len(part.chunk) > CHUNK_BYTES:
            raise LinkError(f"a part after the head is no chunk of at most {CHUNK_BYTES} bytes")
        yield part.chunk


def _watch(call: Any, is_wanted: Callable[[], bool]) -> None:
    """Cancel a call that is wanted no more."""
    import threading

    def watch() -> None:
        while call.is_active():
            if not is_wanted():
                call.cancel()
                return
            done.wait(0.2)

    done = threading.Event()
    call.add_callback(done.set)
    threading.Thread(target=watch, name="watch", daemon=True).start()


def _nested(record: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in record.items():
        table, dot, name = key.partition(".")
        if dot:
            inner = nested.setdefault(table, {})
            if isinstance(inner, dict):
                inner[name] = value
                continue
        nested[key] = value
    return nested


def _refuse_constant(word: str) -> float:
    raise ValueError(f"{word} is no number")
