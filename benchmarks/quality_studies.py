"""What each study of `benchmarks.federation_quality` runs, and one run of it.

A `Plan` says all that decides a run's result but the data and the base model; equal plans are the
same run, so the studies share what they have in common. Everything of one seed sees the same
records in the same order and starts from the same adapter.
"""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.training_sites import Attack, TrainingSites, random_change, scaled
from client.settings import TrainingSettings
from client.site import Site
from federation.atomic import write_atomically
from federation.errors import FedgeError, UserError
from federation.settings import AdapterSettings, FederationSettings, load_settings

if TYPE_CHECKING:
    from client.batches import Example
    from federation.adapter import Adapter

MAX_TOKENS, LEARNING_RATE, DTYPE = 96, 5e-4, "bfloat16"
"""As in examples/four_institutions/demo.py."""
NUM_HELDOUT = 48
"""Held-out records of an institution that are scored: the first ones."""
NEVER_S = 1e9
"""A round's deadline: nothing is late here."""

ATTACKS: Mapping[str, Attack] = {
    "scaled x100": scaled(100),
    "sign-flipped": scaled(-1),
    "random x100": random_change(100),
    "sign-flipped x100": scaled(-100),
}
"""By the site that lies, the last one: what it sends instead of its honest change."""
ROBUST = ("median", "trimmed_mean", "krum", "multi_krum", "geometric_median")
PLAIN, CLIPPED = "products", "products, clipped"
REFERENCE = "products without the liar"
EXACT, FACTORS = "products + tail", "factors"
WIRES = ("int8", "int4", "int4, no feedback")


@dataclass(frozen=True)
class Inputs:
    """What the runs are about."""

    data: Path
    """One folder an institution, each with train.jsonl and heldout.jsonl."""
    base_model: Path
    halves: Path
    """One folder a site of the poison study: see ``halve``."""


@dataclass(frozen=True)
class Plan:
    """One run."""

    name: str
    seed: int
    kind: str = "federated"
    """Or "base" (nothing is trained), or "pooled" (the sites' batches put together)."""
    num_rounds: int = 5
    num_steps: int = 3
    """Of a round."""
    batch_size: int = 8
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the federation, as dotted keys, where they are not the default."""
    ranks: Sequence[int] = ()
    """Of the sites in the order of their names; () = all slices."""
    forgets: bool = False
    """The sites lose what they keep from round to round."""
    is_halved: bool = False
    """Two sites an institution, all of one weight."""
    attack: str = ""
    """What the last site does: a key of ATTACKS, "absent", or "" = it is honest."""


def aggregation_plans(num_seeds: int) -> list[Plan]:
    """Return the runs of the first study, all of one seed before those of the next."""
    plans = [Plan("base", 0, kind="base")]
    for seed in range(num_seeds):
        plans += [
            Plan("pooled", seed, kind="pooled"),
            Plan(FACTORS, seed, settings={"aggregation": "factors"}),
            Plan("products", seed, settings={"tail_rank": 0}),
            Plan(EXACT, seed, settings={"tail_rank": 32}),
            Plan("alternating", seed, settings={"aggregation": "alternating"}),
            Plan("mixed ranks", seed, settings={"tail_rank": 32}, ranks=(2, 4, 8, 16)),
        ]
    return plans


def wire_plans(num_seeds: int) -> list[Plan]:
    """Return the runs of the second study; float32 is the run of the first one."""
    plans = []
    for seed in range(num_seeds):
        plans.append(Plan(EXACT, seed, settings={"tail_rank": 32}))
        for name in WIRES:
            dtype, _, forgets = name.partition(",")
            wire = {"tail_rank": 32, "wire.uplink": dtype, "wire.downlink": dtype}
            plans.append(Plan(name, seed, settings=wire, forgets=bool(forgets)))
    return plans


def reference_plan() -> Plan:
    """Return the honest run that poisoned ones are measured against."""
    return _poison_plan(REFERENCE, {}, "absent")


def poison_plans(clip_norm: float) -> list[Plan]:
    """Return the runs of the third study: every rule against every attack, and against none."""
    rules: dict[str, dict[str, Any]] = {PLAIN: {}, CLIPPED: {"robust.clip_norm": clip_norm}}
    rules |= {name: {"aggregation": name} for name in ROBUST}
    return [
        _poison_plan(name, settings, attack)
        for attack in (*ATTACKS, "")
        for name, settings in rules.items()
    ]


def _poison_plan(name: str, settings: dict[str, Any], attack: str) -> Plan:
    settings = {"tail_rank": 32, "robust.num_byzantine": 1, **settings}
    return Plan(
        name,
        seed=0,
        num_rounds=3,
        num_steps=2,
        batch_size=4,
        settings=settings,
        is_halved=True,
        attack=attack,
    )


def typical_change(reference: Mapping[str, Any]) -> float:
    """Return the median norm of an honest site's change in a round, to three digits."""
    norms = [norm for rounds in reference["change_norms"].values() for norm in rounds]
    return float(f"{statistics.median(norms):.3g}")


