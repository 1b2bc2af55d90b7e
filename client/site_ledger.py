"""A site's ledger, held against what else its state directory remembers.

A ledger that is gone, or that was put back from an old copy, would give the records a new budget.
So none is made where this site answered before, and one that lacks the row of an answer that may
have left is not used. Who replaces the whole state directory is not seen: against that helps a head
hash that was noted elsewhere (`client.chain`).
"""

from __future__ import annotations

from pathlib import Path

from client.answers import noted_rounds
from client.chain import LedgerError
from client.fingerprint import SECRET
from client.ledger import LEDGER, Ledger

WITNESSES = (SECRET, "answers", "secure")
"""What a state directory holds from the first question on. The ledger is made before them."""


def open_site_ledger(state: Path) -> Ledger:
    """Open the ledger of a state directory for writing; the first call makes it.

    Args:
        state: The site's state directory. Read its secret after this: it is one of the witnesses.

    Raises:
        LedgerError: It is gone, older than an answer of this site, broken, or in use.
        SiteStateError: The description of an answer is damaged.
    """
    path = state / LEDGER
    witnesses = [name for name in WITNESSES if (state / name).exists()]
    if witnesses and not path.exists():
        raise LedgerError(
            f"{path} is gone, and {' and '.join(witnesses)} beside it show that this site had one: "
            "put it and its .head back from a backup. Without a backup nobody knows what the "
            "records have spent; to begin anew in spite of that is the security officer's own "
            "decision: move the whole state directory away, and note that the budget starts anew"
        )
    ledger = Ledger.open(path)
    try:
        rows = {(row.run, row.server_round) for row in ledger.rows()}
        for run, server_round in noted_rounds(state):
            if (run, server_round) not in rows:
                raise LedgerError(
                    f"{path} has no row for round {server_round} of run {run}, which this site "
                    "answered: it was put back from before that answer; put the newest copy back"
                )
    except BaseException:
        ledger.close()
        raise
    return ledger
