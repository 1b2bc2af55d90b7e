"""Sites in memory: they implement the product's own interfaces, and faults are one-liners.

`SimulatedSites` stands where the rounds expect `Sites`; a site's training is a function of the
adapter, and a faulty site is one more value in a dict:

    sites.faults["c"] = drop                      never answers
    sites.faults["c"] = in_rounds({2}, crash)     fails in round 2 only

`LocalGrid` stands where Flower has its grid, with the real ClientApp behind it; `spoil` changes
what its pull brings.
"""

import dataclasses
import hashlib
import json
import struct
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from federation.adapter import Adapter, LowRank
from federation.sites import Reply, Request
from federation.wire import Factors, Update, encode, open_update

Move = Callable[[Adapter], Adapter]
Fault = Callable[[Reply], list[tuple[int, Reply]]]
"""What becomes of a reply: what arrives, and after how many more requests to any site."""


def drop(_: Reply) -> list[tuple[int, Reply]]:
    """Lose the reply."""
    return []


def delay(rounds: int) -> Fault:
    """Bring the reply so many requests later."""
    return lambda reply: [(rounds, reply)]


def duplicate(reply: Reply) -> list[tuple[int, Reply]]:
    """Bring the reply twice."""
    return [(0, reply), (0, reply)]


def crash(reply: Reply) -> list[tuple[int, Reply]]:
    """Bring the error of a site whose process died, as Flower reports it."""
    reason = "error 8: ClientApp stopped responding."
    return [(0, Reply(reply.site, reply.server_round, error=reason))]


