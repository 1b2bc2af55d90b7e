"""An OCI image layout on disk, as the registry: any tool that copies images can carry it on.

A release is one OCI manifest under a tag: its config blob is the signed envelope, its layers are
the files of the build. Nothing here is trusted by a device but the envelope; whoever rewrites the
index, the manifest or a blob can only make a device refuse.

``Source`` is all that the agent asks of a registry; an HTTP one fits behind the same two calls.
Format: https://github.com/opencontainers/image-spec/blob/main/image-layout.md
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edge.atomic import exclusive, sync_directory, write_atomically
from edge.errors import EdgeError, UserError, VerificationError
from edge.lineage import is_sha256, sha256_of_file
from edge.release import (
    DEFAULT_PROBE,
    MAX_ENVELOPE_BYTES,
    Probe,
    Release,
    ReleaseFile,
    open_release,
    sign,
)
from edge.verification import verify

INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
ENVELOPE_TYPE = "application/vnd.fedge.release.v1+dsse"
WEIGHT_TYPE = "application/vnd.cncf.model.weight.v1.raw"
"""ModelPack's type for uncompressed weights: https://github.com/modelpack/model-spec"""
FILE_TYPE = "application/octet-stream"
TAG_ANNOTATION = "org.opencontainers.image.ref.name"
TITLE_ANNOTATION = "org.opencontainers.image.title"
_WEIGHT_SUFFIXES = {".gguf", ".onnx", ".data", ".safetensors"}
_MAX_DOCUMENT_BYTES = 4 << 20  # the size up to which OCI registries must accept a manifest
_PIECE_BYTES = 1 << 20


class RegistryError(EdgeError):
    """The registry does not have what was asked for: not there, not yet, or not reachable."""


class Source(Protocol):
    """Where a device gets bytes from. It is not trusted."""

    def envelope(self, tag: str) -> bytes:
        """Return the signed envelope under ``tag``, at most MAX_ENVELOPE_BYTES of it.

        Raises:
            RegistryError: There is none.
            VerificationError: What is there is damaged.
        """

    def blob(self, sha256: str) -> Iterator[bytes]:
        """Yield the bytes that the registry holds under ``sha256``, whatever they are.

        Raises:
            RegistryError: There are none.
            VerificationError: What is there is no file.
        """


@dataclass(frozen=True)
class Layout:
    """An OCI image layout directory."""

    path: Path

    def envelope(self, tag: str) -> bytes:
        """Return the signed envelope under ``tag``; see ``Source``."""
        for entry in self.index()["manifests"]:
            if _tag_of(entry) == tag:
                return self.envelope_of(entry)
        raise RegistryError(f"{self.path} has no tag {tag!r}: push a build to {self.path}:{tag}")

    def blob(self, sha256: str) -> Iterator[bytes]:
        """Yield a blob in pieces of at most 1 MiB; see ``Source``."""
        try:
            with _open_file(self.blob_path(sha256)) as file:
                while piece := file.read(_PIECE_BYTES):
                    yield piece
        except OSError as error:
            raise RegistryError(
                f"{self.path} cannot give blob {sha256}: {error.strerror}; push the build again"
            ) from None

    def blob_path(self, sha256: str) -> Path:
        """Return where the layout keeps a blob."""
        return self.path / "blobs" / "sha256" / sha256

    def index(self) -> dict[str, Any]:
        """Return index.json, its form checked as far as this module reads it."""
        try:
            content = _read_at_most(self.path / "index.json", _MAX_DOCUMENT_BYTES)
        except OSError as error:
            raise RegistryError(
                f"{self.path} is no OCI image layout (index.json: {error.strerror}): "
                "push a build to it first"
            ) from None
        index = _parse(content, f"{self.path}/index.json")
        entries = index.get("manifests")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise VerificationError(f"{self.path}/index.json lists no manifests: it is damaged")
        return index

    def envelope_of(self, entry: dict[str, Any]) -> bytes:
        """Return the envelope of one manifest that the index lists."""
        manifest = _parse(self._document(entry), f"a manifest of {self.path}")
        config = manifest.get("config")
        if not isinstance(config, dict) or config.get("mediaType") != ENVELOPE_TYPE:
            raise VerificationError(f"a manifest of {self.path} holds no signed release")
        return self._document(config, MAX_ENVELOPE_BYTES)

    def _document(self, descriptor: dict[str, Any], max_bytes: int = _MAX_DOCUMENT_BYTES) -> bytes:
        """Read a small blob by its descriptor; damage shows here before a signature is judged."""
        kind, _, sha256 = str(descriptor.get("digest")).partition(":")
        if kind != "sha256" or not is_sha256(sha256):
            raise VerificationError(f"{self.path} names a blob by {kind[:64]!r}, expected a sha256")
        try:
            content = _read_at_most(self.blob_path(sha256), max_bytes)
        except OSError as error:
            raise RegistryError(f"{self.path} lacks blob {sha256}: {error.strerror}") from None
        if (seen := hashlib.sha256(content).hexdigest()) != sha256:
            raise VerificationError(f"{self.path}: blob {sha256} is damaged, its sha256 is {seen}")
        return content


