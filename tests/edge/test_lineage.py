import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import federation.lineage
from edge import lineage
from edge.errors import UserError
from edge.lineage import is_safe_name, parse_statement
from edge.verification import describe, verify
from tests.edge.artefacts import Chain, flip_bit, write_build, write_chain, write_model


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return write_chain(tmp_path)


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("source", ["student", "foreign"])
def test_both_rooms_write_the_same_bytes(chain: Chain, tmp_path: Path, source: str) -> None:
    write_model(tmp_path / "foreign", seed=9)
    written = []
    for write in (lineage.write_lineage, federation.lineage.write_lineage):
        directory = tmp_path / write.__module__
        (directory / "onnx").mkdir(parents=True)
        (directory / "onnx" / "model.onnx").write_bytes(b"weights")
        digest = write(
            directory,
            stage="build",
            directories={"model": tmp_path / source},
            digests={"heldout": "ab" * 32},
            parameters={"format": "gguf:q4_k", "umlaut": "ä"},
            metrics={"kl": 0.125},
        )
        written.append((digest, files_of(directory)))
    assert written[0] == written[1]
    assert any(name.startswith("lineage/") for name in written[0][1])


def test_a_whole_chain_holds_and_every_ancestor_is_hashed(chain: Chain) -> None:
    walk = verify(chain.build, [chain.root])
    assert walk.problems == []
    hashed = {path.resolve() for paths in walk.rehashed.values() for path in paths}
    directories = {chain.build, chain.student, chain.base_model, *chain.rounds}
    assert hashed == {path.resolve() for path in (*directories, chain.wheel)}
    assert [walk.statements[sha256].stage for sha256 in walk.statements][:2] == ["build", "distill"]


def test_the_description_names_student_rounds_updates_base_model_and_package(chain: Chain) -> None:
    text = "\n".join(describe(verify(chain.build)))
    for digest in chain.updates.values():
        assert text.count(digest) == 1
    for artefact in (chain.build, chain.student, chain.base_model, *chain.rounds):
        assert lineage.sha256_of_file(artefact / "lineage.json") in text
    assert lineage.sha256_of_file(chain.wheel) in text
    places = [text.index(word) for word in ("build ", "model ", "of round 3", "of round 2")]
    assert places == sorted(places)


def test_without_sources_ancestors_are_known_by_digest_only(chain: Chain) -> None:
    walk = verify(chain.build)
    assert walk.problems == []
    assert list(walk.rehashed) == [walk.root]


def statement_file(chain: Chain, artefact: Path) -> Path:
    return chain.build / "lineage" / f"{lineage.sha256_of_file(artefact / 'lineage.json')}.json"


PLACES: dict[str, Callable[[Chain], Path]] = {
    "a file of the build": lambda chain: chain.build / "model.gguf",
    "the student's statement": lambda chain: statement_file(chain, chain.student),
    "a round's statement": lambda chain: statement_file(chain, chain.rounds[0]),
    "the base model's statement": lambda chain: statement_file(chain, chain.base_model),
    "the student's weights": lambda chain: chain.student / "model.safetensors",
    "the student's lineage": lambda chain: chain.student / "lineage.json",
    "a round's adapter": lambda chain: chain.rounds[1] / "adapter_model.safetensors",
    "the base model's weights": lambda chain: chain.base_model / "model.safetensors",
    "the fetched package": lambda chain: chain.wheel,
}


@pytest.mark.parametrize("place", PLACES)
def test_one_changed_bit_is_named_with_both_digests(chain: Chain, place: str) -> None:
    file = PLACES[place](chain)
    expected = lineage.sha256_of_file(file)
    flip_bit(file)
    problems = verify(chain.build, [chain.root]).problems
    assert [(one.expected, one.seen) for one in problems] == [
        (expected, lineage.sha256_of_file(file))
    ]
    assert file.name in str(problems[0])


def test_a_changed_own_statement_breaks_the_walk(chain: Chain) -> None:
    expected = lineage.sha256_of_file(chain.build / "lineage.json")
    content = (chain.build / "lineage.json").read_text()
    (chain.build / "lineage.json").write_text(content.replace('"kl": 0.01', '"kl": 0.00'))
    assert (chain.build / "lineage.json").read_text() != content
    # Only a digest from outside can show this: the one that a release signed.
    assert verify(chain.build).problems == []
    problems = verify(chain.build, expected=expected).problems
    assert [(one.file, one.expected) for one in problems] == [("lineage.json", expected)]


def test_every_problem_is_collected(chain: Chain) -> None:
    flip_bit(chain.build / "model.gguf")
    (chain.build / "tokenizer.json").unlink()
    (chain.build / "extra.bin").write_bytes(b"?")
    statement_file(chain, chain.student).unlink()
    found = [(one.file, one.what) for one in verify(chain.build).problems]
    assert found == [
        ("model.gguf", "was changed"),
        ("tokenizer.json", "is missing"),
        ("extra.bin", "is not listed there"),
        (f"lineage/{lineage.sha256_of_file(chain.student / 'lineage.json')}.json", "is missing"),
    ]