def corrupt(reply: Reply) -> list[tuple[int, Reply]]:
    """Flip a bit in the middle of the update."""
    spoiled = bytearray(reply.update)
    spoiled[len(spoiled) // 2] ^= 1
    return [(0, dataclasses.replace(reply, update=bytes(spoiled)))]


def truncate(reply: Reply) -> list[tuple[int, Reply]]:
    """Cut the update off."""
    return [(0, dataclasses.replace(reply, update=reply.update[: len(reply.update) // 2]))]


def say(**changes: object) -> Fault:
    """Bring the reply with other numbers beside the update."""
    return lambda reply: [(0, dataclasses.replace(reply, **changes))]


def forge(change: Callable[[dict[str, object], bytearray], None]) -> Fault:
    """Change header and tensors of the update and make its checksum right again."""

    def fault(reply: Reply) -> list[tuple[int, Reply]]:
        message = bytes(reply.update)
        length = struct.unpack_from("<I", message, 6)[0]
        header, tensors = json.loads(message[10 : 10 + length]), bytearray(message[10 + length :])
        del tensors[-32:]
        change(header, tensors)
        raw = json.dumps(header).encode()
        body = message[:6] + struct.pack("<I", len(raw)) + raw + bytes(tensors)
        forged = body + hashlib.sha256(body).digest()
        return [(0, dataclasses.replace(reply, update=forged))]

    return fault


def in_rounds(rounds: Collection[int], fault: Fault) -> Fault:
    """Let a fault happen in some rounds only."""
    return lambda reply: fault(reply) if reply.server_round in rounds else [(0, reply)]


def once(fault: Fault) -> Fault:
    """Let a fault happen to the first reply only."""
    faults = iter([fault])

    def first(reply: Reply) -> list[tuple[int, Reply]]:
        return next(faults, lambda r: [(0, r)])(reply)

    return first


class SimulatedSites:
    """Sites whose training is a function of the adapter: ``moves[name](adapter) -> adapter``."""

    def __init__(self, scratch: Path, moves: dict[str, Move], *, order: str = "") -> None:
        """Answer in the order of the names in ``order``, or of ``moves``."""
        self.scratch = scratch
        self.moves = moves
        self.faults: dict[str, Fault] = {}
        self.ranks: dict[str, int] = {}
        self.order = list(order or moves)
        self.num_examples = {name: 10 * (index + 1) for index, name in enumerate(moves)}
        self.requests: list[tuple[list[str], Request]] = []
        self._arrivals: list[tuple[int, Reply]] = []
        self._held: dict[str, Update] = {}

    def wait_for(self, count: int, timeout_s: float) -> list[str]:
        """Return every site."""
        return list(self.moves)

    def send(self, sites: Sequence[str], request: Request) -> None:
        """Let each site answer; what it sends arrives in `receive`."""
        self.requests.append((list(sites), request))
        self._arrivals = [(wait - 1, reply) for wait, reply in self._arrivals]
        for name in [name for name in self.order if name in sites]:
            reply = self._answer(name, request)
            self._arrivals += self.faults.get(name, lambda r: [(0, r)])(reply)

    def receive(self) -> Reply | None:
        """Return the first reply whose time has come."""
        for index, (wait, reply) in enumerate(self._arrivals):
            if wait <= 0:
                del self._arrivals[index]
                return reply
        return None

    def _answer(self, name: str, request: Request) -> Reply:
        from federation.wire import REFERENCE_MISSING, MissingReferenceError, write_message

        path = self.scratch / f"{name}-{request.server_round}-{len(self.requests)}"
        path.write_bytes(request.message.read_bytes())
        try:
            received = open_update(path, reference=self._held.get(name))
        except MissingReferenceError as error:
            return Reply(
                name,
                request.server_round,
                error=f"error {REFERENCE_MISSING}: {error}",
                lacks_reference=True,
            )
        held = path.with_suffix(".held")
        write_message(held, received, dtype="float32", base_model=received.base_model)
        self._held[name] = open_update(held)
        adapter = received.adapter().first_slices(self.ranks.get(name, received.rank))
        return Reply(
            name,
            request.server_round,
            update=encoded(self.moves[name](adapter), request, self._held[name]),
            num_examples=self.num_examples[name],
            train_loss=2.0,
            seconds=0.1,
        )


def encoded(adapter: Adapter, request: Request, reference: Factors) -> bytes:
    """Return a trained adapter as the request wants it."""
    return encode(
        adapter,
        dtype=request.uplink,
        base_model=reference.base_model,
        reference=reference,
        factors=request.trains,
    )


def moved(adapter: Adapter, change: Callable[[LowRank], LowRank]) -> Adapter:
    """Return an adapter with every module changed."""
    modules = {name: change(factors) for name, factors in adapter.modules.items()}
    return Adapter(adapter.rank, adapter.alpha, modules)


def drift(seed: int, size: float = 0.01) -> Move:
    """Return a site that moves both factors by its own noise, the same in every round."""
    import torch

    def move(adapter: Adapter) -> Adapter:
        generator = torch.Generator().manual_seed(seed)
        return moved(
            adapter,
            lambda f: LowRank(
                f.b_OR + size * torch.randn(f.b_OR.shape, generator=generator),
                f.a_RI + size * torch.randn(f.a_RI.shape, generator=generator),
            ),
        )

    return move


class Ticks:
    """A clock on which every look costs a moment, and waiting what it should, without waiting."""

    def __init__(self, moment: float = 1e-3) -> None:
        """Start at 0."""
        self.now = 0.0
        self._moment = moment

    def __call__(self) -> float:
        """Return the time."""
        self.now += self._moment
        return self.now

    def sleep(self, seconds: float) -> None:
        """Move on."""
        self.now += seconds


class LocalGrid:
    """Flower's grid in this process: a message pushed is answered by the real ClientApp.

    Args:
        node_configs: One a site, as `flower-supernode --node-config` would give it.
        run_config: As `flwr run -c` would give it.
    """

    def __init__(
        self, node_configs: Sequence[dict[str, object]], run_config: dict[str, object]
    ) -> None:
        from flwr.app import Context, RecordDict
        from flwr.supercore.task_identity import TaskIdentity

        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.contexts = {
            100 + index: Context(1, 100 + index, dict(config), RecordDict(), dict(run_config))
            for index, config in enumerate(node_configs)
        }
        self.server_context = Context(1, 1, {}, RecordDict(), dict(run_config))
        self.spoil: Callable[[object], list[object]] = lambda message: [message]
        """What becomes of a message that is pulled: [] drops it, two are a duplicate."""
        self.answer = _answer_of_the_app
        """What a site makes of a message and its context."""
        self._replies: dict[str, object] = {}
        self._count = 0

    def get_node_ids(self) -> list[int]:
        """Return every site."""
        return list(self.contexts)

    def push_messages(self, messages: Sequence[object]) -> list[str]:
        """Answer each message at once."""
        ids = []
        for message in messages:
            self._count += 1
            message.metadata.__dict__["_message_id"] = f"message-{self._count}"  # as a SuperLink
            ids.append(message.metadata.message_id)
            context = self.contexts[message.metadata.dst_node_id]
            self._replies[ids[-1]] = self.answer(message, context)
        return ids

    def pull_messages(self, message_ids: Sequence[str]) -> list[object]:
        """Return the answers to some messages."""
        found = [self._replies.pop(name) for name in message_ids if name in self._replies]
        return [arrived for message in found for arrived in self.spoil(message)]


def _answer_of_the_app(message: Any, context: Any) -> Any:
    from client.client_app import app

    return app(message, context)
