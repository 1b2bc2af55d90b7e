"""Sites in memory with real trainers, policies and ledgers on disk, for rounds that are sums.

sites.silent["c"] = Stage.MASK              does not answer from that stage on
sites.spoil["c", Stage.SHARE] = flip        what arrives of it is changed
sites.restarts = {Stage.AGREE}              every trainer is started anew before that stage
sites.before[Stage.REVEAL] = action         something happens before that stage is asked
"""

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.fingerprint import fingerprint, read_secret
from client.gate import SiteGate
from client.identity import public_identity
from client.ledger import LEDGER, Ledger
from client.policy import Policy
from client.policy_file import PolicyFile
from client.round import site_records
from client.site import Site
from client.trainer import Reply as Answer
from client.trainer import Trainer
from client.trainer_link import request_head
from federation.secure_messages import Stage
from federation.sites import Reply, Request
from tests.client.policy_example import changed
from tests.conftest import write_records
from tests.policies import policy_tree

NUM_RECORDS = 12
STAGES = list(Stage)
LIMITS = policy_tree(
    training__max_batch=64,
    training__max_tokens=512,
    traffic__uplink=["float32"],
    aggregation__kinds=["alternating", "factors"],
    privacy__required=False,
    metrics__allowed=["seconds", "train_loss"],
    metrics__digits=15,
)
"""A policy under which only secure sums are answered."""


class Institution:
    """One site: its disk, and a trainer that may be started anew at any time."""

    def __init__(self, base_model: Path, directory: Path, index: int, num_records: int) -> None:
        name = directory.name
        data = write_records(directory / "data.jsonl", num_records, topic=name, start=100 * index)
        self.site = Site(base_model, data, name, directory / "state", None)
        self.site.state.mkdir(exist_ok=True)
        self.identity = Ed25519PrivateKey.from_private_bytes(bytes([index + 1]) * 32)
        self.policy = Policy()
        self.policy_file: PolicyFile | None = None
        """Is read anew while the trainer lives, in place of ``policy``."""
        self.said: list[tuple[str, dict[str, Any]]] = []
        self._open = ExitStack()
        self._trainer: Trainer | None = None

    def say(self, event: str, **values: Any) -> None:
        self.said.append((event, values))

    def stop(self) -> None:
        self._open.close()
        self._trainer = None

    def answer(self, head: bytes, message: bytes) -> Answer:
        if self._trainer is None:
            data_set = fingerprint(site_records(self.site.data), read_secret(self.site.state))
            ledger = Ledger.open(self.site.state / LEDGER)
            now = datetime(2026, 11, 24, 12, tzinfo=UTC)
            gate = SiteGate(
                self.policy_file or self.policy,
                ledger,
                data_set,
                say=self.say,
                now=lambda: now,
                identity=self.identity,
            )
            self._trainer = Trainer(self.site, self._open.enter_context(gate), self.say)
        scratch = Path(tempfile.mkdtemp(dir=self.site.state))
        (scratch / "message").write_bytes(message)
        return self._trainer.answer(head, scratch / "message", scratch)

    def count(self, event: str) -> int:
        return sum(name == event for name, _ in self.said)


class SecureSites:
    """The sites of a federation, as the rounds see them."""

    def __init__(
        self,
        base_model: Path,
        directory: Path,
        names: str = "abcd",
        num_records: Sequence[int] = (),
        **limits: Any,
    ) -> None:
        counts = [*num_records, *[NUM_RECORDS] * (len(names) - len(num_records))]
        self.institutions = {
            name: Institution(base_model, directory / name, index, counts[index])
            for index, name in enumerate(names)
        }
        cohort = [public_identity(each.identity) for each in self.institutions.values()]
        tree = changed(changed(LIMITS, aggregation__cohort=cohort), **limits)
        for each in self.institutions.values():
            each.policy = Policy.model_validate(tree)
        self.silent: dict[str, Stage] = {}
        self.spoil: dict[tuple[str, Stage], Callable[[bytes], bytes]] = {}
        self.restarts: set[Stage] = set()
        self.before: dict[Stage, Callable[[], None]] = {}
        self.arrived: list[Reply] = []
        """All that the server saw."""
        self.asked: Counter[tuple[int, int, str]] = Counter()
        """How many sites were asked, by round, attempt and stage."""
        self._replies: list[Reply] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for each in self.institutions.values():
            each.stop()

    def wait_for(self, count: int, timeout_s: float) -> list[str]:
        """Return every site."""
        return list(self.institutions)

    def send(self, sites: Sequence[str], request: Request) -> None:
        """Let each site answer; what it sends arrives in `receive`."""
        from federation.grid_sites import round_values

        stage = Stage(request.stage) if request.stage else None
        self.asked[request.server_round, request.attempt, request.stage] += len(sites)
        if stage in self.before:
            self.before[stage]()
        head = json.dumps(request_head(round_values(request), request.training, "c" * 64)).encode()
        for name in sites:
            each, gone = self.institutions[name], self.silent.get(name)
            if stage in self.restarts:
                each.stop()
            if gone is not None and stage is not None and STAGES.index(gone) <= STAGES.index(stage):
                continue
            empty = Reply(name, request.server_round, request.stage, request.attempt)
            self._replies.append(self._reply(each, empty, head, request.message.read_bytes()))

    def late(self, reply: Reply) -> None:
        """Let a reply arrive that nobody asked for now."""
        self._replies.append(reply)

    def receive(self) -> Reply | None:
        """Return the first reply that is there."""
        if not self._replies:
            return None
        self.arrived.append(self._replies.pop(0))
        return self.arrived[-1]

    def _reply(self, each: Institution, empty: Reply, head: bytes, message: bytes) -> Reply:
        answer = each.answer(head, message)
        if answer.update is None:
            error = f"error {answer.head['code']}: {answer.head['reason']}"
            return replace(empty, error=error)
        metrics = answer.head["metrics"]
        spoil = self.spoil.get((empty.site, Stage(empty.stage)), bytes) if empty.stage else bytes
        return replace(
            empty,
            update=spoil(answer.update.read_bytes()),
            name=answer.head["site"],
            num_examples=metrics.get("num-examples"),
            train_loss=metrics.get("train_loss"),
            seconds=metrics.get("seconds"),
        )
