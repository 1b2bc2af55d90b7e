"""A site without a federation: the same records, model and loop as a round, from the command line.

This is also how the baselines of a federation are made: one site alone, or all sites' text pooled
(what the institutions may not do, and what federation is measured against).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from client.batches import Example, encode_records
from client.cleaning import clean
from client.evaluation import evaluate
from client.model import add_adapter, load_model, load_tokenizer, padding_id
from client.records import read_records
from client.settings import TrainingSettings
from client.training import Step, draw_batches, refuse_privacy, train
from client.work import Work
from federation.adapter import initial_adapter, read_adapter, read_from_model, write_adapter
from federation.atomic import refuse_existing
from federation.base_model import model_digest
from federation.lineage import sha256_of_file, write_lineage
from federation.progress import progress_bar
from federation.settings import AdapterSettings


def train_alone(
    data: Sequence[Path],
    base_model: Path,
    out: Path,
    adapter_settings: AdapterSettings,
    settings: TrainingSettings,
) -> dict[str, Any]:
    """Train a fresh adapter and write it to ``out``; return its first and last loss.

    With several files every step takes ``batch_size`` records from each, as if the sites' batches
    of a round were put together; ``accumulation`` is multiplied by the number of files for that.

    Raises:
        UserError: Data, model or settings are wrong, or ``out`` exists. Nothing is written then.
    """
    refuse_existing(out)
    refuse_privacy(settings)
    tokenizer = load_tokenizer(base_model)
    per_file = [_encode(path, tokenizer, settings.max_tokens) for path in data]
    layout = adapter_settings.model_dump(include={"rank", "alpha", "targets"})
    adapter = initial_adapter(base_model, **layout, seed=settings.seed)
    parameters = {
        "base_model_digest": model_digest(base_model),
        **layout,
        **settings.model_dump(),
    }
    # The digests of private text stay in the work directory; they are not in the lineage.
    work = Work(out, {**parameters, "data": [sha256_of_file(path) for path in data]})
    with work:
        model = add_adapter(load_model(base_model, settings.dtype), adapter)
        with progress_bar(f"training {out.name}", settings.num_steps) as advance:

            def record(step: Step) -> None:
                work.record(step)
                advance(f"loss {step.loss:.3f}")

            train(
                model,
                _interleave(per_file, settings),
                settings.model_copy(update={"accumulation": settings.accumulation * len(data)}),
                pad_id=padding_id(tokenizer),
                checkpoints=work.checkpoints,
                on_step=record,
            )
        steps = work.steps()
        trained = read_from_model(model, rank=adapter.rank, alpha=adapter.alpha)
        building = out.with_name(f".{out.name}.building")
        shutil.rmtree(building, ignore_errors=True)
        write_adapter(building, trained, base_model.name)
        result = _summary(steps)
        write_lineage(
            building,
            stage="train",
            directories={"base_model": base_model},
            digests={},
            parameters=parameters,
            metrics=result,
        )
        building.replace(out)
        work.remove()
        return {"out": str(out), **result, "steps": steps}


def evaluate_alone(
    data: Sequence[Path],
    base_model: Path,
    adapter: Path | None,
    *,
    max_tokens: int,
    batch_size: int,
    dtype: str,
) -> list[dict[str, Any]]:
    """Return loss, perplexity, token accuracy and counts of each file.

    `num_cut` records were longer than ``max_tokens``: only their beginnings are scored.

    Raises:
        UserError: A file, the model or the adapter is wrong.
    """
    tokenizer = load_tokenizer(base_model)
    encoded = {path: encode_records(read_records(path), tokenizer, max_tokens) for path in data}
    model = load_model(base_model, dtype)
    if adapter is not None:
        model = add_adapter(model, read_adapter(adapter)).eval()
    results = []
    total = sum(len(examples) for examples in encoded.values())
    with progress_bar("evaluating", total) as advance:
        for path, examples in encoded.items():
            evaluation = evaluate(
                model,
                examples,
                pad_id=padding_id(tokenizer),
                batch_size=batch_size,
                on_batch=partial(advance, path.parent.name),
            )
            num_cut = sum(example.is_cut for example in examples)
            results.append({"file": str(path), **asdict(evaluation), "num_cut": num_cut})
    return results


def _encode(path: Path, tokenizer: Any, max_tokens: int) -> list[Example]:
    return encode_records(clean(read_records(path)).kept, tokenizer, max_tokens)


def _interleave(per_file: Sequence[Sequence[Example]], settings: TrainingSettings) -> list[Example]:
    """Put the files' batches one after the other, as one step of all of them together."""
    count = settings.num_steps * settings.accumulation * settings.batch_size
    streams = [draw_batches(examples, settings) for examples in per_file]
    ordered: list[Example] = []
    for start in range(0, count, settings.batch_size):
        for stream in streams:
            ordered += stream[start : start + settings.batch_size]
    return ordered


def _summary(steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "num_steps": steps[-1]["step"],
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "num_tokens": sum(step["num_tokens"] for step in steps),
        "seconds": round(sum(step["seconds"] for step in steps), 3),
    }
