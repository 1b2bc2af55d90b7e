"""The whole line on a real model and real text: four institutions, one model, one device.

    python examples/four_institutions/demo.py --out demo

prints and runs the very commands a user types: fetch, check the data, federate among four sites'
daemons over TLS, compare with each site alone and with all text pooled, distil, build, push, and
let a device fetch and answer. Ends with one table, `demo/summary.json` and `demo/report.html`.
Killed, it goes on where it stopped.
"""

import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from commands import Commands, Job
from report import print_table, write_report
from rich.console import Console
from work_directory import start_over_after_a_change, working_in

from federation.atomic import write_atomically
from federation.command import run_command
from federation.status import summarise

sys.path.insert(0, str(Path(__file__).parents[1] / "deployment"))  # the coordinator and the sites
from daemons import Institution, federate, set_up, what_left
from topology import CONNECTION, deployment

SITES = ("bank", "billing", "hospital", "security")
MODELS = ("base", "federated", "pooled", *(f"local-{site}" for site in SITES))
ROUNDS, STEPS, BATCH_SIZE, MAX_TOKENS, LEARNING_RATE = 5, 3, 8, 96, 5e-4
STUDENT, STUDENT_STEPS = "0.43x", 40
BUILDS = ("gguf:f16", "gguf:q8_0", "gguf:q4_k", "gguf:q4_0", "onnx:int4")
DEVICE_BUILD = "gguf-q8_0"
QUESTION = "What is Fever?"


