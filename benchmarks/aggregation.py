"""What the exact mean of LoRA adapters costs, beside the inexact means of stock Flower and NVFlare.

    python -m benchmarks.aggregation --sites 8

writes the sites' updates to a spool, gives the same spool to each method in a process of its own,
on one thread, and prints one JSON line:

- exact_cpu_s: our average of B @ A, CPU seconds beyond decoding. `exact_total_cpu_s` is the whole
  walk over the spool and `exact_read_cpu_s` the same walk that only reads; exact is the difference.
- exact_tail_cpu_s: the same with the tail of the round before as a participant, and a new tail.
- flwr_cpu_s: Flower's `aggregate_arrayrecords`, A and B apart, replies already in memory.
- nvflare_cpu_s: NVFlare's own `WeightedAggregationHelper`, A and B apart, replies decoded outside.
- …_extra_peak_bytes: the most that the process held above what `import torch` and one product take,
  everything else included; Flower's takes all replies as a list, so they are in it.
- residual_vs_optimum: what cutting one k_proj to the rank loses of the mean, ours and the least
  possible (singular values of the dense float64 mean), relative.

CPU seconds are the least of the repeats after one that is not counted, for us and the peers alike:
what else runs on the machine only adds.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.geometry import (
    ALPHA,
    DRIFT,
    GEOMETRIES,
    RANK,
    num_examples,
    write_updates,
)
from benchmarks.peers.environment import nvflare_python
from benchmarks.processes import bytes_after_torch_import, child, cpu_seconds, forget_peak
from benchmarks.processes import peak_bytes as peak

if TYPE_CHECKING:
    from federation.adapter import LowRank
    from federation.aggregation import ModuleAverage
    from federation.wire import Update

TAIL_RANK = 32
"""As a run has it by default."""
K_PROJ = "model.layers.0.self_attn.k_proj"


def spooled(spool: Path) -> "list[Update]":
    """Return the updates of a spool, checked."""
    from federation.wire import open_update

    return [open_update(path) for path in sorted(spool.iterdir())]


def average(
    updates: "Sequence[Update]",
    *,
    tail_rank: int = 0,
    tails: "Mapping[str, LowRank] | None" = None,
) -> "Iterator[ModuleAverage]":
    """Yield our exact mean of spooled updates, module by module, as the server writes it."""
    from federation.aggregation import Rule, aggregate

    rule = Rule("products", RANK, ALPHA, tail_rank=tail_rank)
    weights = num_examples(len(updates))
    # What the sites were sent matters to other rules only: any adapter of these shapes will do.
    return aggregate(updates, weights, rule, origin=updates[0], tails=(tails or {}).get).modules


def exhaust(modules: "Iterator[ModuleAverage]") -> None:
    """Take every module and let it go before the next one."""
    for _ in modules:
        pass


def read_only(updates: "Sequence[Update]") -> None:
    """Read what `average` reads, in the same order and into buffers of the same size."""
    import torch

    num_rows = sum(update.rank for update in updates)
    shapes = updates[0].shapes()
    buffers = [
        torch.empty(num_rows * max(columns)) for columns in zip(*shapes.values(), strict=True)
    ]
    for module, columns in shapes.items():
        b_SO, a_SI = (
            buffer[: num_rows * count].view(num_rows, count)
            for buffer, count in zip(buffers, columns, strict=True)
        )
        start = 0
        for update in updates:
            rows = slice(start, start + update.rank)
            update.read_rows(module, b_SO[rows], a_SI[rows])
            start += update.rank


def repeated(work: Callable[[], object], repeats: int) -> float:
    """Return the least CPU seconds of the calls after the first."""
    work()
    return min(cpu_seconds(work) for _ in range(repeats))


def measure_exact(spool: Path, repeats: int) -> dict[str, Any]:
    floor = bytes_after_torch_import()
    updates = spooled(spool)
    total = repeated(lambda: exhaust(average(updates)), repeats)
    extra_peak_bytes = peak() - floor
    read = repeated(lambda: read_only(updates), repeats)
    # Not the tail of these very updates: it would lie in the span of their rows, where the tail of
    # a round before, of other drifts from the same start, does not.
    before = spooled(spool.with_name("before"))
    tails = {m.name: m.tail for m in average(before, tail_rank=TAIL_RANK) if m.tail is not None}
    with_tail = repeated(
        lambda: exhaust(average(updates, tail_rank=TAIL_RANK, tails=tails)), repeats
    )
    return {
        "cpu_s": round(total - read, 3),
        "total_cpu_s": round(total, 3),
        "read_cpu_s": round(read, 3),
        "tail_cpu_s": round(with_tail - read, 3),
        "extra_peak_bytes": extra_peak_bytes,
    }


def measure_flwr(spool: Path, repeats: int) -> dict[str, Any]:
    """Measure stock Flower's averaging of replies that it holds in memory."""
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    floor = bytes_after_torch_import()
    updates = spooled(spool)
    replies = []
    for update, weight in zip(updates, num_examples(len(updates)), strict=True):
        arrays = {}
        for module in update.modules:
            factors = update.read(module)
            arrays[f"{module}.A"] = Array(factors.a_RI.numpy())
            arrays[f"{module}.B"] = Array(factors.b_OR.numpy())
        metrics = MetricRecord({"num-examples": weight})
        replies.append(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}))
    forget_peak()
    cpu_s = repeated(lambda: aggregate_arrayrecords(replies, "num-examples"), repeats)
    return {"cpu_s": round(cpu_s, 3), "extra_peak_bytes": peak() - floor}


