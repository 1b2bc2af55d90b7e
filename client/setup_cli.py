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
    as_json: Json = False,
) -> None:
    """Write a commented site.toml and policy.toml, make the node key and the state directory.

    Nothing is overwritten. What is not said gets a placeholder; `client doctor` names it.
    """
    from client.site_directory import make_site

    paths = {
        "root_certificate": root_certificate,
        "base_model": base_model,
        "data": data,
        "state": state,
    }
    known = {key: str(path.absolute()) for key, path in paths.items() if path is not None}
    known |= {key: value for key, value in {"superlink": superlink, "name": name}.items() if value}
    made = make_site(directory, known=known, base_models=_digests(base_model), signers=signer or ())
    steps = _next_steps(made, known)
    result = {
        "directory": str(made.directory),
        "files": [str(path) for path in made.files],
        "state": str(made.settings.state),
        "public_key": made.public_key,
        "fingerprint": made.fingerprint,
        "base_models": list(made.policy.models.base),
        "next": steps,
    }
    print_result(result, as_json, lambda: _print_new(result))


def _digests(base_model: Path | None) -> list[str]:
    from federation.base_model import model_digest

    return [model_digest(base_model)] if base_model else []


def _next_steps(made: "NewSite", known: dict[str, str]) -> list[str]:
    """Return what is left to do, one sentence a step."""
    from client.site_template import PLACEHOLDERS

    site, policy = made.directory / "site.toml", made.settings.policy
    steps = []
    if missing := [key for key in PLACEHOLDERS if key not in known]:
        steps.append(f"Fill in {', '.join(missing)} in {site}.")
    steps.append(
        f"Give the coordinator {made.settings.node_key}.pub by a way on which nobody can swap it, "
        f"and compare the fingerprint, {made.fingerprint}. The coordinator registers it: flwr "
        f"supernode register node.pub CONNECTION --name {made.settings.name or 'SITE'}"
    )
    if not made.policy.models.base:
        steps.append(
            f"Name the base model's digest in {policy}, [models] base: `client doctor` prints it."
        )
    if not (made.policy.runs.allowed or made.policy.runs.signers):
        steps.append(f"Allow a run in {policy}, [runs]: the key of a signer, or the id of a run.")
    steps.append(f"Read what the policy allows: client policy check {policy}")
    steps.append(f"See what is missing: client doctor --config {site}")
    steps.append(f"Start the site: client daemon --config {site}")
    return steps


def _print_new(result: dict[str, Any]) -> None:
    for path in (*result["files"], result["state"]):
        typer.echo(f"made {path}")
    typer.echo("\nNext:")
    for number, step in enumerate(result["next"], start=1):
        typer.echo(f"{number}. {step}")
