"""`federation`: where a run stands. A run itself is started by Flower: `flwr run .`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from federation.command import print_result, run_command

app = typer.Typer(
    help="The server side of a federation. Start a run with `flwr run .`; see README.md.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _federation() -> None:
    """Keep `status` a subcommand while it is the only one."""


@app.command()
def status(
    run: Annotated[Path, typer.Argument(help="Directory of a run: what `out` named.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Show the rounds of a run: sites, bytes, loss, what failed."""
    from federation.errors import UserError
    from federation.status import summarise

    path = run / "events.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist: pass the directory that the run's `out` named")
    summary = summarise(path)
    print_result(summary, as_json, lambda: _print(summary))


def _print(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=f"{summary['state']}: round {summary['rounds_done']} of "
        f"{summary['num_rounds']}, {summary['aggregation']}, rank {summary['rank']}"
    )
    for column in ("round", "sites", "failed", "MB up", "train loss", "lost in averaging", "s"):
        table.add_column(column, justify="right")
    for row in summary["rounds"]:
        table.add_row(
            str(row["server_round"]),
            str(row["num_updates"]),
            str(row["num_failed"]),
            f"{row['bytes_up'] / 1e6:.1f}",
            f"{row['train_loss']:.4f}",
            f"{row['aggregation_error']:.2%}",
            f"{row['seconds']:.1f}",
        )
    Console().print(table)
    if "reason" in summary:
        Console().print(f"[red]{escape(summary['reason'])}")
    for failure in summary["failures"]:
        place = f"round {failure['server_round']}, site {failure['site']}"
        Console().print(f"[yellow]{place}: {escape(failure['reason'])}")


def main() -> None:
    """Entry point of the console script."""
    run_command(app)


if __name__ == "__main__":
    main()
