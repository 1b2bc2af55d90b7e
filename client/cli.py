"""`client`: one private site, alone and as a node of a federation.

The federated way to the same training loop is `client.client_app`.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from client.ledger_cli import ledger_app
from client.policy_cli import policy_app
from client.setup_cli import doctor, init
from federation.command import print_result, run_command

app = typer.Typer(
    help="One private site: set it up, run it, check its data, train on it alone, evaluate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(policy_app, name="policy")
app.add_typer(ledger_app, name="ledger")
app.command("init")(init)
app.command("doctor")(doctor)

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Base = Annotated[Path, typer.Option("--base-model", help="Model directory (Hugging Face layout).")]
Config = Annotated[Path, typer.Option("--config", help="site.toml")]
AdapterPath = Annotated[Path | None, typer.Option("--adapter", help="PEFT adapter directory.")]


@app.command("check-data")
def check_data(
    data: Annotated[list[Path], typer.Argument(help="JSONL files: prompt and response a line.")],
    min_characters: Annotated[int, typer.Option(min=1, help="Shortest response kept.")] = 2,
    max_characters: Annotated[int, typer.Option(min=1, help="Longest text kept.")] = 20_000,
    as_json: Json = False,
) -> None:
    """Say what would be kept and dropped, by rule, with line numbers. Never prints the text."""
    from client.cleaning import clean
    from client.records import read_records

    results = []
    for path in data:
        cleaned = clean(
            read_records(path), min_characters=min_characters, max_characters=max_characters
        )
        results.append({"file": str(path), "kept": len(cleaned.kept), "dropped": cleaned.dropped})
    print_result({"files": results}, as_json, lambda: _print_check(results))


@app.command()
def train(
    data: Annotated[list[Path], typer.Option("--data", help="JSONL file; repeat for several.")],
    base_model: Base,
    out: Annotated[Path, typer.Option(help="New directory for the adapter.")],
    rank: Annotated[int, typer.Option(min=1)] = 16,
    alpha: Annotated[float, typer.Option(min=0.001)] = 32.0,
    targets: Annotated[str, typer.Option(help="all-linear or attention.")] = "all-linear",
    settings_file: Annotated[
        Path | None, typer.Option("--settings", help="TOML with training settings.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="One training setting, key=value; repeat.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a LoRA adapter on this site's data alone. Several files share every batch evenly.

    Killed runs continue from their last checkpoint (`--set checkpoint_every=50`).
    """
    from client.alone import train_alone
    from client.settings import TrainingSettings
    from federation.settings import AdapterSettings, load_settings, read_toml

    values = read_toml(settings_file) if settings_file else {}
    values |= _parse_settings(settings or [])
    result = train_alone(
        data,
        base_model,
        out,
        load_settings(AdapterSettings, {"rank": rank, "alpha": alpha, "targets": targets}, "train"),
        load_settings(TrainingSettings, values, str(settings_file or "--set")),
    )
    print_result(
        result,
        as_json,
        lambda: typer.echo(
            f"{out}: {result['num_steps']} steps, loss {result['first_loss']:.4f} -> "
            f"{result['last_loss']:.4f}, {result['seconds']:.0f} s"
        ),
    )


@app.command()
def evaluate(
    data: Annotated[list[Path], typer.Option("--data", help="Held-out JSONL; repeat for several.")],
    base_model: Base,
    adapter: AdapterPath = None,
    max_tokens: Annotated[int, typer.Option(min=8)] = 512,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    as_json: Json = False,
) -> None:
    """Print loss, perplexity, token accuracy and number of tokens of each file.

    Longer records are cut to --max-tokens; their number is printed too.
    """
    from client.alone import evaluate_alone
    from federation.settings import SettingsError

    if dtype not in ("float32", "bfloat16"):
        raise SettingsError(f"--dtype is {dtype!r}: expected float32 or bfloat16")
    results = evaluate_alone(
        data, base_model, adapter, max_tokens=max_tokens, batch_size=batch_size, dtype=dtype
    )
    print_result({"files": results}, as_json, lambda: _print_evaluation(results))


@app.command()
def daemon(config: Config) -> None:
    """Be this site's Flower node: take messages, have the trainer answer them, reply. SIGTERM ends.

    A round in hand is answered first.
    """
    from client.daemon import run_daemon
    from client.site_settings import load_site

    settings = load_site(config)
    command = [sys.executable, "-m", "client.cli", "trainer", "--config", str(config.absolute())]
    run_daemon(settings, command, config=config)


@app.command()
def trainer(
    config: Config,
    parent: Annotated[int | None, typer.Option(help="Process with which it ends.")] = None,
) -> None:
    """Own this site's data and model, and answer what its policy allows. SIGTERM ends it."""
    from client.gate import SiteGate
    from client.site_settings import load_site
    from client.trainer_service import run_trainer

    run_trainer(load_site(config), SiteGate.open, parent=parent)


@app.command()
def identity(config: Config, as_json: Json = False) -> None:
    """Print this site's identity in secure sums, for the other sites' policies; make it if none.

    Tell it to the other sites yourself, not by way of the coordinator.
    """
    from client.identity import new_identity, public_identity, read_identity
    from client.site_settings import load_site

    path = load_site(config).identity
    key = read_identity(path) if path.exists() else new_identity(path)
    public = public_identity(key)
    print_result({"identity": public}, as_json, lambda: typer.echo(public))


@app.command()
def status(
    config: Config,
    part: Annotated[
        str, typer.Option(help="trainer: only whether it takes connections; it knows no more.")
    ] = "both",
    as_json: Json = False,
) -> None:
    """Say how this site's daemon is: connected or not, its run and round, its last answer.

    Ends with 1 if what was asked for does not run, and with 2 if this user may not know.
    """
    from client.site_settings import load_site
    from client.status import describe, site_status, trainer_status
    from federation.settings import SettingsError

    settings = load_site(config)
    if part == "trainer":
        result = trainer_status(settings)
        is_there = bool(result["is_trainer_up"])
        text = f"trainer      {'up' if is_there else 'down: its log says why'}"
    elif part == "both":
        result = site_status(settings)
        is_there = bool(result["is_running"])
        text = describe(result)
    else:
        raise SettingsError(f"--part is {part!r}: expected trainer or both")
    print_result(result, as_json, lambda: typer.echo(text))
    if not is_there:
        raise typer.Exit(1)


def _parse_settings(pairs: list[str]) -> dict[str, Any]:
    from federation.settings import SettingsError

    values: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise SettingsError(f"--set {pair!r}: expected key=value, such as num_steps=24")
        values[key.strip()] = value.strip()
    return values


def _print_check(results: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("file", "rule", "records", "lines"):
        table.add_column(column)
    for result in results:
        table.add_row(result["file"], "kept", str(result["kept"]), "")
        for rule, lines in result["dropped"].items():
            shown = ", ".join(map(str, lines[:12])) + (" …" if len(lines) > 12 else "")
            table.add_row("", rule, str(len(lines)), shown)
    Console().print(table)


def _print_evaluation(results: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("file", "loss", "perplexity", "token accuracy", "tokens", "records cut"):
        table.add_column(column, justify="left" if column == "file" else "right")
    for result in results:
        table.add_row(
            result["file"],
            f"{result['loss']:.4f}",
            f"{result['perplexity']:.2f}",
            f"{result['token_accuracy']:.1%}",
            str(result["num_tokens"]),
            str(result["num_cut"]),
        )
    Console().print(table)


def main() -> None:
    """Entry point of the console script."""
    run_command(app)


if __name__ == "__main__":
    main()
