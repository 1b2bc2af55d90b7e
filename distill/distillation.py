"""A teacher into a student: read, cut, train, compare, write.

Everything that the user can get wrong is checked before torch is loaded. A killed run keeps its
checkpoints beside its output (`client.work`); the same command continues from there and ends with
the same weights. The output directory appears whole, at the very end.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.batches import Example, batches_of_like_length, encode_records
from client.cleaning import clean, content_digest
from client.records import DataError, Record, read_records
from client.training import refuse_privacy
from client.work import Work
from distill.settings import DistillationSettings
from distill.student import Plan, describe, plan_student
from federation.atomic import new_directory, refuse_existing, write_atomically
from federation.base_model import ModelError, model_digest
from federation.lineage import sha256_of_file, write_lineage
from federation.progress import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from client.training import Step
    from distill.comparison import Comparison

HELD_OUT_SHARE = 10
"""One in so many records of each file is held out where no file is named for it: the last ones."""
ADAPTER_WEIGHTS = "adapter_model.safetensors"
COPIED = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template*", "generation_config.json", "LICENSE*", "NOTICE*"),
)
"""What a student takes from its teacher's directory besides weights."""


@dataclass(frozen=True)
class Inputs:
    """What a distillation is made from, and where it goes."""

    teacher: Path
    adapter: Path | None
    student: str
    data: tuple[Path, ...]
    heldout: tuple[Path, ...]
    out: Path


def distil(inputs: Inputs, settings: DistillationSettings) -> dict[str, Any]:
    """Make the student and write its directory; return the report.

    Raises:
        UserError: An input is wrong or ``out`` exists. Nothing is written then.
    """
    refuse_existing(inputs.out)
    refuse_privacy(settings.training)
    plan = plan_student(inputs.student, inputs.teacher)
    _check_adapter(inputs.adapter)
    training, heldout = read_splits(inputs.data, inputs.heldout, settings.heldout_records)
    digests = _digests(inputs, plan)
    parameters = {"shape": describe(plan.student), **settings.model_dump()}
    work = Work(inputs.out, {**digests, **parameters})

    from client.model import load_model, load_tokenizer, merged_model, padding_id

    tokenizer = load_tokenizer(inputs.teacher)
    max_tokens, dtype = settings.training.max_tokens, settings.training.dtype
    training_examples = encode_records(training, tokenizer, max_tokens)
    heldout_examples = encode_records(heldout, tokenizer, max_tokens)
    teacher = _place(
        merged_model(inputs.teacher, inputs.adapter, dtype)
        if inputs.adapter
        else load_model(inputs.teacher, dtype)
    )
    with work:
        report, student = _teach(
            teacher,
            plan,
            training_examples,
            heldout_examples,
            settings,
            pad_id=padding_id(tokenizer),
            work=work,
        )
        _write(inputs, plan, student, report, digests, parameters)
        work.remove()
    return report


