"""The `edge` command: from a model directory to a generating device.

Each function here parses, calls and prints; the work is in the module it imports. Those imports
stand inside the functions, so that `edge --help` answers before torch is loaded.
"""

import typer

from edge.errors import run_command

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def edge() -> None:
    """From a model directory to a generating device. `--debug` shows tracebacks."""


def main() -> None:
    """Run the command line."""
    run_command(app)
