"""What a device knows about its releases, and what it does next: pure functions, no disk.

A release is tried in a slot of its own beside the running one; only one that has generated tokens
becomes current, and the one before it stays for a way back. ``State`` is the truth and the
`current` link follows it: each transition is written down before the disk is changed to match, so
whatever moment the power fails, ``recover`` has only to make the link say what the state says.
"""

from collections.abc import Set
from dataclasses import dataclass, replace
from enum import Enum

from edge.errors import EdgeError, VerificationError
from edge.release import Release

MAX_ATTEMPTS = 3
"""Probes that may end with the death of the agent before a release is given up."""


@dataclass(frozen=True)
class State:
    """What must survive a power cut. Releases are named by the sha256 of their payload."""

    sequence: int = 0
    """Highest sequence ever accepted; it never falls."""
    accepted: str | None = None
    """The release that had it."""
    current: str | None = None
    """The release that runs."""
    previous: str | None = None
    """The release that ran before, kept for a rollback."""
    trial: str | None = None
    """The release whose probe has begun."""
    attempts: int = 0
    """Probes of ``trial`` begun so far."""
    bad: str | None = None
    """``accepted``, if it failed its probe or was rolled back: it is not tried again."""


class Action(Enum):
    """What to do about the release that the registry offers."""

    KEEP = "kept"
    """It runs already."""
    HOLD = "held"
    """It is known to be bad: wait for a newer one."""
    INSTALL = "installed"
    GIVE_UP = "given up"
    """Its probe has killed the agent too often."""


def decide(state: State, release: Release, channel: str) -> Action:
    """Say what to do about a release whose signature holds.

    Raises:
        VerificationError: No device in this state may act on it: it is for another channel, older
            than what was accepted, or another release under the same sequence number.
    """
    if release.channel != channel:
        raise VerificationError(f"{release} is refused: this device follows channel {channel!r}")
    if release.sequence < state.sequence:
        raise VerificationError(
            f"{release} is refused: it is older than release {state.sequence}, accepted before; "
            "to go back, publish the older build under a higher sequence"
        )
    if release.sequence == state.sequence and release.digest != state.accepted:
        raise VerificationError(
            f"{release} is refused: another release {state.sequence} was accepted before; "
            "publish it under a higher sequence"
        )
    if release.digest == state.current:
        return Action.KEEP
    if release.digest == state.bad:
        return Action.HOLD
    if release.digest == state.trial and state.attempts >= MAX_ATTEMPTS:
        return Action.GIVE_UP
    return Action.INSTALL


def accept(state: State, release: Release) -> State:
    """Remember the newest release seen, so that nothing older is believed again."""
    if release.digest == state.accepted:
        return state
    return replace(
        state,
        sequence=release.sequence,
        accepted=release.digest,
        trial=None,
        attempts=0,
        bad=None,
    )


def begin_trial(state: State) -> State:
    """Count a probe before it starts, for it may not return."""
    attempts = state.attempts + 1 if state.trial == state.accepted else 1
    return replace(state, trial=state.accepted, attempts=attempts)


def commit(state: State) -> State:
    """Make the release on trial the current one."""
    return replace(state, current=state.trial, previous=state.current, trial=None, attempts=0)


def reject(state: State) -> State:
    """Hold the accepted release to be bad; the current one stays."""
    return replace(state, trial=None, attempts=0, bad=state.accepted)


def roll_back(state: State) -> State:
    """Return to the previous release; the one left behind is not installed again by itself.

    Raises:
        EdgeError: There is no previous release.
    """
    if state.previous is None:
        raise EdgeError("there is no previous release on this device to go back to")
    bad = state.accepted if state.current == state.accepted else state.bad
    return replace(state, current=state.previous, previous=None, trial=None, attempts=0, bad=bad)


def recover(state: State, whole: Set[str]) -> State:
    """Return a state that names only releases that are whole on disk.

    A current release with missing files gives way to the previous one, and is not held to be bad:
    the next check installs it afresh.
    """
    current = next((one for one in (state.current, state.previous) if one in whole), None)
    previous = state.previous if state.previous in whole and state.previous != current else None
    return replace(state, current=current, previous=previous)


def kept_releases(state: State) -> frozenset[str]:
    """Return the releases whose bytes are still of use, finished or half fetched."""
    wanted = None if state.accepted == state.bad else state.accepted
    return frozenset(one for one in (state.current, state.previous, wanted) if one is not None)
