"""What can go wrong, named by who must act; and how a command says it.

- EdgeError                  it failed (exit code 1)
  - UserError                the user must change something (exit code 2)
    - SettingsError          edge.settings: a device setting is unknown or out of range
  - VerificationError        the publisher or the wire is at fault: what came is not what was signed

Each message holds the value seen, what was expected, and the way out.
"""

import json
import sys
from collections.abc import Callable
from typing import Any


class EdgeError(Exception):
    """Base of every error this room raises on purpose."""

    exit_code = 1


class UserError(EdgeError):
    """The user must change something: an argument, a file, a setting."""

    exit_code = 2


class SettingsError(UserError):
    """A device setting is missing, unknown or out of range."""


class VerificationError(EdgeError):
    """Bytes, a signature or a lineage are not what the publisher signed."""


def run_command(app: Callable[[], Any]) -> None:
    """Run a typer app; turn our own errors into one sentence and an exit code.

    ``--debug`` anywhere in the arguments lets the traceback through.
    """
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app()
    except EdgeError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)


def print_result(result: dict[str, Any], as_json: bool, human: Callable[[], None]) -> None:
    """Print one JSON object on stdout, or let ``human`` print for a person."""
    if as_json:
        print(json.dumps(result, sort_keys=True), flush=True)  # noqa: T201
    else:
        human()
