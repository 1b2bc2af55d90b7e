"""The sites of a federation as the rounds see them: what they are asked and what they answer.

`grid_sites` implements `Sites` with a Flower grid, the tests in memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from federation.metrics import METRICS


@dataclass(frozen=True)
class Request:
    """What a site gets each round."""

    server_round: int
    message: Path
    """The adapter, or its change, on disk: in the format of federation.wire."""
    training: Mapping[str, object]
    """client.settings.TrainingSettings."""
    uplink: str = "float32"
    """In what dtype the update is to come."""
    downlink: str = "float32"
    """In what dtype adapters are sent: with int8 and int4 a site keeps the last one."""
    trains: str = "AB"
    """The factors to train and to send."""
    run: str = ""
    """Id of the run, the same after a resume: a site keeps what it owes a run under it."""
    aggregation: str = "products"
    """What becomes of the updates: a site's policy may ask."""
    num_rounds: int = 0
    """Of the whole run; 0 = not said."""
    cohort: int = 0
    """Fewest updates in the average: the quorum; 0 = not said."""
    metrics: tuple[str, ...] = METRICS
    """Names of the numbers that are wanted beside the update."""
    secure_sum: Mapping[str, int | float] | None = None
    """The terms of a secure sum (client.request.SecureSumTerms), of which this asks a stage."""
    stage: str = ""
    """federation.secure_messages.Stage. In all but the first ``message`` is what that module says,
    not an adapter."""
    attempt: int = 0
    """At the round's secure sum, from 1 on."""
    description: str = ""
    """Of the run, as its owner signed it (federation.run_signature); empty = not signed."""
    signature: str = ""
    """Of ``description``."""
    max_reply_bytes: int = 1 << 62
    """A longer update is refused, where it can be before it is in memory."""
    simulation: Mapping[str, str] | None = None
    """In simulation only: where the base model and the sites' folders are."""


@dataclass(frozen=True)
class Reply:
    """What a site sends back: an update, or the reason why there is none."""

    site: str
    server_round: int
    """Of the request that it answers."""
    stage: str = ""
    """Of the request that it answers, like ``attempt``."""
    attempt: int = 0
    update: bytes | memoryview | None = None
    """In a secure sum what the site says in this stage."""
    error: str | None = None
    lacks_reference: bool = False
    """The error is that the site does not hold the adapter that a change stands on."""
    name: str = ""
    """What the site calls itself, for people; ``site`` is who it is."""
    num_examples: int | None = None
    """None, as below: the site does not say it."""
    train_loss: float | None = None
    seconds: float | None = None


class Sites(Protocol):
    """The sites of a federation."""

    def wait_for(self, count: int, timeout_s: float) -> list[str]:
        """Return the sites once there are ``count`` of them, or those there are at the timeout."""
        ...

    def send(self, sites: Sequence[str], request: Request) -> None:
        """Send the same request to every site.

        A request of a secure sum ends the wait for replies to other stages and attempts.
        """
        ...

    def receive(self) -> Reply | None:
        """Return one reply to any request so far, or None when none has arrived yet."""
        ...
