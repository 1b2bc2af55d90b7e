"""What a server remembers of its secure sums, so that it may be killed at any moment.

    DIR/attempt.json     the last attempt's round and number: none is ever used twice
        opening.json     all that was said before the last stage of a round, and of whom
        opening.sum      the masked sum
        tried            that the last stage was tried in vain before
        stopped          the last round when the run ended because too many sums were lost: it may
                         be resumed

`opening.json` comes last: without it there is no opening. All of it is removed with the commit of a
round.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from federation.atomic import atomic_file, write_atomically
from federation.errors import UserError
from federation.gathering import Part
from federation.masking import pack, unpack
from federation.secure_messages import Opening
from federation.secure_sum import SecureSum
from federation.sites import Reply

if TYPE_CHECKING:
    from federation.masking import Ring

_PIECE = 1 << 18


class SecureMemoryError(UserError):
    """What a server kept of a secure sum is damaged."""


class SecureMemory:
    """The directory of one run's secure sums."""

    def __init__(self, directory: Path) -> None:
        """Nothing is read or written yet."""
        self._directory = directory

    def next_attempt(self, server_round: int) -> int:
        """Return a number that no attempt at this round had; it is on disk when this returns.

        Raises:
            SecureMemoryError: The last number is damaged.
        """
        path = self._directory / "attempt.json"
        number = 1
        if path.is_file():
            last = self._read(path)
            if last["server_round"] == server_round:
                number = int(last["attempt"]) + 1
        write_atomically(path, json.dumps({"server_round": server_round, "attempt": number}))
        return number

    def keep_opening(self, secure: SecureSum, parts: Mapping[str, Part]) -> None:
        """Put on disk what the last stage stands on; it is there when this returns."""
        opening, sum_N = secure.opening(), secure.masked_sum
        for name in ("opening.json", "tried"):
            (self._directory / name).unlink(missing_ok=True)
        with atomic_file(self._directory / "opening.sum") as file:
            for start in range(0, len(sum_N), _PIECE):
                file.write(pack(sum_N[start : start + _PIECE], opening.terms.ring_bits))
        said = {site: asdict(part) for site, part in parts.items()}
        text = json.dumps({"opening": opening.model_dump(mode="json"), "parts": said})
        write_atomically(self._directory / "opening.json", text)

    def note_tried(self) -> None:
        """Note that the opening was tried for as long as the settings say."""
        write_atomically(self._directory / "tried", "")

    @property
    def is_tried(self) -> bool:
        """Whether it was."""
        return (self._directory / "tried").is_file()

    def note_stopped(self, last_round: int) -> None:
        """Note that whoever leads the run was told of the lost sums up to this round."""
        write_atomically(self._directory / "stopped", str(last_round))

    def is_stopped(self, last_round: int) -> bool:
        """Whether they were.

        The round is compared: a kill in the middle of a commit leaves the file of the one before.
        """
        path = self._directory / "stopped"
        return path.is_file() and path.read_bytes() == str(last_round).encode()

    def opening(self, server_round: int, subject: str) -> tuple[SecureSum, dict[str, Part]] | None:
        """Return the sum that a killed server had begun to open in this round, or None.

        Args:
            server_round: The round.
            subject: Of its terms: another adapter's sum is of no use.

        Raises:
            SecureMemoryError: It is damaged.
        """
        path = self._directory / "opening.json"
        if not path.is_file():
            return None
        value = self._read(path)
        try:
            opening = Opening.model_validate_json(json.dumps(value["opening"]))
            parts = {
                site: Part(Reply(**part["reply"]), part["sha256"])
                for site, part in value["parts"].items()
            }
        except (ValidationError, KeyError, TypeError):
            raise self._damaged(path) from None
        terms = opening.terms
        if (terms.server_round, terms.subject) != (server_round, subject):
            return None
        raw = (self._directory / "opening.sum").read_bytes()
        if len(raw) != terms.num_elements * terms.ring_bits // 8:
            raise self._damaged(self._directory / "opening.sum")
        sum_N: Ring = unpack(raw, terms.ring_bits)
        return SecureSum.reopened(opening, sum_N), parts

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise self._damaged(path)
        return value

    def _damaged(self, path: Path) -> SecureMemoryError:
        return SecureMemoryError(f"{path} is damaged: restore it from a copy, or start a new run")
