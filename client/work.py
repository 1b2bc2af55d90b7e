"""What a run keeps beside its output until it is done, so that a killed one can go on.

.<out>.work/run.json      what decides the result; another run is refused
steps.jsonl   every step done
checkpoints/  weights, optimizer, schedule and data position
"""

from __future__ import annotations

import fcntl
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

from federation.atomic import write_atomically
from federation.errors import UserError

if TYPE_CHECKING:
    from client.training import Step


class Work:
    """The work directory of one output."""

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        """Nothing is written before the ``with`` block.

        Args:
            out: The output directory.
            identity: What decides the result, JSON values by name.

        Raises:
            UserError: An interrupted run with another identity is in the way.
        """
        if not out.name:
            raise UserError(f"{out}: name a new directory, not the current one")
        self._out_name = out.name
        self._directory = out.with_name(f".{out.name}.work")
        self._lock: TextIO | None = None
        self._identity = json.dumps(identity, indent=2, sort_keys=True)
        path = self._directory / "run.json"
        if path.is_file() and (before := path.read_text(encoding="utf-8")) != self._identity:
            raise UserError(
                f"{self._directory} holds an interrupted run with another "
                f"{_difference(json.loads(before), json.loads(self._identity))}: repeat its "
                "command to continue it, or remove that directory"
            )

    @property
    def checkpoints(self) -> Path:
        """Where the training loop keeps its checkpoints."""
        return self._directory / "checkpoints"

    def __enter__(self) -> Self:
        """Claim the directory for this run and clear what a kill left half written.

        Raises:
            UserError: Another process works on the same output now.
        """
        write_atomically(self._directory / "run.json", self._identity)
        self._lock = (self._directory / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UserError(
                f"another process works in {self._directory}: wait for it or choose another output"
            ) from None
        for leftover in self._directory.parent.glob(f".{self._out_name}.????????"):
            shutil.rmtree(leftover)  # an output that a kill left half written
        steps = self._directory / "steps.jsonl"
        if steps.is_file():  # a line that a kill cut in half must not swallow the next one
            whole, _, _ = steps.read_text(encoding="utf-8").rpartition("\n")
            write_atomically(steps, f"{whole}\n" if whole else "")
        for checkpoint in self.checkpoints.glob("checkpoint-*"):
            # The Trainer writes a checkpoint in place, its state last.
            if not _is_json(checkpoint / "trainer_state.json"):
                shutil.rmtree(checkpoint)
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock:
            self._lock.close()

    def record(self, step: Step) -> None:
        """Append a step that was done."""
        with (self._directory / "steps.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(step)) + "\n")

    def steps(self) -> list[dict[str, Any]]:
        """Return every step once, in order.

        The steps after the last checkpoint of a killed run were done twice; a line that the kill
        cut in half belongs to one of them.
        """
        steps: dict[int, dict[str, Any]] = {}
        text = (self._directory / "steps.jsonl").read_text(encoding="utf-8")
        for line in text.splitlines():
            try:
                step = json.loads(line)
            except json.JSONDecodeError:
                continue
            steps[step["step"]] = step
        return [steps[number] for number in sorted(steps)]

    def remove(self) -> None:
        """Remove everything: the output is complete."""
        shutil.rmtree(self._directory)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    names = [name for name in now | before if before.get(name) != now.get(name)]
    return ", ".join(sorted(names))