def parse_reference(reference: str) -> tuple[Path, str]:
    """Split ``DIR:TAG``.

    Raises:
        UserError: There is no tag, or one that OCI does not allow.
    """
    directory, _, tag = reference.rpartition(":")
    if not directory or not re.fullmatch(r"\w[\w.-]{0,127}", tag, re.ASCII):
        raise UserError(f"reference {reference!r}: expected DIR:TAG, for example registry:stable")
    return Path(directory), tag


@dataclass(frozen=True)
class Pushed:
    """What a push did."""

    release: Release
    num_bytes_copied: int
    """Bytes of blobs that the registry did not hold yet."""

    def as_json(self) -> dict[str, Any]:
        """Return what was pushed as one JSON object."""
        release = self.release
        return {
            "build": release.build,
            "channel": release.channel,
            "sequence": release.sequence,
            "digest": release.digest,
            "num_bytes": sum(file.size for file in release.files),
            "num_bytes_copied": self.num_bytes_copied,
        }


def push(
    build: Path,
    registry: Path,
    tag: str,
    key: Ed25519PrivateKey,
    *,
    channel: str = "stable",
    sequence: int | None = None,
    probe: Probe = DEFAULT_PROBE,
) -> Pushed:
    """Sign a build and put it under ``tag``; the tag moves last, in one step.

    The build's files are hashed against its lineage first: what no longer is what was built is
    not signed. Blobs that the registry holds whole are not copied again.

    Args:
        build: A build directory with manifest.json and lineage.json.
        registry: An OCI image layout directory; made if it is not there.
        tag: The tag to move, for example "stable".
        key: The publisher's key.
        channel: Which devices act on it: those whose device.toml names this channel.
        sequence: Grows with each release; None takes one more than the highest that the
            registry lists for the channel, under a tag or displaced from one.
        probe: What a device asks the build before it trusts it.

    Raises:
        UserError: The build is not one, a field of the release is out of range, or the tag
            belongs to another channel.
        VerificationError: A file is not what the build's lineage says.
    """
    from edge.manifest import read_manifest  # pydantic: a device that only reads does without

    walk = verify(build)
    if walk.problems:
        raise VerificationError(f"{build} is not pushed: {walk.problems[0]}; build it again")
    manifest = read_manifest(build)
    try:
        release = Release(
            channel=channel,
            sequence=1 if sequence is None else sequence,
            build=manifest.format,
            runtime=manifest.runtime,
            files=_files_of(build),
            lineage=walk.root,
            probe=probe,
        )
    except ValueError as error:
        raise UserError(f"{build} cannot be released: {error}") from None
    layout = Layout(registry)
    with exclusive(registry / ".lock"):
        listed = _listed(layout, key.public_key())
        _check_channel(listed, f"{registry}:{tag}", tag, channel)
        if sequence is None:
            release = replace(release, sequence=_last_sequence(listed, channel) + 1)
        num_bytes_copied = sum(_store(layout, build, file) for file in release.files)
        _publish(layout, tag, release, sign(release, key), listed)
    return Pushed(release, num_bytes_copied)


def _files_of(build: Path) -> tuple[ReleaseFile, ...]:
    paths = sorted(path for path in build.rglob("*") if path.is_file())
    return tuple(
        ReleaseFile(path.relative_to(build).as_posix(), sha256_of_file(path), path.stat().st_size)
        for path in paths
    )


@dataclass(frozen=True)
class _Listed:
    """One manifest that the index lists, under a tag or displaced from one."""

    entry: dict[str, Any]
    release: Release | EdgeError
    """The release, or why it cannot be read with the publisher's key."""


def _listed(layout: Layout, key: Ed25519PublicKey) -> list[_Listed]:
    if not (layout.path / "index.json").exists():
        return []
    listed = []
    for entry in layout.index()["manifests"]:
        release: Release | EdgeError
        try:
            release = open_release(layout.envelope_of(entry), [key])
        except (RegistryError, VerificationError) as error:
            release = error
        listed.append(_Listed(entry, release))
    return listed


