"""Walk an artefact's lineage back to its first byte, and name every byte that is not as it was.

``verify`` believes nothing it has not hashed. It collects every disagreement instead of stopping
at the first, and tells the ancestors it saw on disk from those it knows only by digest. What it
cannot see is a lineage.json whose parameters or metrics were edited before anything signed it:
the digest in a signed release closes that gap (``expected``).
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge.errors import UserError
from edge.lineage import Statement, parse_statement, sha256_of_file, subject_names


@dataclass(frozen=True)
class Problem:
    """One disagreement between a statement and the bytes on disk."""

    artefact: str
    file: str
    what: str
    expected: str = ""
    seen: str = ""

    def __str__(self) -> str:
        digests = [f"expected sha256 {self.expected}"] if self.expected else []
        digests += [f"found sha256 {self.seen}"] if self.seen else []
        # Names and roles come from foreign statements and directories.
        text = f"{_plain(self.artefact)}: {_plain(self.file)} {_plain(self.what)}"
        return text + "".join(f", {one}" for one in digests)


@dataclass
class Walk:
    """What ``verify`` found on the way back."""

    path: Path
    root: str
    """sha256 of the artefact's own lineage.json."""
    statements: dict[str, Statement] = field(default_factory=dict)
    """The artefact and every ancestor whose statement is whole, by sha256, nearest first."""
    roles: dict[str, str] = field(default_factory=dict)
    """The first name under which each digest was reached."""
    rehashed: dict[str, list[Path]] = field(default_factory=dict)
    """Directories (of statements) and files (of other materials) hashed and found whole."""
    problems: list[Problem] = field(default_factory=list)
    digests: dict[Path, str] = field(default_factory=dict, repr=False)
    """sha256 of each file read so far: rounds share file names, each is compared with all."""

    def sha256_of(self, file: Path) -> str:
        """Return the sha256 of a file, read once in this walk."""
        if file not in self.digests:
            self.digests[file] = sha256_of_file(file)
        return self.digests[file]

    def label(self, sha256: str) -> str:
        """Return a name for people: role, round where there is one, first digits of the digest."""
        statement = self.statements.get(sha256)
        server_round = statement.parameters.get("server_round") if statement else None
        of_round = "" if server_round is None else f" of round {_short(server_round)}"
        return f"{_plain(self.roles.get(sha256, 'artefact'))}{of_round} {sha256[:12]}"

    def as_json(self) -> dict[str, Any]:
        """Return the walk as one JSON object, nearest ancestor first."""
        return {
            "path": str(self.path),
            "ok": not self.problems,
            "lineage": self.root,
            "artefacts": [
                {
                    "sha256": sha256,
                    "role": self.roles[sha256],
                    "stage": one.stage,
                    "files": dict(one.subjects),
                    "materials": [vars(material) for material in one.materials],
                    "parameters": dict(one.parameters),
                    "metrics": dict(one.metrics),
                    "rehashed": [str(path) for path in self.rehashed.get(sha256, [])],
                }
                for sha256, one in self.statements.items()
            ],
            "problems": [vars(problem) for problem in self.problems],
        }


def verify(path: Path, sources: Sequence[Path] = (), expected: str | None = None) -> Walk:
    """Hash an artefact and walk its lineage back as far as statements and ``sources`` reach.

    Cost: one read of every file of ``path`` and of each ancestor found in ``sources``.

    Args:
        path: An artefact directory, or a link to one (a device's `current`).
        sources: Directories searched, at any depth, for ancestors: a directory that carries an
            ancestor's statement, a model from elsewhere by its file names, and for a material
            known by digest a file named `<sha256>` or `<sha256>.*`, or the wheel of its name.
        expected: sha256 of lineage.json as a signed release gives it.

    Returns:
        The walk. It holds when ``problems`` is empty.

    Raises:
        UserError: ``path`` has no lineage.json, or a source is no directory.
    """
    own = path / "lineage.json"
    if not own.is_file():
        raise UserError(f"{path} holds no lineage.json: name the directory of a finished artefact")
    if missing := [source for source in sources if not source.is_dir()]:
        raise UserError(f"--source {missing[0]} is not a directory")
    content = own.read_bytes()
    walk = Walk(path=path, root=hashlib.sha256(content).hexdigest())
    if expected is not None and walk.root != expected:
        problem = Problem(str(path), "lineage.json", "is not the signed one", expected, walk.root)
        walk.problems.append(problem)
    try:
        statement = parse_statement(content)
    except ValueError as error:
        walk.problems.append(Problem(str(path), "lineage.json", str(error)))
        return walk
    walk.statements[walk.root] = statement
    walk.roles[walk.root] = statement.stage
    _record(walk, path, statement, _file_problems(walk, path, statement))
    _walk_back(walk)
    if sources:
        _search(walk, sources)
    return walk


