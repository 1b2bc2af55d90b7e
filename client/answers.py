"""The answers that a site gave, on its disk before they leave it.

DIR/answers/<run>/<round>.json     the question's digest, the numbers beside the update; for ever
                  <round>.update   the update; kept for the last rounds only, and for some weeks
                  <round>.begun    how often a private round was begun, while it has no answer

A round that is asked again is answered with the same bytes: nothing is trained again, no noise is
drawn again, nothing is charged again. The same round with another adapter or other settings is
another question, and refused: whoever could ask a round anew could have its noise averaged out.
Only an answer that is noted (`Answers.note`: the ledger has it) may have left; so a noted answer
without its row shows a ledger that was put back from before (`client.site_ledger`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from client.reasons import Refused
from client.site_state import KEPT_S, SiteStateError
from federation.accountant import PrivacyEvent
from federation.atomic import write_atomically
from federation.wire import WireError

KEPT_ROUNDS = 2
"""Rounds of a run whose updates are kept: the last, and the one before for a server set back."""
MAX_BEGUN = 3
"""Times that a private round is begun before its failure is its answer. Each draws anew, and who
can end a trainer sees how far it came; a machine rarely ends so often in one round by itself. Well
below `client.trainer_link.MAX_LOST`: who gives up asking before that leaves the round unpaid."""


@dataclass(frozen=True)
class Kept:
    """An answer on disk."""

    server_round: int
    question: str
    """sha256 of what was asked: `client.trainer.Question.digest`."""
    adapter: str
    """Content digest of the adapter that was asked about."""
    sha256: str
    """Of the update."""
    num_bytes: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The numbers that leave with it."""
    num_examples: int = 0
    """Records behind it: what it weighs in a secure sum. Does not leave by itself."""
    data_set: str = ""
    """Digest of the records that it was trained on."""
    event: PrivacyEvent | None = None
    """What its training spent; None = it was not private."""
    is_noted: bool = False
    """Whether the ledger has it. Before that nothing of it left."""

    @property
    def is_failed(self) -> bool:
        """Whether the training failed after it had begun: no update, and still an answer."""
        return self.num_bytes == 0


class Answers:
    """The answers of one site in one run."""

    def __init__(self, root: Path, run: str) -> None:
        """Nothing is read or written yet.

        Args:
            root: The site's state directory.
            run: Random id of the run, in hex: it becomes part of a file name.

        Raises:
            WireError: ``run`` is no such id.
        """
        if not re.fullmatch("[0-9a-f]{1,64}", run):
            raise WireError(
                f"the run calls itself {run[:80]!r}: expected 1 to 64 hex digits, by which a site "
                "keeps its answers"
            )
        self._root = root
        self._directory = root / "answers" / run

    def find(self, server_round: int, question: str) -> Kept | None:
        """Return the answer that this question had before, or None.

        Raises:
            Refused: The round was answered, but to another question, or too long ago.
            SiteStateError: What was kept is damaged.
        """
        kept = self._read(server_round)
        if kept is None:
            return None
        if kept.question != question:
            raise Refused(
                "replay",
                f"round {server_round} of this run was answered for adapter "
                f"{kept.adapter[:16]}…; a second answer with another adapter or other settings is "
                "not given: go on with the next round",
            )
        if not self.path(kept).is_file():
            raise Refused(
                "replay",
                f"round {server_round} of this run was answered, and its update is kept for "
                f"{KEPT_ROUNDS} rounds and some weeks only: go on with the next round",
            )
        with self.path(kept).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != kept.sha256:
                raise _damaged(self.path(kept))
        return kept

    def keep(
        self,
        server_round: int,
        *,
        question: str,
        adapter: str,
        update: bytes,
        metrics: Mapping[str, float],
        num_examples: int = 0,
        data_set: str = "",
        event: PrivacyEvent | None = None,
    ) -> Kept:
        """Put an answer on disk; it is there when this returns. Arguments: the fields of `Kept`."""
        # An update says something of the records behind it: it is for no other user of the machine.
        self._directory.mkdir(parents=True, exist_ok=True)
        self._directory.parent.chmod(0o700)
        digest = hashlib.sha256(update).hexdigest()
        kept = Kept(
            server_round,
            question,
            adapter,
            digest,
            len(update),
            dict(metrics),
            num_examples,
            data_set,
            event,
        )
        write_atomically(self.path(kept), update)
        # Its description last: without it the update is not there.
        self._write(kept)
        self._begun_path(server_round).unlink(missing_ok=True)
        self._remove_old(server_round)
        return kept

    def num_begun(self, server_round: int) -> int:
        """Return how often a round without an answer was begun, whatever was asked in it."""
        path = self._begun_path(server_round)
        try:
            return int(path.read_text(encoding="ascii")) if path.is_file() else 0
        except ValueError:
            return MAX_BEGUN  # nobody knows any more: as often as it may

    def note_begun(self, server_round: int) -> None:
        """Note that a private round begins, before its first draw; it is on disk then."""
        self._directory.mkdir(parents=True, exist_ok=True)
        self._directory.parent.chmod(0o700)
        count = self.num_begun(server_round) + 1
        write_atomically(self._begun_path(server_round), str(count))

    def note(self, kept: Kept) -> None:
        """Note that the ledger has an answer, before a byte of it leaves."""
        if not kept.is_noted:
            self._write(replace(kept, is_noted=True))

    def is_noted(self, server_round: int) -> bool:
        """Return whether the answer to a round may have left."""
        kept = self._read(server_round)
        return kept is not None and kept.is_noted

    def path(self, kept: Kept) -> Path:
        """Return the file of an update."""
        return self._directory / f"{kept.server_round}.update"

    def _begun_path(self, server_round: int) -> Path:
        return self._directory / f"{server_round}.begun"

    def _read(self, server_round: int) -> Kept | None:
        path = self._directory / f"{server_round}.json"
        return _read(path) if path.is_file() else None

    def _write(self, kept: Kept) -> None:
        path = self._directory / f"{kept.server_round}.json"
        write_atomically(path, json.dumps(asdict(kept), indent=2))

    def _remove_old(self, server_round: int) -> None:
        for path in self._directory.iterdir():
            number = path.name.partition(".")[0]
            if path.suffix == ".update" and int(number) <= server_round - KEPT_ROUNDS:
                path.unlink()
            elif not number:
                path.unlink()  # what a kill left half written begins with a dot
        for path in (self._root / "answers").glob("*/*.update"):
            with contextlib.suppress(FileNotFoundError):  # another run may be removing it too
                if path.parent != self._directory and path.stat().st_mtime < time.time() - KEPT_S:
                    path.unlink()


def noted_rounds(root: Path) -> Iterator[tuple[str, int]]:
    """Yield the run and the round of every answer that may have left, in a state directory.

    Raises:
        SiteStateError: A description is damaged.
    """
    for path in sorted((root / "answers").glob("*/*.json")):
        if not path.name.startswith(".") and (kept := _read(path)).is_noted:
            yield path.parent.name, kept.server_round


def _read(path: Path) -> Kept:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        event = values.pop("event", None)
        return Kept(**values, event=None if event is None else PrivacyEvent(**event))
    except (ValueError, TypeError, AttributeError):
        raise _damaged(path) from None


def _damaged(path: Path) -> SiteStateError:
    return SiteStateError(
        f"{path} is damaged: restore it from a copy, or remove it; the round is not answered again"
    )
