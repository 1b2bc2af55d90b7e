"""The ClientApp that a run carries to a site: one message in, one update out.

Nothing heavy is imported at the top: a stock SuperNode starts a process for every message. Where
Flower keeps the process (simulation), the model stays loaded between messages.

What a reply may hold: the update, a count, a mean loss, seconds. Errors carry our own sentences,
which never quote a record; of any other exception only the type leaves the site.
"""

import re
import sys
import time
import traceback
from functools import lru_cache
from pathlib import Path
from typing import Any

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
from federation.adapter import Adapter, read_from_model, write_into_model
from federation.base_model import ModelError, model_digest
from federation.errors import FedgeError
from federation.server_app import ADAPTER, RESULT, ROUND, SITE, TRAINING

app = ClientApp()

SITE_ERROR = 1001
"""Error code of a reply: the site refused or failed; the reason says which."""


@app.train()  # type: ignore[untyped-decorator]
def train(message: Message, context: Context) -> Message:
    """Train the received adapter on the site's records and send it back."""
    try:
        return _train(message, context)
    except FedgeError as error:
        reason = without_directories(str(error))
    except Exception as error:
        traceback.print_tb(error.__traceback__, file=sys.stderr)
        reason = f"the site failed with {type(error).__name__}; its own log shows where"
    return Message(Error(SITE_ERROR, reason), reply_to=message)


def without_directories(reason: str) -> str:
    """Return a message with file names but not where they lie: that is the site's own business."""
    return re.sub(r"(?:[A-Za-z]:)?[\\/](?:[^\s\\/:'\"]+[\\/])+", "…/", reason)


def _train(message: Message, context: Context) -> Message:
    import tempfile

    import numpy as np

    from client import training
    from federation.settings import load_settings
    from federation.wire import encode, open_update

    started = time.perf_counter()
    base_model, data, name = _site(context)
    settings = load_settings(
        TrainingSettings, dict(message.content[TRAINING]), "the run's training settings"
    )
    server_round = int(message.content[ROUND]["server_round"])
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "adapter"
        path.write_bytes(message.content[ADAPTER][ADAPTER].numpy().tobytes())
        received = open_update(path)
        digest = _digest(base_model)
        if received.base_model != digest:
            raise ModelError(
                f"the run trains base model {received.base_model[:16]}…, this site holds "
                f"{digest[:16]}…: install the run's base model"
            )
        adapter = received.adapter()
    model = _resident_model(base_model, settings.dtype, _layout(adapter))
    write_into_model(model, adapter)
    examples, pad_id = _examples(base_model, data, settings.max_tokens)
    steps = training.train(
        model,
        training.draw_batches(examples, settings, stretch=server_round - 1),
        settings,
        pad_id=pad_id,
    )
    trained = read_from_model(model, rank=adapter.rank, alpha=adapter.alpha)
    update = encode(trained, dtype=received.dtype, base_model=digest)
    result = MetricRecord(
        {
            "num-examples": len(examples),
            "train_loss": sum(step.loss for step in steps) / len(steps),
            "seconds": time.perf_counter() - started,
        }
    )
    arrays = ArrayRecord({ADAPTER: Array(np.frombuffer(update, dtype=np.uint8))})
    content = RecordDict({ADAPTER: arrays, RESULT: result, SITE: ConfigRecord({"name": name})})
    return Message(content, reply_to=message)


def _site(context: Context) -> tuple[Path, Path, str]:
    """Return base model, training data and name of this site.

    A real site says all three itself (`flower-supernode --node-config 'base_model="…" data="…"
    name="…"'`), and its name only if it wants to. In simulation the run names a directory with one
    folder a site, taken in the order of their names.
    """
    node, run = context.node_config, context.run_config
    if "partition-id" not in node:
        # On a real site nothing that the run says may name a file.
        if missing := [key for key in ("data", "base_model") if not node.get(key)]:
            raise ModelError(
                f"this site does not say its {missing[0]}: start its SuperNode with --node-config "
                '\'data="FILE.jsonl" base_model="DIRECTORY"\''
            )
        return Path(str(node["base_model"])), Path(str(node["data"])), str(node.get("name", ""))
    root = Path(str(run.get("simulated_sites", "")))
    if not str(run.get("simulated_sites", "")) or not root.is_dir():
        raise ModelError(
            f"simulated_sites is {run.get('simulated_sites', '')!r}: a simulation needs a "
            "directory with one folder a site, each with train.jsonl"
        )
    folders = sorted(path for path in root.iterdir() if (path / "train.jsonl").is_file())
    index = int(node["partition-id"])
    if index >= len(folders):
        raise ModelError(
            f"{root} holds {len(folders)} sites, the simulation has one more: pass "
            f"--federation-config 'num-supernodes={len(folders)}'"
        )
    folder = folders[index]
    return Path(str(run["base_model"])), folder / "train.jsonl", folder.name


def _layout(adapter: Adapter) -> tuple[Any, ...]:
    return (adapter.rank, adapter.alpha, tuple(adapter.target_modules))


@lru_cache(maxsize=1)
def _digest(base_model: Path) -> str:
    return model_digest(base_model)


@lru_cache(maxsize=1)
def _resident_model(base_model: Path, dtype: str, layout: tuple[Any, ...]) -> Any:
    """Load the base with an empty adapter of this layout once a process."""
    from client.model import load_model, new_adapter

    rank, alpha, target_modules = layout
    return new_adapter(
        load_model(base_model, dtype), rank=rank, alpha=alpha, target_modules=target_modules
    )


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
