"""How a command speaks: one JSON object on stdout with `--json`, progress and errors on stderr.

Exit codes: 0 done, 1 it failed, 2 the user must change something. A user's mistake is one
sentence; `--debug` adds the traceback.
"""

import errno
import json
import sys
from collections.abc import Callable
from typing import Any

from federation.errors import FedgeError, UserError

WAYS_OUT = {
    errno.EACCES: "run this as a user who may, or change its rights",
    errno.EPERM: "run this as a user who may, or change its rights",
    errno.EROFS: "choose a place that can be written, or mount it so",
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some space there, or ask for a larger quota",
}
"""Of what a system refuses wherever files are used, and only the user can change."""
PASSING = (errno.ENOSPC, errno.EDQUOT)
"""What may pass by itself all the same: a service that met it is started again."""


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
        _end(error)
    except OSError as error:
        if debug or error.errno not in WAYS_OUT:
            raise
        place = f"{error.filename}: " if error.filename else ""
        kind = FedgeError if error.errno in PASSING else UserError
        _end(kind(f"{place}{error.strerror}: {WAYS_OUT[error.errno]}"))


def _end(error: FedgeError) -> None:
    print(f"error: {error}", file=sys.stderr)  # noqa: T201
    sys.exit(error.exit_code)


def print_result(result: dict[str, Any], as_json: bool, human: Callable[[], None]) -> None:
    """Print one JSON object on stdout, or let ``human`` print for a person."""
    if as_json:
        print(json.dumps(result, sort_keys=True))  # noqa: T201
    else:
        human()
