"""Institutions whose node is `client daemon`, from `client init` to what their ledgers say.

What an operator and a security officer would do at each site is done here with their own commands
and in their own two files. A run has its id once it has been started, and only then can an officer
allow it: so the coordinator starts the run first, and it waits for the sites.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from services import ServiceError
from topology import CONNECTION, Deployment

from federation.atomic import write_atomically
from federation.errors import UserError
from federation.metrics import metric_names
from federation.status import summarise

ROOT = Path(__file__).parents[2]
START_S = 120.0
"""How long a run may take from its start to its directory."""
DRAIN_S = 120.0
"""How long a site may take to leave: it has nothing in hand when the run is over."""

Node = Literal["resident", "supernode"]


@dataclass(frozen=True)
class Institution:
    """One site: its own directory, and what it trains with."""

    name: str
    directory: Path
    """Of site.toml, policy.toml, the node key and the state. A path of many bytes does not do: the
    trainer's socket is below it."""
    base_model: Path
    data: Path
    node: Node = "resident"
    """Who speaks to the SuperLink: the daemon, which runs no code of a run, or a stock SuperNode
    beside the trainer, whose app has only the trainer's socket."""

    @property
    def config(self) -> Path:
        """Its site.toml."""
        return self.directory / "site.toml"

    @property
    def program(self) -> str:
        """What its daemon is called among the services."""
        return f"site-{self.name}"


def set_up(made: Deployment, institutions: Sequence[Institution]) -> None:
    """Make each site where there is none yet, tell it where the coordinator is, admit its key.

    Raises:
        ServiceError: `client init` or the registration failed.
    """
    # Two at a time: each command is mostly the start of a Python, on one core.
    with ThreadPoolExecutor(max_workers=2) as lanes:
        for done in [lanes.submit(_set_up, made, institution) for institution in institutions]:
            done.result()


def _set_up(made: Deployment, institution: Institution) -> None:
    address, certificate = f"127.0.0.1:{made.sites_port}", made.certificates / "ca.crt"
    if not institution.config.is_file():
        command = ["client", "init", str(institution.directory), "--superlink", address]
        command += ["--root-certificate", str(certificate), "--name", institution.name]
        command += ["--base-model", str(institution.base_model), "--data", str(institution.data)]
        made.services.call([*command, "--json"], {})
    # What a coordinator that was set up anew changes, and what is not the default here.
    changes = {
        "superlink": address,
        "root_certificate": str(certificate),
        "node": institution.node,
        # All of one user here, with text that is public.
        "allow_same_user": institution.node == "supernode",
        "log": "site.log",
        "drain_s": DRAIN_S,
    }
    _edit(institution.config, changes)
    made.register(institution.directory / "node.pub", institution.name)


def allowances(description: Mapping[str, Any], bundle: str, node: Node) -> dict[str, Any]:
    """Return what an officer writes into a policy that `client init` wrote, for one run.

    The run by its id and its bundle by its sha256; what it makes of the updates and what it wants
    beside them; and that there is no secure sum, and no noise where it has none. The bounds on
    ranks, steps, bytes and rounds stay those of the template.

    Args:
        description: The run.json of the run.
        bundle: sha256 of its app bundle.
        node: Of the site. A stock SuperNode does not tell the trainer which bundle it runs.
    """
    settings = description["settings"]
    return {
        "runs.allowed": [description["run"]],
        "runs.bundles": [bundle if node == "resident" else "any"],
        "traffic.uplink": [settings["wire"]["uplink"]],
        "aggregation.kinds": [settings["aggregation"]],
        "aggregation.secure_sum_required": False,
        "aggregation.min_cohort": settings["quorum"],
        "privacy.required": float(settings["training"].get("noise_multiplier", 0.0)) > 0,
        "metrics.allowed": list(metric_names(settings["metrics"])),
    }


