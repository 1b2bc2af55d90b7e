"""What a round over resident nodes costs: beside stock Flower if empty, beside NVFlare if full.

    python -m benchmarks.resident_rounds
    python -m benchmarks.resident_rounds --payload 7b --sites 4 --peer nvflare

The sites are daemons with their trainers, on a SuperLink with TLS behind nginx, all on one machine.

Without --payload the adapter has a few hundred numbers on a real model of two layers, and a round
trains one step on one record: what is left is the way there and back, the policy, the ledger, and
what the site puts on disk. `stock_round_s` is FedAvg with as many bytes on a stock SuperLink and
stock SuperNodes, as they are shipped, in the same run.

With --payload the adapter has rank 16 on every projection of a model of that geometry, and the
sites move its numbers instead of training (`resident_sites`). NVFlare's simulator does the same,
without TLS and without a proxy, each side in the number format that is its fastest here: `--uplink`
and `--downlink` of ours, `--peer nvflare` (float32) or `nvflare-float16` of theirs. Both average
factor by factor; `--aggregation products` is the exact mean, which NVFlare has not.

One JSON line: mean, median, least and most seconds of a round, the first one not counted.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.deployment import ROOT, SITES, differences, run_stock, spread
from benchmarks.geometry import ALPHA, GEOMETRIES, RANK
from benchmarks.peers.environment import nvflare_python
from benchmarks.processes import child
from benchmarks.resident_sites import ResidentSite, resident_sites
from federation.events import RoundFinished, RoundStarted, UpdateReceived, read_events

sys.path.insert(0, str(ROOT / "examples"))
sys.path.insert(0, str(ROOT / "examples" / "deployment"))

from topology import CONNECTION, Deployment, deployment

PEERS = ("nvflare", "nvflare-float16")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11, help="the first is not counted")
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--payload", choices=GEOMETRIES, help="none = next to nothing")
    parser.add_argument("--uplink", default="bfloat16")
    parser.add_argument("--downlink", default="bfloat16")
    parser.add_argument("--aggregation", default="factors", help="factors = NVFlare's FedAvg")
    parser.add_argument("--peer", choices=PEERS, action="append", default=[])
    parser.add_argument("--no-stock", action="store_true", help="of the empty round")
    asked = parser.parse_args()
    figures: dict[str, Any] = {
        "benchmark": "resident_rounds",
        "sites": asked.sites,
        "payload": asked.payload or "empty",
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
    }
    # Short paths: the trainer's socket is below.
    with tempfile.TemporaryDirectory(prefix="fedge-") as directory:
        measure = measure_payload if asked.payload else measure_empty
        figures |= measure(Path(directory), asked)
    print(json.dumps(figures))


def measure_empty(scratch: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Compare rounds that bring next to nothing with stock Flower's."""
    from tests.conftest import write_tiny_model

    base = write_tiny_model(scratch / "base")
    words = 'adapter.rank=1 adapter.targets="attention" training.num_steps=1 '
    words += 'training.batch_size=1 training.max_tokens=64 training.dtype="float32"'
    ours, num_bytes, parts = run_ours(scratch, base, words, asked, moves=False)
    figures = {"payload_bytes": num_bytes, **spread("empty_round", ours), "parts_s": parts}
    if not asked.no_stock:
        console = Console(stderr=True)
        with deployment(scratch / "stock", SITES, console, site_switches={}) as made:
            stock = run_stock(made, scratch, asked.rounds, num_bytes)
        figures |= spread("stock_round", stock)
        figures["of_stock"] = round(statistics.mean(ours) / statistics.mean(stock), 3)
    return figures


