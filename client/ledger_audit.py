"""Are the epsilons in a ledger what its rows amount to? Computed anew, from the rows alone.

The chain says that nobody changed a row; this says that what was written was right: each release is
charged to every data set that shares a record with its own, once, at the sampling rate that its
batch and the number of its records give, and its epsilon is the accountant's for all of them
together. What charges nothing is a masked vector, and a row before it charges its training. Reads
only.
"""

from __future__ import annotations

import contextlib
import functools
import math
from pathlib import Path

from client import chain
from client.chain import LedgerError
from client.fingerprint import share_a_record
from client.ledger import Contents, EpsilonOf
from federation import accountant

TOLERANCE = 1e-6
"""Relative: another version of scipy may sum in another order."""


def check_epsilons(
    path: Path, contents: Contents, epsilon_of: EpsilonOf = accountant.epsilon_of
) -> None:
    """Compute the epsilon of every release again.

    Args:
        path: File of the ledger; another process may be writing it.
        contents: What `client.ledger.read_ledger` found in it.
        epsilon_of: The accountant.

    Raises:
        LedgerError: Naming the first row whose epsilon or sampling rate is another, or that has
            nothing to show for charging nothing.
    """
    with contextlib.closing(chain.connect(path, is_writer=False)) as connection:
        records = {name: chain.read_data_set(connection, path, name) for name in contents.data_sets}

    @functools.cache
    def shares(one: str, other: str) -> bool:
        return share_a_record(records[one], records[other])

    for index, row in enumerate(contents.rows):
        num_records = contents.data_sets[row.data_set]
        rate = min(1.0, row.batch / max(num_records, 1))
        if row.steps and not math.isclose(rate, row.sampling_rate, rel_tol=TOLERANCE):
            raise LedgerError(
                f"{path}: row {row.number} says sampling rate {row.sampling_rate:.6g}, and "
                f"{row.batch} of its {num_records} records are {rate:.6g}: do not rely on its "
                "budget; use the version that wrote it, and if it says the same, report this"
            )
        before = contents.rows[:index]
        if not row.steps and not any(r.is_training_of(row) for r in before):
            raise LedgerError(
                f"{path}: row {row.number} charges nothing, and no row before it charges the "
                f"training of round {row.server_round}: do not rely on its budget; use the version "
                "that wrote it, and if it says the same, report this"
            )
        events = [r.event for r in before if r.steps and shares(r.data_set, row.data_set)]
        found = epsilon_of([*events, row.event], row.delta)
        written = math.inf if row.epsilon is None else row.epsilon
        if not math.isclose(found, written, rel_tol=TOLERANCE):
            raise LedgerError(
                f"{path}: row {row.number} says epsilon {written:.6g}, and the rows up to it "
                f"amount to {found:.6g}: do not rely on its budget; use the version that wrote it, "
                "and if it says the same, report this"
            )
