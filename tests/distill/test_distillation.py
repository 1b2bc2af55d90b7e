import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from client.batches import collate
from client.model import load_model
from client.records import DataError
from client.settings import TrainingSettings
from distill.comparison import HeldOut
from distill.distillation import Inputs, distil, read_splits
from distill.settings import DistillationSettings
from federation.adapter import initial_adapter, write_adapter
from federation.errors import UserError
from tests.conftest import write_records, write_tiny_model
from tests.distill.models import examples_of

SETTINGS = DistillationSettings(
    calibration_records=8,
    training=TrainingSettings(
        num_steps=30,
        batch_size=4,
        learning_rate=3e-3,
        schedule="cosine",
        warmup_steps=2,
        max_tokens=64,
        checkpoint_every=2,
        dtype="float32",
    ),
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_tiny_model(tmp_path_factory.mktemp("teacher") / "model", num_layers=4)
    (directory / "LICENSE").write_text("the teacher's licence")
    # Random logits of so small a model are nearly flat; sharper ones give the KL something to lose.
    model = load_model(directory, "float32")
    with torch.no_grad():
        model.model.norm.weight.mul_(30)
    model.save_pretrained(directory)
    return directory


def inputs_for(teacher: Path, tmp_path: Path, student: str = "0.6x") -> Inputs:
    data = write_records(tmp_path / "data.jsonl", 60)
    return Inputs(teacher, None, student, (data,), (), tmp_path / "student")


def test_student_directory_is_whole_and_closer_to_the_teacher(
    teacher: Path, tmp_path: Path
) -> None:
    inputs = inputs_for(teacher, tmp_path)
    report = distil(inputs, SETTINGS)
    out = inputs.out
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl", "student"}
    assert report["end"]["kl"] < 0.8 * report["start"]["kl"]
    assert report["steps"] == len(report["curve"]) == 30
    assert report["tokens"] > 0
    assert json.loads((out / "report.json").read_text()) == report

    student = AutoModelForCausalLM.from_pretrained(out)
    assert sum(p.numel() for p in student.parameters()) == report["student"]["params"]
    assert student.config.use_cache
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(teacher).chat_template
    assert (out / "LICENSE").read_text() == "the teacher's licence"

    page = (out / "report.html").read_text()
    assert "<polyline" in page
    assert not re.search(r"<script|<link|https?://|src=", page)
    statement = json.loads((out / "lineage.json").read_text())
    assert statement["predicate"]["stage"] == "distill"
    assert {material["name"] for material in statement["predicate"]["materials"]} == {
        *("teacher", "teacher_model", "data_1"),
    }
    assert "model.safetensors" in {subject["name"] for subject in statement["subject"]}


def test_no_text_of_the_data_reaches_the_output(teacher: Path, tmp_path: Path) -> None:
    inputs = inputs_for(teacher, tmp_path)
    quick = SETTINGS.training.model_copy(update={"num_steps": 1})
    distil(inputs, SETTINGS.model_copy(update={"training": quick}))
    for path in inputs.out.rglob("*"):
        if path.suffix in {".json", ".html"} and not path.name.startswith("tokenizer"):
            assert "What sign is" not in path.read_text(), path


def test_weights_are_bfloat16_by_default_and_the_adapter_counts(
    teacher: Path, tmp_path: Path
) -> None:
    adapter = initial_adapter(teacher, rank=2, alpha=4.0, targets="all-linear", seed=0)
    for factors in adapter.modules.values():
        factors.b_OR.fill_(0.2)
    write_adapter(tmp_path / "adapter", adapter, "tiny")
    plain = inputs_for(teacher, tmp_path)
    quick = TrainingSettings(num_steps=2, batch_size=2, max_tokens=64)
    settings = DistillationSettings(calibration_records=4, training=quick)
    alone = distil(plain, settings)
    weights = load_file(plain.out / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    adapted = Inputs(teacher, tmp_path / "adapter", "0.6x", plain.data, (), tmp_path / "adapted")
    report = distil(adapted, settings)
    assert abs(report["teacher"]["ce"] - alone["teacher"]["ce"]) > 0.01
    statement = json.loads((adapted.out / "lineage.json").read_text())
    names = {material["name"] for material in statement["predicate"]["materials"]}
    assert {"teacher", "adapter", "adapter_model.safetensors"} <= names


def test_a_student_directory_starts_from_its_own_weights(teacher: Path, tmp_path: Path) -> None:
    given = write_tiny_model(tmp_path / "given", seed=3, num_layers=2)
    inputs = inputs_for(teacher, tmp_path, str(given))
    quick = SETTINGS.training.model_copy(update={"num_steps": 1, "learning_rate": 1e-12})
    distil(inputs, SETTINGS.model_copy(update={"training": quick}))
    start, end = (load_file(path / "model.safetensors") for path in (given, inputs.out))
    for name, tensor in start.items():
        torch.testing.assert_close(end[name], tensor, rtol=0, atol=1e-9)


KILLED_AT_THREE = """
import os, signal, sys
from pathlib import Path
import client.training
from distill.distillation import Inputs, distil
from distill.settings import DistillationSettings

train = client.training.train

def train_until_killed(*arguments, on_step, **named):
    def step_then_die(step):
        on_step(step)
        if step.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    return train(*arguments, on_step=step_then_die, **named)

client.training.train = train_until_killed
teacher, data, out, settings = sys.argv[1:]
inputs = Inputs(Path(teacher), None, "0.6x", (Path(data),), (), Path(out))
import torch
torch.set_num_threads(1)
distil(inputs, DistillationSettings.model_validate_json(settings))
"""


def test_a_killed_run_goes_on_to_the_identical_student(teacher: Path, tmp_path: Path) -> None:
    inputs = inputs_for(teacher, tmp_path)
    settings = SETTINGS.model_copy(
        update={"training": SETTINGS.training.model_copy(update={"num_steps": 5})}
    )
    whole = Inputs(teacher, None, "0.6x", inputs.data, (), tmp_path / "whole")
    expected = distil(whole, settings)
    killed = subprocess.run(
        [
            *(sys.executable, "-c", KILLED_AT_THREE, str(teacher), str(inputs.data[0])),
            *(str(inputs.out), settings.model_dump_json()),
        ],
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert not inputs.out.exists()
    work = tmp_path / ".student.work"
    assert (work / "checkpoints" / "checkpoint-2").is_dir()

    other = settings.model_copy(update={"temperature": 2.0})
    with pytest.raises(UserError, match="interrupted run with another temperature"):
        distil(inputs, other)

    # As a kill inside the writing of a checkpoint leaves it.
    half = work / "checkpoints" / "checkpoint-4"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    report = distil(inputs, settings)
    got, wanted = (load_file(path / "model.safetensors") for path in (inputs.out, whole.out))
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name
    assert [point["loss"] for point in report["curve"]] == [
        point["loss"] for point in expected["curve"]
    ]
    assert report["end"] == expected["end"]
    assert not work.exists()


def test_comparison_is_that_of_whole_logits(teacher: Path, tmp_path: Path) -> None:
    examples = examples_of(teacher, tmp_path, 20)
    big = load_model(teacher, "float32")
    small = load_model(write_tiny_model(tmp_path / "small", seed=5), "float32")
    got = HeldOut(big, examples, pad_id=0).compare(small)
    kl, ce, count = 0.0, 0.0, 0
    for example in examples:
        batch = collate([example], pad_id=0)
        with torch.no_grad():
            p = big(**batch).logits[0].log_softmax(-1)
            q = small(**batch).logits[0].log_softmax(-1)
        for position in range(example.num_prompt - 1, len(example.input_ids) - 1):
            kl += (p[position].exp() * (p[position] - q[position])).sum().item()
            ce -= q[position, example.input_ids[position + 1]].item()
            count += 1
    assert got.num_tokens == count
    assert got.kl == pytest.approx(kl / count, rel=1e-4)
    assert got.ce == pytest.approx(ce / count, rel=1e-4)
    own = HeldOut(big, examples, pad_id=0).compare(big)
    assert own.kl == pytest.approx(0, abs=1e-6)
    assert own.top1 == 1
    assert own.ce == pytest.approx(own.teacher_ce)


def test_no_held_out_record_is_trained_on(tmp_path: Path) -> None:
    one = write_records(tmp_path / "one.jsonl", 40)
    both = write_records(tmp_path / "both.jsonl", 40, start=30)
    training, held = read_splits([one, both], [], 100)
    assert not {record.prompt for record in training} & {record.prompt for record in held}
    assert len(held) == 8
    training, held = read_splits([one], [both], 5)
    assert len(held) == 5
    assert not {record.prompt for record in training} & {record.prompt for record in held}


def test_one_record_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least two different records"):
        read_splits([write_records(tmp_path / "one.jsonl", 1)], [], 10)
