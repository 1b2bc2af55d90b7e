"""The whole line on a real model and real text: four institutions, one model, one device.

    python examples/four_institutions/demo.py --out demo

prints and runs the very commands a user types: fetch, check the data, federate, compare with each
site alone and with all text pooled, distil, build, push, and let a device fetch and answer. Ends
with one table, `demo/summary.json` and `demo/report.html`. Killed, it goes on where it stopped.
"""

import contextlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from commands import CommandError, Commands, environment
from report import print_table, write_report
from rich.console import Console

from federation.atomic import write_atomically
from federation.command import run_command
from federation.status import summarise

SITES = ("bank", "billing", "hospital", "security")
ROUNDS, STEPS, BATCH_SIZE, MAX_TOKENS, LEARNING_RATE = 6, 4, 8, 96, 5e-4
STUDENT = "0.43x"
BUILDS = ("gguf:f16", "gguf:q8_0", "gguf:q4_k", "gguf:q4_0", "onnx:int4")
DEVICE_BUILD = "gguf-q8_0"
QUESTION = "What is Fever?"


class Demo:
    """The commands in order, and what they printed."""

    def __init__(self, out: Path, console: Console) -> None:
        """Everything goes below ``out``."""
        self.out = out
        self.base = out / "models" / "base"
        self.console = console
        self.commands = Commands(out / "commands.jsonl", console)

    def run(self) -> dict[str, Any]:
        """Run every stage and return the summary."""
        self.stage("Fetch a model and the text of four institutions")
        fetch = os.path.relpath(Path(__file__).with_name("fetch.py"))
        self.commands.run("fetch", ["python", fetch, "--out", str(self.out), "--json"])
        self.stage("Each institution checks its own data")
        train = [str(self.data(site, "train")) for site in SITES]
        self.commands.run("check-data", ["client", "check-data", *train, "--json"])
        self.stage(f"Federate: {ROUNDS} rounds of {STEPS} steps; only adapters travel")
        self.federate()
        self.stage("Baselines: each site alone, and all text pooled (which nobody may do)")
        self.train_baselines()
        self.stage("Evaluate every model on every site's held-out text")
        evaluations = self.evaluate()
        self.stage("Distil the federated model into a smaller one, on public text")
        self.distill()
        self.stage("Build for devices, each build compared with the student")
        builds = self.build()
        self.stage("Push a signed release; a device verifies, probes and installs it")
        device = self.ship()
        return self.summary(evaluations, builds, device)

    def stage(self, title: str) -> None:
        """Print a heading."""
        self.console.rule(f"[bold]{title}", align="left")

    def data(self, site: str, split: str) -> Path:
        """Return a data file of a site."""
        return self.out / "data" / site / f"{split}.jsonl"

    def federate(self) -> None:
        """Start a SuperLink in simulation mode, run the federation on it, end it."""
        run, name = self.out / "run", "federate"
        if name not in self.commands.finished:
            shutil.rmtree(run, ignore_errors=True)  # a round that was cut off cannot be trusted
        config = (
            f'base_model="{self.base.resolve()}" out="{run.resolve()}" '
            f'simulated_sites="{(self.out / "data").resolve()}" '
            f"num_rounds={ROUNDS} num_sites={len(SITES)} training.num_steps={STEPS} "
            f"training.batch_size={BATCH_SIZE} training.max_tokens={MAX_TOKENS} "
            f"training.learning_rate={LEARNING_RATE}"
        )
        home = self.out / "flower"
        with contextlib.ExitStack() as stack:
            if name not in self.commands.finished:
                stack.enter_context(superlink(home))
            self.commands.run(
                name,
                ["flwr", "run", ".", "--stream", "--federation-config",
                 f"num-supernodes={len(SITES)} client-resources-num-cpus=1", "-c", config],
                variables={"FLWR_HOME": str(home.resolve())},
                streams=True,
            )  # fmt: skip
        status = self.commands.run("status", ["federation", "status", str(run), "--json"])
        if status.output.get("state") != "finished":
            raise CommandError(f"the federation did not finish: see {run / 'events.jsonl'}")

    def train_baselines(self) -> None:
        """Train each site alone, and all pooled, for as many steps as the federation took."""
        settings = [
            f"num_steps={ROUNDS * STEPS}",
            f"batch_size={BATCH_SIZE}",
            f"max_tokens={MAX_TOKENS}",
            f"learning_rate={LEARNING_RATE}",
            "checkpoint_every=8",
        ]
        shared = [word for setting in settings for word in ("--set", setting)]
        shared += ["--base-model", str(self.base), "--json"]

        def command(name: str, sites: tuple[str, ...]) -> list[str]:
            data = [word for site in sites for word in ("--data", str(self.data(site, "train")))]
            return ["client", "train", *data, "--out", str(self.adapter(name)), *shared]

        names = {f"local-{site}": command(f"local-{site}", (site,)) for site in SITES}
        self.commands.run_in_lanes(names)
        self.commands.run("pooled", command("pooled", SITES))

    def adapter(self, name: str) -> Path:
        """Return the directory of a model's adapter."""
        return self.out / ("run/adapter" if name == "federated" else f"adapters/{name}")

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Return each model's mean cross-entropy on each site's held-out text."""
        heldout = [word for site in SITES for word in ("--data", str(self.data(site, "heldout")))]
        shared = [*heldout, "--base-model", str(self.base), "--max-tokens", str(MAX_TOKENS)]
        models = ("base", "federated", "pooled", *(f"local-{site}" for site in SITES))
        commands = {}
        for model in models:
            chosen = [] if model == "base" else ["--adapter", str(self.adapter(model))]
            commands[f"evaluate-{model}"] = ["client", "evaluate", *shared, *chosen, "--json"]
        done = self.commands.run_in_lanes(commands)
        return {
            model: {
                site: row["loss"]
                for site, row in zip(SITES, done[f"evaluate-{model}"].output["files"], strict=True)
            }
            for model in models
        }

    def distill(self) -> None:
        """Prune and train the student on public text of the sites' kinds."""
        words = ["distill", "--teacher", str(self.base)]
        words += ["--adapter", str(self.adapter("federated")), "--student", STUDENT]
        for site in SITES:
            words += ["--data", str(self.out / "public" / site / "public.jsonl")]
            words += ["--heldout", str(self.data(site, "heldout"))]
        words += ["--max-tokens", str(MAX_TOKENS), "--out", str(self.out / "student"), "--json"]
        self.commands.run("distill", words)

    def build(self) -> list[dict[str, Any]]:
        """Build and measure every format."""
        words = ["edge", "build", str(self.out / "student"), "--out", str(self.out / "builds")]
        words += [word for target in BUILDS for word in ("--to", target)]
        for site in SITES:
            words += ["--heldout", str(self.data(site, "heldout"))]
        built = self.commands.run("build", [*words, "--json"]).output["builds"]
        rows = []
        for one in built:
            directory = self.out / "builds" / one["format"].replace(":", "-")
            bench = self.commands.run(
                f"bench-{directory.name}", ["edge", "bench", str(directory), "--json"]
            ).output
            rows.append(
                {
                    "format": one["format"],
                    "bytes": one["bytes"],
                    "kl": one["fidelity"]["kl"],
                    "first_token_ms": bench["first_token_ms"],
                    "decode_tokens_per_s": bench["decode_tokens_per_s"],
                    "peak_bytes": bench["peak_bytes"],
                }
            )
        return rows

    def ship(self) -> dict[str, Any]:
        """Push one build, install it on a device, ask the device a question, verify its lineage."""
        keys, registry, device = self.out / "keys", self.out / "registry", self.out / "device"
        self.commands.run("keygen", ["edge", "keygen", "--out", str(keys), "--json"])
        pushed = self.commands.run(
            "push",
            ["edge", "push", str(self.out / "builds" / DEVICE_BUILD), f"{registry}:stable",
             "--key", str(keys / "private.pem"), "--prompt", QUESTION, "--json"],
        )  # fmt: skip
        settings = self.out / "device.toml"
        write_atomically(
            settings,
            'device_dir = "device"\nregistry = "registry"\ntag = "stable"\nchannel = "stable"\n'
            'public_keys = ["keys/public.pem"]\n',
        )
        self.commands.run("agent", ["edge", "agent", "--config", str(settings), "--once", "--json"])
        current = device / "current"
        answer = self.commands.run(
            "ask",
            ["edge", "run", str(current), "--prompt", QUESTION, "--max-tokens", "48", "--json"],
        )
        verified = self.commands.run(
            "verify",
            [
                "edge",
                "verify",
                str(current),
                "--source",
                str(self.out),
                "--key",
                str(keys / "public.pem"),
                "--json",
            ],
        )
        return {
            "digest": current.resolve().name,
            "prompt": QUESTION,
            "text": answer.output["text"],
            "pushed": pushed.output,
            "lineage": verified.output,
        }

    def student_report(self) -> dict[str, Any]:
        """Return what the distillation wrote down."""
        report: dict[str, Any] = json.loads((self.out / "student" / "report.json").read_text())
        return report

    def summary(
        self,
        losses: dict[str, dict[str, float]],
        builds: list[dict[str, Any]],
        device: dict[str, Any],
    ) -> dict[str, Any]:
        """Put together what the demo shows; the keys are stable."""
        finished = self.commands.finished
        counts = finished["fetch"].output["sites"]
        mean = {name: sum(by_site.values()) / len(SITES) for name, by_site in losses.items()}
        student = self.student_report()
        end = student["end"]
        return {
            "sites": {
                site: {
                    **counts[site],
                    "base_ppl": math.exp(losses["base"][site]),
                    "local_ppl": math.exp(losses[f"local-{site}"][site]),
                    "federated_ppl": math.exp(losses["federated"][site]),
                    "pooled_ppl": math.exp(losses["pooled"][site]),
                }
                for site in SITES
            },
            "cross_site": {
                site: {
                    "local_log_ppl": _mean_elsewhere(losses[f"local-{site}"], site),
                    "federated_log_ppl": _mean_elsewhere(losses["federated"], site),
                }
                for site in SITES
            },
            "gap_closed": (mean["base"] - mean["federated"]) / (mean["base"] - mean["pooled"]),
            "mean_log_ppl": mean,
            "student": {
                "params": student["student"]["params"],
                "teacher_params": student["teacher"]["params"],
                "teacher_ppl": math.exp(student["teacher"]["ce"]),
                "start_ppl": math.exp(student["start"]["ce"]),
                "ppl": math.exp(end["ce"]),
                "start_kl": student["start"]["kl"],
                "kl": end["kl"],
                "top1": end["top1"],
                "num_tokens": student["tokens"],
            },
            "builds": builds,
            "device": device,
            "wall_s": self.commands.elapsed_s,
            "seconds": {name: done.seconds for name, done in finished.items()},
            "peak_bytes": self.commands.peak_bytes,
        }


