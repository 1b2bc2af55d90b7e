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
def build(
    model: Annotated[Path, typer.Argument(help="A model directory, Llama or Qwen2 family.")],
    to: Annotated[list[str], typer.Option(help="gguf:q4_k, gguf:q8_0, onnx:int4, … Repeatable.")],
    out: Annotated[Path, typer.Option(help="Each target becomes a directory in it.")],
    heldout: Annotated[
        list[Path] | None, typer.Option(help="JSONL to compare with the source on. Repeatable.")
    ] = None,
    heldout_tokens: Annotated[int, typer.Option(help="Response tokens to score.")] = 2000,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Convert a model for devices, and prove each build against its source."""
    from edge.build import build as build_targets
    from edge.progress import progress_bars

    with progress_bars() as on_progress:
        built = build_targets(model, to, out, heldout or [], heldout_tokens, on_progress)
    print_result(
        {"builds": [one.as_json() for one in built]},
        as_json,
        lambda: print("\n".join(one.as_line() for one in built)),
    )


@app.command()
def run(
    build: Annotated[Path, typer.Argument(help="A build directory, for example OUT/gguf-q4_k.")],
    prompt: Annotated[str, typer.Option(help="What to ask.")],
    system: Annotated[str | None, typer.Option(help="Instructions before it.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Stop after this many.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws above temperature 0.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: all cores.")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Ask a build one question; the answer streams to stdout."""
    from dataclasses import asdict

    from edge.runtime import open_runtime

    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    on_text = None if as_json else lambda text: print(text, end="", flush=True)
    with open_runtime(build, threads) as runtime:
        answer = runtime.generate(messages, max_tokens, temperature, on_text, seed)
    print_result(asdict(answer), as_json, print)


@app.command()
def bench(
    build: Annotated[Path, typer.Argument(help="A build directory, for example OUT/gguf-q4_k.")],
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 128,
    max_tokens: Annotated[int, typer.Option(help="Tokens generated each time.")] = 64,
    repeats: Annotated[int, typer.Option(help="Answers measured; medians are shown.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: all cores.")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Measure a build on this machine: load, first token, speed, peak memory."""
    from dataclasses import asdict

    from edge.benchmark import run_benchmark

    figures = run_benchmark(build, prompt_tokens, max_tokens, repeats, threads)
    print_result(asdict(figures), as_json, lambda: print(figures.as_line()))


@app.command()
def inspect(
    build: Annotated[Path, typer.Argument(help="A build directory, for example OUT/gguf-q4_k.")],
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Say what a build directory holds: format, size, tensor types, fidelity, lineage."""
    from edge.inspection import inspect_build, inspection_lines

    found = inspect_build(build)
    print_result(found, as_json, lambda: print("\n".join(inspection_lines(found))))


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
    from edge.agent import Outcome
    from edge.device import open_agent, poll_until_terminated

    settings, device = open_agent(config, lambda step: print(step, file=sys.stderr))

    def report(outcome: Outcome) -> None:
        print_result(outcome.as_json(), as_json, lambda: print(outcome, flush=True))

    if once:
        report(device.check())
    else:
        poll_until_terminated(
            device.check,
            report,
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
    lines = describe(walk)
    if release:
        signature = "signature holds" if key else "signature not checked, pass --key PUBLIC.PEM"
        lines.append(f"installed from {release}: {signature}")
    result = walk.as_json() | {
        "release": str(release) if release else None,
        "is_signature_checked": bool(release and key),
    }
    print_result(result, as_json, lambda: print("\n".join(lines)))
    for problem in walk.problems:
        print(f"problem: {problem}", file=sys.stderr)
    if walk.problems:
        raise VerificationError(f"{path} does not hold; problems named above: {len(walk.problems)}")


def main() -> None:
    """Run the command line."""
    run_command(app)
