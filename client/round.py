"""A site's answer to one round: from the message that came to the update that goes.

Who carries the two is somebody else's business: `client_app` has a Flower message around them, a
benchmark calls `answer_round` itself. The base, its digest and the tokenised records stay in memory
for the next round of the same process. Nothing heavy is imported at the top.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.settings import TrainingSettings
from client.site import Site
from client.site_state import SiteState
from federation.accountant import PrivacyEvent
from federation.adapter import Adapter, read_from_model, train_only, write_into_model
from federation.base_model import ModelError, model_digest
from federation.header import DTYPES, FACTORS, LARGEST_WEIGHT, holds_changes
from federation.metrics import METRICS
from federation.wire import Update, WireError, encode, is_within, open_update, reference_of

Begun = Callable[[PrivacyEvent | None], None]
"""Told what the training is about to spend, before its first draw; it may raise."""


if TYPE_CHECKING:
    from client.batches import Example
    from client.model import ResidentModel
    from client.records import Record


@dataclass(frozen=True)
class RoundRequest:
    """What a round asks of a site, beside the adapter and the training settings."""

    server_round: int
    uplink: str = "float32"
    """Number format of the update."""
    downlink: str = "float32"
    """Number format of the adapters that are sent: says whether the next may be a change."""
    trains: str = "AB"
    """Factors that learn; the others are frozen and not sent back."""
    run: str = ""
    """Random id of the run, in hex."""
    metrics: tuple[str, ...] = METRICS
    """Names of the numbers that are wanted beside the update."""

    @property
    def leaves_state(self) -> bool:
        """Whether the site must keep something for the rounds that follow."""
        return holds_changes(self.uplink) or holds_changes(self.downlink)


@dataclass(frozen=True)
class Answer:
    """What leaves the site."""

    update: bytes
    num_examples: int
    """Records that the site trains on: what its update weighs."""
    train_loss: float
    """Mean over the round's steps, nats."""
    training_s: float = 0.0
    """Seconds of the training alone, without what is read, written and encoded around it."""
    event: PrivacyEvent | None = None
    """What the training spent of the records' privacy; None = it was not private."""


def read_request(record: Mapping[str, Any]) -> RoundRequest:
    """Return a round's request; what it does not say has the value it had before it could.

    Raises:
        WireError: A value that this version does not know.
    """
    request = RoundRequest(
        server_round=int(record["server_round"]),
        **{
            key: str(record[key])
            for key in ("uplink", "downlink", "trains", "run")
            if key in record
        },
        metrics=tuple(str(name) for name in record.get("metrics", METRICS)),
    )
    for key, value, known in (
        ("uplink", request.uplink, DTYPES),
        ("downlink", request.downlink, DTYPES),
        ("trains", request.trains, FACTORS),
    ):
        if value not in known:
            raise WireError(
                f"the round's {key} is {value[:80]!r}, this site knows {', '.join(known)}: "
                "install the same version of fedge on both sides"
            )
    return request


def answer_round(
    message: Path,
    site: Site,
    settings: TrainingSettings,
    request: RoundRequest,
    *,
    key: bytes | None = None,
) -> Answer:
    """Train the adapter of a message on the site's records: `open_received`, `answer_received`."""
    received = open_received(message, site, request)
    return answer_received(received, site, settings, request, key=key)


def answer_received(
    received: Update,
    site: Site,
    settings: TrainingSettings,
    request: RoundRequest,
    *,
    key: bytes | None = None,
    begun: Begun = lambda _: None,
) -> Answer:
    """Train an adapter that was received on the site's records.

    What the next round needs is on the site's disk when this returns.

    Args:
        received: The adapter that the message brought.
        site: Whose records, model and state.
        settings: Of the training.
        request: What else the round asks.
        key: See `client.privacy.train_privately`; for tests.
        begun: Called before the training's first draw: what fails after it may tell of the draw.

    Raises:
        FedgeError: Model, data or state are not what they have to be, or the training went astray.
    """
    trained, answer = train_received(received, site, settings, request, key=key, begun=begun)
    update = _encode_reply(trained, received, site, request)
    return replace(answer, update=update)


