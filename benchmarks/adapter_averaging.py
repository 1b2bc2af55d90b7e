"""How long averaging adapters takes: exact products, factors, and Flower's own FedAvg.

SmolLM2-135M geometry (30 layers, all seven projections, rank 16: 19.5 MB an adapter), one thread,
the same adapters for all three. Flower's function averages A and B apart and takes replies as
it finds them in memory; ours read checked updates from disk, one module of every site at a time.

    python benchmarks/adapter_averaging.py [--sites 8]

prints one JSON line: CPU seconds, and what each loses against the exact mean.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from federation.adapter import Adapter, LowRank
from federation.aggregation import aggregate
from federation.wire import Update, encode, open_update

HIDDEN, KEYS, MLP, LAYERS, RANK = 576, 192, 1536, 30, 16
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}


def site_adapter(seed: int) -> Adapter:
    """An adapter after some local steps: A near a shared start, B small."""
    start, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    modules = {}
    for layer in range(LAYERS):
        for name, (out, inn) in SHAPES.items():
            a_RI = torch.randn(RANK, inn, generator=start) / inn**0.5
            a_RI += 0.1 * torch.randn(RANK, inn, generator=own) / inn**0.5
            b_OR = 0.01 * torch.randn(out, RANK, generator=own)
            modules[f"model.layers.{layer}.{name}"] = LowRank(b_OR, a_RI)
    return Adapter(RANK, 2.0 * RANK, dict(sorted(modules.items())))


def timed(work: Callable[[], object]) -> tuple[float, object]:
    """Return CPU seconds and the result."""
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def flower_average(updates: list[Update], weights: list[float]) -> float:
    """Return the CPU seconds of flwr's aggregate_arrayrecords on the same adapters."""
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    replies = []
    for update, weight in zip(updates, weights, strict=True):
        arrays = {}
        for name, factors in update.adapter().modules.items():
            arrays[f"{name}.A"] = Array(factors.a_RI.numpy())
            arrays[f"{name}.B"] = Array(factors.b_OR.numpy())
        metrics = MetricRecord({"num-examples": weight})
        replies.append(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}))
    seconds, _ = timed(lambda: aggregate_arrayrecords(replies, "num-examples"))
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, default=8)
    sites = parser.parse_args().sites
    torch.set_num_threads(1)
    weights = [float(100 + 50 * index) for index in range(sites)]
    figures: dict[str, object] = {"benchmark": "adapter_averaging", "sites": sites, "rank": RANK}
    with tempfile.TemporaryDirectory() as directory:
        updates = []
        for index in range(sites):
            path = Path(directory) / str(index)
            path.write_bytes(encode(site_adapter(index + 1), dtype="float32", base_model="b"))
            updates.append(open_update(path))
        figures["adapter_mb"] = round(updates[0].num_bytes / 1e6, 2)
        aggregate(updates, weights, kind="products", rank=RANK, alpha=32.0)  # warm up
        for kind in ("products", "factors"):
            seconds, result = timed(
                lambda kind=kind: aggregate(updates, weights, kind=kind, rank=RANK, alpha=32.0)  # type: ignore[misc]
            )
            figures[f"{kind}_cpu_s"] = round(seconds, 3)
            figures[f"{kind}_worst_relative_error"] = round(result[1], 5)  # type: ignore[index]
        figures["flower_cpu_s"] = round(flower_average(updates, weights), 3)
    json.dump(figures, sys.stdout)
    print()


if __name__ == "__main__":
    main()
