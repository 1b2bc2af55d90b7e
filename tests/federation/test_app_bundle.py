"""What flwr makes of an app and of -c, and the names of flwr by which it is asked."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import flwr
import pytest

from federation.app_bundle import bundle_digest, run_config
from federation.settings import SettingsError
from tests.private_names import TESTED, parameters, unlisted

ROOT = Path(__file__).parents[2]


def write_app(directory: Path) -> Path:
    """Copy what of this project is in its bundle; the project may hold a large .venv beside it."""
    for room in ("federation", "client"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / room, directory / room, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, directory)
    return directory


FUNCTIONS = {
    "flwr.cli.build.build_fab_from_disk": "app",
    "flwr.common.config.get_fused_config_from_dir": "project_dir override_config",
    "flwr.common.config.parse_config_args": "config flatten",
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_functions_are_those_of_the_tested_versions(name: str) -> None:
    assert flwr.__version__ in TESTED
    assert parameters(name) == FUNCTIONS[name].split()


def test_every_private_name_is_in_the_list() -> None:
    assert unlisted(ROOT / "federation" / "app_bundle.py", FUNCTIONS, []) == []


def test_the_digest_is_that_of_the_file_that_flwr_builds(tmp_path: Path) -> None:
    app = write_app(tmp_path / "app")
    code = "from flwr.cli.app import app; app()"
    command = [sys.executable, "-c", code, "build", "--app", str(app)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (bundle,) = tmp_path.glob("*.fab")
    assert bundle_digest(app) == hashlib.sha256(bundle.read_bytes()).hexdigest()


def test_settings_come_from_texts_or_from_one_file_and_the_rest_from_the_app(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run.toml"
    path.write_text("num_rounds = 9\ntraining.num_steps = 3\n[wire]\nuplink = 'int8'\n")
    given = {"num_rounds": 9, "training.num_steps": 3, "wire.uplink": "int8"}
    for texts in ([str(path)], ["num_rounds=9 training.num_steps=3", "wire.uplink='int8'"]):
        overrides, values = run_config(ROOT, texts)
        assert overrides == given
        assert values == run_config(ROOT, [])[1] | given


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (["num_round=3"], "'num_round' is no setting of the app"),
        (["num_rounds=three"], "invalid format"),
        (["none.toml"], "none.toml cannot be read"),
    ],
)
def test_what_is_no_setting_is_one_sentence(given: list[str], fault: str) -> None:
    with pytest.raises(SettingsError, match="^-c: ") as caught:
        run_config(ROOT, given)
    assert fault in str(caught.value)


def test_a_directory_without_an_app_has_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="pass the directory of the app"):
        bundle_digest(tmp_path)
    with pytest.raises(SettingsError, match=r"pyproject.toml.*pass the directory of the app"):
        run_config(tmp_path, [])
