"""What Mallory tries. Each attempt has a name; what it got, or why it failed, is reported."""

import contextlib
import ctypes
import json
import os
import signal
import socket as sockets
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

METHOD = "/fedge.Trainer/Answer"
OTHERS = (
    "/fedge.Trainer/Data",
    "/fedge.Trainer/Ledger",
    "/fedge.Trainer/answer",
    "/fedge.Trainer/",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "/grpc.health.v1.Health/Check",
    "/grpc.channelz.v1.Channelz/GetServers",
    "/../../etc/passwd",
    "/",
)


@dataclass
class Report:
    got: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def attempt(self, name: str, action: Callable[[], Any]) -> None:
        try:
            self.got[name] = action()
        except Exception as error:
            self.failed[name] = f"{type(error).__name__}: {error}"[:300]


def mark(report: Report, directories: Iterable[Any], when: str) -> None:
    """Leave a file wherever one can be left: where none is found, this code never ran."""
    for directory in directories:
        path = Path(str(directory)) / f"mallory-{when}-{os.getpid()}"
        report.attempt(f"mark {path}", lambda path=path: path.write_text("mallory was here"))


def attack_files(report: Report, told: dict[str, Any]) -> None:
    for name in told["files"]:
        path = Path(name)
        report.attempt(f"read {name}", lambda path=path: path.read_bytes()[:4000].decode("latin1"))
        if told["reads_only"]:
            continue
        report.attempt(f"open for writing {name}", lambda path=path: path.open("r+b").close())
        report.attempt(f"replace {name}", lambda path=path: _replace(path))
        report.attempt(f"chmod {name}", lambda path=path: path.chmod(0o666))
        report.attempt(f"link {name}", lambda path=path: _link(path))
    for name in told["directories"]:
        path = Path(name)
        report.attempt(f"list {name}", lambda path=path: sorted(map(str, path.iterdir())))
        if not told["reads_only"]:
            report.attempt(f"rename {name}", lambda path=path: path.rename(f"{path}-mallory"))


def _replace(path: Path) -> str:
    new = path.with_name(f"mallory-new-{os.getpid()}")
    new.write_text("mallory")
    new.replace(path)
    return "replaced"


def _link(path: Path) -> str:
    """Hard links and symbolic links pass directory checks that were made before."""
    link = Path.home() / f"mallory-link-{os.getpid()}-{len(str(path))}-{path.name}"
    with contextlib.suppress(OSError):
        link.symlink_to(path)
    hard = link.with_name(f"{link.name}-hard")
    hard.hardlink_to(path)
    return hard.read_bytes()[:4000].decode("latin1")


