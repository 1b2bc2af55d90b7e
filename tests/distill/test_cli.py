import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.model import load_model
from distill.cli import app
from federation.errors import UserError
from tests.conftest import write_records, write_tiny_model


def run(*arguments: object) -> dict[str, object]:
    """Run the command in this process; our own errors come out as they are raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_plan_names_the_shape_and_needs_no_weights_in_memory(tiny_model: Path) -> None:
    program = (
        "import sys; from distill.cli import main; sys.argv[0] = 'distill'\n"
        "try: main()\nfinally: assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [
            *(sys.executable, "-c", program, "--teacher", str(tiny_model)),
            *("--student", "0.9x", "--plan", "--json"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    plan = json.loads(done.stdout)
    assert plan["student"]["params"] <= 0.9 * plan["teacher"]["params"]
    assert plan["why"].startswith("keeps ")
    assert plan["runners_up"]


def test_flags_and_settings_file_reach_the_run(tiny_model: Path, tmp_path: Path) -> None:
    settings = tmp_path / "distill.toml"
    settings.write_text(
        'calibration_records = 4\n[training]\ndtype = "float32"\nnum_steps = 9\nwarmup_steps = 0\n'
    )
    report = run(
        *("--teacher", tiny_model, "--student", "0.6x", "--settings", settings, "--json"),
        *("--data", write_records(tmp_path / "data.jsonl", 20), "--out", tmp_path / "student"),
        *("--steps", 2, "--batch-size", 2, "--max-tokens", 64),
    )
    assert report["steps"] == 2
    statement = json.loads((tmp_path / "student" / "lineage.json").read_text())
    parameters = statement["predicate"]["parameters"]
    assert parameters["calibration_records"] == 4
    assert parameters["training"]["dtype"] == "float32"
    assert parameters["training"]["num_steps"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--data": "missing.jsonl"}, "missing.jsonl does not exist"),
        ({"--data": "empty.jsonl"}, "empty.jsonl holds no record"),
        ({"--data": "broken.jsonl"}, "broken.jsonl:2: not JSON"),
        ({"--teacher": "nowhere"}, "nowhere does not exist"),
        ({"--adapter": "nowhere"}, "adapter_model.safetensors is missing"),
        ({"--student": "3b"}, "not smaller than its teacher"),
        ({"--student": "0.001x"}, "the smallest has"),
        ({"--student": "tiny"}, "neither a size nor a model directory"),
        ({"--student": "other"}, "another tokenizer"),
        ({"--out": "other"}, "exists already"),
        ({"--steps": "0"}, "num_steps"),
        ({"--temperature": "0"}, "temperature"),
        ({"--heldout": "missing.jsonl"}, "missing.jsonl does not exist"),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, tmp_path / "other")
    write_tiny_model(tmp_path / "other", hidden=32)
    tokenizer = tmp_path / "other" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<|endoftext|>", "<|other|>"))
    write_records(tmp_path / "data.jsonl", 10)
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt"\n')
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    arguments = {
        "--teacher": str(tiny_model),
        "--student": "0.6x",
        "--data": "data.jsonl",
        "--out": "student",
        **change,
    }
    with pytest.raises(UserError, match=message) as refusal:
        run(*(part for pair in arguments.items() for part in pair))
    assert refusal.value.exit_code == 2
    assert "\n" not in str(refusal.value)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_tokenizer_that_knows_more_than_the_model_is_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_model, teacher)
    model = load_model(teacher, "float32")
    model.resize_token_embeddings(256, mean_resizing=False)
    model.save_pretrained(teacher)
    data = write_records(tmp_path / "data.jsonl", 10)
    with pytest.raises(UserError, match="tokenizer mismatch"):
        run(
            *("--teacher", teacher, "--student", "0.6x"),
            *("--data", data, "--out", tmp_path / "student"),
        )
    assert {path.name for path in tmp_path.iterdir()} == {"teacher", "data.jsonl"}


def test_training_settings_that_are_no_table_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text("training = 5\n")
    data = write_records(tmp_path / "data.jsonl", 8)
    with pytest.raises(UserError, match="training is 5: expected a table"):
        run(
            *("--teacher", tiny_model, "--student", "0.9x", "--data", data),
            *("--out", tmp_path / "out", "--settings", settings),
        )
    assert not (tmp_path / "out").exists()


def test_a_student_that_should_be_private_is_refused_before_anything_is_written(
    tiny_model: Path, tmp_path: Path
) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text("[training]\nnoise_multiplier = 1.0\ncheckpoint_every = 0\n")
    data = write_records(tmp_path / "data.jsonl", 8)
    with pytest.raises(UserError, match="noise_multiplier is 1 where records"):
        run(
            *("--teacher", tiny_model, "--student", "0.9x", "--data", data),
            *("--out", tmp_path / "out", "--settings", settings),
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "settings.toml"]