def measure_payload(scratch: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Compare rounds of a real adapter's size with NVFlare's."""
    from benchmarks.canned_grid import write_base_model

    geometry = GEOMETRIES[asked.payload]
    write_base_model(scratch / "base", geometry)
    words = f'wire.uplink="{asked.uplink}" wire.downlink="{asked.downlink}" '
    words += f'adapter.rank={RANK} adapter.alpha={ALPHA} aggregation="{asked.aggregation}"'
    ours, num_bytes, parts = run_ours(scratch, scratch / "base", words, asked, moves=True)
    shutil.rmtree(scratch / "ours")  # the SuperLink's state is as large as what it carried
    figures = {
        "float32_bytes": 4 * geometry.num_parameters(),
        "update_bytes": num_bytes,
        "uplink": asked.uplink,
        "downlink": asked.downlink,
        "aggregation": asked.aggregation,
        **spread("round", ours),
        "parts_s": parts,
    }
    for peer in asked.peer:
        arguments = ["--sites", asked.sites, "--rounds", asked.rounds, "--geometry", asked.payload]
        is_narrow = peer == "nvflare-float16"
        arguments += ["--quantize", "float16"] if is_narrow else []
        python = nvflare_python(with_quantizer=is_narrow)
        there = child("benchmarks.peers.nvflare_rounds", *arguments, python=python)
        figures |= spread(peer.replace("-", "_"), there["round_s"][1:])
    means = [figures[f"{peer.replace('-', '_')}_s"] for peer in asked.peer]
    if means:
        figures["of_best_nvflare"] = round(statistics.mean(ours) / min(means), 3)
    return figures


def run_ours(
    scratch: Path, base: Path, words: str, asked: argparse.Namespace, *, moves: bool
) -> tuple[list[float], int, dict[str, float]]:
    """Run a federation of resident sites; return seconds a round, bytes of an update, and parts."""
    names = [f"site{index}" for index in range(asked.sites)]
    out = scratch / "run"
    words += f' base_model="{base}" out="{out}" num_rounds={asked.rounds}'
    words += f" num_sites={asked.sites} quorum={asked.sites}"
    with (
        deployment(scratch / "ours", [], Console(stderr=True)) as made,
        resident_sites(made, scratch / "s", names, base=base, moves=moves) as sites,
    ):
        run(made, words)
        parts = parts_of(out, sites)
    events = list(read_events(out / "events.jsonl"))
    times = [at.timestamp() for at, event in events if isinstance(event, RoundFinished)]
    sizes = [event.num_bytes for _, event in events if isinstance(event, UpdateReceived)]
    return differences(times, asked.rounds), max(sizes), parts


def run(made: Deployment, words: str) -> None:
    """Run the federation to its end."""
    command = ["flwr", "run", str(ROOT), CONNECTION, "--stream", "-c", words]
    made.services.run(command, made.variables("coordinator"))


def parts_of(out: Path, sites: Sequence[ResidentSite]) -> dict[str, float]:
    """Return the median seconds of a round's parts, by the clocks of the server and the sites.

    asked: from the round's start until a site has the message; answered: until its trainer has the
    answer on disk and in the ledger; replied: until the SuperLink has it; received: until the
    server has taken it in; finished: until the average is written.
    """
    marks: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    names = {RoundStarted: "started", UpdateReceived: "received", RoundFinished: "finished"}
    for time, event in read_events(out / "events.jsonl"):
        if isinstance(event, RoundStarted | UpdateReceived | RoundFinished):
            marks[event.server_round][names[type(event)]].append(time.timestamp())
    for site in sites:
        server_round = 0
        for line in site.events():
            server_round += line["event"] == "asked"
            if line["event"] in ("asked", "answered", "replied"):
                at = datetime.fromisoformat(line["time"]).timestamp()
                marks[server_round][line["event"]].append(at)
    order = ("started", "asked", "answered", "replied", "received", "finished")
    spans: dict[str, list[float]] = defaultdict(list)
    for mark in list(marks.values())[1:]:
        for before, after in itertools.pairwise(order):
            if mark[before] and mark[after]:
                spans[after].append(statistics.mean(mark[after]) - statistics.mean(mark[before]))
    return _medians(spans)


def _medians(spans: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: round(statistics.median(values), 3) for name, values in spans.items()}


if __name__ == "__main__":
    main()
