"""Rounds of NVFlare's simulator on the same payload; runs in the environment that has NVFlare.

The server and one process a site stand on this machine and speak over loopback without TLS. The
first round begins before the sites' processes have started, so it is the longer one. The seconds
are those between the lines of NVFlare's own log; the server's memory is the peak that Linux counts.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.processes import ROOT, bytes_after_torch_import, status_bytes

_STAMP = r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) - INFO - \n[-=]+\n *"
_ROUND, _END = re.compile(_STAMP + r"Round \d+ started"), re.compile(_STAMP + "Finished FedAvg")
_SERVER, _SITE = "simulator.simulator", "simulator_worker"


def run_job(asked: argparse.Namespace) -> None:
    """Run the job in NVFlare's simulator, as its user would."""
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
    from nvflare.recipe import SimEnv

    recipe = FedAvgRecipe(
        name="payload",
        model={
            "class_path": "benchmarks.peers.nvflare_model.Payload",
            "args": {"geometry": asked.geometry},
        },
        min_clients=asked.sites,
        num_rounds=asked.rounds,
        train_script=str(Path(__file__).with_name("nvflare_client.py")),
        server_expected_format="pytorch",
        enable_tensor_disk_offload=asked.offload,
    )
    if asked.quantize:
        _quantize(recipe, asked.quantize)
    recipe.execute(
        SimEnv(num_clients=asked.sites, num_threads=asked.sites, workspace_root=asked.workspace)
    )


def _quantize(recipe: Any, kind: str) -> None:
    """Let NVFlare's own filters narrow what goes down and comes up."""
    from nvflare.app_opt.pt.quantization.dequantizer import ModelDequantizer
    from nvflare.app_opt.pt.quantization.quantizer import ModelQuantizer

    narrow, widen = ModelQuantizer(quantization_type=kind), ModelDequantizer()
    recipe.add_server_output_filter(narrow, tasks=["train"])
    recipe.add_server_input_filter(widen, tasks=["train"])
    recipe.add_client_output_filter(narrow, tasks=["train"])
    recipe.add_client_input_filter(widen, tasks=["train"])


def measure(arguments: list[str], rounds: int) -> dict[str, Any]:
    """Run the job in processes of its own and watch them.

    Raises:
        RuntimeError: The job failed, or its log does not show every round.
    """
    floor = bytes_after_torch_import()
    itself = (sys.executable, "-m", "benchmarks.peers.nvflare_rounds")
    with tempfile.TemporaryDirectory() as workspace:
        log_path = Path(workspace) / "log"
        with log_path.open("wb") as log:
            job = subprocess.Popen(
                [*itself, "--job", *arguments, "--workspace", workspace],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            server, sites = watch(job)
        text = log_path.read_text()
    stamps = _ROUND.findall(text) + _END.findall(text)
    if job.returncode or len(stamps) != rounds + 1:
        raise RuntimeError(f"NVFlare's job ended with {job.returncode}: {text[-2000:]}")
    times = [datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S,%f") for stamp in stamps]  # noqa: DTZ007
    return {
        "round_s": [round((end - begin).total_seconds(), 2) for begin, end in pairwise(times)],
        "server_peak_bytes": server,
        "server_extra_peak_bytes": server - floor,
        "site_peak_bytes": sites,
    }


def watch(job: subprocess.Popen[bytes]) -> tuple[int, int]:
    """Return the peaks, once it has ended, of the server and of the largest site, in bytes."""
    server = sites = 0
    while job.poll() is None:
        for process, command in descendants(job.pid).items():
            try:
                peak = status_bytes(process, "VmHWM")
            except OSError:
                continue  # it ended between the two looks
            if _SITE in command:
                sites = max(sites, peak)
            elif _SERVER in command:
                server = max(server, peak)
        time.sleep(0.25)
    return server, sites


def descendants(ancestor: int) -> dict[int, str]:
    """Return the processes that come from one, with their command lines."""
    parents, commands = {}, {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            stat = (directory / "stat").read_text()
            commands[int(directory.name)] = (directory / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        parents[int(directory.name)] = int(stat[stat.rindex(")") + 2 :].split()[1])
    found: dict[int, str] = {}
    for process, command in commands.items():
        parent = parents[process]
        while parent not in (0, ancestor):
            parent = parents.get(parent, 0)
        if parent == ancestor:
            found[process] = command
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--geometry", required=True)
    parser.add_argument("--sites", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--quantize", choices=("float16",), help="what travels")
    parser.add_argument("--job", action="store_true")
    parser.add_argument("--workspace")
    asked = parser.parse_args()
    if asked.job:
        run_job(asked)
        return
    print(json.dumps({"sites": asked.sites, **measure(sys.argv[1:], asked.rounds)}))


if __name__ == "__main__":
    main()