class Demo:
    """The commands in order, and what they printed."""

    def __init__(self, out: Path, console: Console) -> None:
        """Everything goes below ``out``, which nobody else works in (`working_in`)."""
        self.out = out
        self.base = out / "models" / "base"
        self.console = console
        if start_over_after_a_change(out):
            console.print("[dim]this code has not made anything here yet: starting fresh[/dim]")
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
        self.stage(
            "Distil the federated model on public text; beside it the baselines (each site alone, "
            "and all text pooled, which nobody may do) and every model's held-out loss"
        )
        # Longest first: two lanes are then done at about the same time.
        self.commands.run_in_lanes(
            {**self.distillation(), **self.baselines(), **self.evaluations()}
        )
        self.stage("Build for devices, each build compared with the student")
        builds = self.build()
        self.stage("Push a signed release; a device verifies, probes and installs it")
        device = self.ship()
        return self.summary(builds, device)

    def stage(self, title: str) -> None:
        """Print a heading."""
        self.console.rule(f"[bold]{title}", align="left")

    def data(self, site: str, split: str) -> Path:
        """Return a data file of a site."""
        return self.out / "data" / site / f"{split}.jsonl"

    def institutions(self) -> list[Institution]:
        """Return the four sites, each with a directory of its own."""
        return [
            Institution(site, self.out / "sites" / site, self.base, self.data(site, "train"))
            for site in SITES
        ]

    def federate(self) -> None:
        """Run the federation among the sites' daemons; end it where a kill left it."""
        run, home, sites = self.out / "run", self.out / "flower", self.institutions()
        config = (
            f'base_model="{self.base.resolve()}" out="{run.resolve()}" '
            f"num_rounds={ROUNDS} num_sites={len(SITES)} quorum={len(SITES)} "
            f"training.num_steps={STEPS} training.batch_size={BATCH_SIZE} "
            f"training.max_tokens={MAX_TOKENS} training.learning_rate={LEARNING_RATE}"
        )
        command = ["flwr", "run", ".", CONNECTION, "-c", config]

        def action() -> dict[str, Any]:
            is_begun = (run / "run.json").is_file()
            if is_begun and summarise(run / "events.jsonl")["state"] == "finished":
                return {}
            words = ["-c", f'resume="{run.resolve()}"'] if is_begun else command[4:]
            # The coordinator is made anew, certificates and all; sites keep what is theirs, and a
            # round that they answered before the kill is sent again and not trained again.
            shutil.rmtree(home, ignore_errors=True)
            if not is_begun:
                shutil.rmtree(run, ignore_errors=True)
            with deployment(
                home, [], self.console, has_proxy=False, started_for=self.out
            ) as coordinator:
                set_up(coordinator, sites)
                # Four trainers share the cores; more threads would only wait for each other.
                threads = max(1, (os.cpu_count() or 1) // len(sites))
                federate(coordinator, sites, words, run, threads=threads)
            return {}

        self.commands.perform("federate", command, action)
        self.commands.run("status", ["federation", "status", str(run), "--json"])
        for site in sites:
            for word in ("verify", "show"):
                ledger = ["client", "ledger", word, str(site.config), "--json"]
                self.commands.run(f"ledger-{word}-{site.name}", ledger)

    def daemons(self) -> dict[str, dict[str, Any]]:
        """Return what left each site by its own ledger and log."""
        finished = self.commands.finished
        return {
            site.name: {
                **what_left(site, finished[f"ledger-show-{site.name}"].output),
                "ledger_rows": finished[f"ledger-verify-{site.name}"].output["releases"],
                "is_ledger_verified": True,  # else the command would have failed, and the demo
            }
            for site in self.institutions()
        }

    def distillation(self) -> dict[str, Job]:
        """Prune and train the student on public text of the sites' kinds."""
        words = ["distill", "--teacher", str(self.base)]
        words += ["--adapter", str(self.adapter("federated")), "--student", STUDENT]
        for site in SITES:
            words += ["--data", str(self.out / "public" / site / "public.jsonl")]
            words += ["--heldout", str(self.data(site, "heldout"))]
        words += ["--max-tokens", str(MAX_TOKENS), "--steps", str(STUDENT_STEPS)]
        words += ["--out", str(self.out / "student"), "--json"]
        return {"distill": Job(words, self.out / "student")}

    def baselines(self) -> dict[str, Job]:
        """Train all text pooled, and each site alone, for as many steps as the federation took."""
        settings = [
            f"num_steps={ROUNDS * STEPS}",
            f"batch_size={BATCH_SIZE}",
            f"max_tokens={MAX_TOKENS}",
            f"learning_rate={LEARNING_RATE}",
            "checkpoint_every=5",
        ]
        shared = [word for setting in settings for word in ("--set", setting)]
        shared += ["--base-model", str(self.base), "--json"]
        jobs = {}
        for name, sites in {
            "pooled": SITES,
            **{f"local-{site}": (site,) for site in SITES},
        }.items():
            data = [word for site in sites for word in ("--data", str(self.data(site, "train")))]
            out = self.adapter(name)
            jobs[name] = Job(["client", "train", *data, "--out", str(out), *shared], out)
        return jobs

    def evaluations(self) -> dict[str, Job]:
        """Score every model on every site's held-out text."""
        heldout = [word for site in SITES for word in ("--data", str(self.data(site, "heldout")))]
        shared = [*heldout, "--base-model", str(self.base), "--max-tokens", str(MAX_TOKENS)]
        jobs = {}
        for model in MODELS:
            chosen = [] if model == "base" else ["--adapter", str(self.adapter(model))]
            jobs[f"evaluate-{model}"] = Job(
                ["client", "evaluate", *shared, *chosen, "--json"],
                after=None if model in ("base", "federated") else model,
            )
        return jobs

    def adapter(self, name: str) -> Path:
        """Return the directory of a model's adapter."""
        return self.out / ("run/adapter" if name == "federated" else f"adapters/{name}")

    def losses(self) -> dict[str, dict[str, float]]:
        """Return each model's mean cross-entropy on each site's held-out text."""
        rows = {m: self.commands.finished[f"evaluate-{m}"].output["files"] for m in MODELS}
        return {
            model: {site: row["loss"] for site, row in zip(SITES, rows[model], strict=True)}
            for model in MODELS
        }

    def build(self) -> list[dict[str, Any]]:
        """Build and measure every format."""
        words = ["edge", "build", str(self.out / "student"), "--out", str(self.out / "builds")]
        words += [word for target in BUILDS for word in ("--to", target)]
        words += ["--heldout-tokens", "1000"]
        for site in SITES:
            words += ["--heldout", str(self.data(site, "heldout"))]
        built = self.commands.run("build", [*words, "--json"]).output["builds"]
        rows = []
        for one in built:
            directory = self.out / "builds" / one["format"].replace(":", "-")
            bench = self.commands.run(
                f"bench-{directory.name}",
                ["edge", "bench", str(directory), "--repeats", "3", "--json"],
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
        self.commands.run("keygen", ["edge", "keygen", "--out", str(keys), "--json"], output=keys)
        pushed = self.commands.run(
            "push",
            ["edge", "push", str(self.out / "builds" / DEVICE_BUILD), f"{registry}:stable",
             "--key", str(keys / "private.pem"), "--prompt", QUESTION, "--json"],
            output=registry,
        )  # fmt: skip
        settings = self.out / "device.toml"
        write_atomically(
            settings,
            'device_dir = "device"\nregistry = "registry"\ntag = "stable"\nchannel = "stable"\n'
            'public_keys = ["keys/public.pem"]\n',
        )
        agent = ["edge", "agent", "--config", str(settings), "--once", "--json"]
        self.commands.run("agent", agent, output=device)
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
            "digest": current.resolve().parent.name,
            "prompt": QUESTION,
            "text": answer.output["text"],
            "pushed": pushed.output,
            "lineage": verified.output,
        }

    def student_report(self) -> dict[str, Any]:
        """Return what the distillation wrote down."""
        report: dict[str, Any] = json.loads((self.out / "student" / "report.json").read_text())
        return report

    def summary(self, builds: list[dict[str, Any]], device: dict[str, Any]) -> dict[str, Any]:
        """Put together what the demo shows; the keys are stable."""
        finished, losses = self.commands.finished, self.losses()
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
            "daemons": self.daemons(),
            "builds": builds,
            "device": device,
            "wall_s": self.commands.elapsed_s,
            "seconds": {name: done.seconds for name, done in finished.items()},
            "peak_bytes": self.commands.peak_bytes,
            "total_peak_bytes": self.commands.total_peak_bytes,
        }


def _mean_elsewhere(losses: dict[str, float], site: str) -> float:
    """Return the mean log-perplexity over the held-out text of all sites but one."""
    return sum(loss for name, loss in losses.items() if name != site) / (len(losses) - 1)


def main(
    out: Annotated[Path, typer.Option(help="Everything goes below this directory.")] = Path("demo"),
) -> None:
    """Run the whole line: four institutions, one model, one device."""
    console = Console(stderr=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    with working_in(out, console, max(SITES, key=len)):
        console.print(
            "Each command below is one that you can type too, after: source .venv/bin/activate"
        )
        demo = Demo(out, console)
        summary = demo.run()
        write_atomically(out / "summary.json", json.dumps(summary, indent=2) + "\n")
        rounds = summarise(out / "run" / "events.jsonl")
        write_report(out / "report.html", summary, rounds, demo.student_report()["curve"])
        print_table(summary, Console())
        console.print(f"\n{out / 'summary.json'}   {out / 'report.html'}")


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