def institutions(data: Path) -> list[Path]:
    """Return the folders of the institutions by name.

    Raises:
        UserError: There is none.
    """
    folders = sorted(path.parent for path in data.glob("*/train.jsonl"))
    if not folders:
        raise UserError(f"{data} holds no folder with a train.jsonl: run make demo, or fetch.py")
    return folders


def halve(data: Path, halves: Path) -> None:
    """Make two sites of every institution: the first half of its records, and the second."""
    for folder in institutions(data):
        lines = (folder / "train.jsonl").read_bytes().splitlines(keepends=True)
        middle = len(lines) // 2
        for number, part in enumerate((lines[:middle], lines[middle:]), start=1):
            site = halves / f"{folder.name}-{number}"
            site.mkdir(parents=True, exist_ok=True)
            write_atomically(site / "train.jsonl", b"".join(part))


def run_plan(plan: Plan, inputs: Inputs, work: Path) -> dict[str, Any]:
    """Do one run and score its last adapter; ``work`` is emptied before and removed after.

    Returns:
        The plan's own fields; `losses` by institution and their mean `loss` (nats a token; None
        where it is not finite); `seconds`; of a federation also its bytes, `train_loss` and
        `aggregation_error` a round, `change_norms`, and `failed`, the reason why it ended early.
    """
    started = time.perf_counter()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    facts: dict[str, Any] = {}
    if plan.kind == "base":
        adapter = _first_adapter(plan, inputs)
    elif plan.kind == "pooled":
        adapter = _pooled(plan, inputs, work)
    else:
        adapter, facts = _federated(plan, inputs, work)
    losses = heldout_losses(adapter, inputs)
    shutil.rmtree(work)
    values = [loss for loss in losses.values() if loss is not None]
    return {
        **asdict(plan),
        "losses": losses,
        "loss": statistics.mean(values) if len(values) == len(losses) else None,
        **facts,
        "seconds": round(time.perf_counter() - started, 1),
    }


def _first_adapter(plan: Plan, inputs: Inputs) -> Adapter:
    from federation.adapter import initial_adapter

    layout = AdapterSettings().model_dump(include={"rank", "alpha", "targets"})
    return initial_adapter(inputs.base_model, **layout, seed=plan.seed)


def _training(plan: Plan, num_steps: int) -> TrainingSettings:
    return TrainingSettings.model_validate(
        {
            "num_steps": num_steps,
            "batch_size": plan.batch_size,
            "max_tokens": MAX_TOKENS,
            "learning_rate": LEARNING_RATE,
            "dtype": DTYPE,
            "seed": plan.seed,
        }
    )


def _pooled(plan: Plan, inputs: Inputs, work: Path) -> Adapter:
    """Train as `client train` does on several files: a step takes a batch of each."""
    from client.alone import train_alone
    from federation.adapter import read_adapter

    train_alone(
        [folder / "train.jsonl" for folder in institutions(inputs.data)],
        inputs.base_model,
        work / "pooled",
        AdapterSettings(),
        _training(plan, plan.num_rounds * plan.num_steps),
    )
    return read_adapter(work / "pooled")


