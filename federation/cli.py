"""`federation`: what a run will cost, who signed it, where it stands. `flwr run` starts it."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from federation.command import print_result, run_command
from federation.signing_cli import keygen, sign, verify

app = typer.Typer(
    help="The server side of a federation. Start a run with `flwr run .`; see README.md.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _command in (keygen, sign, verify):
    app.command()(_command)
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


@app.command()
def plan(
    model: Annotated[
        Path | None,
        typer.Option(help="Model directory, or a config.json alone; else the setting base_model."),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="One setting of the run, key=value; repeat.")
    ] = None,
    records: Annotated[
        int | None, typer.Option(help="Records of a site: what the run costs it of its privacy.")
    ] = None,
    delta: Annotated[float, typer.Option(help="Of that site's policy.")] = 1e-6,
    epsilon: Annotated[
        float | None, typer.Option(help="What it may cost that site: the noise that it needs.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a run will cost: bytes, disk, memory, seconds, privacy, what the coordinator sees.

    Settings are those of `flwr run . -c`. Weights are not needed: a config.json is enough.
    """
    from federation.base_model import read_config, read_config_file
    from federation.plan import make_plan, privacy_cost
    from federation.settings import FederationSettings, SettingsError, load_settings

    values = _parse_settings(settings or [])
    named = model or Path(values.get("base_model", ""))
    if named == Path():
        raise SettingsError("no model is named: pass --model DIRECTORY, or the path of config.json")
    # A plan writes nothing, so `out` may be left open.
    values = {**values, "base_model": str(named), "out": values.get("out") or "not-written"}
    checked = load_settings(FederationSettings, values, "--set")
    config = read_config_file(named) if named.is_file() else read_config(named)
    if epsilon is not None and records is None:
        raise SettingsError("--epsilon needs --records, the number of a site's records")
    cost = None if records is None else privacy_cost(checked, records, delta, epsilon)
    result = make_plan(checked, config, cost=cost)
    print_result(result.as_json(), as_json, lambda: _show_plan(result))


@app.command()
def status(
    run: Annotated[Path, typer.Argument(help="Directory of a run: what `out` named.")],
    watch: Annotated[
        bool, typer.Option("--watch", help="Refresh every second until the run ends.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show where a run stands: rounds, sites, bytes, loss, who is behind, what failed."""
    from federation.errors import UserError
    from federation.status import summarise

    path = run / "events.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist: pass the directory that the run's `out` named")
    summary = _watch(lambda: summarise(path), as_json) if watch else summarise(path)
    print_result(summary, as_json, lambda: None if watch else _show_status(summary))


def _parse_settings(pairs: list[str]) -> dict[str, Any]:
    from federation.settings import SettingsError

    values: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key.strip():
            raise SettingsError(f"--set {pair!r}: expected key=value, such as num_rounds=20")
        # The quotes of a TOML string, as `flwr run -c` wants them, are welcome too.
        values[key.strip()] = value.strip().strip("\"'")
    return values


def _watch(summarise: Callable[[], dict[str, Any]], as_json: bool) -> dict[str, Any]:
    """Show a run until it ends or the person has seen enough (Ctrl-C); return the last summary."""
    from rich.console import Console
    from rich.live import Live

    from federation.tables import status_view

    summary = summarise()
    # With --json stdout belongs to the one object at the end.
    console = Console(stderr=as_json)
    with Live(status_view(summary), console=console, auto_refresh=False) as live:
        try:
            while summary["state"] == "running":
                time.sleep(1)
                summary = summarise()
                live.update(status_view(summary), refresh=True)
        except KeyboardInterrupt:
            pass
    return summary


def _show_plan(result: Any) -> None:
    from rich.console import Console

    from federation.tables import plan_view

    Console().print(plan_view(result))


def _show_status(summary: dict[str, Any]) -> None:
    from rich.console import Console

    from federation.tables import status_view

    Console().print(status_view(summary))


def main() -> None:
    """Entry point of the console script."""
    run_command(app)


if __name__ == "__main__":
    main()
