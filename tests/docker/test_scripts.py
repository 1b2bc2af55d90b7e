"""docker/new_site.sh and certificates.sh where something is wrong: one sentence, nothing half-made.

What they make when all is well is in test_containers.py.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import write_records
from tests.docker.containers import DOCKER

NO_ENGINE = """#!/bin/sh
echo "$@" >> "$LOG"
exit 125
"""


def run_script(home: Path, script: str, *words: str, **variables: str) -> tuple[int, str]:
    """Run a script of docker/ from the directory above it, with an engine that always fails."""
    shim = home.parent / "bin" / "docker"
    shim.parent.mkdir(exist_ok=True)
    shim.write_text(NO_ENGINE)
    shim.chmod(0o755)
    path = f"{shim.parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", f"{home.name}/{script}", *words],
        cwd=home.parent,
        env={"PATH": path, "LOG": str(home.parent / "log"), **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A copy of docker/, with a coordinator's certificate, beside records and a model."""
    made = tmp_path / "docker"
    shutil.copytree(DOCKER, made, ignore=shutil.ignore_patterns("sites", "coordinator"))
    (made / "coordinator").mkdir()
    (made / "coordinator" / "ca.crt").write_text("a certificate")
    write_records(tmp_path / "records.jsonl", 2)
    (tmp_path / "base").mkdir()
    return made


root_only = pytest.mark.skipif(os.getuid() != 0, reason="the scripts are root's")


@root_only
@pytest.mark.parametrize(
    ("words", "model", "sentence"),
    [
        (["clinic"], "base", "expected NAME RECORDS.jsonl"),
        (["../x", "records.jsonl"], "base", "the site's name is '../x': expected small letters"),
        (["", "records.jsonl"], "base", "the site's name is ''"),
        (["clinic", "nowhere.jsonl"], "base", "nowhere.jsonl does not exist or is not a file"),
        (["clinic", "records.jsonl"], "", "FEDGE_BASE_MODEL is not set"),
        (["clinic", "records.jsonl"], "bose", "FEDGE_BASE_MODEL is bose, which is no directory"),
    ],
)
def test_a_wrong_word_to_new_site_is_one_sentence_and_makes_nothing(
    home: Path, words: list[str], model: str, sentence: str
) -> None:
    code, said = run_script(home, "new_site.sh", *words, FEDGE_BASE_MODEL=model)
    assert (code, said.count("\n"), sentence in said) == (2, 1, True), said
    assert not (home / "sites").exists()


@root_only
def test_new_site_can_be_typed_again_after_an_error_and_takes_relative_paths(home: Path) -> None:
    for _ in range(2):
        code, said = run_script(
            home, "new_site.sh", "clinic", "records.jsonl", FEDGE_BASE_MODEL="base"
        )
        assert (code, said) == (125, "")
        assert list((home / "sites").iterdir()) == []
    asked = (home.parent / "log").read_text()
    assert asked.count(f"-v {home.parent / 'base'}:/srv/base-model:ro") == 2
    (home / "sites" / "clinic").mkdir()
    code, said = run_script(home, "new_site.sh", "clinic", "records.jsonl", FEDGE_BASE_MODEL="base")
    assert (code, "sites/clinic exists already" in said) == (2, True)
    (home / "coordinator" / "ca.crt").unlink()
    code, said = run_script(home, "new_site.sh", "bank", "records.jsonl", FEDGE_BASE_MODEL="base")
    assert (code, "run certificates.sh first" in said) == (2, True)


@root_only
def test_certificates_are_made_whole_or_not_at_all(home: Path) -> None:
    code, said = run_script(home, "certificates.sh")
    assert (code, "coordinator exists already" in said) == (2, True)
    shutil.rmtree(home / "coordinator")
    code, _ = run_script(home, "certificates.sh", "no name, but a\nline")
    assert code not in (0, 2)
    assert not [path for path in home.iterdir() if "coordinator" in path.name]


@pytest.mark.parametrize("script", ["certificates.sh", "new_site.sh"])
def test_the_scripts_can_be_read_by_a_plain_shell(script: str) -> None:
    subprocess.run(["sh", "-n", DOCKER / script], check=True)