def test_a_statement_that_no_ancestor_names_is_a_problem(chain: Chain) -> None:
    (chain.build / "lineage" / f"{'0' * 64}.json").write_text("{}")
    problems = verify(chain.build).problems
    assert [one.what for one in problems] == ["is no ancestor's"]


def test_a_model_from_elsewhere_is_found_and_its_changed_weights_are_named(tmp_path: Path) -> None:
    foreign = write_model(tmp_path / "models" / "foreign", seed=5)
    build = write_build(tmp_path / "build", model=foreign)
    assert verify(build, [tmp_path / "models"]).problems == []
    flip_bit(foreign / "model.safetensors")
    problems = verify(build, [tmp_path / "models"]).problems
    assert [one.file for one in problems] == ["model.safetensors"]


def test_a_sibling_with_the_same_tokenizer_is_not_blamed(tmp_path: Path) -> None:
    foreign = write_model(tmp_path / "models" / "foreign", seed=5)
    write_model(tmp_path / "models" / "sibling", seed=6)
    build = write_build(tmp_path / "build", model=foreign)
    assert verify(build, [tmp_path / "models"]).problems == []


def test_an_unrelated_artefact_with_a_shared_file_is_not_blamed(chain: Chain) -> None:
    other = chain.root / "run" / "local-only"
    shutil.copytree(chain.rounds[0], other)
    (other / "adapter_model.safetensors").write_bytes(b"trained alone")
    shutil.rmtree(other / "lineage")
    (other / "lineage.json").unlink()
    lineage.write_lineage(
        other, stage="train", directories={}, digests={}, parameters={}, metrics={}
    )
    assert verify(chain.build, [chain.root]).problems == []


def test_a_source_that_holds_no_ancestor_is_named(chain: Chain, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    problems = verify(chain.build, [tmp_path / "elsewhere"]).problems
    assert [one.what for one in problems] == ["holds no ancestor of this one"]


def test_a_directory_without_lineage_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no lineage\.json"):
        verify(tmp_path)


def test_a_statement_may_not_name_a_file_outside(chain: Chain) -> None:
    own = chain.build / "lineage.json"
    content = own.read_text().replace('"model.gguf"', '"../../secret"')
    own.write_text(content)
    problems = verify(chain.build).problems
    assert len(problems) == 1
    assert "outside its directory" in problems[0].what


@given(st.recursive(st.none() | st.integers() | st.text(), st.lists))
def test_a_statement_of_any_other_form_is_a_value_error(document: object) -> None:
    with pytest.raises(ValueError, match="is not a lineage statement"):
        parse_statement(json.dumps(document).encode())


def test_a_deeply_nested_statement_is_refused() -> None:
    with pytest.raises(ValueError, match="is not a lineage statement"):
        parse_statement(b"[" * 200_000)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "/etc/passwd", "a//b", "a/../b", "a/", "a\\b", "a\0b", "a\nb", "x" * 256, 7],
)
def test_unsafe_names_are_told(name: object) -> None:
    assert not is_safe_name(name)


@given(st.text(min_size=1, max_size=40))
def test_a_safe_name_stays_inside_its_directory(name: str) -> None:
    inside = Path("/base/dir")
    if is_safe_name(name):
        assert (inside / name).resolve().is_relative_to(inside)
        assert (inside / name).resolve() != inside


def test_each_file_is_read_once_whatever_the_number_of_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = write_chain(tmp_path, num_rounds=6)
    read: list[Path] = []

    def counted(path: Path) -> str:
        read.append(path)
        return lineage.sha256_of_file(path)

    monkeypatch.setattr("edge.verification.sha256_of_file", counted)
    assert verify(chain.build, [chain.root]).problems == []
    assert len(read) == len(set(read))


def test_a_foreign_name_cannot_steer_the_terminal(tmp_path: Path) -> None:
    artefact, source = tmp_path / "artefact", tmp_path / "source"
    write_model(source, seed=1)
    lineage.write_lineage(
        source,
        stage="external",
        directories={},
        digests={},
        parameters={"server_round": "\x1b[2J"},
        metrics={},
    )
    write_model(artefact, seed=2)
    lineage.write_lineage(
        artefact,
        stage="build",
        directories={"\x1b[31mmodel": source},
        digests={"\x1b]0;x\x07": "ab" * 32},
        parameters={},
        metrics={},
    )
    (artefact / "un\x1blisted").write_bytes(b"")
    (tmp_path / ("ab" * 32)).write_bytes(b"something else")
    flip_bit(source / "model.safetensors")
    walk = verify(artefact, [tmp_path])
    assert len(walk.problems) > 1
    for line in (*describe(walk), *map(str, walk.problems), *map(walk.label, walk.roles)):
        assert line.isprintable(), repr(line)
