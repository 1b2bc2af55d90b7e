"""NVFlare's averaging of adapters, measured; runs in the environment that has NVFlare.

`WeightedAggregationHelper` is what NVFlare's FedAvg gives each result to as it arrives. It averages
A and B apart. The results are torch tensors, its faster way (numpy arrays are not summed in place).
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper

from benchmarks.geometry import num_examples
from benchmarks.processes import bytes_after_torch_import, cpu_seconds, peak_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from federation.wire import Update


def decoded(update: "Update") -> "dict[str, Tensor]":
    """Return one result as NVFlare holds it."""
    tensors = {}
    for module in update.modules:
        factors = update.read(module)
        tensors[f"{module}.A"], tensors[f"{module}.B"] = factors.a_RI, factors.b_OR
    return tensors


def average(updates: "list[Update]") -> float:
    """Return the CPU seconds of one average; reading a result is outside the clock."""
    helper = WeightedAggregationHelper()
    seconds = 0.0
    for update, weight in zip(updates, num_examples(len(updates)), strict=True):
        add = partial(helper.add, decoded(update), weight, update.path.name, 0)
        seconds += cpu_seconds(add)
        del add  # and with it the result, before the next one is read
    return seconds + cpu_seconds(helper.get_result)


def measure(spool: Path, repeats: int) -> dict[str, Any]:
    """Return the least of the repeats after one that is not counted, and the memory."""
    from federation.wire import open_update

    floor = bytes_after_torch_import()
    updates = [open_update(path) for path in sorted(spool.iterdir())]
    average(updates)
    cpu_s = min(average(updates) for _ in range(repeats))
    return {"cpu_s": round(cpu_s, 3), "extra_peak_bytes": peak_bytes() - floor}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spool", type=Path, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    asked = parser.parse_args()
    print(json.dumps(measure(asked.spool, asked.repeats)))