def read_splits(
    data: Sequence[Path], heldout: Sequence[Path], most_heldout: int
) -> tuple[list[Record], list[Record]]:
    """Return training and held-out records, cleaned; no held-out record is trained on.

    Without held-out files the last tenth of each data file is held out.

    Args:
        data: JSONL files.
        heldout: JSONL files, or none.
        most_heldout: Held-out records beyond it are thinned out evenly.

    Raises:
        DataError: A file is missing, empty or malformed, or nothing is left to train on.
    """
    training, held = [], []
    for path in data:
        records = clean(read_records(path)).kept
        border = len(records)
        if not heldout:
            border -= max(1, len(records) // HELD_OUT_SHARE)
        training += records[:border]
        held += records[border:]
    for path in heldout:
        held += clean(read_records(path)).kept
    stride = max(1, -(-len(held) // most_heldout))
    held = held[::stride]
    seen = {content_digest(record) for record in held}
    training = [record for record in training if content_digest(record) not in seen]
    if not training or not held:
        places = ", ".join(map(str, [*data, *heldout]))
        raise DataError(
            f"{places}: {len(training)} record(s) to train on and {len(held)} held out after "
            "cleaning: give at least two different records"
        )
    return training, held


def _teach(
    teacher: PreTrainedModel,
    plan: Plan,
    training: Sequence[Example],
    heldout: Sequence[Example],
    settings: DistillationSettings,
    *,
    pad_id: int,
    work: Work,
) -> tuple[dict[str, Any], PreTrainedModel]:
    """Cut, train and compare; return the report and the student in the dtype it is saved in."""
    import torch

    from client.training import draw, train
    from distill.comparison import HeldOut
    from distill.losses import DistillationLoss

    options = settings.training
    dtype = getattr(torch, options.dtype)
    with progress_bar("choosing what to keep", 3) as advance:
        held_out = HeldOut(teacher, heldout, pad_id=pad_id)
        advance("teacher read")
        student = _start(teacher, plan, training, settings, pad_id=pad_id)
        advance("student cut")
        start = held_out.compare(student)
        advance(f"held-out KL {start.kl:.2f}")
    count = options.num_steps * options.accumulation * options.batch_size
    with progress_bar("distilling", options.num_steps) as advance:

        def record(step: Step) -> None:
            work.record(step)
            advance(f"loss {step.loss:.3f}")

        train(
            student.float(),
            batches_of_like_length(
                draw(training, count, seed=options.seed), options.batch_size, seed=options.seed
            ),
            options,
            pad_id=pad_id,
            loss_function=DistillationLoss(
                teacher,
                temperature=settings.temperature,
                cross_entropy_weight=settings.cross_entropy_weight,
                dtype=dtype,
            ),
            checkpoints=work.checkpoints,
            on_step=record,
        )
    # The Trainer switches the cache off in the config; a student is there to generate.
    student.config.use_cache = teacher.config.use_cache
    student = student.to(dtype)
    report = _report(plan, start, held_out.compare(student), work.steps())
    return report, student


def _start(
    teacher: PreTrainedModel,
    plan: Plan,
    training: Sequence[Example],
    settings: DistillationSettings,
    *,
    pad_id: int,
) -> PreTrainedModel:
    """Return the untrained student, on the teacher's device and in the dtype it is saved in."""
    from client.model import load_model
    from client.training import draw
    from distill.calibration import measure_importance
    from distill.pruning import prune

    if plan.directory is not None:
        student = load_model(plan.directory, settings.training.dtype)
    else:
        count = min(settings.calibration_records, len(training))
        sample = draw(training, count, seed=settings.training.seed)
        sample.sort(key=lambda example: len(example.input_ids))
        importance = measure_importance(teacher, sample, pad_id=pad_id)
        student = prune(teacher, plan.student, importance)
    return student.to(teacher.device)


def _place(model: PreTrainedModel) -> PreTrainedModel:
    """Put a model where the training loop will put the student."""
    import torch

    placed: PreTrainedModel = model.to("cuda") if torch.cuda.is_available() else model
    return placed


def _report(
    plan: Plan, start: Comparison, end: Comparison, steps: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "teacher": {"params": describe(plan.teacher)["params"], "ce": end.teacher_ce},
        "student": {"params": describe(plan.student)["params"]},
        "start": {"kl": start.kl, "ce": start.ce, "top1": start.top1},
        "end": {"kl": end.kl, "ce": end.ce, "top1": end.top1},
        "heldout_tokens": end.num_tokens,
        "tokens": sum(step["num_tokens"] for step in steps),
        "steps": len(steps),
        "seconds": round(sum(step["seconds"] for step in steps), 3),
        "shape": describe(plan.student),
        "why": plan.why,
        "runners_up": [describe(shape) for shape in plan.runners_up],
        "curve": [
            {"step": step["step"], "loss": step["loss"], "learning_rate": step["learning_rate"]}
            for step in steps
        ],
    }


def _write(
    inputs: Inputs,
    plan: Plan,
    student: PreTrainedModel,
    report: dict[str, Any],
    digests: dict[str, str],
    parameters: dict[str, Any],
) -> None:
    from distill.report import render

    directories = {"teacher": inputs.teacher}
    if inputs.adapter:
        directories["adapter"] = inputs.adapter
    if plan.directory is not None:
        directories["student"] = plan.directory
    with new_directory(inputs.out) as building:
        student.save_pretrained(building)
        for pattern in COPIED:
            for file in inputs.teacher.glob(pattern):
                shutil.copyfile(file, building / file.name)
        write_atomically(building / "report.json", json.dumps(report, indent=2) + "\n")
        write_atomically(building / "report.html", render(report, inputs.out.name))
        write_lineage(
            building,
            stage="distill",
            directories=directories,
            digests=digests,
            parameters=parameters,
            metrics={name: report[name] for name in ("teacher", "start", "end", "tokens", "steps")},
        )


def _digests(inputs: Inputs, plan: Plan) -> dict[str, str]:
    """Return the sha256 of everything that is read, by role."""
    digests = {"teacher_model": model_digest(inputs.teacher)}
    if plan.directory is not None:
        digests["student_model"] = model_digest(plan.directory)
    if inputs.adapter is not None:
        for name in (ADAPTER_WEIGHTS, "adapter_config.json"):
            digests[name] = sha256_of_file(inputs.adapter / name)
    for role, paths in (("data", inputs.data), ("heldout", inputs.heldout)):
        for number, path in enumerate(paths, start=1):
            digests[f"{role}_{number}"] = sha256_of_file(path)
    return digests


def _check_adapter(adapter: Path | None) -> None:
    if adapter is not None and not (adapter / ADAPTER_WEIGHTS).is_file():
        raise ModelError(
            f"{adapter / ADAPTER_WEIGHTS} is missing: pass a PEFT adapter directory with --adapter"
        )
