import hashlib
import json
from pathlib import Path

from federation.lineage import sha256_of_file, statement_of, write_lineage


def artefact(directory: Path, content: str) -> Path:
    (directory / "sub").mkdir(parents=True)
    (directory / "weights").write_text(content)
    (directory / "sub" / "more").write_text(content * 2)
    return directory


def describe(directory: Path, **sources: Path) -> str:
    return write_lineage(
        directory,
        stage="test",
        directories=sources,
        digests={"x": "0" * 64},
        parameters={"a": 1},
        metrics={},
    )


def test_a_statement_names_every_file_and_not_itself(tmp_path: Path) -> None:
    made = artefact(tmp_path / "made", "w")
    digest = describe(made)
    raw = (made / "lineage.json").read_bytes()
    assert hashlib.sha256(raw).hexdigest() == digest
    statement = json.loads(raw)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert {s["name"]: s["digest"]["sha256"] for s in statement["subject"]} == {
        "weights": hashlib.sha256(b"w").hexdigest(),
        "sub/more": hashlib.sha256(b"ww").hexdigest(),
    }


def test_ancestors_travel_with_the_artefact_each_under_its_digest(tmp_path: Path) -> None:
    first = artefact(tmp_path / "first", "1")
    first_digest = describe(first)
    second = artefact(tmp_path / "second", "2")
    second_digest = describe(second, first=first)
    third = artefact(tmp_path / "third", "3")
    describe(third, second=second)
    kept = {path.stem: path for path in (third / "lineage").iterdir()}
    assert kept.keys() == {first_digest, second_digest}
    for digest, path in kept.items():
        assert sha256_of_file(path) == digest
    (material, _) = json.loads((third / "lineage.json").read_text())["predicate"]["materials"]
    assert material["name"] == "second"
    assert material["digest"]["sha256"] == second_digest


def test_a_directory_from_elsewhere_is_described_by_its_files(tmp_path: Path) -> None:
    foreign = artefact(tmp_path / "foreign", "f")
    made = artefact(tmp_path / "made", "m")
    describe(made, base_model=foreign)
    (path,) = (made / "lineage").iterdir()
    statement = json.loads(path.read_text())
    assert statement["predicate"]["stage"] == "external"
    assert {s["name"] for s in statement["subject"]} == {"weights", "sub/more"}
    assert not (foreign / "lineage.json").exists()
    assert path.read_bytes() == statement_of(foreign)


def test_the_same_artefact_gives_the_same_bytes(tmp_path: Path) -> None:
    one, two = artefact(tmp_path / "one", "w"), artefact(tmp_path / "two", "w")
    assert describe(one) == describe(two)
