"""`client ledger`: what left this site, for its security officer and an auditor.

Both commands read only, while the trainer may be writing, and show nothing that they have not
checked.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from federation.command import print_result

if TYPE_CHECKING:
    from client.ledger import Contents, Row

ledger_app = typer.Typer(
    help="What left this site, and what it cost: show it, check that nobody changed it.",
    no_args_is_help=True,
)

Place = Annotated[
    Path,
    typer.Argument(metavar="LEDGER", help="A ledger, or the site.toml of the site it belongs to."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


@ledger_app.command()
def show(
    place: Place,
    run: Annotated[str, typer.Option(help="Only this run: the first digits of its id.")] = "",
    head: Annotated[
        bool,
        typer.Option("--head", help="Only the end of the chain, for an auditor's own notes."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Print a row for everything that left: when, of which run, how much, at what epsilon.

    --head does not ask for the head file beside the ledger.
    """
    from dataclasses import asdict

    from client.ledger import read_ledger

    path, limit = _find(place)
    contents = read_ledger(path, is_head_checked=not head)
    if head:
        count, found = contents.head.count, contents.head.hash
        print_result(asdict(contents.head), as_json, lambda: typer.echo(f"{count} rows, {found}"))
        return
    rows = [row for row in contents.rows if row.run.startswith(run)]
    result = {
        "ledger": str(path),
        "rows": [asdict(row) for row in rows],
        "data_sets": contents.data_sets,
        "epsilon_limit": limit,
    }
    print_result(result, as_json, lambda: _print_rows(rows, contents, limit))


@ledger_app.command()
def verify(
    place: Place,
    noted: Annotated[
        str, typer.Option(help="A head hash that was noted earlier: is it part of this history?")
    ] = "",
    as_json: Json = False,
) -> None:
    """Check the chain of rows, its end against the head file, and every epsilon anew."""
    from dataclasses import asdict

    from client.chain import LedgerError
    from client.ledger import read_ledger
    from client.ledger_audit import check_epsilons

    path, _ = _find(place)
    contents = read_ledger(path)
    if noted and noted not in {row.hash for row in contents.rows}:
        raise LedgerError(
            f"{path} holds together, but no release in it has the hash {noted[:16]}…: it is "
            "another history than the one that was noted"
        )
    check_epsilons(path, contents)
    head = contents.head
    result: dict[str, Any] = {"ledger": str(path), **asdict(head), "releases": len(contents.rows)}
    print_result(
        result,
        as_json,
        lambda: typer.echo(
            f"{path}: {head.count} rows hold together, {len(contents.rows)} of them releases whose "
            f"epsilons are what they amount to; the last is {head.hash}"
        ),
    )


def _find(place: Path) -> tuple[Path, float | None]:
    """Return the ledger, and the policy's epsilon for life where a site.toml leads to it."""
    from client.ledger import LEDGER
    from federation.settings import SettingsError, read_toml

    place = place.expanduser()
    if place.suffix != ".toml":
        return place, None
    site = read_toml(place)
    state = site.get("state")
    if not isinstance(state, str):
        raise SettingsError(f"{place}: `state` is missing: expected the site's state directory")
    limit = None
    if isinstance(policy := site.get("policy"), str):
        privacy = read_toml(place.parent / Path(policy).expanduser()).get("privacy", {})
        limit = privacy.get("epsilon") if isinstance(privacy, dict) else None
    ledger = place.parent / Path(state).expanduser() / LEDGER
    return ledger, float(limit) if limit is not None else None


def _print_rows(rows: "list[Row]", contents: "Contents", limit: float | None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("time", "run", "round", "stage"):
        table.add_column(column)
    for column in ("bytes", "noise", "epsilon"):
        table.add_column(column, justify="right")
    for row in rows:
        spent = "no bound" if row.epsilon is None else f"{row.epsilon:.3f}"
        table.add_row(
            row.time[:16].replace("T", " "),
            row.run[:8],
            str(row.server_round),
            row.stage,
            str(row.num_bytes),
            f"{row.noise_multiplier:.3g}" if row.steps else "",
            spent if limit is None else f"{spent} of {limit:g}",
        )
    console = Console()
    console.print(table)
    console.print(f"{len(rows)} of {len(contents.rows)} releases")
