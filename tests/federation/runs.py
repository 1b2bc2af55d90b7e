"""What tests of whole runs share: three named sites, and what a run left behind."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from federation.adapter import LowRank
from federation.events import (
    Event,
    read_events,
)
from federation.rounds import run_rounds
from federation.settings import FederationSettings
from tests.simulated import (
    SimulatedSites,
    Ticks,
    drift,
)

Settings = Callable[..., FederationSettings]
"""Makes settings: keyword arguments change the default run of three sites."""


def named_sites(scratch: Path, names: str = "abc", order: str = "") -> SimulatedSites:
    scratch.mkdir(parents=True, exist_ok=True)
    return SimulatedSites(scratch, {n: drift(ord(n) - 97) for n in names}, order=order)


def run(sites: SimulatedSites, settings: FederationSettings) -> Path:
    clock = Ticks()
    return run_rounds(sites, settings, clock=clock, sleep=clock.sleep)


def events(settings: FederationSettings, kind: type[Event] = Event) -> list[Event]:
    log = Path(settings.out) / "events.jsonl"
    return [event for _, event in read_events(log) if isinstance(event, kind)]


def weights_of(directory: Path) -> bytes:
    return (directory / "adapter_model.safetensors").read_bytes()


def dense(factors: LowRank) -> np.ndarray:
    return (factors.b_OR.double() @ factors.a_RI.double()).numpy()