def train_received(
    received: Update,
    site: Site,
    settings: TrainingSettings,
    request: RoundRequest,
    *,
    key: bytes | None = None,
    begun: Begun = lambda _: None,
) -> tuple[Adapter, Answer]:
    """Return the adapter as the site's records made it, and an answer that has no update yet.

    Arguments and errors as `answer_received`; nothing is written.
    """
    from client.privacy import privacy_event, train_records

    adapter = received.adapter()
    _refuse_large_weights(adapter)
    if site.rank is not None:
        adapter = adapter.first_slices(site.rank)
    model = resident_model(site.base_model, settings.dtype).laid_out_for(adapter)
    write_into_model(model, adapter)
    train_only(model, request.trains)
    is_private = settings.noise_multiplier > 0
    examples, pad_id = _examples(site.base_model, site.data, settings.max_tokens, is_private)
    begun(privacy_event(settings, len(examples)))
    started = time.perf_counter()
    done = train_records(
        model, examples, settings, pad_id=pad_id, stretch=request.server_round - 1, key=key
    )
    training_s = time.perf_counter() - started
    trained = read_from_model(model, rank=adapter.rank, alpha=adapter.alpha)
    train_loss = sum(step.loss for step in done.steps) / len(done.steps)
    return trained, Answer(b"", len(examples), train_loss, training_s, done.event)


def _refuse_large_weights(adapter: Adapter) -> None:
    """Refuse an adapter whose numbers are no weights of a model.

    Raises:
        WireError: The module and the limit are named, before anything is trained.
    """
    for name, factors in adapter.modules.items():
        if not all(is_within(f, LARGEST_WEIGHT) for f in (factors.b_OR, factors.a_RI)):
            largest = max(float(factors.b_OR.abs().max()), float(factors.a_RI.abs().max()))
            raise WireError(
                f"the adapter's {name} holds {largest:g}: a site trains weights of at most "
                f"{LARGEST_WEIGHT:g}; begin again from an adapter that did not diverge"
            )


def open_received(path: Path, site: Site, request: RoundRequest) -> Update:
    """Check what the server sent; a change is opened on the adapter that this site kept.

    Raises:
        MissingReferenceError: The site does not hold what the message is a change of.
        ModelError: The run trains another base model.
    """
    reference = reference_of(path)
    held = SiteState(site.state, request.run).open_adapter(reference) if reference else None
    received = open_update(path, reference=held, keeps=request.leaves_state)
    digest = _digest(site.base_model)
    if received.base_model != digest:
        raise ModelError(
            f"the run trains base model {received.base_model[:16]}…, this site holds "
            f"{digest[:16]}…: install the run's base model"
        )
    return received


def _encode_reply(trained: Adapter, received: Update, site: Site, request: RoundRequest) -> bytes:
    """Return the update as the round wants it; what the next round needs is on disk then."""
    state = SiteState(site.state, request.run) if request.leaves_state else None
    residual = None
    if state is not None and holds_changes(request.uplink):
        from client.feedback import encode_with_feedback

        update, residual = encode_with_feedback(
            trained,
            state.residual(request.server_round, received, trained),
            received,
            dtype=request.uplink,
            factors=request.trains,
        )
    else:
        update = encode(
            trained,
            dtype=request.uplink,
            base_model=received.base_model,
            reference=received,
            factors=request.trains,
        )
    if state is not None:
        state.keep(
            request.server_round,
            received,
            residual=residual,
            is_reference=holds_changes(request.downlink),
        )
    return update


@lru_cache(maxsize=1)
def _digest(base_model: Path) -> str:
    return model_digest(base_model)


@lru_cache(maxsize=1)
def resident_model(base_model: Path, dtype: str) -> ResidentModel:
    """Load the base once a process."""
    from client.model import ResidentModel, load_model

    gc.unfreeze()  # another base may have been kept out of the collector's sight: it goes now
    return ResidentModel(load_model(base_model, dtype))


def num_model_loads() -> int:
    """Return how often this process loaded a base."""
    return resident_model.cache_info().misses


def settle() -> None:
    """Take what a process keeps between rounds out of the garbage collector's sight, once.

    transformers' Trainer collects garbage whenever it begins, and looking through all that torch
    and transformers brought took 0.25 s a round (2 cores, 2026-11-24).
    """
    if num_model_loads() and not gc.get_freeze_count():
        gc.collect()
        gc.freeze()


@lru_cache(maxsize=8)
def _examples(
    base_model: Path, data: Path, max_tokens: int, is_private: bool
) -> tuple[list[Example], int]:
    """Tokenise a site's records once a process; for private training every one of them."""
    from client.batches import encode_records
    from client.model import load_tokenizer, padding_id

    tokenizer = load_tokenizer(base_model)
    records = site_records(data)
    examples = encode_records(records, tokenizer, max_tokens, keeps_all=is_private)
    return examples, padding_id(tokenizer)


@lru_cache(maxsize=8)
def site_records(data: Path) -> list[Record]:
    """Read and clean a site's records once a process: what is trained on is what is charged."""
    from client.cleaning import clean
    from client.records import read_records

    return clean(read_records(data)).kept
