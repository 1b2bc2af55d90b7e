"""A run on disk: what it is, how far it is, and all that it needs to go on.

    run.json                      settings, id of the run, digest of the base model
    events.jsonl                  what happened
    round-0001/ round-0002/ …     a PEFT adapter with its lineage after every round
    state-0002/                   what the server carries on: the tail, the optimizer's moments
    served/round-0003.update      what the sites of the last rounds were sent
    updates/                      the updates in flight
    secure/                       a secure sum in flight: federation.secure_memory
    adapter -> round-0002         the newest

A round is over when its `round-…` directory has its name: that rename is the commit, and all
that the next round needs is on disk before it. Whatever a killed server had begun after
its last commit is done again, from the same numbers and so with the same result; what it left half
written is removed.
"""

from __future__ import annotations

import fcntl
import json
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self, TextIO

from federation.adapter import LowRank, read_adapter
from federation.atomic import new_directory, sync_directory, sync_file, write_atomically
from federation.base_model import model_digest
from federation.errors import UserError
from federation.header import holds_changes
from federation.settings import FederationSettings, SignedSettings, load_settings
from federation.signed_run import signed_id

if TYPE_CHECKING:
    from torch import Tensor

    from federation.adapter import Adapter

ModuleState = Mapping[str, "Tensor"]
"""Plain tensors of one module by name: `tail_b`, `tail_a`, and the server optimizer's own."""


class ResumeError(UserError):
    """A run cannot be gone on with."""


class RunDirectory:
    """The directory of one run, claimed for this process."""

    def __init__(
        self,
        settings: FederationSettings,
        run: str,
        base_model: str,
        *,
        is_new: bool,
        is_signed_anew: bool = False,
    ) -> None:
        """Use `start` or `resume`."""
        self.settings = settings
        self._is_new = is_new
        self._is_signed_anew = is_signed_anew
        self.path = Path(settings.out)
        self.run = run
        self.base_model = base_model
        self.last_round = 0
        """The last that is over; 0 = none. Known once the directory is claimed."""
        self._lock: TextIO | None = None

    @classmethod
    def start(cls, settings: FederationSettings) -> Self:
        """Begin a new run.

        Raises:
            UserError: The base model is missing, or the directory is not empty.
        """
        _refuse_used(Path(settings.out))
        run = signed_id(settings) or secrets.token_hex(16)
        digest = model_digest(Path(settings.base_model))
        return cls(settings, run, digest, is_new=True)

    @classmethod
    def resume(cls, path: Path, signed: SignedSettings | None = None) -> Self:
        """Go on with an interrupted run, under the settings that it began with.

        Args:
            path: Its directory.
            signed: A newer signature of the run, which is kept once the directory is claimed;
                without one the last goes on.

        Raises:
            ResumeError: There is no run, or its last round is damaged.
            UserError: The base model is missing or is another one now.
        """
        description_path = path / "run.json"
        if not description_path.is_file():
            raise ResumeError(
                f"{description_path} does not exist: resume takes the directory that the run's "
                "out named"
            )
        try:
            description = json.loads(description_path.read_text(encoding="utf-8"))
            run, digest = str(description["run"]), str(description["base_model_digest"])
            values = {**description["settings"], "out": str(path)}
        except (ValueError, KeyError, TypeError):
            raise ResumeError(f"{description_path} is damaged: start a new run") from None
        settings = load_settings(FederationSettings, values, str(description_path))
        is_signed_anew = False
        if signed is not None and signed.signature:
            is_signed_anew = signed != settings.signed
            settings = settings.model_copy(update={"signed": signed})
        seen = model_digest(Path(settings.base_model))
        if seen != digest:
            raise ResumeError(
                f"{settings.base_model} has digest {seen[:16]}…, the run trains {digest[:16]}…: "
                "put the run's base model back"
            )
        return cls(settings, run, digest, is_new=False, is_signed_anew=is_signed_anew)

    def __enter__(self) -> Self:
        """Claim the directory and clear what a kill left half written.

        Raises:
            ResumeError: Another process runs it now.
            UserError: A new run would write over something.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / _LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise ResumeError(f"another process runs {self.path} now: wait for it") from None
        for leftover in filter(_is_leftover, self.path.iterdir()):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
        if self._is_new:
            _refuse_used(self.path)
        if self._is_new or self._is_signed_anew:
            self._describe()
        # Not before: whoever ran it until now may have finished a round.
        names = (match for p in self.path.iterdir() if (match := _ROUND.fullmatch(p.name)))
        self.last_round = max((int(match[1]) for match in names), default=0)
        for state in self.path.glob("state-*"):
            if state != self._state(self.last_round):
                shutil.rmtree(state)
        if self.last_round:
            self._switch_link()
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path / "updates", ignore_errors=True)
        if self._lock:
            self._lock.close()

    def _describe(self) -> None:
        description = {
            "run": self.run,
            "base_model_digest": self.base_model,
            "settings": self.settings.model_dump(exclude={"resume"}),
        }
        text = json.dumps(description, indent=2, sort_keys=True) + "\n"
        write_atomically(self.path / "run.json", text)

    def round(self, server_round: int) -> Path:
        """Return the directory of a round's adapter."""
        return self.path / f"round-{server_round:04d}"

    def served(self, server_round: int) -> Path:
        """Return the file of what the sites of a round were sent."""
        return self.path / "served" / f"round-{server_round:04d}.update"

    def last_adapter(self) -> Adapter:
        """Read the adapter of the last round that is over.

        Raises:
            ResumeError: Its files are damaged.
        """
        try:
            return read_adapter(self.round(self.last_round))
        except UserError as error:
            raise ResumeError(f"the run cannot go on: {error}") from None

    def states(self) -> ServerState:
        """Return what the last round carried on, one module at a time.

        Raises:
            ResumeError: It is gone.
        """
        path = self._state(self.last_round)
        if self.last_round and not path.is_dir():
            raise ResumeError(
                f"the run cannot go on: {path} is gone, which holds what round {self.last_round} "
                "carried on: restore it, or start a new run"
            )
        return ServerState(path)

    def commit(self, server_round: int, building: Path) -> Path:
        """Make a round's finished directory the last one; return where it is now.

        Args:
            server_round: The round.
            building: Its adapter and lineage, below ``path``; its state is in place already.
        """
        target = self.round(server_round)
        if holds_changes(self.settings.wire.downlink):
            # The next change stands on it, and sites answer a round asked again only if it is the
            # same change. It was written before they trained: little of it is still in memory.
            sync_file(self.served(server_round))
        building.replace(target)
        sync_directory(self.path)
        self.last_round = server_round
        self._switch_link()
        for state in self.path.glob("state-*"):
            if state != self._state(server_round):
                shutil.rmtree(state)
        shutil.rmtree(self.path / "secure", ignore_errors=True)
        for served in (self.path / "served").iterdir():
            if served != self.served(server_round):
                served.unlink()
        return target

    @contextmanager
    def new_states(self, server_round: int) -> Iterator[ServerState]:
        """Yield where to write what a round carries on; it is there when the block ends well."""
        shutil.rmtree(self._state(server_round), ignore_errors=True)
        with new_directory(self._state(server_round)) as building:
            yield ServerState(building)

    def _state(self, server_round: int) -> Path:
        return self.path / f"state-{server_round:04d}"

    def _switch_link(self) -> None:
        """Point `adapter` at the last round in one step: a reader finds the old one or the new."""
        link = self.path / "adapter"
        fresh = self.path / ".adapter"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(self.round(self.last_round).name)
        fresh.replace(link)


