"""The `edge` command: from a model directory to a generating device.

Each function here parses, calls and prints; the work is in the module it imports. Those imports
stand inside the functions, so that `edge --help` answers before torch is loaded.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from edge.errors import VerificationError, print_result, run_command

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def edge() -> None:
    """From a model directory to a generating device. `--debug` shows tracebacks."""


@app.command()
def push(
    build: Annotated[Path, typer.Argument(help="A build directory, for example OUT/gguf-q4_k.")],
    reference: Annotated[str, typer.Argument(metavar="REF", help="DIR:TAG of an OCI layout.")],
    key: Annotated[Path, typer.Option(help="The publisher's private key.")],
    channel: Annotated[str, typer.Option(help="Devices of this channel take it.")] = "stable",
    sequence: Annotated[
        int | None, typer.Option(help="Default: the registry's last plus 1.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="What a device asks it first.")] = "Say hello.",
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Sign a build and put it into an OCI image layout under a tag."""
    from edge import keys, registry
    from edge.release import Probe

    directory, tag = registry.parse_reference(reference)
    signing_key = keys.read_private_key(key, os.environ.get(keys.PASSPHRASE_VARIABLE))
    pushed = registry.push(
        build,
        directory,
        tag,
        signing_key,
        channel=channel,
        sequence=sequence,
        probe=Probe(prompt),
    )
    print_result(
        pushed.as_json(),
        as_json,
        lambda: print(f"pushed {pushed.release}: {pushed.num_bytes_copied:,} bytes copied"),
    )


@app.command()
def agent(
    config: Annotated[Path, typer.Option(help="The device's settings: device.toml.")],
    once: Annotated[bool, typer.Option(help="Check once and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a check.")] = False,
) -> None:
    """Keep a device on the newest release: fetch, verify, probe, switch. SIGTERM ends it."""
    from edge.device import open_agent, poll_until_terminated

    settings, device = open_agent(config, lambda step: print(step, file=sys.stderr))
    if once:
        outcome = device.check()
        print_result(outcome.as_json(), as_json, lambda: print(outcome))
        return
    poll_until_terminated(
        device.check,
        lambda outcome: print_result(outcome.as_json(), as_json, lambda: print(outcome)),
        lambda error: print(f"error: {error}", file=sys.stderr),
        settings.poll_interval_s,
    )


@app.command()
def rollback(
    config: Annotated[Path, typer.Option(help="The device's settings: device.toml.")],
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Switch a device back to its previous release, at once and without the network."""
    from edge.device import open_agent

    _, device = open_agent(config, lambda step: print(step, file=sys.stderr))
    outcome = device.roll_back()
    print_result(outcome.as_json(), as_json, lambda: print(outcome))


@app.command()
def keygen(
    out: Annotated[Path, typer.Option(help="Directory for private.pem and public.pem.")],
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Make a publisher's key pair; EDGE_KEY_PASSPHRASE encrypts the private key."""
    from edge import keys

    private, public = keys.generate_keys(out, os.environ.get(keys.PASSPHRASE_VARIABLE))
    result = {"private": str(private), "public": str(public)}
    print_result(result, as_json, lambda: print(f"keep {private} secret; devices pin {public}"))


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="An artefact directory, or a device's `current`.")],
    source: Annotated[
        list[Path] | None, typer.Option(help="Where ancestors may lie on disk. Repeatable.")
    ] = None,
    key: Annotated[
        list[Path] | None, typer.Option(help="Public key that signed an installed build.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Hash an artefact, walk its lineage back, and name every byte that is not as it was."""
    from edge.device import verify_installed
    from edge.keys import read_public_key
    from edge.verification import describe

    walk, release = verify_installed(
        path, source or [], [read_public_key(one) for one in key or []]
    )
    result = walk.as_json() | {"release": str(release) if release else None}
    print_result(result, as_json, lambda: print("\n".join(describe(walk))))
    for problem in walk.problems:
        print(f"problem: {problem}", file=sys.stderr)
    if walk.problems:
        raise VerificationError(f"{path} does not hold: {len(walk.problems)} problems, named above")


def main() -> None:
    """Run the command line."""
    run_command(app)
