"""A trainer with a small policy and a small ledger, as a process of its own.

    python site_trainer.py --config site.toml [--parent PID]

It allows adapters up to rank 8, and notes what leaves in `ledger.jsonl` of the state directory.
"""

import argparse
import json
from pathlib import Path

from client.answers import Kept
from client.reasons import Refused
from client.site_settings import load_site
from client.trainer import Question
from client.trainer_service import run_trainer


def allow(question: Question) -> None:
    """Refuse adapters above rank 8."""
    if question.rank > 8:
        raise Refused("max_rank", f"the adapter has rank {question.rank}, at most 8 is trained")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--parent", type=int)
    options = parser.parse_args()
    settings = load_site(options.config)
    ledger = settings.state / "ledger.jsonl"

    def record(question: Question, kept: Kept) -> None:
        """Note an answer once."""
        row = json.dumps([question.request.run, kept.server_round, kept.sha256])
        rows = ledger.read_text().splitlines() if ledger.is_file() else []
        if row not in rows:
            with ledger.open("a") as file:
                file.write(row + "\n")

    run_trainer(settings, allow=allow, record=record, parent=options.parent)


if __name__ == "__main__":
    main()
