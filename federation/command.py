"""How a command speaks: one JSON object on stdout with `--json`, progress and errors on stderr.

Exit codes: 0 done, 1 it failed, 2 the user must change something. A user's mistake is one
sentence; `--debug` adds the traceback.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

from federation.errors import FedgeError


def run_command(app: Callable[[], Any]) -> None:
    """Run a typer app; turn our own errors into one sentence and an exit code.

    ``--debug`` anywhere in the arguments lets the traceback through.
    """
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app()
    except FedgeError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)


def print_result(result: dict[str, Any], as_json: bool, human: Callable[[], None]) -> None:
    """Print one JSON object on stdout, or let ``human`` print for a person."""
    if as_json:
        print(json.dumps(result, sort_keys=True))  # noqa: T201
    else:
        human()
