"""What record-level privacy costs in training: speed and memory of plain LoRA and of DP-SGD.

    python -m benchmarks.private_training --data demo/data --model demo/models/base

Both train the same factors of the same base on the same institution's records with the same
expected batch, each in a process of its own, --repeats times in turn; speeds are the best of them,
peaks the largest. Tokens are those that are learned. Without a GPU seconds are CPU seconds of one
thread, and a peak is what the process holds at most while it trains, the base included, above what
torch's import takes; with one they are seconds of the clock and bytes on the device.

The noise multiplier has no part in the cost.

Then a site's own trainer, as a process behind its socket with policy and ledger, is asked
--rounds private rounds of --round-steps steps, one after the other, on all threads of the machine:

- load_count: how often it loaded the base model in its life.
- round_overhead_ms: what a round took the one who asked above the training itself: the adapter
  through the socket, its checks, the policy, the encoding, the answer on disk, the ledger, and the
  answer through the socket. Median of the rounds after the first; `first_round_overhead_ms` is that
  one, which loads the model and reads the records.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.processes import ROOT, bytes_after_torch_import, child, forget_peak, peak_bytes
from client.settings import TrainingSettings
from federation.command import run_command

if TYPE_CHECKING:
    from client.site_settings import SiteSettings

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


def measure_rounds(asked: argparse.Namespace, data: Path) -> dict[str, Any]:
    """Ask a trainer round after round; return its loads and what it takes beside the training.

    Raises:
        RuntimeError: It ended before its first round, or refused one.
    """
    from benchmarks.resident_sites import write_settings
    from client.site_settings import load_site

    with tempfile.TemporaryDirectory(prefix="fedge-") as directory:
        config = write_settings(Path(directory), asked.model, data=str(data))
        settings = load_site(config)
        trainer = subprocess.Popen(
            [sys.executable, "-m", "client.cli", "trainer", "--config", str(config)], cwd=ROOT
        )
        try:
            _wait_for(trainer, settings.socket)
            seconds = _ask_rounds(asked, settings)
        finally:
            trainer.terminate()
            trainer.wait()
        lines = (settings.log or Path()).read_text(encoding="utf-8").splitlines()
    answered = [line for line in map(json.loads, lines) if line["event"] == "answered"]
    overhead_ms = [
        1e3 * (took - line["training_s"]) for took, line in zip(seconds, answered, strict=True)
    ]
    return {
        "rounds": asked.rounds,
        "round_steps": asked.round_steps,
        "load_count": max(line["num_model_loads"] for line in answered),
        "round_training_s": round(statistics.median(row["training_s"] for row in answered[1:]), 3),
        "round_overhead_ms": round(statistics.median(overhead_ms[1:])),
        "round_overhead_max_ms": round(max(overhead_ms[1:])),
        "first_round_overhead_ms": round(overhead_ms[0]),
    }


def _wait_for(trainer: subprocess.Popen[bytes], socket: Path) -> None:
    """Return once the trainer listens.

    Raises:
        RuntimeError: It ended; why, it said on stderr.
    """
    while not socket.exists():
        if trainer.poll() is not None:
            raise RuntimeError(
                f"the trainer ended with {trainer.returncode} before it could be asked: see above"
            )
        time.sleep(0.05)


def _ask_rounds(asked: argparse.Namespace, settings: "SiteSettings") -> list[float]:
    """Return the seconds of each round, from the question to the whole answer."""
    from client.trainer_link import ask
    from federation.adapter import initial_adapter
    from federation.base_model import model_digest
    from federation.wire import encode

    adapter = initial_adapter(asked.model, rank=RANK, alpha=ALPHA, targets="all-linear", seed=0)
    message = encode(adapter, dtype="float32", base_model=model_digest(asked.model))
    training = {
        "num_steps": asked.round_steps,
        "batch_size": asked.batch_size,
        "max_tokens": MAX_TOKENS,
        "noise_multiplier": 1.0,
    }
    seconds = []
    for server_round in range(1, asked.rounds + 1):
        head = {
            "server_round": server_round,
            "run": "ab" * 16,
            "bundle": "",
            "uplink": "float32",
            "downlink": "float32",
            "trains": asked.factors,
            "aggregation": "alternating",
            "num_rounds": asked.rounds,
            "cohort": 1,
            "training": training,
        }
        started = time.perf_counter()
        answer = ask(settings.socket, head, memoryview(message))
        seconds.append(time.perf_counter() - started)
        if answer.code:
            raise RuntimeError(f"the trainer refused round {server_round}: {answer.head}")
    return seconds


def compare(asked: argparse.Namespace) -> dict[str, Any]:
    """Run both methods in turn, each in a process of its own."""
    data = asked.data / asked.institution / "train.jsonl" if asked.institution else asked.data
    options = {
        "data": data,
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
        **measure_rounds(asked, data),
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
    parser.add_argument("--rounds", type=int, default=5, help="asked of a trainer")
    parser.add_argument("--round-steps", type=int, default=1)
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    asked.data, asked.model = asked.data.resolve(), asked.model.resolve()
    print(json.dumps(measure(asked) if asked.method else compare(asked)))


if __name__ == "__main__":
    run_command(main)
