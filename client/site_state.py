"""What a site keeps on its disk between the rounds of a run that sends changes.

    DIR/run-<id>/state.json          the last round that was answered: the files below, by name
                 adapter-<digest>    what the site was sent last, and what that was a change of
                 residual-…          what was still to be sent before that round, and after it

`state.json` is replaced in one step, after the files that it names and before the reply leaves. So
a kill at any point leaves the state before the round or the one after it; and the round, asked
again, starts from the same residual either way and gives the same bytes. Each run has its own
directory: a residual never gets into another run.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from federation.atomic import write_atomically
from federation.errors import UserError
from federation.wire import (
    Factors,
    MissingReferenceError,
    Update,
    WireError,
    open_update,
    tensors_of,
    whole_message,
    whole_rows,
    write_known,
)

KEPT_S = 30 * 24 * 3600
"""Seconds for which the state of a run that asks no more is kept: it may be resumed."""

_DIRECTORY = re.compile("run-[0-9a-f]{1,64}")
"""Of a run, in the state directory of the site."""


class SiteStateError(UserError):
    """What a site kept is damaged."""


@dataclass(frozen=True)
class _Answered:
    """The last round that was answered."""

    server_round: int
    adapter: str
    """Content digest of what the site was sent."""
    reference: str
    """Content digest of what that was a change of, or ""."""
    before: str
    """File of the residual that the round started with, or ""."""
    after: str
    """File of the residual that it left, or ""."""


class SiteState:
    """The state of one site in one run."""

    def __init__(self, root: Path, run: str) -> None:
        """Read what there is; nothing is written before ``keep``.

        Args:
            root: The site's state directory.
            run: Random id of the run, in hex: it becomes part of a file name.

        Raises:
            WireError: ``run`` is no such id.
            SiteStateError: The state of this run is damaged.
        """
        if not _DIRECTORY.fullmatch(f"run-{run}"):
            raise WireError(
                f"the run calls itself {run[:80]!r}: expected 1 to 64 hex digits, "
                "by which a site keeps what int8 and int4 need from round to round"
            )
        self._root = root
        self._directory = root / f"run-{run}"
        self._last = self._read()

    def open_adapter(self, digest: str) -> Update:
        """Return an adapter that the site was sent before.

        Raises:
            MissingReferenceError: It is not there, or damaged.
        """
        path = self._adapter_path(digest)
        try:
            held = _remembered(path)
        except (OSError, WireError):
            held = None
        if held is None or held.sha256_of_content != digest:
            raise MissingReferenceError(
                f"this site does not hold adapter {digest[:16]}…, of which a change was sent: "
                "send the whole adapter as float32"
            )
        return held

    def residual(self, server_round: int, received: Update, like: Factors) -> Update | None:
        """Return what is still to be sent when this round starts, or None.

        A residual of another rank or scale belongs to another factorisation and is not used.

        Args:
            server_round: The round that is asked.
            received: The adapter that the site was sent for it.
            like: What will be trained.

        Raises:
            SiteStateError: The residual is damaged.
        """
        name = self._before(server_round, received)
        if not name:
            return None
        path = self._directory / name
        try:
            kept = _remembered(path)
        except (OSError, WireError) as error:
            raise SiteStateError(
                f"{path} is damaged ({error}): remove {self._directory}; the site then goes on "
                "without what it had still to send"
            ) from None
        if (kept.rank, kept.alpha, kept.shapes()) != (like.rank, like.alpha, like.shapes()):
            return None
        return kept

    def take_back_unless(self, has_left: Callable[[int], bool]) -> None:
        """Forget what the last round left to be sent, if its own answer never left.

        A kill between this state and the answer leaves a residual of a training that nobody was
        charged for: the next round starts from what there was before it.

        Args:
            has_left: Whether the answer to a round may have left.
        """
        last = self._last
        if last is not None and last.after != last.before and not has_left(last.server_round):
            self._write(replace(last, after=last.before))

    def keep(
        self, server_round: int, received: Update, *, residual: Factors | None, is_reference: bool
    ) -> None:
        """Put the state after a round on disk; it is there when this returns.

        Args:
            server_round: The round that was answered.
            received: The adapter that the site was sent for it.
            residual: What is still to be sent, or None.
            is_reference: Whether the next round may be sent as a change of ``received``.
        """
        # What a residual says of the records behind it is for no other user of the machine. The
        # root may be a directory that the user made, and the run's may have been moved or copied.
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory.mkdir(mode=0o700, exist_ok=True)
        self._directory.chmod(0o700)
        digest = received.sha256_of_content
        path = self._adapter_path(digest)
        if is_reference and not path.is_file():
            # If power is lost it may be damaged: its digest says so, and it is asked for again.
            write_known(path, received)
            # A message of one factor has the other from its reference, not in memory.
            if received.numbers is not None and received.content:
                _remember(path, replace(received, origin=None))
        after = ""
        if residual is not None:
            after = f"residual-{server_round}-{digest[:16]}"
            _write_residual(self._directory / after, residual, received.base_model)
        before = self._before(server_round, received)
        self._write(_Answered(server_round, digest, received.reference, before, after))
        self._remove_old()

    def _write(self, last: _Answered) -> None:
        write_atomically(self._directory / "state.json", json.dumps(asdict(last), indent=2))
        self._last = last

    def _before(self, server_round: int, received: Update) -> str:
        """Return the file of the residual that a round starts with, the first time or again."""
        last = self._last
        if last is None:
            return ""
        is_repeated = (last.server_round, last.adapter) == (
            server_round,
            received.sha256_of_content,
        )
        return last.before if is_repeated else last.after

    def _adapter_path(self, digest: str) -> Path:
        return self._directory / f"adapter-{digest}"

    def _read(self) -> _Answered | None:
        path = self._directory / "state.json"
        if not path.is_file():
            return None
        try:
            return _Answered(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise SiteStateError(
                f"{path} is damaged: remove {self._directory}; the site then goes on without what "
                "it had still to send"
            ) from None

    def _remove_old(self) -> None:
        """Remove what state.json does not name, a kill's half-written files included."""
        last = self._last
        if last is None:
            return
        adapters = {f"adapter-{digest}" for digest in (last.adapter, last.reference)}
        named = {"state.json", last.before, last.after} | adapters
        for path in self._directory.iterdir():
            if path.name not in named:
                path.unlink()
        for path in filter(_is_state_of_a_run, self._root.iterdir()):
            with contextlib.suppress(FileNotFoundError):  # another run may be removing it too
                if path != self._directory and path.stat().st_mtime < time.time() - KEPT_S:
                    shutil.rmtree(path)


