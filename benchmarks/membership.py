"""Who was in the training data? An attack on canaries, with and without record-level privacy.

    python -m benchmarks.membership --data demo/data --model demo/models/base

A canary is a record whose answer nobody can guess: random letters. They come in pairs of one kind,
and a coin says which of the two is trained on, among records of one institution. The attacker knows
the canaries, has the base model and the trained one, and ranks the canaries by

- loss: the mean cross-entropy of the answer under the trained model (Yeom et al.,
  arXiv:1709.01604),
- gain: how much lower it is than under the base model, which takes out how hard an answer is.

Per run: the area under the attack's ROC curve (0.5 = chance), and its advantage, the share of
members minus that of the others which it calls members, at a threshold that was best on the other
half of the pairs (0 = chance). Intervals are 95 % of bootstrap draws of pairs. `bound` is the most
that any attack's advantage can be at this epsilon and delta: (e^epsilon - 1 + 2 delta) /
(e^epsilon + 1) (Kairouz et al., arXiv:1311.0776). All runs train the same factor from the same
start with the same steps, expected batch and learning rate; the private ones draw noise anew each
time. One rate for all matters: at a tenth of it the attack fails without any privacy too.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import string
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.processes import child
from client.records import Record, read_records
from client.settings import TrainingSettings
from federation.accountant import noise_for
from federation.command import run_command

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from client.batches import Example

MAX_TOKENS, ALPHA = 96, 32.0
NUM_HELDOUT = 48
NUM_BOOTSTRAPS = 2000
KINDS = ("access code", "case number", "seal", "file key", "badge number")


def make_canaries(num_pairs: int, seed: int) -> tuple[list[tuple[Record, Record]], list[int]]:
    """Return pairs of canaries, and which of each pair (0 or 1) is trained on."""
    draw = random.Random(f"canaries/{seed}")  # noqa: S311 - an experiment that can be repeated
    pairs = []
    for number in range(num_pairs):
        kind = KINDS[number % len(KINDS)]
        one, other = (
            Record(
                f"What is the {kind} of {''.join(draw.sample(string.ascii_uppercase, 3))} {line}?",
                " ".join("".join(draw.choices(string.ascii_lowercase, k=4)) for _ in range(4)),
                line + 1,
            )
            for line in (2 * number, 2 * number + 1)
        )
        pairs.append((one, other))
    return pairs, [draw.randrange(2) for _ in pairs]


def area_under_curve(members: NDArray[np.float64], others: NDArray[np.float64]) -> float:
    """Return the probability that a member scores above another canary; a draw counts half."""
    difference = members[:, None] - others[None, :]
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


def best_threshold(members: NDArray[np.float64], others: NDArray[np.float64]) -> float:
    """Return the score from which on to call a canary a member, with the largest advantage."""
    candidates = np.unique(np.concatenate([members, others]))
    hits = (members[:, None] >= candidates).mean(axis=0)
    false_alarms = (others[:, None] >= candidates).mean(axis=0)
    return float(candidates[np.argmax(hits - false_alarms)])


def advantage(members: NDArray[np.float64], others: NDArray[np.float64]) -> float:
    """Return hits minus false alarms at the threshold that was best on the other half of pairs."""
    halves = (slice(0, None, 2), slice(1, None, 2))
    found = []
    for seen, scored in (halves, halves[::-1]):
        threshold = best_threshold(members[seen], others[seen])
        hits, alarms = (scores[scored] >= threshold for scores in (members, others))
        found.append(float(hits.mean() - alarms.mean()))
    return sum(found) / 2


def with_interval(
    measure: Any, members: NDArray[np.float64], others: NDArray[np.float64]
) -> dict[str, Any]:
    """Return a figure and the 95 % interval of bootstrap draws of pairs."""
    draw = np.random.default_rng(0)
    num_pairs = len(members)
    # A pair that is drawn twice must not stand in both halves: order them by pair, then split.
    values = []
    for _ in range(NUM_BOOTSTRAPS):
        order = draw.permutation(num_pairs)
        halves = [draw.choice(half, size=len(half)) for half in (order[::2], order[1::2])]
        picked = np.empty(num_pairs, dtype=np.int64)
        picked[::2], picked[1::2] = halves
        values.append(measure(members[picked], others[picked]))
    low, high = np.percentile(values, [2.5, 97.5])
    return {
        "value": round(measure(members, others), 3),
        "interval": [round(float(low), 3), round(float(high), 3)],
    }


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """Train by one method in this process; return every canary's losses before and after."""
    from client.batches import encode_records
    from client.model import add_adapter, load_model, load_tokenizer, padding_id
    from client.privacy import train_records
    from federation.adapter import initial_adapter, train_only

    pairs, coins = make_canaries(asked.canaries // 2, asked.seed)
    background = read_records(asked.data / "train.jsonl")[: asked.background]
    members = [pair[coin] for pair, coin in zip(pairs, coins, strict=True)]
    tokenizer = load_tokenizer(asked.model)
    pad_id = padding_id(tokenizer)
    canaries = encode_records([each for pair in pairs for each in pair], tokenizer, MAX_TOKENS)
    examples = encode_records([*background, *members], tokenizer, MAX_TOKENS)
    settings = settings_of(asked, len(examples))
    adapter = initial_adapter(
        asked.model, rank=asked.rank, alpha=ALPHA, targets="all-linear", seed=0
    )
    model = add_adapter(load_model(asked.model, settings.dtype), adapter)
    train_only(model, "B")
    heldout = encode_records(
        read_records(asked.data / "heldout.jsonl")[:NUM_HELDOUT], tokenizer, MAX_TOKENS
    )
    before = canary_losses(model, canaries, pad_id)
    heldout_before = float(np.mean(canary_losses(model, heldout, pad_id)))
    started = time.perf_counter()
    result = train_records(model, examples, settings, pad_id=pad_id)
    return {
        "noise_multiplier": round(settings.noise_multiplier, 3),
        "sampling_rate": result.event.sampling_rate if result.event else None,
        "train_s": round(time.perf_counter() - started, 1),
        "before": before,
        "after": canary_losses(model, canaries, pad_id),
        "coins": coins,
        "heldout_loss_before": round(heldout_before, 4),
        "heldout_loss": round(float(np.mean(canary_losses(model, heldout, pad_id))), 4),
    }


def settings_of(asked: argparse.Namespace, num_records: int) -> TrainingSettings:
    """Return the settings of a run; its noise follows from its epsilon."""
    noise = 0.0
    if asked.epsilon_of_run > 0:
        rate = asked.batch_size / num_records
        noise = noise_for(asked.epsilon_of_run, asked.delta, rate, asked.steps)
    return TrainingSettings(
        num_steps=asked.steps,
        batch_size=asked.batch_size,
        learning_rate=asked.learning_rate,
        max_tokens=MAX_TOKENS,
        noise_multiplier=noise,
        record_clip_norm=asked.clip_norm,
        seed=asked.seed,
    )


def canary_losses(model: Any, examples: Sequence[Example], pad_id: int) -> list[float]:
    """Return the mean cross-entropy of each record's response, nats."""
    import torch

    from client.batches import collate
    from client.privacy import record_losses

    losses: list[float] = []
    with torch.inference_mode():
        for start in range(0, len(examples), 16):
            rows = examples[start : start + 16]
            batch = {name: t.to(model.device) for name, t in collate(rows, pad_id).items()}
            losses_B, tokens_B = record_losses(model, batch)
            losses += (losses_B / tokens_B).tolist()
    return losses


def attack(run: dict[str, Any]) -> dict[str, Any]:
    """Return what the attacks come to on one run."""
    before, after = np.array(run["before"]).reshape(-1, 2), np.array(run["after"]).reshape(-1, 2)
    rows, coins = np.arange(len(before)), np.array(run["coins"])
    figures: dict[str, Any] = {}
    for name, scores in (("loss", -after), ("gain", before - after)):
        members, others = scores[rows, coins], scores[rows, 1 - coins]
        figures[name] = {
            "area": with_interval(area_under_curve, members, others),
            "advantage": with_interval(advantage, members, others),
        }
    return figures


def compare(asked: argparse.Namespace) -> dict[str, Any]:
    """Train without privacy and at each epsilon, each run in a process of its own."""
    options = {
        "data": asked.data / asked.institution,
        "model": asked.model,
        "canaries": asked.canaries,
        "background": asked.background,
        "steps": asked.steps,
        "batch-size": asked.batch_size,
        "rank": asked.rank,
        "learning-rate": asked.learning_rate,
        "clip-norm": asked.clip_norm,
        "delta": asked.delta,
        "seed": asked.seed,
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]

    wanted = {"not private": 0.0, **{f"epsilon {epsilon:g}": epsilon for epsilon in asked.epsilon}}

    def run(epsilon: float) -> dict[str, Any]:
        return child("benchmarks.membership", *arguments, "--epsilon-of-run", epsilon)

    with ThreadPoolExecutor(asked.lanes) as lanes:
        runs = list(lanes.map(run, wanted.values()))
    figures: dict[str, Any] = {}
    for (name, epsilon), done in zip(wanted.items(), runs, strict=True):
        figures[name] = {
            **attack(done),
            **{key: done[key] for key in ("heldout_loss_before", "heldout_loss", "train_s")},
        }
        if epsilon:
            power = math.exp(epsilon)
            figures[name] |= {
                "noise_multiplier": done["noise_multiplier"],
                "sampling_rate": done["sampling_rate"],
                "bound": round((power - 1 + 2 * asked.delta) / (power + 1), 3),
            }
    return {
        "benchmark": "membership",
        **{name: value for name, value in options.items() if name not in ("data", "model")},
        "institution": asked.institution,
        **figures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("demo/data"))
    parser.add_argument("--institution", default="hospital", help="folder of --data")
    parser.add_argument("--model", type=Path, default=Path("demo/models/base"))
    parser.add_argument("--canaries", type=int, default=200, help="half of them are trained on")
    parser.add_argument("--background", type=int, default=50, help="other records of the site")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=15, help="expected records of a step")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--clip-norm", type=float, default=1.0)
    parser.add_argument("--epsilon", type=float, nargs="+", default=[8.0, 2.0])
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lanes", type=int, default=1, help="runs beside each other")
    parser.add_argument("--epsilon-of-run", type=float, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    asked.data, asked.model = asked.data.resolve(), asked.model.resolve()
    print(json.dumps(compare(asked) if asked.epsilon_of_run is None else measure(asked)))


if __name__ == "__main__":
    run_command(main)
