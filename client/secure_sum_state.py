"""A site's part in the secure sums of a run, on disk before anything of it leaves.

    DIR/run-<id>/attempt.json   keys, what was asked and what was answered: client.secure_sum.Held
                 masked         the masked vector, as it leaves
                 revealed       round and content of each sum that it helped to open; for ever

`attempt.json` is replaced in one step with each answer in it; a stage that is asked again is
answered with the same bytes. So after a kill at any point a site never makes a second vector under
the same keys, never reveals both kinds of share of one member, and can still help to open the sum.

One attempt a run is kept, the newest. A site that has revealed its shares refuses every other
attempt of that round, and without noise every other round of the run over the same adapter and
settings: two sums of the same updates would say more than one. With noise each round's update is
drawn anew and charged, so that a run may go on after a sum that was lost. Settings are compared by
what they come to, however a request spells them. What differs a little is other content, and its
update nearly the same one: only noise bounds that.

One process may use a directory at a time. The files hold keys: only their owner may read the
directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from client.reasons import Refused
from client.secure_sum import (
    ANSWERS,
    Held,
    Membership,
    advertise,
    check_cohort,
    check_policy,
    is_repeated,
    mask,
    masked,
)
from client.site_state import KEPT_S, SiteStateError
from federation.atomic import atomic_file, write_atomically
from federation.secure_messages import SecureSumError, Stage, Terms

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_REVEALED = "revealed"


class SecureSumSite:
    """One site in the secure sums of one run."""

    def __init__(self, root: Path, run: str, member: Callable[[], Membership]) -> None:
        """Read what there is; nothing is written before the first answer.

        Args:
            root: Directory for this alone.
            run: Random id of the run, in hex: it becomes part of a file name.
            member: Returns this site as its policy has it now: it may change between two stages.

        Raises:
            SecureSumError: ``run`` is no such id.
            SiteStateError: What there is is damaged.
        """
        if not re.fullmatch("[0-9a-f]{1,64}", run):
            raise SecureSumError(f"the run calls itself {run[:80]!r}: expected 1 to 64 hex digits")
        self._root, self._run, self._member = root, run, member
        self._directory = root / f"run-{run}"
        self._held = self._read()

    def check(self, terms: Terms, *, is_private: bool, trained: str = "") -> None:
        """Return if an attempt may begin, or is the one that is held; nothing is written.

        Args:
            terms: As this site knows them: the run's numbers, and the subject that it computed.
            is_private: Whether the round's training draws noise.
            trained: Digest of what decides the update; "" = the subject.

        Raises:
            SecureSumError: The attempt is refused: too small a cohort, a round or attempt that is
                over, or a round that this site has helped to open.
            Refused: Without noise, this site has helped to open a sum of this content.
            SiteStateError: What was kept is damaged.
        """
        held = self._held
        if held is not None and held.terms == terms:
            return
        if terms.run != self._run:
            raise SecureSumError(f"the terms are for run {terms.run}, this is {self._run}")
        if held is not None:
            before = held.terms
            if (terms.server_round, terms.attempt) <= (before.server_round, before.attempt):
                raise SecureSumError(
                    f"attempt {terms.attempt} of round {terms.server_round} comes after attempt "
                    f"{before.attempt} of round {before.server_round}, or has other terms now: "
                    "expected a higher number"
                )
            if terms.server_round == before.server_round and Stage.REVEAL in held.requests:
                raise SecureSumError(
                    f"this site has helped to open the sum of round {terms.server_round}: two sums "
                    "of the same updates would say more than one, so go on to another round"
                )
        check_cohort(terms, self._member())
        opened = None if is_private else self._revealed().get(trained or terms.subject)
        if opened is not None:
            raise Refused(
                "replay",
                f"this site has helped to open the sum of round {opened} of this run, over the "
                "same adapter with the same settings: without noise the updates would be the same "
                "again, and two sums of them would say more than one",
            )

    def advertise(self, terms: Terms, *, is_private: bool = False, trained: str = "") -> bytes:
        """Begin an attempt, or give its first answer again. Arguments and errors as ``check``."""
        self.check(terms, is_private=is_private, trained=trained)
        if self._held is not None and self._held.terms == terms:
            return self._held.answers[Stage.ADVERTISE].encode()
        held = advertise(terms, self._member()).model_copy(update={"trained": trained})
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._keep(held)
        self._vector.unlink(missing_ok=True)
        self._remove_old()
        return held.answers[Stage.ADVERTISE].encode()

    def answer(self, stage: Stage, request: bytes) -> bytes:
        """Answer the stage ``share``, ``agree`` or ``reveal``, the first time or again.

        Raises:
            SecureSumError: The request is refused: client.secure_sum says why.
        """
        held, member = self._attempt(), self._member()
        check_policy(held, member)
        if not is_repeated(held, stage, request):
            held = ANSWERS[stage](held, request, member)
            if stage == Stage.REVEAL:
                self._note_revealed(held)
            self._keep(held)
        return held.answers[stage].encode()

    def masked_vector(
        self,
        request: bytes,
        values: Iterable[NDArray[np.floating[Any]]],
        num_examples: int,
        rng: np.random.Generator,
    ) -> Path:
        """Return the file of this site's masked vector: made the first time, the same one again.

        Arguments and errors as client.secure_sum.mask; ``values`` is drawn the first time only.
        """
        held, member = self._attempt(), self._member()
        check_policy(held, member)
        if is_repeated(held, Stage.MASK, request):
            return self._vector
        vector = mask(held, request, member, values, num_examples, rng)
        self._remove_half_written()
        num_clipped = 0
        with atomic_file(self._vector) as file:
            file.write(vector.head)
            for piece, clipped in vector.pieces:
                file.write(piece)
                num_clipped += clipped
        # A kill before this line leaves a vector that never left; another one then replaces it.
        self._keep(masked(held, request, num_clipped))
        return self._vector

    @property
    def vector_digest(self) -> str:
        """sha256 of the masked vector, or "" while there is none."""
        if self._held is None or Stage.MASK not in self._held.requests:
            return ""
        with self._vector.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def num_clipped(self) -> int:
        """Numbers of the last masked vector that were beyond the clip; known to this site only."""
        return int(self._attempt().answers[Stage.MASK])

    @property
    def _vector(self) -> Path:
        return self._directory / "masked"

    def _attempt(self) -> Held:
        if self._held is None:
            raise SecureSumError(
                "this site takes part in no secure sum of this run: advertise first"
            )
        return self._held

    def _keep(self, held: Held) -> None:
        write_atomically(self._directory / "attempt.json", held.model_dump_json())
        self._held = held

    def _read(self) -> Held | None:
        path = self._directory / "attempt.json"
        if not path.is_file():
            return None
        try:
            return Held.model_validate_json(path.read_bytes())
        except ValidationError:
            raise SiteStateError(
                f"{path} is damaged: remove {self._directory}; this site then drops out of the "
                "attempt that is under way"
            ) from None

    def _revealed(self) -> dict[str, int]:
        """Return each content that this site helped to open a sum of, and the first such round."""
        path = self._directory / _REVEALED
        found: dict[str, int] = {}
        try:
            for line in path.read_text("ascii").splitlines() if path.is_file() else []:
                number, content = line.split(" ")
                found.setdefault(content, int(number))
        except ValueError:
            raise SiteStateError(
                f"{path} is damaged: put it back from a copy; without it this site takes part in "
                "no further secure sum of this run that has no noise"
            ) from None
        return found

    def _note_revealed(self, held: Held) -> None:
        """Put a sum's content on disk, before a share that helps to open it leaves."""
        content = held.trained or held.terms.subject
        if self._revealed().get(content) is None:
            path = self._directory / _REVEALED
            before = path.read_text("ascii") if path.is_file() else ""
            write_atomically(path, f"{before}{held.terms.server_round} {content}\n")

    def _remove_old(self) -> None:
        """Remove what a kill left half written, and the attempts of runs that ask no more."""
        self._remove_half_written()
        old = time.time() - KEPT_S
        for directory in self._root.glob("run-*"):
            with contextlib.suppress(FileNotFoundError):
                if directory != self._directory and directory.stat().st_mtime < old:
                    for path in directory.iterdir():
                        if path.name != _REVEALED:
                            path.unlink()
                    if not (directory / _REVEALED).exists():
                        directory.rmdir()

    def _remove_half_written(self) -> None:
        for path in self._directory.glob(".*"):
            path.unlink()
