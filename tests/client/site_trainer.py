"""A trainer with a small policy and a small ledger, as a process of its own.

    python site_trainer.py --config site.toml [--parent PID]

It allows adapters up to rank 8, and notes what leaves in `ledger.jsonl` of the state directory.
"""

import argparse
import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

from client.answers import Kept
from client.reasons import Refused
from client.site_settings import load_site
from client.trainer import Question
from client.trainer_service import run_trainer


class SmallGate:
    """Refuses adapters above rank 8, lets every number out, and notes an answer once."""

    data_set = "d" * 64

    def __init__(self, ledger: Path) -> None:
        self._ledger = ledger

    def admit(self, *_: object) -> None:
        pass

    def allow(self, question: Question) -> None:
        if question.rank > 8:
            raise Refused("max_rank", f"the adapter has rank {question.rank}, at most 8 is trained")

    def release(self, question: Question, measured: Mapping[str, float]) -> dict[str, float]:
        return dict(measured)

    def record(self, question: Question, kept: Kept) -> None:
        row = json.dumps([question.request.run, kept.server_round, kept.sha256])
        rows = self._ledger.read_text().splitlines() if self._ledger.is_file() else []
        if row not in rows:
            with self._ledger.open("a") as file:
                file.write(row + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--parent", type=int)
    options = parser.parse_args()
    settings = load_site(options.config)
    gate = SmallGate(settings.state / "ledger.jsonl")
    run_trainer(settings, lambda *_: nullcontext(gate), parent=options.parent)


if __name__ == "__main__":
    main()
