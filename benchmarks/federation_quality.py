"""What each aggregation, number format and robust rule is worth: held-out loss of real federations.

    python -m benchmarks.federation_quality --data demo/data --model demo/models/base --out quality

runs the product's own rounds on sites that train for real (benchmarks.training_sites), without
Flower: the text and the base model are those that `make demo` fetches. Three studies:

- aggregations: base, pooled, factors, products without and with a tail, alternating, and mixed
  ranks (2, 4, 8 and 16 of 16 slices, the sites in the order of their names). 5 rounds of 3 steps of
  8 records. Sites weigh what they have; "pooled" takes as many records of each.
- wire: products + tail with both ways in int8 or int4, relative to float32 of the same seed; and
  int4 at sites that forget what they had still to send, as the control of error feedback.
- poison: eight sites of one weight, half an institution each, 3 rounds of 2 steps of 4 records, one
  seed. The last site lies: it sends its honest change of B and of A times 100 ("scaled x100"),
  times -1 or -100 ("sign-flipped"), or normal noise with 100 times the norm of the honest change in
  each factor ("random x100"). Losses are relative to the plain mean of the seven honest sites;
  clip_norm is the median norm of their changes.

Each finished run is a line of OUT/runs.jsonl and is not done again. At the end one JSON line says
what came out; --report prints tables of the runs that are there. On two cores the whole takes about
an hour and a half.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import quality_report
from benchmarks.quality_studies import (
    Inputs,
    Plan,
    aggregation_plans,
    halve,
    institutions,
    poison_plans,
    reference_plan,
    run_plan,
    typical_change,
    wire_plans,
)
from federation.atomic import write_atomically
from federation.base_model import model_digest
from federation.command import run_command
from federation.errors import FedgeError

STUDIES = ("aggregations", "wire", "poison")
LANE = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}
"""Environment of the processes that train: one thread each, and nothing calls home."""


class FinishedRuns:
    """The runs that are done with these inputs, on disk."""

    def __init__(self, path: Path, inputs: str) -> None:
        """Read what there is; a torn last line is a run that is not done.

        Args:
            path: A JSON line a run; made when there is one.
            inputs: Digest of data and base model: runs of others are not looked at.
        """
        self._path = path
        self._inputs = inputs
        self._records: dict[str, dict[str, Any]] = {}
        if path.is_file():
            lines = path.read_text(encoding="utf-8").split("\n")[:-1]
            for record in map(json.loads, lines):
                self._records[_key(record)] = record

    def find(self, plan: Plan) -> dict[str, Any] | None:
        """Return what a run came to, or None when it is not done."""
        return self._records.get(_key({**asdict(plan), "inputs": self._inputs}))

    def of(self, plans: Sequence[Plan]) -> list[dict[str, Any]]:
        """Return those of the runs that are done."""
        return [record for plan in plans if (record := self.find(plan)) is not None]

    def add(self, record: Mapping[str, Any]) -> None:
        """Note a finished run; it is on disk when this returns."""
        whole = {**record, "inputs": self._inputs}
        self._records[_key(whole)] = whole
        lines = [json.dumps(each) for each in self._records.values()]
        write_atomically(self._path, "".join(f"{line}\n" for line in lines))


def _key(record: Mapping[str, Any]) -> str:
    """Return what decides a run's result, as text."""
    names = [*Plan.__dataclass_fields__, "inputs"]
    return json.dumps({name: record.get(name) for name in names}, sort_keys=True)


def run_missing(
    plans: Sequence[Plan], runs: FinishedRuns, inputs: Inputs, out: Path, num_lanes: int
) -> None:
    """Do the runs that are not done, in their order, so many beside each other.

    Raises:
        FedgeError: Some did not end; the others did, and are on disk.
    """
    missing = [plan for plan in plans if runs.find(plan) is None]
    if not missing:
        return
    os.environ.update(LANE)
    lanes = ProcessPoolExecutor(
        num_lanes, mp_context=multiprocessing.get_context("spawn"), initializer=_end_with_parent
    )
    started, broken = time.monotonic(), []
    with lanes:
        futures: dict[Future[dict[str, Any]], Plan] = {
            lanes.submit(run_plan, plan, inputs, out / "work" / str(number)): plan
            for number, plan in enumerate(missing)
        }
        for count, future in enumerate(as_completed(futures), start=1):
            plan = futures[future]
            if (error := future.exception()) is None:
                record = future.result()
                runs.add(record)
                result = f"loss {record['loss']}, {record['seconds']:.0f} s"
                result += f", failed: {record['failed']}" if "failed" in record else ""
            else:
                result = f"did not end: {type(error).__name__}: {error}"
                broken.append(plan.name)
            attack = f", {plan.attack}" if plan.attack else ""
            elapsed = time.monotonic() - started
            _say(f"[{count}/{len(missing)}, {elapsed:.0f} s] {plan.name}{attack}, seed {plan.seed}")
            _say(f"    {result}")
    if broken:
        raise FedgeError(f"{len(broken)} runs did not end ({', '.join(broken)}): see above")


def _end_with_parent() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
    from processes import end_with_parent

    end_with_parent()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _digest(inputs: Inputs) -> str:
    """Return a digest of every record and of the base model."""
    digest = hashlib.sha256(model_digest(inputs.base_model).encode())
    for folder in institutions(inputs.data):
        for split in ("train", "heldout"):
            digest.update((folder / f"{split}.jsonl").read_bytes())
    return digest.hexdigest()[:16]


def plans_of(study: str, runs: FinishedRuns, num_seeds: int) -> list[Plan]:
    """Return the runs of a study that can be done now: poisoned ones need the honest run."""
    if study == "aggregations":
        return aggregation_plans(num_seeds)
    if study == "wire":
        return wire_plans(num_seeds)
    reference = runs.find(reference_plan())
    rest = poison_plans(typical_change(reference)) if reference else []
    return [reference_plan(), *rest]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("demo/data"))
    parser.add_argument("--model", type=Path, default=Path("demo/models/base"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3, help="of the first two studies")
    parser.add_argument("--study", choices=STUDIES, action="append", default=[])
    parser.add_argument("--lanes", type=int, default=2, help="runs beside each other")
    parser.add_argument("--report", action="store_true", help="print tables and run nothing")
    asked = parser.parse_args()
    studies = [study for study in STUDIES if study in asked.study or not asked.study]
    inputs = Inputs(asked.data.resolve(), asked.model.resolve(), asked.out.resolve() / "halves")
    runs = FinishedRuns(asked.out / "runs.jsonl", _digest(inputs))
    if asked.report:
        for study in studies:
            done = runs.of(plans_of(study, runs, asked.seeds))
            print(f"### {study}\n\n{quality_report.markdown(study, done)}\n")
        return
    halve(inputs.data, inputs.halves)
    for study in studies:
        if study == "poison":
            run_missing([reference_plan()], runs, inputs, asked.out, 1)
            clip_norm = typical_change(runs.of([reference_plan()])[0])
            _say(f"clip_norm {clip_norm:g}: the median norm of an honest site's change in a round")
        run_missing(plans_of(study, runs, asked.seeds), runs, inputs, asked.out, asked.lanes)
    result = {
        study: getattr(quality_report, study)(runs.of(plans_of(study, runs, asked.seeds)))
        for study in studies
    }
    print(json.dumps({"benchmark": "federation_quality", "num_seeds": asked.seeds, **result}))


if __name__ == "__main__":
    run_command(main)