def _file_problems(walk: Walk, directory: Path, statement: Statement) -> list[Problem]:
    """Hash the files of one artefact: missing, changed and unlisted ones are each named."""
    artefact = f"{walk.label(statement.sha256)} ({directory})"
    problems = []
    for name, expected in statement.subjects.items():
        file = directory / name
        if not file.is_file():
            problems.append(Problem(artefact, name, "is missing", expected))
        elif (seen := walk.sha256_of(file)) != expected:
            problems.append(Problem(artefact, name, "was changed", expected, seen))
    unlisted = sorted(set(subject_names(directory)) - set(statement.subjects))
    return problems + [Problem(artefact, name, "is not listed there") for name in unlisted]


def _record(walk: Walk, directory: Path, statement: Statement, problems: list[Problem]) -> None:
    walk.problems += problems
    if not problems:
        walk.rehashed.setdefault(statement.sha256, []).append(directory)


def _walk_back(walk: Walk) -> None:
    """Read every ancestor's statement from lineage/, each proven by the digest that named it."""
    folder = walk.path / "lineage"
    waiting = [walk.statements[walk.root]]
    tried = {walk.root}
    has_gap = False
    while waiting:
        for material in waiting.pop(0).materials:
            walk.roles.setdefault(material.sha256, material.name)
            if not material.is_statement or material.sha256 in tried:
                continue
            tried.add(material.sha256)
            ancestor = _read_ancestor(walk, folder / f"{material.sha256}.json", material.sha256)
            if ancestor is None:
                has_gap = True
            else:
                walk.statements[ancestor.sha256] = ancestor
                waiting.append(ancestor)
    if has_gap:
        return  # what lies behind the gap cannot be told from what does not belong
    known = {f"{sha256}.json" for sha256 in walk.statements}
    for file in sorted(entry for entry in folder.rglob("*") if entry.is_file()):
        if (name := file.relative_to(folder).as_posix()) not in known:
            walk.problems.append(Problem(str(walk.path), f"lineage/{name}", "is no ancestor's"))


def _read_ancestor(walk: Walk, file: Path, sha256: str) -> Statement | None:
    artefact, name = f"statement of {walk.label(sha256)}", f"lineage/{file.name}"
    if not file.is_file():
        walk.problems.append(Problem(artefact, name, "is missing", sha256))
        return None
    content = file.read_bytes()
    if (seen := hashlib.sha256(content).hexdigest()) != sha256:
        walk.problems.append(Problem(artefact, name, "was altered", sha256, seen))
        return None
    try:
        return parse_statement(content)
    except ValueError as error:
        walk.problems.append(Problem(artefact, name, str(error)))
        return None


def _search(walk: Walk, sources: Sequence[Path]) -> None:
    """Find ancestors on disk and hash them too.

    A directory from elsewhere carries no statement, so it is known by its file names; when no
    whole copy of it turns up, the copies that share at least one file are what was changed.
    """
    materials = _material_files(walk)
    suspects: dict[str, list[Problem]] = {}
    for source in sources:
        found = _progress(walk, suspects)
        for directory, names in _directories(source, skip=walk.path.resolve()):
            if "lineage.json" in names:
                _check_descendant(walk, directory)
            else:
                _check_foreign(walk, directory, suspects)
            for name in names:
                if wanted := materials.get(_material_key(name)):
                    _check_material(walk, directory / name, wanted)
        is_useless = found == _progress(walk, suspects)
        if is_useless and not walk.problems:  # behind a gap an ancestor cannot be told
            walk.problems.append(Problem("--source", str(source), "holds no ancestor of this one"))
    for sha256, problems in suspects.items():
        if sha256 not in walk.rehashed:
            walk.problems += problems


def _progress(walk: Walk, suspects: dict[str, list[Problem]]) -> tuple[int, int, int]:
    return len(walk.problems), sum(map(len, walk.rehashed.values())), len(suspects)


def _directories(source: Path, skip: Path) -> Iterator[tuple[Path, list[str]]]:
    for here, folders, names in os.walk(source):
        folders[:] = sorted(
            folder for folder in folders if folder != "lineage" and not folder.startswith(".")
        )
        if Path(here).resolve() != skip:
            yield Path(here), sorted(names)


def _check_descendant(walk: Walk, directory: Path) -> None:
    """Hash a directory that carries an ancestor's statement, or its files under another one."""
    seen = walk.sha256_of(directory / "lineage.json")
    for sha256, ancestor in walk.statements.items():
        if sha256 == seen != walk.root:
            _record(walk, directory, ancestor, _file_problems(walk, directory, ancestor))
        elif sha256 not in {walk.root, seen} and ancestor.stage != "external":
            files = [(directory / name, digest) for name, digest in ancestor.subjects.items()]
            if files and all(
                file.is_file() and walk.sha256_of(file) == digest for file, digest in files
            ):
                artefact = f"{walk.label(sha256)} ({directory})"
                problem = Problem(artefact, "lineage.json", "was altered", sha256, seen)
                walk.problems.append(problem)


