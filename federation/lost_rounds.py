"""Rounds whose secure sum was lost: what a run remembers of them, and when it stops.

A round is lost where its sum can never be opened, or where no honest sites can have made it. It
leaves adapter and optimizer as they were, byte for byte; but its sites have charged it to their
budgets. So two of them in a row end the run, and whoever leads it decides.

**One liar must not lose round after round.** A masked vector cannot be looked at, so mostly nobody
can be named; but who was in a lost sum is known. The more lost rounds a site had part in, the later
it is asked: where more sites are connected than a round asks, a liar is soon among those
that are left over. A site that was named (federation.unmasking) is asked last from then on.

All of it is read from the lineages of the rounds, so that it is there after a kill, and no more
than what the run's own record says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from federation.adapter import write_modules
from federation.exchange import RoundError
from federation.lineage import write_lineage
from federation.run_directory import ResumeError
from federation.secure_memory import SecureMemory

if TYPE_CHECKING:
    from federation.adapter import Adapter
    from federation.run_directory import RunDirectory
    from federation.settings import FederationSettings

MAX_IN_A_ROW = 2
"""Lost rounds after which a run stops."""


@dataclass(frozen=True)
class LostRound:
    """A round that left the adapter as it was."""

    server_round: int
    reason: str
    suspects: tuple[str, ...]
    """Sites of which one or more are to blame, sorted."""
    named: tuple[str, ...] = ()
    """Sites at odds with most of the others, sorted (federation.unmasking)."""
    terms: Mapping[str, object] | None = None
    """Of the sum, in words."""


def read_lost_rounds(directory: RunDirectory) -> list[LostRound]:
    """Return the lost rounds of a run, in order.

    Raises:
        ResumeError: The lineage of a round is damaged or gone.
    """
    lost = []
    for server_round in range(1, directory.last_round + 1):
        path = directory.round(server_round) / "lineage.json"
        try:
            parameters = json.loads(path.read_bytes())["predicate"]["parameters"]
            said = parameters.get("secure_sum", {})
            if "lost" in said:
                suspects, named = tuple(said["suspects"]), tuple(said["named"])
                lost.append(LostRound(server_round, str(said["lost"]), suspects, named))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ResumeError(
                f"the run cannot go on: {path} is damaged or gone, which says whether round "
                f"{server_round} was lost: restore it, or start a new run"
            ) from None
    return lost


def stop_if_lost(lost: Sequence[LostRound], directory: RunDirectory) -> None:
    """Let a run go on only while its secure sums are opened.

    Once resumed it tries one more round, and stops again if that is lost too.

    Raises:
        RoundError: Too many in a row were lost, and that was not said yet, or the run is over.
    """
    last_round, num_rounds = directory.last_round, directory.settings.num_rounds
    row, is_over = lost_in_a_row(lost, last_round), last_round == num_rounds
    memory = SecureMemory(directory.path / "secure")
    if len(row) < min(MAX_IN_A_ROW, num_rounds) or (memory.is_stopped(last_round) and not is_over):
        return
    memory.note_stopped(last_round)
    go_on = "resume the run"
    if is_over:
        go_on = "begin a new run"
    elif is_stuck(lost, last_round, directory.settings):
        go_on = "begin a new run (this one can go on only among sites that were in none of them)"
    raise RoundError(_reason_to_stop(row, go_on))


def is_stuck(lost: Sequence[LostRound], last_round: int, settings: FederationSettings) -> bool:
    """Return whether the next round is over what was in a lost sum: its sites open no second one.

    Not with noise, which is drawn anew, nor before a first sum was opened: then the adapter is.
    """
    row = len(lost_in_a_row(lost, last_round))
    if settings.training.get("noise_multiplier") or row == last_round:
        return False
    return row >= (2 if settings.aggregation == "alternating" else 1)


def lost_in_a_row(lost: Sequence[LostRound], last_round: int) -> list[LostRound]:
    """Return those lost rounds after which no sum was opened, in order."""
    by_round = {each.server_round: each for each in lost}
    row: list[LostRound] = []
    while (each := by_round.get(last_round - len(row))) is not None:
        row.insert(0, each)
    return row


def _reason_to_stop(row: Sequence[LostRound], go_on: str) -> str:
    """Return what whoever leads the run has to know and to do."""
    first, last = row[0].server_round, row[-1].server_round
    rounds = f"round {last}" if first == last else f"rounds {first} to {last}"
    always = set(row[0].suspects).intersection(*(each.suspects for each in row))
    named = sorted({site for each in row for site in each.named})
    in_all = f"in each of them were site {', '.join(sorted(always))}" if always else ""
    who = in_all or "no site was in each of them"
    # Not more than that: two that lie together can bring it about for a third.
    at_odds = f"; at odds with most of the others: site {', '.join(named)}" if named else ""
    return (
        f"{rounds}: no secure sum came out ({row[-1].reason}); {who}{at_odds}. Every site that "
        "trained for it has charged that to its data, for nothing, so the run stops with the "
        f"adapter as it was before. Unregister the sites that you doubt and {go_on}, or begin one "
        "without secure_sum.enabled: a robust aggregation can look at each update"
    )


def build_lost_round(
    directory: RunDirectory, building: Path, adapter: Adapter, lost: LostRound, base_model: Path
) -> None:
    """Write a lost round's directory and carried state: what there was, and that it was lost.

    Args:
        directory: Of the run.
        building: Where the round's directory is made.
        adapter: The last one.
        lost: What is said of the round.
        base_model: Directory of the base model.
    """
    states = directory.states()
    with directory.new_states(lost.server_round) as new_states:
        for module in adapter.shapes():
            new_states.write(module, states.read(module), None)
    write_modules(
        building,
        ((name, adapter.modules[name]) for name in adapter.shapes()),
        shapes=adapter.shapes(),
        rank=adapter.rank,
        alpha=adapter.alpha,
        base_model=base_model.name,
    )
    ancestors = {"base_model": base_model}
    if lost.server_round > 1:
        ancestors["previous_round"] = directory.round(lost.server_round - 1)
    write_lineage(
        building,
        stage="federate",
        directories=ancestors,
        digests={},
        parameters=_parameters(directory, adapter, lost),
        metrics={},
    )


def _parameters(directory: RunDirectory, adapter: Adapter, lost: LostRound) -> dict[str, Any]:
    return {
        "server_round": lost.server_round,
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "base_model_digest": directory.base_model,
        "secure_sum": {
            **(lost.terms or {}),
            "sites": [],
            "lost": lost.reason,
            "suspects": list(lost.suspects),
            "named": list(lost.named),
        },
    }
