"""Where an artefact comes from: an in-toto Statement v1 beside its files.

Every artefact directory carries `lineage.json` (its own statement) and `lineage/` (the statements
of all its ancestors, each named by the sha256 of its bytes). A statement names its files by digest
(subject) and what they were made from (materials): a directory by the digest of *its* statement,
anything else by its own digest. So one signed digest at the end of the line, on a device, fixes
every byte of every stage before it, and the walk back needs no network. `edge verify` walks it.

There is no time and no host name in a statement: the same run gives the same bytes.
Format: https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md
"""

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from federation.atomic import write_atomically

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


def write_lineage(
    directory: Path,
    *,
    stage: str,
    directories: Mapping[str, Path],
    digests: Mapping[str, str],
    parameters: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> str:
    """Describe the files of ``directory`` and their sources; return the statement's sha256.

    Args:
        directory: The finished artefact. `lineage.json` and `lineage/` are written into it.
        stage: What made it: "fetch", "federate", "distill", "build".
        directories: Artefact directories it was made from, by role ("base_model", "adapter").
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
    """Return an artefact's statement; one from elsewhere is described by its files."""
    own = directory / "lineage.json"
    if own.is_file():
        return own.read_bytes()
    stats = ((name, (directory / name).stat()) for name in sorted(_subject_names(directory)))
    return _external_statement(directory, tuple((n, s.st_size, s.st_mtime_ns) for n, s in stats))


@lru_cache(maxsize=4)
def _external_statement(directory: Path, _files: tuple[tuple[str, int, int], ...]) -> bytes:
    """Describe files from elsewhere; a run asks for those of its base model every round."""
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
            for name in sorted(_subject_names(directory))
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


def _subject_names(directory: Path) -> list[str]:
    names = (
        path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()
    )
    return [name for name in names if name != "lineage.json" and not name.startswith("lineage/")]
