"""What a run carries to a site: our code, and nothing that lies beside it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bundle(tmp_path: Path) -> set[str]:
    """The names in the bundle that `flwr build` makes of this project, secrets planted in it."""
    project = tmp_path / "project"
    skipped = shutil.ignore_patterns(
        ".git", ".venv", "demo", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis", "build"
    )
    shutil.copytree(ROOT, project, ignore=skipped)
    for place in (
        "data/secret.jsonl",
        "federation/secret.jsonl",
        "client/secret.toml",
        "client/patients.json",
        "secret.md",
        "notes.yaml",
        "edge/secret.py",
    ):
        path = project / place
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"prompt": "Mrs Jones", "response": "has a fever"}\n')
    subprocess.run(
        [Path(sys.executable).parent / "flwr", "build", "--app", project],
        cwd=tmp_path,
        env=os.environ
        | {
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_HOME": str(tmp_path / "home"),
        },
        check=True,
        capture_output=True,
    )
    (fab,) = [*tmp_path.glob("*.fab"), *project.glob("*.fab")]
    with zipfile.ZipFile(fab) as archive:
        for name in archive.namelist():
            assert b"Mrs Jones" not in archive.read(name)
        return set(archive.namelist())


def test_the_bundle_holds_two_rooms_and_nothing_else(bundle: set[str]) -> None:
    ours = {
        path.relative_to(ROOT).as_posix()
        for room in ("federation", "client")
        for path in (ROOT / room).rglob("*.py")
    }
    assert bundle == ours | {"README.md", "LICENSE", "pyproject.toml", ".info/CONTENT"}
    assert {"federation/server_app.py", "client/client_app.py"} <= bundle


def test_what_the_bundle_imports_at_the_top_is_light() -> None:
    """Flower starts a process for every message: torch at import would cost seconds each time."""
    code = (
        "import sys, federation.server_app, client.client_app; "
        "heavy = {'torch', 'transformers', 'peft', 'ray'} & set(sys.modules); print(sorted(heavy))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
