"""How long a round takes in a real deployment: nothing to train, next to nothing to carry.

The deployment of examples/deployment: SuperLink with TLS, node keys and a database on disk,
SuperExec, nginx, two stock SuperNodes, all on this machine. Measured is our server loop (the
bundle's own ServerApp, with an adapter of one 8 x 8 module, rank 2) against Flower's FedAvg with
its own polling. In both the ClientApp sends back what it got, so no torch is imported on a site.
What differs: our loop asks for replies at its own pace, and FLWR_SUPEREXEC_TASK_POLL_INTERVAL is
0.05 at the sites, as the example has it; FedAvg runs as it is shipped, without that variable.

    python -m benchmarks.deployment [--rounds 11]

prints one JSON line. Rounds are timed from the end of one to the end of the next, so the first is
not in; the mean is what a run of many rounds costs a round, the median, smallest and largest say
how it scatters (a SuperNode looks for work every 3 s, and two of them drift apart and together).

``floor_round_s`` is what stock SuperNodes leave to any server: on the same deployment, a ServerApp
that pushes bytes, asks for the replies every 0.02 s and pushes again, and does nothing else.
``floor_s`` is derived, not measured: a stock SuperNode that has just replied sleeps 3.0 s (flwr
1.41 start_client_internal.py:263), pulls its message (0.1 s), starts a Python process for it (about
1.4 s of imports), looks for the reply every 0.5 s, and uploads it (0.2 s): 4.5 to 5 s on the
reference machine.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import struct
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from federation.events import RoundFinished, UpdateReceived, read_events

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
sys.path.insert(0, str(ROOT / "examples" / "deployment"))

from topology import CONNECTION, Deployment, Site, deployment  # noqa: E402

SITES = (Site("a", ""), Site("b", ""))
FLOOR_S = 5.0

OUR_CLIENT = """
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from federation.grid_sites import ADAPTER, RESULT, SITE

app = ClientApp()


@app.train()
def train(message, context):
    result = MetricRecord({"num-examples": 1, "train_loss": 0.0, "seconds": 0.0})
    content = {ADAPTER: message.content[ADAPTER], RESULT: result, SITE: ConfigRecord({"name": ""})}
    return Message(RecordDict(content), reply_to=message)
"""

STOCK_CLIENT = """
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    metrics = MetricRecord({"num-examples": 1})
    content = {"arrays": message.content["arrays"], "metrics": metrics}
    return Message(RecordDict(content), reply_to=message)
"""

STOCK_SERVER = """
import time

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid, context):
    def note(server_round, arrays):
        with open(context.run_config["out"], "a") as file:
            file.write(f"{time.time()}\\n")

    payload = np.zeros(context.run_config["adapter.rank"], dtype=np.float32)
    FedAvg(fraction_evaluate=0.0).start(
        grid,
        ArrayRecord({"payload": Array(payload)}),
        num_rounds=context.run_config["num_rounds"],
        evaluate_fn=note,
    )
"""

FLOOR_SERVER = """
import time

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import ServerApp

from federation.grid_sites import ADAPTER

app = ServerApp()


@app.main()
def main(grid, context):
    payload = np.zeros(context.run_config["adapter.rank"], dtype=np.uint8)
    record = ArrayRecord({ADAPTER: Array(payload)})
    while len(nodes := list(grid.get_node_ids())) < context.run_config["num_sites"]:
        time.sleep(0.1)
    for _ in range(context.run_config["num_rounds"]):
        content = RecordDict({ADAPTER: record})
        messages = [Message(content, message_type="train", dst_node_id=node) for node in nodes]
        waiting = set(grid.push_messages(messages))
        while waiting:
            time.sleep(0.02)
            for reply in grid.pull_messages(list(waiting)):
                if reply.has_error():
                    raise RuntimeError(reply.error.reason)
                waiting.remove(reply.metadata.reply_to_message_id)
        with open(context.run_config["out"], "a") as file:
            file.write(f"{time.time()}\\n")
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11, help="of each; the first is not counted")
    rounds = parser.parse_args().rounds
    load = os.getloadavg()[0]
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        base = write_base_model(scratch / "base")
        with deployment(scratch / "ours", SITES, console) as made:
            ours, payload = run_ours(made, scratch, base, rounds)
            floor = run_floor(made, scratch, rounds, payload)
        with deployment(scratch / "stock", SITES, console, site_switches={}) as made:
            stock = run_stock(made, scratch, rounds, payload)
    figures = {
        "benchmark": "deployment",
        "sites": len(SITES),
        "payload_bytes": payload,
        "num_rounds": len(ours),
        "of_mean_floor": round(statistics.mean(ours) / statistics.mean(floor), 3),
        **spread("round", ours),
        **spread("stock_round", stock),
        **spread("floor_round", floor),
        "floor_s": FLOOR_S,
        "cores": os.cpu_count(),
        "load_before": round(load, 2),
    }
    json.dump(figures, sys.stdout)
    print()


