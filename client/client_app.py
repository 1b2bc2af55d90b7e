"""The ClientApp that a run carries to a site: one message in, one update out.

Nothing heavy is imported at the top: a stock SuperNode starts a process for every message. Where
Flower keeps the process (simulation), the model stays loaded between messages.

What a reply may hold: the update, a count, a mean loss, seconds. Errors carry our own sentences,
which never quote a record; of any other exception only the type leaves the site.
"""

import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp

from client.settings import TrainingSettings
from client.site import Site, find_site
from client.site_state import SiteState
from federation.adapter import Adapter, read_from_model, train_only, write_into_model
from federation.base_model import ModelError, model_digest
from federation.errors import FedgeError
from federation.header import DTYPES, FACTORS, holds_changes
from federation.server_app import ADAPTER, RESULT, ROUND, SIMULATION, SITE, TRAINING
from federation.wire import (
    REFERENCE_MISSING,
    MissingReferenceError,
    Update,
    WireError,
    encode,
    open_update,
    reference_of,
)

if TYPE_CHECKING:
    from client.model import ResidentModel

app = ClientApp()

SITE_ERROR = 1001
"""Error code of a reply: the site refused or failed; the reason says which."""


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

    @property
    def leaves_state(self) -> bool:
        """Whether the site must keep something for the rounds that follow."""
        return holds_changes(self.uplink) or holds_changes(self.downlink)


@app.train()  # type: ignore[untyped-decorator]
def train(message: Message, context: Context) -> Message:
    """Train the received adapter on the site's records and send it back."""
    code = SITE_ERROR
    own = [str(context.node_config.get(key, "")) for key in ("data", "base_model", "state")]
    try:
        return _train(message, context)
    except MissingReferenceError as error:
        code, reason = REFERENCE_MISSING, without_directories(str(error), own)
    except FedgeError as error:
        reason = without_directories(str(error), own)
    except Exception as error:
        traceback.print_tb(error.__traceback__, file=sys.stderr)
        reason = f"the site failed with {type(error).__name__}; its own log shows where"
    return Message(Error(code, reason), reply_to=message)


def without_directories(reason: str, own: Sequence[str] = ()) -> str:
    """Return a message with file names but not where they lie: that is the site's own business.

    Args:
        reason: What went wrong.
        own: The paths that the site was given: they may be relative, or hold spaces and quotes, so
            that no pattern could tell where they end.
    """
    for path in map(Path, own):
        for directory in (path.parent, path.absolute().parent):
            if directory.name:
                reason = reason.replace(f"{directory}{os.sep}", f"…{os.sep}")
    return re.sub(r"(?:[A-Za-z]:)?[\\/](?:[^\s\\/:'\"]+[\\/])+", "…/", reason)


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


def _train(message: Message, context: Context) -> Message:
    import numpy as np

    from client import training
    from federation.settings import load_settings

    started = time.perf_counter()
    site = find_site(
        context.node_config,
        message.content.get(SIMULATION, context.run_config),
        node_id=context.node_id,
        environment=os.environ,
    )
    settings = load_settings(
        TrainingSettings, dict(message.content[TRAINING]), "the run's training settings"
    )
    request = read_request(message.content[ROUND])
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "adapter"
        path.write_bytes(message.content[ADAPTER][ADAPTER].numpy().tobytes())
        received = _open_received(path, site, request)
        adapter = received.adapter()
        if site.rank is not None:
            adapter = adapter.first_slices(site.rank)
        model = _resident_model(site.base_model, settings.dtype).laid_out_for(adapter)
        write_into_model(model, adapter)
        train_only(model, request.trains)
        examples, pad_id = _examples(site.base_model, site.data, settings.max_tokens)
        steps = training.train(
            model,
            training.draw_batches(examples, settings, stretch=request.server_round - 1),
            settings,
            pad_id=pad_id,
        )
        trained = read_from_model(model, rank=adapter.rank, alpha=adapter.alpha)
        update = _encode_reply(trained, received, site, request, Path(scratch))
    result = MetricRecord(
        {
            "num-examples": len(examples),
            "train_loss": sum(step.loss for step in steps) / len(steps),
            "seconds": time.perf_counter() - started,
        }
    )
    arrays = ArrayRecord({ADAPTER: Array(np.frombuffer(update, dtype=np.uint8))})
    content = RecordDict({ADAPTER: arrays, RESULT: result, SITE: ConfigRecord({"name": site.name})})
    return Message(content, reply_to=message)


def _open_received(path: Path, site: Site, request: RoundRequest) -> Update:
    """Check what the server sent; a change is opened on the adapter that this site kept.

    Raises:
        MissingReferenceError: The site does not hold what the message is a change of.
        ModelError: The run trains another base model.
    """
    reference = reference_of(path)
    held = SiteState(site.state, request.run).open_adapter(reference) if reference else None
    received = open_update(path, reference=held)
    digest = _digest(site.base_model)
    if received.base_model != digest:
        raise ModelError(
            f"the run trains base model {received.base_model[:16]}…, this site holds "
            f"{digest[:16]}…: install the run's base model"
        )
    return received


def _encode_reply(
    trained: Adapter, received: Update, site: Site, request: RoundRequest, scratch: Path
) -> bytes:
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
            scratch=scratch,
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
def _resident_model(base_model: Path, dtype: str) -> "ResidentModel":
    """Load the base once a process."""
    from client.model import ResidentModel, load_model

    return ResidentModel(load_model(base_model, dtype))


@lru_cache(maxsize=8)
def _examples(base_model: Path, data: Path, max_tokens: int) -> tuple[list[Any], int]:
    """Read, clean and tokenise a site's records once a process."""
    from client.batches import encode_records
    from client.cleaning import clean
    from client.model import load_tokenizer, padding_id
    from client.records import read_records

    tokenizer = load_tokenizer(base_model)
    records = clean(read_records(data)).kept
    return encode_records(records, tokenizer, max_tokens), padding_id(tokenizer)
