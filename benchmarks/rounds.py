"""What a round costs the server: its seconds, its memory, and the bytes on the wire.

    python -m benchmarks.rounds --sites 16
    python -m benchmarks.rounds --sites 4 --peer nvflare

runs the product's own rounds in one process on a grid whose sites answer with ready-made updates,
so that what the process holds is what a server holds, and prints one JSON line:

- payload_bytes: of one float32 message.
- round_s: seconds of each round, first to last, of which `replies_s` went into making replies (a
  real site does that itself).
- server_extra_peak_bytes: the most that the process held above what `import torch` and one product
  take; `flwr_import_bytes` of it is Flower itself.
- wire_ratio: bytes of a real encoded message against float32; the same format travels up and down.

With a peer the same payload goes through NVFlare's simulator too, and a second line says what that
took; nvflare-offload switches on its spooling of received tensors to disk.

Replies are whole float32 adapters of rank 16 whatever is asked: `--set` can change how they are
averaged and what goes down, but not to `alternating` or another uplink.

The base model is a file that ends after its header: the server reads nothing of a model but shapes
and a digest. Hashing the 15 GB of a real one, once a run, is not in these figures.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.canned_grid import CannedGrid, write_base_model
from benchmarks.geometry import ALPHA, GEOMETRIES, RANK, num_examples, site_adapter
from benchmarks.peers.environment import nvflare_python
from benchmarks.processes import bytes_after_torch_import, child, peak_bytes, resident_bytes

ROUND_TIMEOUT_S = 3600.0
PEERS = ("nvflare", "nvflare-offload")


def measure_server(scratch: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Run the rounds in this process."""
    floor = bytes_after_torch_import()
    from federation.events import RoundFinished, RoundStarted, read_events
    from federation.grid_sites import GridSites
    from federation.rounds import run_rounds

    flwr_import_bytes = resident_bytes() - floor
    grid = CannedGrid(scratch / "canned", num_examples(asked.sites))
    settings = settings_of(scratch, asked)
    run_rounds(GridSites(grid, ROUND_TIMEOUT_S), settings)
    events = [event for _, event in read_events(scratch / "run" / "events.jsonl")]
    finished = [event for event in events if isinstance(event, RoundFinished)]
    return {
        "payload_bytes": next(e.num_bytes for e in events if isinstance(e, RoundStarted)),
        "round_s": [round(event.seconds, 2) for event in finished],
        "replies_s": [round(seconds, 2) for seconds in grid.seconds_by_round],
        "aggregation_s": [round(event.aggregation_seconds, 2) for event in finished],
        "server_extra_peak_bytes": peak_bytes() - floor,
        "flwr_import_bytes": flwr_import_bytes,
    }


def settings_of(scratch: Path, asked: argparse.Namespace) -> Any:
    """Return the settings of a run; `--set` takes any that `flwr run -c` takes."""
    import tomllib

    from federation.settings import FederationSettings, load_settings

    values: dict[str, Any] = {
        "base_model": str(scratch / "base"),
        "out": str(scratch / "run"),
        "num_rounds": asked.rounds,
        "num_sites": asked.sites,
        "round_timeout_s": ROUND_TIMEOUT_S,
        "adapter.rank": RANK,
        "adapter.alpha": ALPHA,
    }
    for text in asked.set:
        key, _, value = text.partition("=")
        values[key] = tomllib.loads(f"value = {value}")["value"]
    return load_settings(FederationSettings, values, "--set")


def write_canned(scratch: Path, geometry: str) -> dict[str, Any]:
    """Write the base model and the update that all replies are made from."""
    from federation.base_model import model_digest
    from federation.wire import encode

    write_base_model(scratch / "base", GEOMETRIES[geometry])
    adapter = site_adapter(GEOMETRIES[geometry], 1)
    digest = model_digest(scratch / "base")
    (scratch / "canned").write_bytes(encode(adapter, dtype="float32", base_model=digest))
    return {}


def measure_wire(geometry: str) -> dict[str, Any]:
    """Encode a site's change in each format, and the unchanged adapter in float32."""
    from federation.wire import encode

    start, trained = (site_adapter(GEOMETRIES[geometry], seed) for seed in (0, 1))
    full = len(encode(trained, dtype="float32", base_model="benchmark"))
    ratios = {}
    for dtype in ("int8", "int4"):
        message = encode(trained, dtype=dtype, base_model="benchmark", reference=start)
        ratios[dtype] = round(len(message) / full, 5)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="7b")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--peer", choices=PEERS, action="append", default=[])
    parser.add_argument("--measure", choices=("canned", "server", "wire"), help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure == "canned":
        print(json.dumps(write_canned(asked.scratch, asked.geometry)))
    elif asked.measure == "server":
        print(json.dumps(measure_server(asked.scratch, asked)))
    elif asked.measure == "wire":
        print(json.dumps(measure_wire(asked.geometry)))
    else:
        print(json.dumps(run_all(asked)), flush=True)
        for peer in asked.peer:
            print(json.dumps(run_peer(peer, asked)), flush=True)


def run_all(asked: argparse.Namespace) -> dict[str, Any]:
    """Prepare, run the rounds, and weigh the messages, each in a process of its own."""
    itself = "benchmarks.rounds"
    common = ["--sites", asked.sites, "--rounds", asked.rounds, "--geometry", asked.geometry]
    common += [f"--set={text}" for text in asked.set]
    with tempfile.TemporaryDirectory() as scratch:
        child(itself, "--measure", "canned", "--scratch", scratch, *common)
        figures = child(itself, "--measure", "server", "--scratch", scratch, *common)
    figures["wire_ratio"] = child(itself, "--measure", "wire", *common)
    head = {"benchmark": "rounds", "geometry": asked.geometry, "sites": asked.sites}
    return {**head, "settings": asked.set, **figures}


def run_peer(peer: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Run NVFlare's simulator with the same payload, number of sites and rounds."""
    arguments = ["--sites", asked.sites, "--rounds", asked.rounds, "--geometry", asked.geometry]
    if peer == "nvflare-offload":
        arguments.append("--offload")
    figures = child("benchmarks.peers.nvflare_rounds", *arguments, python=nvflare_python())
    return {"benchmark": f"rounds of {peer}", "geometry": asked.geometry, **figures}


if __name__ == "__main__":
    main()