def write_base_model(directory: Path) -> Path:
    """Write the least that our server loop takes for a model: one 8 x 8 projection."""
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama"}\n')
    entry = {"dtype": "F32", "shape": [8, 8], "data_offsets": [0, 256]}
    header = json.dumps({"model.layers.0.self_attn.q_proj.weight": entry}).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(256)
    (directory / "model.safetensors").write_bytes(content)
    return directory


def run_ours(made: Deployment, scratch: Path, base: Path, rounds: int) -> tuple[list[float], int]:
    """Run our server loop with echoing sites; return seconds a round, and bytes of an update."""
    app = write_app(scratch / "our-app", {"clientapp": "echo:app"}, {"echo.py": OUR_CLIENT})
    out = scratch / "run"
    run_app(made, app, f'base_model="{base}" out="{out}" num_rounds={rounds} adapter.rank=2')
    times, num_bytes = [], 0
    for at, event in read_events(out / "events.jsonl"):
        if isinstance(event, RoundFinished):
            times.append(at.timestamp())
        if isinstance(event, UpdateReceived):
            num_bytes = event.num_bytes
    return differences(times, rounds), num_bytes


def run_floor(made: Deployment, scratch: Path, rounds: int, payload: int) -> list[float]:
    """Run the least that a server can do with as many bytes; return seconds a round."""
    app = write_app(
        scratch / "floor-app",
        {"serverapp": "floor:app", "clientapp": "echo:app"},
        {"echo.py": OUR_CLIENT, "floor.py": FLOOR_SERVER},
    )
    out = scratch / "floor-times"
    sites = f"num_sites={len(SITES)}"
    run_app(made, app, f'out="{out}" num_rounds={rounds} {sites} adapter.rank={payload}')
    return differences([float(line) for line in out.read_text().split()], rounds)


def run_stock(made: Deployment, scratch: Path, rounds: int, payload: int) -> list[float]:
    """Run FedAvg with as many bytes, as it is shipped; return seconds a round."""
    app = write_app(
        scratch / "stock-app",
        {"serverapp": "stock:app", "clientapp": "echo:app"},
        {"echo.py": STOCK_CLIENT, "stock.py": STOCK_SERVER},
    )
    out = scratch / "times"
    run_app(made, app, f'out="{out}" num_rounds={rounds} adapter.rank={payload // 4}')
    # One line before the first round, then one a round.
    return differences([float(line) for line in out.read_text().split()][1:], rounds)


# Flower takes only settings that the bundle's pyproject.toml has, so the apps of the peers read the
# payload's size from `adapter.rank`.
def write_app(directory: Path, components: Mapping[str, str], files: Mapping[str, str]) -> Path:
    """Write a Flower app that is ours but for some components; return its directory."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lines = []
    for line in project.split("\n"):
        name = line.partition(" = ")[0]
        if name in components:
            lines.append(f'{name} = "{components[name]}"')
        elif name == "fab-include":
            included = ["federation/**/*.py", "/README.md", "/LICENSE", *(f"/{f}" for f in files)]
            lines.append(f"{name} = {json.dumps(included)}")
        else:
            lines.append(line)
    directory.mkdir()
    (directory / "pyproject.toml").write_text("\n".join(lines), encoding="utf-8")
    # Copies: what goes into a bundle is looked for without following links.
    shutil.copytree(ROOT / "federation", directory / "federation")
    for name in ("README.md", "LICENSE"):
        shutil.copy(ROOT / name, directory / name)
    for name, content in files.items():
        (directory / name).write_text(content, encoding="utf-8")
    return directory


def run_app(made: Deployment, app: Path, config: str) -> None:
    """Run an app to its end on a deployment."""
    command = ["flwr", "run", str(app), CONNECTION, "--stream", "-c", config]
    made.services.run(command, made.variables("coordinator"))


def differences(times: Sequence[float], rounds: int) -> list[float]:
    """Return the seconds between ends of rounds.

    Raises:
        SystemExit: Some round did not end.
    """
    if len(times) != rounds:
        sys.exit(f"{len(times)} of {rounds} rounds ended: see what `flwr run` printed above")
    return [end - start for start, end in itertools.pairwise(times)]


def spread(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Return mean, median, smallest and largest, as they stand in the JSON line."""
    return {
        f"{name}_s": round(statistics.mean(seconds), 2),
        f"{name}_median_s": round(statistics.median(seconds), 2),
        f"{name}_min_s": round(min(seconds), 2),
        f"{name}_max_s": round(max(seconds), 2),
    }


if __name__ == "__main__":
    main()