def _federated(plan: Plan, inputs: Inputs, work: Path) -> tuple[Adapter, dict[str, Any]]:
    """Run the product's rounds; a run that fails gives the last adapter that it had."""
    from federation.adapter import read_adapter
    from federation.rounds import run_rounds
    from federation.status import summarise

    sites = _sites(plan, inputs, work)
    lies = plan.attack in ATTACKS
    training = TrainingSites(
        sites,
        num_examples=1 if plan.is_halved else None,
        attacks={sites[-1].name: ATTACKS[plan.attack]} if lies else {},
        forgets=plan.forgets,
        measures_changes=plan.is_halved,
    )
    failed = ""
    try:
        run_rounds(training, _settings(plan, inputs, work / "run", len(sites)))
    except FedgeError as error:
        failed = str(error)
    newest = work / "run" / "adapter"
    adapter = read_adapter(newest) if newest.exists() else _first_adapter(plan, inputs)
    summary = summarise(work / "run" / "events.jsonl")
    facts = {key: summary[key] for key in ("bytes_down", "bytes_up")}
    for key in ("train_loss", "aggregation_error"):
        facts[key] = [row[key] for row in summary["rounds"]]
    if plan.is_halved:
        facts["change_norms"] = training.change_norms
    return adapter, {**facts, "failed": failed} if failed else facts


def _sites(plan: Plan, inputs: Inputs, work: Path) -> list[Site]:
    folders = institutions(inputs.halves if plan.is_halved else inputs.data)
    if plan.attack == "absent":
        folders = folders[:-1]
    ranks: Sequence[int | None] = plan.ranks or [None] * len(folders)
    return [
        Site(
            inputs.base_model,
            folder / "train.jsonl",
            folder.name,
            work / "site-state" / folder.name,
            rank,
        )
        for folder, rank in zip(folders, ranks, strict=True)
    ]


def _settings(plan: Plan, inputs: Inputs, out: Path, num_sites: int) -> FederationSettings:
    # In the poison study a model that was spoilt makes honest sites fail: the others go on as long
    # as Krum has the five updates that it needs to bear one liar.
    values = {
        "base_model": str(inputs.base_model),
        "out": str(out),
        "num_rounds": plan.num_rounds,
        "num_sites": num_sites,
        "quorum": min(5, num_sites) if plan.is_halved else num_sites,
        "round_attempts": 1,
        "round_timeout_s": NEVER_S,
        "seed": plan.seed,
        **plan.settings,
        "training": _training(plan, plan.num_steps).model_dump(),
    }
    return load_settings(FederationSettings, values, f"the plan {plan.name}")


def heldout_losses(adapter: Adapter, inputs: Inputs) -> dict[str, float | None]:
    """Return the mean cross-entropy of each institution's held-out responses, in nats a token."""
    from client.evaluation import evaluate
    from client.round import resident_model
    from federation.adapter import write_into_model

    model = resident_model(inputs.base_model, DTYPE).laid_out_for(adapter)
    write_into_model(model, adapter)
    model.eval()
    examples, pad_id = _heldout(inputs.data, inputs.base_model)
    losses = {}
    for name, rows in examples.items():
        loss = evaluate(model, rows, pad_id=pad_id).loss
        losses[name] = loss if math.isfinite(loss) else None
    return losses


@lru_cache(maxsize=1)
def _heldout(data: Path, base_model: Path) -> tuple[dict[str, list[Example]], int]:
    """Read and tokenise the held-out records once a process."""
    from client.batches import encode_records
    from client.model import load_tokenizer, padding_id
    from client.records import read_records

    tokenizer = load_tokenizer(base_model)
    examples = {
        folder.name: encode_records(
            read_records(folder / "heldout.jsonl")[:NUM_HELDOUT], tokenizer, MAX_TOKENS
        )
        for folder in institutions(data)
    }
    return examples, padding_id(tokenizer)
