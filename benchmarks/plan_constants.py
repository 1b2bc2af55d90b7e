"""How fast one core of this machine is at what `federation plan` counts.

    python -m benchmarks.plan_constants

prints one JSON line with the fields of `federation.server_costs.Machine`, each the best of a few
runs: what the machine can do, not what it did beside other work.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from federation.adapter import Adapter, LowRank
from federation.aggregation import average_products
from federation.wire import encode, open_update

LENGTH, STACKED, KEPT = 18944, 160, 48
"""A long side of a 7B model; eight sites of rank 16 and a tail of 32; rank and tail."""


def best_seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Return the shortest CPU time of a few runs."""
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return min(seconds)


def cube_seconds() -> float:
    """Return the seconds per S**3 of averaging square modules no longer than S is."""
    generator = torch.Generator().manual_seed(0)
    updates = [
        LowRank(
            torch.randn(STACKED, 16, generator=generator),
            torch.randn(16, STACKED, generator=generator),
        )
        for _ in range(STACKED // 16)
    ]
    weights = [1.0] * len(updates)
    return best_seconds(lambda: average_products(updates, weights, 16)) / STACKED**3


def read_bytes_per_s(directory: Path) -> float:
    """Return the speed of reading a spooled update, which is in the page cache, and adding it."""
    factors = LowRank(torch.ones(LENGTH, 16), torch.ones(16, LENGTH))
    adapter = Adapter(16, 32.0, {f"layer.{index}": factors for index in range(8)})
    path = directory / "update"
    path.write_bytes(encode(adapter, dtype="float32", base_model="0" * 64))
    update = open_update(path)
    total_RI = torch.zeros(16, LENGTH)

    def read() -> None:
        for module in update.modules:
            read = update.read(module)
            total_RI.add_(read.a_RI, alpha=0.5).add_(read.b_OR.mT, alpha=0.5)

    return path.stat().st_size / best_seconds(read)


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    x_SN, w_KS = torch.randn(STACKED, LENGTH), torch.randn(KEPT, STACKED)
    sites_KN = torch.randn(8, 1_000_000)
    with tempfile.TemporaryDirectory() as scratch:
        speed = read_bytes_per_s(Path(scratch))
    result = {
        "gemm_flops_per_s": 2 * STACKED**2 * LENGTH / best_seconds(lambda: x_SN @ x_SN.mT),
        "thin_flops_per_s": 2 * KEPT * STACKED * LENGTH / best_seconds(lambda: w_KS @ x_SN),
        "cube_s": cube_seconds(),
        "read_bytes_per_s": speed,
        "sort_numbers_per_s": sites_KN.numel() / best_seconds(lambda: sites_KN.sort(dim=0), 2),
    }
    print(json.dumps({name: float(f"{value:.3g}") for name, value in result.items()}))


if __name__ == "__main__":
    main()
