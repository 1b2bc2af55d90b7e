"""A federation over TLS as institutions would run one, on one machine, with one command.

    python examples/deployment/run.py --out deployment

makes the certificates, starts coordinator, proxy and two sites, shows what the sites' port lets
through, runs three rounds, and ends everything that it started. Every command is printed as you
would type it. Without options it uses the model and the text that the demo has fetched.
"""

import json
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from federation.command import print_result, run_command
from federation.errors import UserError
from federation.status import summarise

sys.path.insert(0, str(Path(__file__).parents[1]))  # what the examples share
from services import ServiceError
from topology import CONNECTION, Deployment, Site, deployment

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "demo"
PROBES = (
    ("POST", "/v1/fleet/pull-messages", "a site's request for work, without its signature"),
    ("POST", "/v1/fleet/register-node", "a site that registers itself"),
    ("POST", "/v1/control/start-run", "start a run: code on every site"),
    ("POST", "/v1/control/register-node", "admit another site"),
    ("POST", "/v1/runtime/acquire-task", "act as a run's ServerApp"),
    ("GET", "/docs", "the SuperLink's own documentation"),
)


def main(
    out: Annotated[Path, typer.Option(help="A new directory for all of it.")] = Path("deployment"),
    base_model: Annotated[
        Path, typer.Option(help="Base model, Hugging Face layout; here every site has this one.")
    ] = DEMO / "models" / "base",
    data: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FILE.jsonl, once a site; default: hospital and bank of the demo."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value of the run config, like `flwr run -c`."),
    ] = None,
    port: Annotated[int | None, typer.Option(help="That sites connect to; default: free.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Run a federation over TLS: coordinator, proxy and sites on this machine."""
    signal.signal(signal.SIGTERM, _leave)
    console = Console(stderr=True)
    sites = _sites(base_model, data)
    with deployment(out, sites, console, port=port) as made:
        answers = {f"{method} {path}": made.status_of(method, path) for method, path, _ in PROBES}
        _print_answers(answers, console)
        summary = _federate(made, base_model, rounds, len(sites), setting or [])
    result = {"adapter": str(out / "run" / "adapter"), "port": answers, **summary}
    print_result(result, as_json, lambda: print(f"adapter: {result['adapter']}"))


def _leave(*_: int | FrameType | None) -> NoReturn:
    """Unwind, so that everything is ended, and let no second signal disturb that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


def _sites(base_model: Path, data: list[str] | None) -> list[Site]:
    """Return the sites that the options name.

    Raises:
        UserError: A file is missing, or an option is no NAME=FILE.
    """
    if data is None:
        data = [f"{name}={DEMO / 'data' / name / 'train.jsonl'}" for name in ("hospital", "bank")]
    sites = []
    for word in data:
        name, _, file = word.partition("=")
        if not file or not name.replace("-", "").isalnum():
            raise UserError(f"--data {word}: expected NAME=FILE.jsonl, NAME of letters and digits")
        for path in (base_model / "config.json", Path(file)):
            if not path.is_file():
                raise UserError(
                    f"{path} does not exist: run `python examples/four_institutions/fetch.py "
                    "--out demo` first, or name your own with --base-model and --data"
                )
        words = {"data": Path(file).resolve(), "base_model": base_model.resolve(), "name": name}
        sites.append(Site(name, " ".join(f'{key}="{value}"' for key, value in words.items())))
    if len({site.name for site in sites}) < len(sites):
        raise UserError(f"--data {' '.join(data)}: every site needs a name of its own")
    return sites


def _print_answers(answers: dict[str, int], console: Console) -> None:
    table = Table("request", "HTTP", "what it is", title="What the sites' port lets through")
    for (request, status), (_, _, what) in zip(answers.items(), PROBES, strict=True):
        table.add_row(request, str(status), what)
    console.print(table)


def _federate(
    made: Deployment, base_model: Path, rounds: int, num_sites: int, settings: list[str]
) -> dict[str, Any]:
    """Run the federation through the coordinator's SuperLink and return its summary.

    Raises:
        ServiceError: It did not finish.
    """
    out = made.home / "run"
    config = (
        f'base_model="{base_model.resolve()}" out="{out}" num_rounds={rounds} '
        f"num_sites={num_sites} round_timeout_s=600 training.num_steps=2 training.max_tokens=96"
    )
    command = ["flwr", "run", str(ROOT), CONNECTION, "--stream", "-c", config]
    command += [word for setting in settings for word in ("-c", setting)]
    made.services.run(command, made.variables("coordinator"))
    # `flwr run` ends with 0 whatever became of the run: the event log is what counts.
    events = out / "events.jsonl"
    if not events.is_file():
        runs = made.flwr("ls")["runs"]
        raise ServiceError(f"the run did not start: {json.dumps(runs)[:400]}")
    summary = summarise(events)
    if summary["state"] != "finished":
        reason = summary.get("reason", "it stopped without a word")
        raise ServiceError(f"the federation {summary['state']}: {reason}; see {events}")
    return summary


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