def attack_processes(report: Report, *, reads_only: bool) -> None:
    """Every process but our own: its command line is for all to see, the rest should not be."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            pid = int(entry.name)
            words = (entry / "cmdline").read_bytes().decode("latin1").replace("\0", " ").strip()
            is_ours = entry.stat().st_uid == os.geteuid()
            kind = next((k for k in ("trainer", "daemon") if f" {k} --config" in words), "")
            if kind or not is_ours:  # the SuperNode's processes are ours anyway
                name = f"{kind or 'other'} {pid}"
                if kind:
                    report.got[f"cmdline {name}"] = words
                _attack_process(report, name, entry, "" if reads_only else kind)


def _attack_process(report: Report, name: str, entry: Path, kind: str) -> None:
    pid = int(entry.name)
    for part in ("environ", "maps", "mem", "auxv", "syscall", "stack"):
        path = entry / part
        report.attempt(f"{part} {name}", lambda path=path: _beginning(path))
    for part in ("cwd", "root", "exe"):
        path = entry / part
        report.attempt(f"{part} {name}", path.readlink)
    report.attempt(f"fd {name}", lambda: [path.readlink() for path in (entry / "fd").iterdir()])
    if kind:
        report.attempt(f"ptrace {name}", lambda: _ptrace(pid))
        report.attempt(f"memory {name}", lambda: _read_memory(pid))
    if kind == "trainer":  # the daemon may be ended by its own user, which would end us too
        report.attempt(f"limits {name}", lambda: _set_limits(pid))
        for number in (signal.SIGCONT, signal.SIGSTOP, signal.SIGTERM, signal.SIGKILL):
            report.attempt(f"{number.name} {name}", lambda number=number: os.kill(pid, number))


def _beginning(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(2000)
    if not content:
        raise OSError("it is empty: a thread of the kernel, or a process that ended")
    return content.decode("latin1")


def _ptrace(pid: int) -> str:
    libc = ctypes.CDLL(None, use_errno=True)
    attach, detach = 16, 17
    if libc.ptrace(attach, pid, None, None) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    os.waitpid(pid, 0)
    libc.ptrace(detach, pid, None, None)
    return "attached"


def _read_memory(pid: int) -> str:
    libc = ctypes.CDLL(None, use_errno=True)

    class Vector(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

    buffer = ctypes.create_string_buffer(64)
    mine = Vector(ctypes.addressof(buffer), 64)
    its = Vector(0x400000, 64)
    read = libc.process_vm_readv(pid, ctypes.byref(mine), 1, ctypes.byref(its), 1, 0)
    if read < 0 and ctypes.get_errno() != 14:  # EFAULT: allowed, and nothing there
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return "read"


def _set_limits(pid: int) -> str:
    import resource

    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, 3))
    return "set"


def attack_socket(
    report: Report, path: Path, adapter: bytes, other: bytes, told: dict[str, Any]
) -> None:
    import grpc

    for name, content in (
        ("nothing", b""),
        ("zeros", bytes(1 << 16)),
        ("http", b"GET /data.jsonl HTTP/1.1\r\nHost: trainer\r\n\r\n"),
        ("preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * (1 << 20)),
    ):
        report.attempt(f"raw {name}", lambda content=content: _raw(path, content))
    channel = grpc.insecure_channel(
        f"unix:{path}",
        options=[("grpc.max_send_message_length", -1), ("grpc.enable_http_proxy", 0)],
    )
    with channel:
        for method in OTHERS:
            for content in (b"", b"\n\x00", bytes(5 << 20)):
                name = f"method {method} {len(content)}"
                call = channel.unary_unary(method)
                report.attempt(name, lambda call=call, content=content: repr(call(content)))
        ask = Asking(channel)
        for name, parts in malformed(adapter):
            report.attempt(f"parts {name}", lambda parts=parts: ask(parts))
        for name, head in told["heads"].items():
            report.attempt(f"head {name}", lambda head=head: ask.question(head, adapter))
        flood(report, ask, told["allowed"], adapter)
        report.attempt("answer", lambda: ask.question(told["allowed"], adapter))
        report.attempt("other adapter", lambda: ask.question(told["allowed"], other))

        settings = {**told["allowed"], "training": {**told["allowed"]["training"], "seed": 1}}
        report.attempt("other settings", lambda: ask.question(settings, adapter))


def _raw(path: Path, content: bytes) -> str:
    with sockets.socket(sockets.AF_UNIX) as raw:
        raw.settimeout(3)
        raw.connect(str(path))
        with contextlib.suppress(OSError):
            raw.sendall(content)
        with contextlib.suppress(OSError):
            return raw.recv(4096).decode("latin1")
    return ""


class Asking:
    """The trainer's one method, with parts written by hand."""

    def __init__(self, channel: Any) -> None:
        self._method = channel.stream_stream(METHOD)

    def __call__(self, parts: Iterable[bytes]) -> list[str]:
        return [part[:3000].decode("latin1") for part in self._method(iter(parts), timeout=300)]

    def question(self, head: Any, adapter: bytes) -> list[str]:
        content = head.encode() if isinstance(head, str) else json.dumps(head).encode()
        chunks = (adapter[at : at + (1 << 20)] for at in range(0, len(adapter), 1 << 20))
        return self([_part(1, content), *(_part(2, chunk) for chunk in chunks)])


def _part(number: int, content: bytes) -> bytes:
    """Return a protobuf message with one field of bytes."""
    size, length = bytearray(), len(content)
    while True:
        size.append(length & 0x7F | (0x80 if length > 0x7F else 0))
        length >>= 7
        if not length:
            return bytes([number << 3 | 2]) + bytes(size) + content


def malformed(adapter: bytes) -> list[tuple[str, list[bytes]]]:
    return [
        ("none", []),
        ("no protobuf", [b"\xff\xff\xff"]),
        ("unknown field", [_part(9, b"data.jsonl")]),
        ("chunk first", [_part(2, b"x")]),
        ("two heads", [_part(1, b"{}"), _part(1, b"{}")]),
        ("long head", [_part(1, b"x" * (65 << 10))]),
        ("huge chunk", [_part(1, b"{}"), _part(2, bytes(2 << 20))]),
        ("huge message", [_part(1, b"{}"), *[_part(2, bytes(1 << 20))] * 64]),
        ("many chunks", [_part(1, b"{}"), *[_part(2, b"x")] * 20_000]),
        ("above grpc's limit", [_part(1, b"x" * (5 << 20))]),
        ("half an adapter", [_part(1, b"{}"), _part(2, adapter[: len(adapter) // 2])]),
    ]


def flood(report: Report, ask: Asking, head: Any, adapter: bytes) -> None:
    """Ask the same from many threads at once."""

    def one(number: int) -> None:
        report.attempt(f"flood {number}", lambda: ask.question(head, adapter)[:1])

    threads = [threading.Thread(target=one, args=[number]) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
