"""Kill the server of a run with SIGKILL, resume it, and compare with a run that was left alone.

A process of its own: each case forks, and a fork wants a process without threads. The child
either kills itself at its n-th change to the file system (an audit hook counts them) or is killed
from outside after a random time; then another child resumes the run to its end.

    python run_kill_matrix.py MODEL WORK_DIR changes STEP        kill at every STEP-th change
    python run_kill_matrix.py MODEL WORK_DIR moments COUNT       kill at COUNT random moments
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from federation.events import RoundFinished, RunResumed, read_events
from federation.rounds import run_rounds
from federation.settings import FederationSettings, load_settings
from tests.simulated import SimulatedSites, drift

CHANGES = {
    *("os.rename", "os.remove", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.chmod"),
    *("shutil.rmtree", "os.truncate"),
}


def settings(model: Path, out: Path, num_rounds: int) -> FederationSettings:
    """Settings with everything that a run can carry on: tail, moments, the last adapter sent."""
    values = {
        "base_model": str(model),
        "out": str(out),
        "num_rounds": num_rounds,
        "num_sites": 3,
        "fraction_train": 0.7,
        "adapter": {"rank": 4, "alpha": 8.0},
        "tail_rank": 4,
        "server_optimizer": {"kind": "fedavgm", "momentum": 0.5},
        "wire": {"downlink": "int8"},
    }
    return load_settings(FederationSettings, values, "the test")


def run(sites: Path, values: FederationSettings) -> None:
    """Run or resume to the end."""
    shutil.rmtree(sites, ignore_errors=True)
    sites.mkdir(parents=True)
    moves = {name: drift(index) for index, name in enumerate("abcd")}
    run_rounds(SimulatedSites(sites, moves), values, sleep=lambda _: None)


def in_child(work: Callable[[], None]) -> int:
    """Start work in a fork; return its process id."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return child


def wait(child: int) -> int:
    """Return the exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(change: int) -> None:
    """Kill this process when it is about to make its n-th change to the file system."""
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & 0o3103
        if is_write or event in CHANGES:
            count += 1
            if count == change:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def artefact(out: Path, num_rounds: int) -> tuple[bytes, bytes]:
    """Return the weights of a run's last round, and where they come from."""
    last = out / f"round-{num_rounds:04d}"
    weights, lineage = last / "adapter_model.safetensors", last / "lineage.json"
    return weights.read_bytes(), lineage.read_bytes()


def resumed(
    directory: Path, model: Path, num_rounds: int, reference: tuple[bytes, bytes]
) -> dict[str, object]:
    """Resume a killed run and say how it ended."""
    out, sites = directory / "run", directory / "sites"
    done = len([p for p in out.glob("round-*") if p.is_dir()]) if out.is_dir() else 0
    is_begun = (out / "run.json").is_file()
    values = settings(model, out, num_rounds)
    if is_begun:
        values = values.model_copy(update={"resume": str(out), "out": "", "base_model": ""})
    else:
        shutil.rmtree(out, ignore_errors=True)
    code = wait(in_child(lambda: run(sites, values)))
    events = [event for _, event in read_events(out / "events.jsonl")]
    finished = [e.server_round for e in events if isinstance(e, RoundFinished)]
    again = [e.server_round for e in events if isinstance(e, RunResumed)]
    return {
        "code": code,
        "is_same": artefact(out, num_rounds) == reference,
        "lost": (again[0] - 1 != done) if again else is_begun,
        "repeated": len(finished) - len(set(finished)),
        "left": sorted(p.name for p in out.iterdir() if p.name.startswith((".", "updates"))),
        "states": len(list(out.glob("state-*"))),
    }


def main() -> None:
    """Run every case and print one JSON object."""
    model, work, mode, number = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    torch.set_num_threads(1)
    num_rounds = 6 if mode == "moments" else 2
    whole = work / "whole"
    started = time.monotonic()
    assert (
        wait(in_child(lambda: run(whole / "sites", settings(model, whole / "run", num_rounds))))
        == 0
    )
    duration = time.monotonic() - started
    reference = artefact(whole / "run", num_rounds)
    cases: list[dict[str, object]] = []
    source = random.Random(0)  # noqa: S311 - moments of kills, no secret
    change = 1
    while mode == "changes" or len(cases) < number:
        case = work / "case"
        shutil.rmtree(case, ignore_errors=True)

        def killed(case: Path = case, change: int = change) -> None:
            if mode == "changes":
                kill_at(change)
            run(case / "sites", settings(model, case / "run", num_rounds))

        child = in_child(killed)
        if mode == "moments":
            time.sleep(source.uniform(0.0, duration))
            os.kill(child, signal.SIGKILL)
        if wait(child) == 0:
            if mode == "changes":
                break  # it ended before its n-th change: every change was a case
            continue  # the moment came too late to be a case
        cases.append({"at": change} | resumed(case, model, num_rounds, reference))
        change += number if mode == "changes" else 1
    print(json.dumps({"cases": cases, "seconds_uninterrupted": duration}))


if __name__ == "__main__":
    main()
