"""The ServerApp that `flwr run .` starts: Flower's grid behind the `Sites` of `rounds`.

Nothing heavy is imported here: Flower loads this module in every process of a run.
"""

import os
import sys
from datetime import UTC, datetime

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from federation.errors import FedgeError
from federation.events import (
    Event,
    RoundFinished,
    RunResumed,
    SiteFailed,
    SiteLate,
    SumLost,
    SumOpened,
)
from federation.exchange import LIFETIME
from federation.grid_sites import GridSites
from federation.rounds import run_rounds
from federation.run_directory import RunDirectory
from federation.settings import FederationSettings, load_settings
from federation.signed_run import check_signed

app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Run a federation with the settings of the run config."""
    try:
        settings = load_settings(FederationSettings, context.run_config, "the run config")
        sites = GridSites(grid, LIFETIME * settings.round_timeout_s)
        directory = run_rounds(sites, settings, check=lambda run: _check(run, grid), on_event=_say)
    except FedgeError as error:
        # One sentence in the run's log instead of a traceback; the run counts as failed.
        print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201
        if os.environ.get("FEDGE_DEBUG"):
            raise
        sys.exit(error.exit_code)
    print(f"adapter: {directory}", file=sys.stderr, flush=True)  # noqa: T201


def _check(run: RunDirectory, grid: Grid) -> None:
    """Let a signed run begin only as it was signed: a site would refuse each of its rounds.

    Raises:
        SettingsError: It is another run than the one that was signed; the field is named.
    """
    if run.settings.signed.signature:
        check_signed(
            run.settings,
            run=run.run,
            bundle=grid.run.fab_hash,
            base_model=run.base_model,
            now=datetime.now(UTC),
        )


def _say(event: Event) -> None:
    """Print what `flwr run --stream` should show while a run is under way."""
    match event:
        case RoundFinished():
            loss = "–" if event.train_loss is None else f"{event.train_loss:.4f}"
            line = (
                f"round {event.server_round}: {event.num_updates} updates, train loss "
                f"{loss}, {event.seconds:.1f} s"
            )
        case RunResumed():
            line = f"resumed at round {event.server_round}, with the settings of its run.json"
        case SiteLate():
            line = (
                f"round {event.server_round}: site {event.site} came late with round "
                f"{event.trained_round}: {'folded in' if event.kept else 'dropped'}"
            )
        case SumOpened():
            line = (
                f"round {event.server_round}: secure sum of {len(event.sites)} sites opened "
                f"(attempt {event.attempt})"
            )
        case SumLost():
            line = f"round {event.server_round}: the adapter stays as it was: {event.reason}"
        case SiteFailed():
            line = f"round {event.server_round}: site {event.site} failed: {event.reason}"
        case _:
            return
    print(line, file=sys.stderr, flush=True)  # noqa: T201