def _write_residual(path: Path, residual: Factors, base_model: str) -> None:
    numbers = {}
    with whole_message(path, residual, base_model) as message:
        for module, factor in tensors_of(residual):
            name, rows_RC = f"{module}.{factor}", whole_rows(residual, module, factor)
            message.add(name, rows_RC)
            numbers[name] = rows_RC
    _remember(path, replace(message.opened(), numbers=numbers))


_NUM_REMEMBERED = 2
"""An adapter and a residual: what the next round of a resident trainer reads."""
_memory: OrderedDict[Path, tuple[tuple[int, int, int], Update]] = OrderedDict()
"""What this process wrote or read last, and which file that was: it is not read again.

All of one run. Between its rounds that is up to twice the adapter as float32.
"""


def _remember(path: Path, update: Update) -> None:
    for other in [each for each in _memory if each.parent != path.parent]:
        del _memory[other]
    _memory[path] = _stamp(path), update
    while len(_memory) > _NUM_REMEMBERED:
        _memory.popitem(last=False)


def _remembered(path: Path) -> Update:
    """Open a message with its numbers, or take it from memory if it is the same file as then.

    Raises:
        OSError: It is not there.
        WireError: It is damaged.
    """
    stamp, update = _memory.get(path, (None, None))
    if update is None or stamp != _stamp(path):
        update = open_update(path, keeps=True)
        _remember(path, update)
    return update


def _stamp(path: Path) -> tuple[int, int, int]:
    seen = path.stat()
    return seen.st_ino, seen.st_size, seen.st_mtime_ns


def _is_state_of_a_run(path: Path) -> bool:
    """Tell a run's state from the other things in a directory that the user chose."""
    is_named_so = _DIRECTORY.fullmatch(path.name) is not None
    return is_named_so and not path.is_symlink() and (path / "state.json").is_file()
