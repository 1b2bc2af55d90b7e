"""`federation keygen`, `sign` and `verify`: a run that its owner lets into the sites beforehand."""

import secrets
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from federation.command import print_result

if TYPE_CHECKING:
    from federation.run_signature import RunDescription

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
FIX = "make one with `federation keygen --out FILE`"


def keygen(
    out: Annotated[
        Path, typer.Option(help="File of the private key; OUT.pub gets the public one.")
    ],
    as_json: Json = False,
) -> None:
    """Make the key with which a coordinator signs runs; print the half that sites list.

    Keep the private half off the server that runs are started on.
    """
    from federation.atomic import write_atomically
    from federation.settings import SettingsError
    from federation.signing_key import new_key, public_half

    beside = out.with_name(f"{out.name}.pub")
    for path in (out, beside):
        if path.exists():
            raise SettingsError(
                f"{path} exists already and is not overwritten, since sites list what it holds: "
                "choose another --out"
            )
    try:
        public = public_half(new_key(out))
        write_atomically(beside, f"{public}\n")
    except OSError as error:
        raise SettingsError(f"{out} cannot be written ({error.strerror})") from None
    print_result({"key": str(out), "public_key": public}, as_json, lambda: typer.echo(public))


def sign(
    key: Annotated[Path, typer.Option(help="Private key, of `federation keygen`.")],
    out: Annotated[Path, typer.Option(help="File that starts the run: `flwr run . -c OUT`.toml.")],
    app: Annotated[Path, typer.Argument(help="Directory of the app, as for `flwr run`.")] = Path(),
    config: Annotated[
        list[str] | None,
        typer.Option("-c", "--run-config", help="As for `flwr run`: key=value pairs, or a TOML."),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Where the base model lies here; else the setting.")
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=3650, help="How long the signature holds.")] = 90,
    as_json: Json = False,
) -> None:
    """Sign a run before it starts, and show what was signed.

    Sites that list the key's public half let this run in, exactly as it is described, and no other.
    To go on with a run that was interrupted, by another bundle or after the signature's end, sign
    it with -c 'resume="DIR"'.
    """
    from federation.app_bundle import run_config
    from federation.atomic import write_atomically
    from federation.run_signature import sign as signature_of
    from federation.settings import SettingsError
    from federation.signed_run import run_file
    from federation.signing_key import public_half, read_key

    if out.suffix != ".toml":
        raise SettingsError(f"--out {out}: expected a name that ends in .toml, as flwr wants it")
    if out.exists():
        raise SettingsError(f"{out} exists already and is not overwritten: choose another --out")
    private = read_key(key, what="signing key", fix=FIX)
    overrides, values = run_config(app, config or [])
    # An older signature is made anew.
    overrides, values = (
        {name: value for name, value in table.items() if not name.startswith("signed.")}
        for table in (overrides, values)
    )
    description = _description(values, app, model, days)
    signature = signature_of(private, description.content)
    write_atomically(out, run_file(overrides, description.content, signature))
    result = {"signer": public_half(private), **description.model_dump(mode="json")}
    print_result(result | {"out": str(out)}, as_json, lambda: _show(result))


def verify(
    file: Annotated[Path, typer.Argument(help="File of `federation sign`.")],
    signer: Annotated[str, typer.Option(help="Public key, 64 hex digits.")],
    as_json: Json = False,
) -> None:
    """Show what a file has signed; end with 2 unless the owner of a key signed it."""
    from federation.settings import read_toml
    from federation.signed_run import check_signer, described, read_run_file

    signed = read_run_file(file, read_toml(file))
    check_signer(signed, signer)
    result = {"signer": signer, **described(signed).model_dump(mode="json")}
    print_result(result, as_json, lambda: _show(result))


def _description(
    values: dict[str, Any], app: Path, model: Path | None, days: int
) -> "RunDescription":
    """Return the description of a run that is to begin, or that goes on under its own id."""
    from federation.app_bundle import bundle_digest
    from federation.base_model import model_digest
    from federation.run_directory import RunDirectory
    from federation.run_signature import MOMENT
    from federation.settings import FederationSettings, load_settings
    from federation.signed_run import describe

    settings = load_settings(FederationSettings, values, "the run config")
    if settings.resume:
        begun = RunDirectory.resume(Path(settings.resume))
        settings, run, digest = begun.settings, begun.run, begun.base_model
        model = Path(settings.base_model)
    else:
        model = model or Path(settings.base_model)
        run, digest = secrets.token_hex(16), model_digest(model)
    return describe(
        settings,
        run=run,
        bundle=bundle_digest(app),
        base_model=digest,
        model=model,
        not_after=(datetime.now(UTC) + timedelta(days=days)).strftime(MOMENT),
    )


def _show(result: dict[str, Any]) -> None:
    """Print one value a line, whole: what was signed is read before it is believed."""
    for name, value in result.items():
        if isinstance(value, dict):
            for key, inner in value.items():
                typer.echo(f"{name + '.' + key:32} {inner}")
        elif isinstance(value, list):
            for index, inner in enumerate(value or ["none"]):
                typer.echo(f"{'' if index else name:32} {inner}")
        else:
            typer.echo(f"{name:32} {'none' if value is None else value}")
