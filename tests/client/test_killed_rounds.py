"""A private round whose trainer dies every time, asked by those who ask it: node and app."""

import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from client import daemon
from client.answers import MAX_BEGUN
from client.child import Child
from client.health import Health, Status
from client.ledger import LEDGER, read_ledger
from client.reasons import SITE_ERROR
from client.site_log import SiteLog
from client.site_settings import SiteSettings, load_site
from client.trainer_link import MAX_LOST, ask_again, request_head
from federation.adapter import initial_adapter
from federation.base_model import model_digest
from federation.grid_sites import ADAPTER, ROUND, TRAINING
from federation.wire import encode
from tests.client.test_daemon import write_site
from tests.client.test_private_rounds import SENTENCE
from tests.client.trainer_kill_matrix import EVENT, HEAD, NUM_RECORDS, RUN
from tests.conftest import write_records
from tests.policies import policy_text

ROOT = Path(__file__).parents[2]
POLICY = policy_text(
    runs__allowed=[RUN],
    traffic__uplink=["int8"],
    aggregation={"kinds": ["products"], "secure_sum_required": False, "min_cohort": 2},
    privacy__max_record_clip_norm=1.0,
    privacy__epsilon=1000.0,
    privacy__delta=1e-3,
    privacy__one_factor_only=False,
)


class Counting:
    """The part of a node that counts the trainers that one message cost."""

    lost = 0

    def note_lost(self, _: object) -> int:
        self.lost += 1
        return self.lost


def test_a_round_is_begun_less_often_than_a_message_may_cost_trainers() -> None:
    # A trainer may also be lost before it began: while it loads the model.
    assert MAX_BEGUN + 2 <= MAX_LOST


@pytest.fixture
def message(tiny_model: Path) -> bytes:
    adapter = initial_adapter(tiny_model, rank=2, alpha=4.0, targets="attention", seed=0)
    return encode(adapter, dtype="float32", base_model=model_digest(tiny_model))


@pytest.fixture
def settings(tiny_model: Path) -> Iterator[SiteSettings]:
    directory = Path(tempfile.mkdtemp(prefix="fedge-"))  # a short path, for the socket
    data = write_records(directory / "data.jsonl", NUM_RECORDS)
    (directory / "policy.toml").write_text(POLICY)
    yield load_site(write_site(directory, base_model=str(tiny_model), data=str(data)))
    shutil.rmtree(directory)


@pytest.fixture
def trainer(settings: SiteSettings) -> Iterator[Child]:
    script = str(Path(__file__).with_name("dying_trainer.py"))
    command = [sys.executable, script, "--config", str(settings.state.parent / "site.toml")]
    child = Child(
        "trainer",
        command,
        patience_s=60,
        say=lambda *_, **__: None,
        environment={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    yield child
    child.end(10)


def charged(settings: SiteSettings) -> list[tuple[str, Any]]:
    return [(row.stage, row.event) for row in read_ledger(settings.state / LEDGER).rows]


@pytest.mark.slow
def test_the_node_asks_until_a_round_that_kills_every_trainer_is_charged(
    settings: SiteSettings, trainer: Child, message: bytes
) -> None:
    settings.memory.mkdir(parents=True)
    health = Health(Status(0), settings.memory / "status.json")
    log = SiteLog("daemon", settings.state.parent / "log")
    life = daemon._Life(settings, log, health, threading.Event())
    training = HEAD["training"]
    asked: Any = SimpleNamespace(
        kind="train",
        configs={ROUND: {**HEAD, "server_round": 1}, TRAINING: training},
        arrays={ADAPTER: memoryview(message)},
        bundle="",
        expires_at=time.time() + 300,
    )
    del asked.configs[ROUND]["training"]
    node: Any = Counting()
    answer = daemon._answer_of(life, node, trainer, asked)
    assert answer is not None
    assert answer.head == {"code": SITE_ERROR, "reason": SENTENCE}
    assert node.lost == MAX_BEGUN
    assert charged(settings) == [("failed", EVENT)]


@pytest.mark.slow
def test_the_app_asks_until_a_round_that_kills_every_trainer_is_charged(
    settings: SiteSettings, trainer: Child, message: bytes
) -> None:
    said = {key: value for key, value in HEAD.items() if key != "training"}
    head = request_head({**said, "server_round": 1}, HEAD["training"], "")
    over = threading.Event()

    def keep_up() -> None:
        while not over.wait(0.1):
            trainer.keep_up()

    thread = threading.Thread(target=keep_up)
    thread.start()
    try:
        answer = ask_again(settings.socket, head, memoryview(message))
    finally:
        over.set()
        thread.join()
    assert answer.head == {"code": SITE_ERROR, "reason": SENTENCE}
    assert charged(settings) == [("failed", EVENT)]
