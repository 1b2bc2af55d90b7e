"""A device from its settings: one agent, its polling loop, and the check of what it installed."""

import os
import random
import select
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge.agent import Agent, Outcome, release_of
from edge.errors import EdgeError, UserError, VerificationError
from edge.keys import read_public_key
from edge.registry import Layout
from edge.release import Release
from edge.settings import DeviceSettings, read_device_settings
from edge.verification import Problem, Walk, verify


def open_agent(config: Path, on_step: Callable[[str], None]) -> tuple[DeviceSettings, Agent]:
    """Return a device's settings and its agent, as device.toml describes them.

    Raises:
        UserError: The settings or a public key cannot be used.
    """
    settings = read_device_settings(config)
    agent = Agent(
        device_dir=settings.device_dir,
        source=Layout(settings.registry),
        tag=settings.tag,
        channel=settings.channel,
        public_keys=tuple(read_public_key(path) for path in settings.public_keys),
        on_step=on_step,
    )
    return settings, agent


def poll(
    check: Callable[[], Outcome],
    on_outcome: Callable[[Outcome], None],
    on_error: Callable[[EdgeError], None],
    wait: Callable[[float], bool],
    interval_s: float,
    jitter: Callable[[], float],
) -> None:
    """Check again and again until ``wait`` is told to stop.

    Args:
        check: One check.
        on_outcome: Takes what each check came to.
        on_error: Takes a check's error; the next check comes all the same.
        wait: Waits that many seconds; True when the agent should stop instead.
        interval_s: Mean seconds between checks.
        jitter: Uniform in [0, 1): spreads a fleet's checks over 0.8 to 1.2 intervals.
    """
    is_stopped = False
    while not is_stopped:
        try:
            on_outcome(check())
        except EdgeError as error:
            on_error(error)
        is_stopped = wait(interval_s * (0.8 + 0.4 * jitter()))


def poll_until_terminated(
    check: Callable[[], Outcome],
    on_outcome: Callable[[Outcome], None],
    on_error: Callable[[EdgeError], None],
    interval_s: float,
) -> None:
    """Poll until SIGTERM; a check that has begun is finished first.

    The signal only writes to a pipe that the wait reads, so it cannot come at a wrong moment.
    Whoever is too impatient for the last check may send SIGKILL: the agent survives that too.
    """
    reader, writer = os.pipe()
    before = signal.signal(signal.SIGTERM, lambda *_: os.write(writer, b"."))
    try:
        poll(
            check,
            on_outcome,
            on_error,
            wait=lambda seconds: bool(select.select([reader], [], [], seconds)[0]),
            interval_s=interval_s,
            jitter=random.random,
        )
    finally:
        signal.signal(signal.SIGTERM, before)
        os.close(reader)
        os.close(writer)


def verify_installed(
    path: Path, sources: Sequence[Path], public_keys: Sequence[Ed25519PublicKey]
) -> tuple[Walk, Release | None]:
    """Verify an artefact's lineage and, on a device, that it is the one a release signed.

    Returns:
        The walk, and the release where ``path`` is an installed build.

    Raises:
        UserError: There is no lineage there, or keys are given and no release to check.
    """
    try:
        release = release_of(path, public_keys)
    except VerificationError as error:
        walk = verify(path, sources)
        walk.problems.append(Problem(str(path), "release.dsse", f"does not hold: {error}"))
        return walk, None
    if release is None and public_keys:
        raise UserError(f"{path} has no signed release beside it: --key is for a device's build")
    return verify(path, sources, release.lineage if release else None), release