def federate(
    made: Deployment,
    institutions: Sequence[Institution],
    words: Sequence[str],
    out: Path,
    *,
    threads: int | None = None,
) -> dict[str, Any]:
    """Start a run, let every site allow it, follow it to its end; return its summary.

    The sites have left when this returns, and their trainers with them.

    Args:
        made: The coordinator.
        institutions: Each set up (`set_up`).
        words: Of `flwr run`, after the app and the connection.
        out: The run's directory.
        threads: OpenMP threads of each trainer; None leaves it to torch.

    Raises:
        ServiceError: The run did not finish, or a program of a site or the coordinator ended.
    """
    run_id, bundle, description = _start_run(made, words, out)
    for institution in institutions:
        changes = allowances(description, bundle, institution.node)
        _edit(institution.directory / "policy.toml", changes)
        made.services.say(f"{institution.directory / 'policy.toml'} allows the run:", changes)
    for institution in institutions:
        start(made, institution, threads=threads)
    _follow(made, run_id)
    made.services.drain([institution.program for institution in institutions], DRAIN_S)
    # `flwr run` and `flwr log` end with 0 whatever became of the run: the event log is what counts.
    summary = summarise(out / "events.jsonl")
    if summary["state"] != "finished":
        reason = summary.get("reason", "it stopped without a word")
        raise ServiceError(f"the federation {summary['state']}: {reason}; see {out}/events.jsonl")
    return summary


def start(made: Deployment, institution: Institution, *, threads: int | None = None) -> None:
    """Start the daemon of a site; it starts the trainer."""
    variables = {"FLWR_HOME": str(institution.directory / "flower")}
    if threads is not None:
        variables["OMP_NUM_THREADS"] = str(threads)
    command = ["client", "daemon", "--config", str(institution.config)]
    made.services.start(institution.program, command, variables)


def what_left(institution: Institution, ledger: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a site says about a federation: what left it, and what its policy said.

    Args:
        institution: The site.
        ledger: What `client ledger show --json` printed.
    """
    rows = ledger["rows"]
    judged: Counter[str] = Counter()
    for line in (institution.directory / "site.log").read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["event"] == "judged":
            judged[event["rule"]] += 1
    return {
        "rounds": len({(row["run"], row["server_round"]) for row in rows}),
        "bytes": sum(row["num_bytes"] for row in rows),
        "metrics": sorted({name for row in rows for name in row["metrics"]}),
        "verdicts": dict(judged),
    }


def _start_run(
    made: Deployment, words: Sequence[str], out: Path
) -> tuple[str, str, dict[str, Any]]:
    """Return Flower's id of a new run, the sha256 of its bundle, and its run.json.

    Raises:
        ServiceError: It ended before it had a directory.
    """
    command = ["flwr", "run", str(ROOT), CONNECTION, *words, "--format", "json"]
    run_id = str(made.services.call(command, made.variables("coordinator"))["run-id"])
    path, looks = out / "run.json", itertools.count(1)

    def row() -> dict[str, Any]:
        runs = made.flwr("ls")["runs"]
        return next(dict(run) for run in runs if run["run-id"] == run_id)

    def is_known() -> bool:
        # To ask Flower takes a second, so only now and then.
        is_over = next(looks) % 20 == 0 and row()["status"].startswith("finished")
        return is_over or path.is_file()

    made.services.wait_until(is_known, "the start of the run", START_S)
    if not path.is_file():
        _follow(made, run_id)
        raise ServiceError(f"the run ended before it began ({row()['status']}): see its log above")
    return run_id, str(row()["fab-hash"]), json.loads(path.read_text(encoding="utf-8"))


def _follow(made: Deployment, run_id: str) -> None:
    """Show the log of a run until it ends."""
    command = ["flwr", "log", run_id, CONNECTION, "--stream"]
    made.services.run(command, made.variables("coordinator"))


def _edit(path: Path, changes: Mapping[str, Any]) -> None:
    text = path.read_text(encoding="utf-8")
    write_atomically(path, with_values(text, changes, path.name))


def with_values(text: str, changes: Mapping[str, Any], source: str) -> str:
    """Return a TOML file of one-line values with other ones; its comments stay.

    Args:
        text: As `client init` writes it. A key that is commented out is made one that counts.
        changes: New values by key, with the table before it: "runs.allowed".
        source: Name of the file, for the error message.

    Raises:
        UserError: A key is not there.
    """
    left, table, lines = dict(changes), "", []
    for line in text.split("\n"):
        if header := re.fullmatch(r"\[(\w+)\]", line):
            table = f"{header[1]}."
        elif (key := re.match(r"(?:# )?(\w+) = ", line)) and table + key[1] in left:
            value = json.dumps(left.pop(table + key[1]), ensure_ascii=False)
            line = f"{key[1]} = {value}"  # noqa: PLW2901
        lines.append(line)
    if left:
        raise UserError(f"{source} has no {next(iter(left))}: expected what `client init` writes")
    return "\n".join(lines)
