"""`client init` and `client doctor`: a new site, and what is still missing at one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from federation.command import print_result

if TYPE_CHECKING:
    from client.site_directory import NewSite

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Of the new site.")],
    superlink: Annotated[str, typer.Option(help="HOST:PORT of the coordinator.")] = "",
    root_certificate: Annotated[
        Path | None, typer.Option(help="PEM file of the coordinator's CA.")
    ] = None,
    base_model: Annotated[
        Path | None, typer.Option(help="Its digest goes into policy.toml; reads all of it.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="JSONL file of the site's records.")] = None,
    name: Annotated[str, typer.Option(help="What the site calls itself.")] = "",
    state: Annotated[
        Path | None, typer.Option(help="State directory; the default is DIR/state.")
    ] = None,
    signer: Annotated[
        list[str] | None,
        typer.Option(help="Ed25519 public key (hex) whose runs the policy allows; repeat."),
    ] = None,
    systemd: Annotated[
        bool,
        typer.Option(
            "--systemd", help="Two users, and units for them: the trainer has no network."
        ),
    ] = False,
    docker: Annotated[
        bool, typer.Option("--docker", help="Two containers, as docker/compose.yaml has them.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a commented site.toml and policy.toml, make both keys and the state directory.

    Nothing is overwritten. What is not said gets a placeholder; `client doctor` names it.
    """
    from client.site_directory import make_site
    from client.site_template import TWO_CONTAINERS
    from federation.settings import SettingsError

    if systemd and (state is not None or data is None or base_model is None):
        raise SettingsError(
            "--systemd needs --data and --base-model, which its units name, and takes no --state: "
            "they keep it below /var/lib"
        )
    if docker and (systemd or state is not None):
        raise SettingsError("--docker takes no --systemd and no --state: its volumes are the state")
    paths = {
        "root_certificate": root_certificate,
        "base_model": base_model,
        "data": data,
        "state": state,
    }
    known = {key: str(path.absolute()) for key, path in paths.items() if path is not None}
    known |= {key: value for key, value in {"superlink": superlink, "name": name}.items() if value}
    if docker:
        known |= TWO_CONTAINERS
    made = make_site(
        directory,
        known=known,
        base_models=_digests(base_model),
        signers=signer or (),
        client=_own_command() if systemd else None,
    )
    steps = _next_steps(made, known)
    result = {
        "directory": str(made.directory),
        "files": [str(path) for path in made.files],
        "state": str(made.settings.state),
        "public_key": made.public_key,
        "fingerprint": made.fingerprint,
        "identity": made.identity,
        "base_models": list(made.policy.models.base),
        "next": steps,
    }
    print_result(result, as_json, lambda: _print_new(result))


def _own_command() -> Path:
    """Return the console script of this installation, for a unit to start.

    Raises:
        UserError: This is no installation.
    """
    import sys

    from federation.errors import UserError

    command = Path(sys.executable).absolute().with_name("client")
    if not command.is_file():
        raise UserError(f"{command} does not exist: install Fedge into this Python, with pip")
    return command


def _digests(base_model: Path | None) -> list[str]:
    from federation.base_model import model_digest

    return [model_digest(base_model)] if base_model else []


def _next_steps(made: "NewSite", known: dict[str, str]) -> list[str]:
    """Return what is left to do, one sentence a step."""
    from client.service_units import DIRECTORY, install_steps
    from client.site_template import PLACEHOLDERS, TWO_CONTAINERS

    site, policy = made.directory / "site.toml", made.settings.policy
    steps = []
    if missing := [key for key in PLACEHOLDERS if key not in known]:
        steps.append(f"Fill in {', '.join(missing)} in {site}.")
    is_docker = made.settings.socket == Path(TWO_CONTAINERS["trainer"])
    if not is_docker and (absent := _absent(known)):
        steps.append(f"Bring what is not there yet: {', '.join(absent)}.")
    steps.append(
        f"Give the coordinator {made.settings.node_key}.pub by a way on which nobody can swap it, "
        f"and compare the fingerprint, {made.fingerprint}. The coordinator registers it: flwr "
        f"supernode register node.pub CONNECTION --name {made.settings.name or 'SITE'}"
    )
    steps.append(
        f"For secure sums, tell the other sites this one's identity, {made.identity}, yourself and "
        f"not by way of the coordinator, and list theirs in {policy}, [aggregation] cohort."
    )
    if not made.policy.models.base:
        steps.append(
            f"Name the base model's digest in {policy}, [models] base: `client doctor` prints it."
        )
    if not (made.policy.runs.allowed or made.policy.runs.signers):
        steps.append(
            f"Let runs in, in {policy}, [runs]: the coordinator's public key under signers (those "
            "that it signs), or the id of one run under allowed."
        )
    steps.append(f"Read what the policy allows: client policy check {policy}")
    if is_docker:
        return [*steps, "Start the site: docker compose up -d; docker/README.md says more"]
    steps.append(f"See what is missing: client doctor --config {site}")
    if made.settings.is_child:
        return [*steps, f"Start the site: client daemon --config {site}"]
    return [*steps, *install_steps(made.directory / DIRECTORY, made.settings)]


def _absent(known: dict[str, str]) -> list[str]:
    """Return what somebody named and nobody can see: a word typed wrong, or a file to come."""
    import os

    named = [(key, known[key]) for key in ("root_certificate", "data") if key in known]
    return [f"{key}, {path}" for key, path in named if not os.path.exists(path)]  # noqa: PTH110


def _print_new(result: dict[str, Any]) -> None:
    for path in result["files"]:
        typer.echo(f"made {path}")
    typer.echo("\nNext:")
    for number, step in enumerate(result["next"], start=1):
        typer.echo(f"{number}. {step}")


def doctor(
    config: Annotated[
        Path | None, typer.Option(help="site.toml; without it the machine is looked at only.")
    ] = None,
    part: Annotated[
        str, typer.Option(help="Where they are two users or containers: node or trainer.")
    ] = "both",
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Do not read the whole base model nor ask the coordinator."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what this machine can do and what is missing, one line a check, with the way to mend it.

    Ends with 2 if something must be changed. Changes nothing itself.
    """
    import os

    from client.check import exit_code
    from client.doctor import PARTS, examine
    from federation.settings import SettingsError

    parts = [each for each in PARTS if part in ("both", each)]
    if not parts:
        raise SettingsError(f"--part is {part!r}: expected node, trainer or both")
    checks = list(examine(config, parts=parts, is_quick=quick, variables=os.environ))
    rows = [vars(check) for check in checks]
    result = {"is_well": exit_code(checks) == 0, "checks": rows}
    print_result(result, as_json, lambda: _print_checks(rows))
    if exit_code(checks):
        raise typer.Exit(exit_code(checks))


def _print_checks(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colours = {"ok": "green", "skip": "dim", "warn": "yellow", "fail": "bold red"}
    table = Table("check", "")
    for column in ("found", "what to do"):
        table.add_column(column, overflow="fold")
    for row in rows:
        colour = colours[row["level"]]
        words = [escape(str(row[key])) for key in ("found", "fix")]
        table.add_row(row["name"], f"[{colour}]{row['level']}[/{colour}]", *words)
    Console().print(table)
