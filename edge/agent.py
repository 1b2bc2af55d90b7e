"""The agent on a device: fetch a signed release, prove it, switch to it, and survive anything.

    DEVICE_DIR/state.json                          edge.slots.State, the truth
    DEVICE_DIR/current -> releases/<digest>/build  what the device runs
    DEVICE_DIR/releases/<digest>/                  release.dsse and build/, whole and verified
    DEVICE_DIR/releases/.<digest>.tmp/             the same, half fetched

Each step is on disk (file, directory, rename) before the next begins, so the agent may be killed
at any moment: the running release stays whole, verified files are not fetched twice. The decisions
are in `edge.slots`; here is only what touches the disk. It does not start a service or stop one:
whatever serves the model follows the `current` link.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge.atomic import exclusive, sync_directory, write_atomically
from edge.download import fetch, take_local
from edge.errors import EdgeError, UserError, VerificationError
from edge.registry import Source
from edge.release import Release, installed_release, open_release
from edge.slots import (
    MAX_ATTEMPTS,
    Action,
    State,
    accept,
    begin_trial,
    commit,
    decide,
    kept_releases,
    recover,
    reject,
    roll_back,
)
from edge.verification import verify

_SPARE_BYTES = 16 << 20
"""Left free beside a download, for state, logs and directory entries."""


@dataclass(frozen=True)
class ProbeResult:
    """What a build did when it was asked to generate. Numbers only: no text leaves a probe."""

    num_tokens: int
    first_token_ms: float
    decode_tokens_per_s: float


@dataclass(frozen=True)
class Outcome:
    """How a check or a rollback ended."""

    action: str
    """"kept", "held", "installed" or "rolled back"."""
    running: Release | None
    """The release that `current` names now."""
    num_bytes_fetched: int = 0
    probe: ProbeResult | None = None

    def __str__(self) -> str:
        text = f"{self.action}: {self.running or 'no release yet'}"
        if self.probe is not None:
            text += (
                f"; it answered with {self.probe.num_tokens} tokens, the first after "
                f"{self.probe.first_token_ms:.0f} ms, {self.probe.decode_tokens_per_s:.1f} a second"
            )
        return text

    def as_json(self) -> dict[str, Any]:
        """Return the outcome as one JSON object."""
        running = self.running
        return {
            "action": self.action,
            "build": running.build if running else None,
            "sequence": running.sequence if running else None,
            "digest": running.digest if running else None,
            "num_bytes_fetched": self.num_bytes_fetched,
            "probe": asdict(self.probe) if self.probe else None,
        }


def free_bytes_of(path: Path) -> int:
    """Return how many bytes the file system of ``path`` can still take."""
    return shutil.disk_usage(path).free


def probe_build(build: Path, release: Release) -> ProbeResult:
    """Load a build with the runtime it is for and let it answer the release's prompt.

    Raises:
        ImportError: This device lacks the runtime, or has one that cannot be used.
        EdgeError: The build does not load or does not answer.
    """
    from edge.llama import LlamaError, load_library
    from edge.runtime import open_runtime

    if release.runtime == "llama.cpp":
        # Before the build is opened: afterwards a missing library reads like a broken build.
        try:
            load_library()
        except (LlamaError, AttributeError) as error:
            raise ImportError(str(error)) from error
    message = {"role": "user", "content": release.probe.prompt}
    with open_runtime(build) as runtime:
        result = runtime.generate([message], max_tokens=release.probe.max_tokens)
    return ProbeResult(result.num_tokens, result.first_token_ms, result.decode_tokens_per_s)


@dataclass(frozen=True)
class Agent:
    """One device's agent. Everything that is not a decision of its own comes in as an argument."""

    device_dir: Path
    source: Source
    tag: str
    channel: str
    public_keys: tuple[Ed25519PublicKey, ...]
    probe: Callable[[Path, Release], ProbeResult] = probe_build
    on_step: Callable[[str], None] = lambda _: None
    """Called after each step is on disk, with what was done: progress for people."""
    free_bytes: Callable[[Path], int] = free_bytes_of

    def check(self) -> Outcome:
        """Look once at the registry and act on what it offers.

        Raises:
            VerificationError: What is offered is not what a pinned key signed, or is older.
            EdgeError: It failed otherwise: no registry, no space, or a probe that gave no tokens.
                The running release is the same as before, unless the disk failed after the
                switch: then the message says which release runs.
        """
        with self._locked():
            state = self._recover()
            envelope = self.source.envelope(self.tag)
            release = open_release(envelope, self.public_keys)
            action = decide(state, release, self.channel)
            if action in {Action.KEEP, Action.HOLD}:
                return Outcome(action.value, self._running(state))
            state = self._save(accept(state, release), f"accepted {release}")
            if action is Action.GIVE_UP:
                reason = f"its probe killed the agent {MAX_ATTEMPTS} times"
                raise self._reject(state, release, reason)
            num_bytes_fetched = self._install(state, release, envelope)
            probe = self._try(state, release)
            return Outcome(Action.INSTALL.value, release, num_bytes_fetched, probe)

    def roll_back(self) -> Outcome:
        """Return to the previous release at once, without the network.

        Raises:
            EdgeError: There is no previous release.
        """
        with self._locked():
            state = self._save(roll_back(self._recover()), "rolled back")
            self._settle(state)
            return Outcome("rolled back", self._running(state))

    # The device directory ---------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the device alone; a full or failing disk is one sentence, not a traceback."""
        try:
            self._releases.mkdir(parents=True, exist_ok=True)
            with exclusive(self.device_dir / ".lock"):
                yield
        except OSError as error:
            raise EdgeError(f"{self.device_dir}: {error}; {self._running_now()}") from error

    def _running_now(self) -> str:
        """Say what `current` names at this moment: a fault may come before the switch or after."""
        try:
            return f"`current` names release {(self.device_dir / 'current').readlink().parts[-2]}"
        except (OSError, IndexError):
            return "`current` names no release"

    @property
    def _releases(self) -> Path:
        return self.device_dir / "releases"

    def _slot(self, digest: str) -> Path:
        return self._releases / digest

    def _staging(self, digest: str) -> Path:
        return self._releases / f".{digest}.tmp"

    def _recover(self) -> State:
        """Read the state and make the disk agree with it."""
        state = self._load()
        whole = {slot.name for slot in self._releases.iterdir() if _is_whole(slot)}
        recovered = recover(state, whole)
        if recovered != state:
            self._save(recovered, "recovered")
        self._settle(recovered)
        return recovered

    def _settle(self, state: State) -> None:
        """Point `current` where the state says, then drop what nothing refers to."""
        link = self.device_dir / "current"
        if state.current is None:
            link.unlink(missing_ok=True)
        elif not link.is_symlink() or link.readlink() != _link_target(state.current):
            fresh = self.device_dir / ".current"
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(_link_target(state.current))
            fresh.replace(link)
            sync_directory(self.device_dir)
            self.on_step(f"switched to {state.current}")
        kept = kept_releases(state)
        for entry in self._releases.iterdir():
            if entry.is_dir() and entry.name.removeprefix(".").removesuffix(".tmp") not in kept:
                self._drop(entry)

    def _drop(self, entry: Path) -> None:
        """Delete what nothing refers to; what stays costs space, and is tried again next time."""
        try:
            shutil.rmtree(entry)
        except OSError as error:
            self.on_step(f"could not delete {entry}: {error.strerror}")

    def _running(self, state: State) -> Release | None:
        return None if state.current is None else _read_slot(self._slot(state.current))

    def _load(self) -> State:
        path = self.device_dir / "state.json"
        if not path.exists() and not (self.device_dir / "current").is_symlink():
            return State()
        try:
            return State(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{path} cannot be used ({error}): restore it, or empty {self.device_dir} "
                "to start afresh"
            ) from None

    def _save(self, state: State, step: str) -> State:
        content = json.dumps(asdict(state), indent=2, sort_keys=True) + "\n"
        write_atomically(self.device_dir / "state.json", content)
        self.on_step(step)
        return state

    # Fetch, prove, switch ---------------------------------------------------------------------

    def _install(self, state: State, release: Release, envelope: bytes) -> int:
        """Bring the release into its slot, whole and verified; return the bytes fetched."""
        slot, staging = self._slot(release.digest), self._staging(release.digest)
        if _is_whole(slot):
            return 0
        if slot.exists():
            shutil.rmtree(slot)
        (staging / "build").mkdir(parents=True, exist_ok=True)
        num_bytes = self._fill(state, release, staging)
        walk = verify(staging / "build", expected=release.lineage)
        if walk.problems:
            raise self._reject(state, release, f"its lineage does not hold: {walk.problems[0]}")
        write_atomically(staging / "release.dsse", envelope)
        for directory in [staging, *(one for one in staging.rglob("*") if one.is_dir())]:
            sync_directory(directory)
        staging.replace(slot)
        sync_directory(self._releases)
        self.on_step(f"installed {release}")
        return num_bytes

    def _fill(self, state: State, release: Release, staging: Path) -> int:
        """Bring every file of the release into ``staging``; return the bytes fetched."""
        build, incoming = staging / "build", staging / "incoming"
        incoming.unlink(missing_ok=True)  # a killed attempt left it
        owned = {
            file.sha256: self._slot(digest) / "build" / file.name
            for digest in (state.current, state.previous)
            if digest is not None
            for file in _read_slot(self._slot(digest)).files
        }
        missing = [file for file in release.files if not take_local(file, build, owned)]
        num_bytes = sum(file.size for file in missing)
        if (free := self.free_bytes(staging)) < num_bytes + _SPARE_BYTES:
            raise EdgeError(
                f"{release} needs {num_bytes + _SPARE_BYTES:,} bytes in {self.device_dir} and "
                f"{free:,} are free: make room; the running build stays"
            )
        for file in missing:
            fetch(file, build, self.source, incoming)
            self.on_step(f"fetched {file.name}")
        return num_bytes

    def _try(self, state: State, release: Release) -> ProbeResult:
        """Let the release generate, and switch to it if it does.

        What the device lacks (a library, memory, a readable disk) says nothing about the release:
        that attempt is taken back, and the next check tries again.
        """
        before = state
        state = self._save(begin_trial(state), f"probing {release}")
        try:
            result = self.probe(self._slot(release.digest) / "build", release)
        except (ImportError, MemoryError, OSError) as error:
            self._save(before, f"could not probe {release}")
            raise EdgeError(
                f"{release} cannot be probed on this device, the running build stays and the next "
                f"check tries again: {_reason(error)}"
            ) from error
        except Exception as error:  # a bad build may fail in any way: survive it, and say how
            raise self._reject(state, release, f"its probe failed: {_reason(error)}") from error
        if result.num_tokens < 1:
            raise self._reject(state, release, "its probe generated no tokens")
        self._settle(self._save(commit(state), f"proved {release}"))
        return result

    def _reject(self, state: State, release: Release, reason: str) -> EdgeError:
        """Hold a release to be bad and drop its bytes; return the error that says so."""
        self._settle(self._save(reject(state), f"rejected {release}"))
        return EdgeError(f"{release} is refused and the running build stays: {reason}")


def release_of(build: Path, public_keys: Sequence[Ed25519PublicKey] = ()) -> Release | None:
    """Return the release that an installed build came with; None where there is no such thing.

    Args:
        build: A build directory, or a device's `current` link.
        public_keys: Checks the signature again; without them only that nothing changed since.

    Raises:
        VerificationError: The release is not what was installed, or none of the keys signed it.
    """
    slot = build.resolve().parent
    if not (slot / "release.dsse").is_file():
        return None
    if public_keys:
        open_release((slot / "release.dsse").read_bytes(), public_keys)
    return _read_slot(slot)


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _link_target(digest: str) -> Path:
    return Path("releases", digest, "build")


def _read_slot(slot: Path) -> Release:
    return installed_release((slot / "release.dsse").read_bytes(), slot.name)


def _is_whole(slot: Path) -> bool:
    """Say whether a slot holds every file of its release, by size: cheap enough for each check."""
    try:
        release = _read_slot(slot)
        return all(
            (slot / "build" / file.name).stat().st_size == file.size for file in release.files
        )
    except (OSError, VerificationError):
        return False
