"""A federation over TLS as institutions would run one, on one machine, with one command.

    python examples/deployment/run.py --out deployment

makes the certificates, starts coordinator and proxy, shows what the sites' port lets through, sets
up two sites with a policy each, runs three rounds, says what left each site, and ends everything
that it started. Every command is printed as you would type it. Without options it uses the model
and the text that the demo has fetched.
"""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn, get_args

import typer
from rich.console import Console
from rich.table import Table

from federation.command import print_result, run_command
from federation.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[1]))  # what the examples share
from daemons import Institution, Node, federate, set_up, what_left
from topology import Deployment, deployment

DEMO = Path(__file__).parents[2] / "demo"
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
    node: Annotated[
        str, typer.Option(help="resident, or supernode: a stock SuperNode beside each trainer.")
    ] = "resident",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Run a federation over TLS: coordinator, proxy and sites on this machine."""
    signal.signal(signal.SIGTERM, _leave)
    console = Console(stderr=True)
    sites = _sites(out, base_model, data, node)
    with deployment(out, [], console, port=port) as made:
        answers = {f"{method} {path}": made.status_of(method, path) for method, path, _ in PROBES}
        _print_answers(answers, console)
        set_up(made, sites)
        words = _words(made, base_model, rounds, len(sites), setting or [])
        summary = federate(made, sites, words, made.home / "run")
        left = _ledgers(made, sites)
    result = {
        "adapter": str(out / "run" / "adapter"),
        "port": answers,
        "left": left,
        **summary,
    }
    print_result(result, as_json, lambda: print(f"adapter: {result['adapter']}"))


def _leave(*_: int | FrameType | None) -> NoReturn:
    """Unwind, so that everything is ended, and let no second signal disturb that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


def _sites(out: Path, base_model: Path, data: list[str] | None, node: str) -> list[Institution]:
    """Return the sites that the options name.

    Raises:
        UserError: A file is missing, or an option is no NAME=FILE.
    """
    if node not in get_args(Node):
        raise UserError(f"--node {node}: expected {' or '.join(get_args(Node))}")
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
        directory = out.resolve() / "sites" / name
        sites.append(
            Institution(
                name,
                directory,
                base_model.resolve(),
                Path(file).resolve(),
                "supernode" if node == "supernode" else "resident",
            )
        )
    if len({site.name for site in sites}) < len(sites):
        raise UserError(f"--data {' '.join(data)}: every site needs a name of its own")
    return sites


def _print_answers(answers: dict[str, int], console: Console) -> None:
    table = Table("request", "HTTP", "what it is", title="What the sites' port lets through")
    for (request, status), (_, _, what) in zip(answers.items(), PROBES, strict=True):
        table.add_row(request, str(status), what)
    console.print(table)


def _words(
    made: Deployment, base_model: Path, rounds: int, num_sites: int, settings: list[str]
) -> list[str]:
    """Return the words of `flwr run` that say which run it is."""
    config = (
        f'base_model="{base_model.resolve()}" out="{made.home / "run"}" num_rounds={rounds} '
        f"num_sites={num_sites} quorum={num_sites} round_timeout_s=600 training.num_steps=2 "
        "training.max_tokens=96"
    )
    return ["-c", config, *(word for setting in settings for word in ("-c", setting))]


def _ledgers(made: Deployment, sites: Sequence[Institution]) -> dict[str, Any]:
    """Return what left each site by its own ledger, which is checked first."""
    left = {}
    for site in sites:
        ledger = ["client", "ledger"]
        made.services.call([*ledger, "verify", str(site.config), "--json"], {})
        shown = made.services.call([*ledger, "show", str(site.config), "--json"], {})
        left[site.name] = what_left(site, shown)
        made.services.say(f"left {site.name}:", left[site.name])
    return left


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