def _check_channel(listed: list[_Listed], reference: str, tag: str, channel: str) -> None:
    """Refuse to take a tag from a channel: its devices would refuse what they then find there."""
    for one in listed:
        if _tag_of(one.entry) != tag or not isinstance(one.release, Release):
            continue
        if one.release.channel != channel:
            raise UserError(
                f"{reference} belongs to channel {one.release.channel!r}, not {channel!r}: "
                "push to another tag"
            )


def _last_sequence(listed: list[_Listed], channel: str) -> int:
    """Return the highest sequence that was released on ``channel``; 0 if none ever was."""
    last = 0
    for one in listed:
        if isinstance(one.release, EdgeError):
            raise UserError(
                f"the next sequence cannot be told, because {one.release}; name it with --sequence"
            )
        if one.release.channel == channel:
            last = max(last, one.release.sequence)
    return last


def _store(layout: Layout, build: Path, file: ReleaseFile) -> int:
    """Copy one file into the blobs, hashing what is written; return the bytes copied."""
    blob = layout.blob_path(file.sha256)
    # A blob of the right size may still be damaged: hashing it here lets a second push repair it.
    if blob.is_file() and blob.stat().st_size == file.size and sha256_of_file(blob) == file.sha256:
        return 0
    blob.parent.mkdir(parents=True, exist_ok=True)
    copy = blob.parent / ".incoming"  # one name, under the lock: what a kill leaves is written over
    digest = hashlib.sha256()
    try:
        with (build / file.name).open("rb") as source, copy.open("wb") as target:
            while piece := source.read(_PIECE_BYTES):
                digest.update(piece)
                target.write(piece)
            target.flush()
            os.fsync(target.fileno())
        if digest.hexdigest() != file.sha256:
            raise EdgeError(f"{build / file.name} changed while it was pushed: push it again")
        copy.replace(blob)
        sync_directory(blob.parent)
    finally:
        copy.unlink(missing_ok=True)
    return file.size


def _publish(
    layout: Layout, tag: str, release: Release, envelope: bytes, listed: list[_Listed]
) -> None:
    """Write envelope and manifest, then let the index name them: readers see all or nothing.

    What the tag named before stays listed without it, so that its sequence is not given again.
    Without a tag only what this key signed is kept: the rest would ask for --sequence for ever.
    """
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": _write_document(layout, ENVELOPE_TYPE, envelope),
        "layers": [_layer(file) for file in release.files],
    }
    entry = _write_document(layout, MANIFEST_TYPE, _encode(manifest))
    entry["annotations"] = {TAG_ANNOTATION: tag}
    index = layout.path / "index.json"
    others = [one.entry for one in listed if _tag_of(one.entry) not in {None, tag}]
    others += [
        {name: value for name, value in one.entry.items() if name != "annotations"}
        for one in listed
        if _tag_of(one.entry) in {None, tag}
        and isinstance(one.release, Release)
        and one.entry["digest"] != entry["digest"]
    ]
    write_atomically(layout.path / "oci-layout", '{"imageLayoutVersion": "1.0.0"}')
    document = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [*others, entry]}
    write_atomically(index, _encode(document))


def _tag_of(entry: dict[str, Any]) -> str | None:
    annotations = entry.get("annotations")
    tag = annotations.get(TAG_ANNOTATION) if isinstance(annotations, dict) else None
    return tag if isinstance(tag, str) else None


def _layer(file: ReleaseFile) -> dict[str, Any]:
    is_weight = Path(file.name).suffix in _WEIGHT_SUFFIXES
    return {
        "mediaType": WEIGHT_TYPE if is_weight else FILE_TYPE,
        "digest": f"sha256:{file.sha256}",
        "size": file.size,
        "annotations": {TITLE_ANNOTATION: file.name},
    }


def _write_document(layout: Layout, media_type: str, content: bytes) -> dict[str, Any]:
    sha256 = hashlib.sha256(content).hexdigest()
    write_atomically(layout.blob_path(sha256), content)
    return {"mediaType": media_type, "digest": f"sha256:{sha256}", "size": len(content)}


def _encode(document: dict[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def _parse(content: bytes, where: str) -> dict[str, Any]:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise VerificationError(f"{where} is damaged: it is not JSON ({error})") from None
    if not isinstance(document, dict):
        raise VerificationError(f"{where} is damaged: it is not a JSON object")
    return document


def _open_file(path: Path) -> BinaryIO:
    """Open a regular file, and nothing else: a pipe would keep its reader waiting for ever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise VerificationError(f"{path} is no regular file: the registry is damaged")
    return os.fdopen(descriptor, "rb")


def _read_at_most(path: Path, max_bytes: int) -> bytes:
    with _open_file(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise VerificationError(f"{path} has more than {max_bytes:,} bytes")
    return content