def _mean_elsewhere(losses: dict[str, float], site: str) -> float:
    """Return the mean log-perplexity over the held-out text of all sites but one."""
    return sum(loss for name, loss in losses.items() if name != site) / (len(losses) - 1)


@contextlib.contextmanager
def superlink(home: Path) -> Iterator[None]:
    """Run a Flower SuperLink in simulation mode on a free loopback port; end it, by its id.

    `flwr run .` starts one by itself too, but that one stays behind when the run is over.
    """
    home.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    write_atomically(
        home / "config.toml",
        f'[superlink]\ndefault = "demo"\n\n[superlink.demo]\naddress = "127.0.0.1:{port}"\n'
        "insecure = true\n",
    )
    command = [
        *("flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"),
        *("--host", "127.0.0.1", "--port", str(port), "--database", str(home / "state.db")),
    ]
    # The SuperLink runs from its own folder: its paths must not depend on where the demo started.
    with (home / "superlink.log").open("ab") as log:
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / command[0]), *command[1:]],
            stdout=log,
            stderr=log,
            env=environment({"FLWR_HOME": str(home.resolve())}),
        )
    try:
        _wait_for_port(process, port, home / "superlink.log")
        yield
    finally:
        _end_tree(process)


def _wait_for_port(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
    raise CommandError(f"the SuperLink did not start: see {log}")


def _end_tree(process: subprocess.Popen[bytes]) -> None:
    """Ask a process and all it started to end, and make them after 10 s."""
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.terminate()
    _, alive = psutil.wait_procs(tree, timeout=10)
    for member in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def main(
    out: Annotated[Path, typer.Option(help="Everything goes below this directory.")] = Path("demo"),
) -> None:
    """Run the whole line: four institutions, one model, one device."""
    console = Console(stderr=True)
    demo = Demo(out, console)
    summary = demo.run()
    write_atomically(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    rounds = summarise(out / "run" / "events.jsonl")
    write_report(out / "report.html", summary, rounds, demo.student_report()["curve"])
    print_table(summary, Console())
    console.print(f"\n{out / 'summary.json'}   {out / 'report.html'}")


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