def measure_residual(spool: Path) -> dict[str, Any]:
    """Compare our cut of one module with the best one that there is, by dense float64 SVD."""
    import torch

    updates = spooled(spool)
    weights = num_examples(len(updates))
    (got,) = (module.factors for module in average(updates))
    mean_OI = torch.zeros(updates[0].shapes()[K_PROJ], dtype=torch.float64)
    for update, weight in zip(updates, weights, strict=True):
        factors = update.read(K_PROJ)
        share = weight / sum(weights) * update.alpha / update.rank
        mean_OI += share * (factors.b_OR.double() @ factors.a_RI.double())
    lost_OI = mean_OI - ALPHA / RANK * (got.b_OR.double() @ got.a_RI.double())
    cut = torch.linalg.svdvals(mean_OI)[RANK:]
    size = float(mean_OI.norm())
    return {"ours": float(lost_OI.norm()) / size, "optimum": float(cut.norm()) / size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, default=8)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="7b")
    parser.add_argument("--drift", type=float, default=DRIFT, help="of a site from the others")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-nvflare", action="store_true", help="make no environment for it")
    parser.add_argument("--measure", choices=("exact", "flwr", "residual"), help=argparse.SUPPRESS)
    parser.add_argument("--spool", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure == "exact":
        print(json.dumps(measure_exact(asked.spool, asked.repeats)))
    elif asked.measure == "flwr":
        print(json.dumps(measure_flwr(asked.spool, asked.repeats)))
    elif asked.measure == "residual":
        print(json.dumps(measure_residual(asked.spool)))
    else:
        print(json.dumps(compare(asked)))


def compare(asked: argparse.Namespace) -> dict[str, Any]:
    """Run every method on the same updates, one after the other."""
    geometry = GEOMETRIES[asked.geometry]
    figures: dict[str, Any] = {
        "benchmark": "aggregation",
        "geometry": asked.geometry,
        "sites": asked.sites,
        "rank": RANK,
        "drift": asked.drift,
        "num_parameters": geometry.num_parameters(),
        "num_modules": len(geometry.shapes()),
    }
    with tempfile.TemporaryDirectory() as directory:
        spool, small = Path(directory) / "spool", Path(directory) / "small"
        write_updates(spool, geometry, asked.sites, drift=asked.drift)
        write_updates(small, geometry, asked.sites, drift=asked.drift, modules=[K_PROJ])
        before = Path(directory) / "before"  # four sites: enough for a tail of full rank
        write_updates(before, geometry, 4, drift=asked.drift, first_seed=1001)
        common = ("--spool", spool, "--repeats", asked.repeats)
        itself = ("benchmarks.aggregation", "--geometry", asked.geometry)
        results = {name: child(*itself, "--measure", name, *common) for name in ("exact", "flwr")}
        if not asked.no_nvflare:
            average_there = "benchmarks.peers.nvflare_average"
            results["nvflare"] = child(average_there, *common, python=nvflare_python())
        for name, values in results.items():
            figures |= {f"{name}_{key}": value for key, value in values.items()}
        residual = child(*itself, "--measure", "residual", "--spool", small)
    return {**figures, "residual_vs_optimum": residual}


if __name__ == "__main__":
    main()
