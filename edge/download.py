"""Bring the files of a release into a directory, believing only what was signed.

A file gets its name after its last byte was hashed and is on disk, so a file under its name is a
whole file, and an attempt that was killed is taken up where it stood.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from edge.errors import EdgeError, VerificationError
from edge.lineage import sha256_of_file
from edge.registry import Source
from edge.release import ReleaseFile


def take_local(file: ReleaseFile, build: Path, owned: Mapping[str, Path]) -> bool:
    """Say whether ``file`` stands in ``build`` now, without a byte from the registry.

    It does when a killed attempt brought it, or when another release on this device has the same
    bytes: then the two share them on disk. Both are hashed before they count.

    Args:
        file: What is wanted.
        build: The directory being filled.
        owned: Files of the other releases on this device, by sha256.
    """
    target = build / file.name
    if target.is_file():
        if sha256_of_file(target) == file.sha256:
            return True
        target.unlink()
    twin = owned.get(file.sha256)
    if twin is None or sha256_of_file(twin) != file.sha256:
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    os.link(twin, target)
    return True


def fetch(file: ReleaseFile, build: Path, source: Source, incoming: Path) -> None:
    """Stream one file from the registry; not a byte beyond its signed size is written.

    Memory is one piece of the stream, whatever the size.

    Args:
        file: What is wanted.
        build: The directory being filled.
        source: Where from. It may give anything.
        incoming: Where the bytes stand until they are proven; on the same file system.

    Raises:
        VerificationError: The bytes are not the signed ones. Nothing of them is left.
        RegistryError: The registry has none.
    """
    digest, size = hashlib.sha256(), 0
    try:
        with incoming.open("wb") as part:
            for piece in source.blob(file.sha256):
                size += len(piece)
                if size > file.size:
                    break
                digest.update(piece)
                part.write(piece)
            part.flush()
            os.fsync(part.fileno())
        refusal = f"{file.name} is refused and the running build stays: the registry gave"
        if size > file.size:
            raise VerificationError(f"{refusal} more than the {file.size:,} bytes signed")
        if size < file.size:
            raise VerificationError(f"{refusal} {size:,} bytes of the {file.size:,} signed")
        if (seen := digest.hexdigest()) != file.sha256:
            raise VerificationError(f"{refusal} sha256 {seen}, {file.sha256} is signed")
    except (EdgeError, OSError):
        incoming.unlink(missing_ok=True)
        raise
    target = build / file.name
    target.parent.mkdir(parents=True, exist_ok=True)
    incoming.replace(target)
