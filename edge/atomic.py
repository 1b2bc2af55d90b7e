"""Writes that either happened or did not: a reader never sees half a file, `kill -9` included."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge.errors import EdgeError, UserError


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace ``path`` by ``content`` in one step, on disk before this returns."""
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
        sync_directory(path.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory that becomes ``path`` when the block ends without an error.

    Raises:
        UserError: ``path`` exists and is not an empty directory.
    """
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        building.chmod(0o755)
        yield building
        for file in building.rglob("*"):
            if file.is_file():
                file.chmod(0o644)  # safetensors makes files that only their owner can read
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        building.replace(path)
        sync_directory(path.parent)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def refuse_existing(path: Path) -> None:
    """Say before the long work, not after it, that an output is in the way.

    Raises:
        UserError: ``path`` exists and is not an empty directory.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists already: remove it or choose another --out")


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file ``path`` for the length of the block; the kernel frees it on `kill -9`.

    Raises:
        EdgeError: Another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EdgeError(
                f"another process works in {path.parent}: wait for it, or stop it, and start again"
            ) from None
        yield


def sync_directory(path: Path) -> None:
    """Put a directory's entries on disk: a rename survives a power cut only after this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