def _check_foreign(walk: Walk, directory: Path, suspects: dict[str, list[Problem]]) -> None:
    for sha256, ancestor in walk.statements.items():
        if ancestor.stage != "external" or sha256 == walk.root:
            continue
        if not all((directory / name).is_file() for name in ancestor.subjects):
            continue
        problems = _file_problems(walk, directory, ancestor)
        if not problems:
            _record(walk, directory, ancestor, problems)
        elif sum(problem.file in ancestor.subjects for problem in problems) < len(
            ancestor.subjects
        ):
            suspects.setdefault(sha256, []).extend(problems)


def _material_files(walk: Walk) -> dict[str, set[str]]:
    """Return the digests of the materials known by digest, by ``_material_key``."""
    files: dict[str, set[str]] = {}
    for statement in walk.statements.values():
        for material in statement.materials:
            if not material.is_statement:
                files.setdefault(material.sha256, set()).add(material.sha256)
                if material.name.startswith("pkg:"):
                    files.setdefault(material.name, set()).add(material.sha256)
    return files


def _material_key(file_name: str) -> str:
    """Return what a material in a file of this name is called: its package URL, or its digest.

    https://github.com/package-url/purl-spec has `pkg:pypi/NAME@VERSION` for a wheel from PyPI.
    """
    if file_name.endswith(".whl") and file_name.count("-") >= 4:
        name, version, _ = file_name.split("-", maxsplit=2)
        return f"pkg:pypi/{name.replace('_', '-').lower()}@{version}"
    return file_name.split(".", maxsplit=1)[0]


def _check_material(walk: Walk, file: Path, wanted: set[str]) -> None:
    """Hash a file that by its name is one of the ``wanted`` materials."""
    if (seen := walk.sha256_of(file)) in wanted:
        walk.rehashed.setdefault(seen, []).append(file)
    else:
        expected = min(wanted)
        walk.problems.append(
            Problem(walk.label(expected), str(file), "was changed", expected, seen)
        )


def describe(walk: Walk) -> list[str]:
    """Return the walk as indented lines, each artefact above what it was made from.

    Artefacts of one stage in a row (the rounds of a federation) stand under each other, not in
    each other. Digests are whole, so that they can be searched for.
    """
    lines: list[str] = []
    shown: set[str] = set()
    waiting = [(0, walk.roles.get(walk.root, "artefact"), walk.root)]
    while waiting:
        depth, role, sha256 = waiting.pop()
        indent = "  " * depth
        statement = walk.statements.get(sha256)
        if statement is None:
            lines.append(f"{indent}{_plain(role)} {sha256}: statement missing or altered")
            continue
        server_round = statement.parameters.get("server_round")
        of_round = "" if server_round is None else f" of round {_short(server_round)}"
        head = f"{indent}{_plain(role)}{of_round} {sha256}"
        if sha256 in shown:
            lines.append(f"{head}: see above")
            continue
        shown.add(sha256)
        lines.append(f"{head} ({_plain(statement.stage)}, {_whereabouts(walk, sha256)})")
        lines += [f"{indent}  . {line}" for line in _details(walk, statement)]
        for material in reversed([one for one in statement.materials if one.is_statement]):
            ancestor = walk.statements.get(material.sha256)
            is_same_stage = ancestor is not None and ancestor.stage == statement.stage
            waiting.append((depth + (not is_same_stage), material.name, material.sha256))
    num_hashed = sum(sha256 in walk.rehashed for sha256 in walk.statements)
    lines.append(f"artefacts: {len(walk.statements)}, of which hashed on disk: {num_hashed}")
    return lines


def _details(walk: Walk, statement: Statement) -> list[str]:
    lines = [
        f"{title}: " + ", ".join(f"{_plain(name)}={_short(value)}" for name, value in items.items())
        for title, items in (
            ("parameters", statement.parameters),
            ("metrics", statement.metrics),
        )
        if items
    ]
    return lines + [
        f"{_plain(one.name)} {one.sha256} ({_whereabouts(walk, one.sha256)})"
        for one in statement.materials
        if not one.is_statement
    ]


def _whereabouts(walk: Walk, sha256: str) -> str:
    places = [_plain(str(place)) for place in walk.rehashed.get(sha256, ())]
    return f"hashed in {', '.join(places)}" if places else "known by digest"


def _short(value: object) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 100 else f"{text[:99]}…"


def _plain(text: str) -> str:
    """Return text that cannot steer a terminal."""
    return text if text.isprintable() else repr(text)
