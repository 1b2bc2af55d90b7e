"""Where an artefact comes from: an in-toto Statement v1 beside its files, written and read.

The format is that of the whole project: `lineage.json` is an in-toto Statement v1 about the files
beside it, and `lineage/` holds the statements of all its ancestors, each named by the sha256 of
its bytes. A statement names its files by digest (subject) and what they were made from
(materials): a directory by the digest of *its* statement, anything else by its own digest. So one
digest, signed in a release, fixes every byte of every stage before it.

``write_lineage`` gives byte for byte what `federation.lineage.write_lineage` gives (a test holds
the two together: this room imports no other). `edge.verification` walks it back.

Format: https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge.atomic import write_atomically

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:fedge:lineage:v1"
STATEMENT_MEDIA_TYPE = "application/vnd.in-toto+json"


def sha256_of_file(path: Path) -> str:
    """Return the hex sha256 of a file, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def is_sha256(value: object) -> bool:
    """Say whether ``value`` is a sha256 in lower-case hex, and so safe as a file name."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def is_safe_name(name: object) -> bool:
    """Say whether ``name`` stays inside the directory it is joined to, on any file system.

    Components joined by single slashes; none empty, ``.`` or ``..``, none longer than 255 bytes;
    no backslash, NUL or other control character.
    """
    if not isinstance(name, str) or "\\" in name or not name.isprintable() or len(name) > 1024:
        return False
    parts = name.split("/")
    return all(part not in {"", ".", ".."} and len(part.encode()) <= 255 for part in parts)


def write_lineage(
    directory: Path,
    *,
    stage: str,
    directories: Mapping[str, Path],
    digests: Mapping[str, str],
    parameters: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> str:
    """Describe every file in ``directory`` and what it was made from; return the sha256 of that.

    Args:
        directory: The finished artefact. `lineage.json` and `lineage/` are written into it.
        stage: What made it: "build" in this room.
        directories: Artefact directories it was made from, by role ("student").
            One without a `lineage.json` (a model from elsewhere) is described by its files.
        digests: Other things it was made from, by role: hex sha256 of their bytes.
        parameters: The settings that shaped it. JSON values only, and never text from a data set.
        metrics: What was measured on it. JSON values only.
    """
    ancestors = directory / "lineage"
    materials: list[dict[str, Any]] = []
    for name, source in directories.items():
        statement = statement_of(source)
        digest = hashlib.sha256(statement).hexdigest()
        for ancestor in sorted((source / "lineage").glob("*.json")):
            write_atomically(ancestors / ancestor.name, ancestor.read_bytes())
        write_atomically(ancestors / f"{digest}.json", statement)
        materials.append(
            {"name": name, "digest": {"sha256": digest}, "mediaType": STATEMENT_MEDIA_TYPE}
        )
    materials += [{"name": name, "digest": {"sha256": digest}} for name, digest in digests.items()]
    statement = _statement(directory, stage, materials, parameters, metrics)
    write_atomically(directory / "lineage.json", statement)
    return hashlib.sha256(statement).hexdigest()


def statement_of(directory: Path) -> bytes:
    """Return a directory's own statement, or one that describes the files of a foreign model."""
    own = directory / "lineage.json"
    if own.is_file():
        return own.read_bytes()
    return _statement(directory, "external", [], {}, {})


def _statement(
    directory: Path,
    stage: str,
    materials: list[dict[str, Any]],
    parameters: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> bytes:
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [
            {"name": name, "digest": {"sha256": sha256_of_file(directory / name)}}
            for name in sorted(subject_names(directory))
        ],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "stage": stage,
            "materials": materials,
            "parameters": dict(parameters),
            "metrics": dict(metrics),
        },
    }
    return (json.dumps(statement, indent=2, sort_keys=True) + "\n").encode()


def subject_names(directory: Path) -> list[str]:
    """Return the names of the files that a statement about ``directory`` describes."""
    names = (
        path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()
    )
    return [name for name in names if name != "lineage.json" and not name.startswith("lineage/")]


@dataclass(frozen=True)
class Material:
    """One thing an artefact was made from."""

    name: str
    sha256: str
    is_statement: bool
    """The digest is that of another artefact's statement, not of a file."""


@dataclass(frozen=True)
class Statement:
    """What a lineage.json says, its form checked."""

    sha256: str
    stage: str
    subjects: Mapping[str, str]
    """File name to hex sha256."""
    materials: tuple[Material, ...]
    parameters: Mapping[str, Any]
    metrics: Mapping[str, Any]


def parse_statement(content: bytes) -> Statement:
    """Read a statement, believing nothing about its form.

    Raises:
        ValueError: It is not a lineage statement; the message says where.
    """
    try:
        document = json.loads(content)
        predicate = document["predicate"]
        subjects = {one["name"]: one["digest"]["sha256"] for one in document["subject"]}
        materials = tuple(
            Material(
                name=one["name"],
                sha256=one["digest"]["sha256"],
                is_statement=one.get("mediaType") == STATEMENT_MEDIA_TYPE,
            )
            for one in predicate["materials"]
        )
        statement = Statement(
            sha256=hashlib.sha256(content).hexdigest(),
            stage=str(predicate["stage"]),
            subjects=subjects,
            materials=materials,
            parameters=dict(predicate["parameters"]),
            metrics=dict(predicate["metrics"]),
        )
        types = document["_type"], document["predicateType"]
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"is not a lineage statement ({type(error).__name__}: {error})") from None
    if types != (STATEMENT_TYPE, PREDICATE_TYPE):
        raise ValueError(f"is of type {types}, expected {(STATEMENT_TYPE, PREDICATE_TYPE)}")
    for name, digest in [*subjects.items(), *((one.name, one.sha256) for one in materials)]:
        if not isinstance(name, str) or not is_sha256(digest):
            raise ValueError(f"gives {name!r} the digest {digest!r}, expected 64 hex digits")
    if unsafe := [name for name in subjects if not is_safe_name(name)]:
        raise ValueError(f"names a file outside its directory: {unsafe[0]!r}")
    return statement
