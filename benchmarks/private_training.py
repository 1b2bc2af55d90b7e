"""What record-level privacy costs in training: speed and memory of plain LoRA and of DP-SGD.

    python -m benchmarks.private_training --data demo/data --model demo/models/base

Both train the same factors of the same base on the same institution's records with the same
expected batch, each in a process of its own, --repeats times in turn; speeds are the best of them,
peaks the largest. Tokens are those that are learned. Without a GPU seconds are CPU seconds of one
thread, and a peak is what the process holds at most while it trains, the base included, above what
torch's import takes; with one they are seconds of the clock and bytes on the device.

The noise multiplier has no part in the cost. What a resident trainer adds to a round is not
measured here.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.processes import bytes_after_torch_import, child, forget_peak, peak_bytes
from client.settings import TrainingSettings
from federation.command import run_command

METHODS = ("plain", "private")
RANK, ALPHA, MAX_TOKENS = 16, 32.0, 96
"""As in examples/four_institutions/demo.py."""
WARM_UP = 1
"""Steps that are not counted: the first one allocates."""


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """Train by one method in this process; return its speed and peak."""
    floor = bytes_after_torch_import()
    import torch

    from client.batches import encode_records
    from client.model import add_adapter, load_model, load_tokenizer, padding_id
    from client.privacy import train_records
    from client.records import read_records
    from client.training import Step
    from federation.adapter import initial_adapter, train_only

    settings = TrainingSettings(
        num_steps=WARM_UP + asked.steps,
        batch_size=asked.batch_size,
        max_tokens=MAX_TOKENS,
        noise_multiplier=float(asked.method == "private"),
    )
    tokenizer = load_tokenizer(asked.model)
    examples = encode_records(read_records(asked.data), tokenizer, MAX_TOKENS)
    adapter = initial_adapter(asked.model, rank=RANK, alpha=ALPHA, targets="all-linear", seed=0)
    model = add_adapter(load_model(asked.model, settings.dtype), adapter)
    train_only(model, asked.factors)
    clock, is_on_gpu = _clock()
    steps: list[tuple[int, float]] = []

    def record(step: Step) -> None:
        steps.append((step.num_tokens, clock()))
        if step.step == WARM_UP:
            forget_peak()

    train_records(model, examples, settings, pad_id=padding_id(tokenizer), on_step=record)
    (_, start), *counted = steps
    peak = torch.cuda.max_memory_allocated() if is_on_gpu else peak_bytes() - floor
    seconds = counted[-1][1] - start
    return {
        "tokens_per_s": sum(tokens for tokens, _ in counted) / seconds,
        "peak_bytes": peak,
        "device": torch.cuda.get_device_name() if is_on_gpu else "cpu",
    }


def _clock() -> tuple[Callable[[], float], bool]:
    import torch

    if not torch.cuda.is_available():
        return time.process_time, False

    def seconds() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return seconds, True


def compare(asked: argparse.Namespace) -> dict[str, Any]:
    """Run both methods in turn, each in a process of its own."""
    options = {
        "data": asked.data / asked.institution / "train.jsonl" if asked.institution else asked.data,
        "model": asked.model,
        "steps": asked.steps,
        "batch-size": asked.batch_size,
        "factors": asked.factors,
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    for _ in range(asked.repeats):
        for method in METHODS:
            runs[method].append(
                child("benchmarks.private_training", "--method", method, *arguments)
            )
    speed = {name: max(run["tokens_per_s"] for run in runs[name]) for name in METHODS}
    peak = {name: max(run["peak_bytes"] for run in runs[name]) for name in METHODS}
    return {
        "benchmark": "private_training",
        "device": runs["plain"][0]["device"],
        "factors": asked.factors,
        "batch_size": asked.batch_size,
        "steps": asked.steps,
        "repeats": asked.repeats,
        **{f"{name}_tokens_per_s": round(speed[name], 1) for name in METHODS},
        **{f"{name}_peak_bytes": peak[name] for name in METHODS},
        "time_ratio": round(speed["plain"] / speed["private"], 3),
        "memory_ratio": round(peak["private"] / peak["plain"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("demo/data"))
    parser.add_argument("--institution", default="hospital", help="folder of --data; '' = a file")
    parser.add_argument("--model", type=Path, default=Path("demo/models/base"))
    parser.add_argument("--factors", choices=("A", "B", "AB"), default="B", help="that are trained")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    asked.data, asked.model = asked.data.resolve(), asked.model.resolve()
    print(json.dumps(measure(asked) if asked.method else compare(asked)))


if __name__ == "__main__":
    run_command(main)