_ROUND = re.compile(r"round-(\d{4,})")
_LEFTOVER = re.compile(r"\.(\.?round-|state-|run\.json\.|adapter$)")
_LOCK = "lock"


def _is_leftover(path: Path) -> bool:
    """Tell what a kill left half written: it is hidden until it is whole."""
    return bool(_LEFTOVER.match(path.name))


def _refuse_used(out: Path) -> None:
    """Say before the long work that a new run's directory holds something.

    Raises:
        UserError: It does.
    """
    if not out.exists():
        return
    if not out.is_dir() or any(p.name != _LOCK and not _is_leftover(p) for p in out.iterdir()):
        raise UserError(
            f"{out} exists already: choose another output directory, or go on with the run that is "
            f'there: resume="{out}"'
        )


@dataclass(frozen=True)
class ServerState:
    """What the server carries from round to round, one file a module."""

    directory: Path

    def read(self, module: str) -> dict[str, Tensor]:
        """Return the tensors of a module; none in the first round, which has no directory.

        Raises:
            ResumeError: Its file is damaged or gone.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not self.directory.is_dir():
            return {}
        path = self.directory / f"{module}.safetensors"
        try:
            return dict(load_file(path))
        except FileNotFoundError:
            raise ResumeError(
                f"the run cannot go on: {path} is gone, which holds what the last round carried "
                "on: restore it, or start a new run"
            ) from None
        except SafetensorError as error:
            raise ResumeError(
                f"the run cannot go on: {path} is damaged ({error}): restore it, or start a new run"
            ) from None

    def tail(self, module: str) -> LowRank | None:
        """Return what the last average lost in a module."""
        state = self.read(module)
        return LowRank(state["tail_b"].mT, state["tail_a"]) if "tail_a" in state else None

    def write(self, module: str, state: ModuleState, tail: LowRank | None) -> None:
        """Put a module's state on disk; an empty one too, so that a lost file is noticed."""
        from safetensors.torch import save_file

        tensors = dict(state)
        if tail is not None:
            tensors |= {"tail_b": tail.b_OR.mT, "tail_a": tail.a_RI}
        path = self.directory / f"{module}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
