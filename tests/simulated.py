"""Sites in memory: they implement the product's own interface, and faults are one-liners."""

from collections.abc import Callable, Sequence
from pathlib import Path

from federation.adapter import Adapter, LowRank
from federation.rounds import Reply, Request
from federation.wire import encode, open_update


class SimulatedSites:
    """Sites whose training is a function of the adapter: ``moves[name](adapter) -> adapter``."""

    def __init__(
        self,
        scratch: Path,
        moves: dict[str, Callable[[Adapter], Adapter]],
        *,
        order: Sequence[str] | None = None,
    ) -> None:
        self.scratch = scratch
        self.moves = moves
        self.order = list(order or moves)
        self.num_examples = {name: 10 * (index + 1) for index, name in enumerate(moves)}
        self.replies: list[Reply] = []
        self.requests: list[Request] = []
        self.spoil: dict[str, Callable[[Reply], Reply | None]] = {}

    def wait_for(self, count: int, timeout_s: float) -> list[str]:
        return list(self.moves)

    def send(self, sites: Sequence[str], request: Request) -> None:
        self.requests.append(request)
        path = self.scratch / "received"
        path.write_bytes(request.adapter)
        update = open_update(path)
        for name in self.order:
            moved = self.moves[name](update.adapter())
            reply = Reply(
                name,
                encode(moved, dtype="float32", base_model=update.base_model),
                None,
                num_examples=self.num_examples[name],
                train_loss=2.0,
                seconds=0.1,
            )
            spoiled = self.spoil.get(name, lambda reply: reply)(reply)
            if spoiled is not None:
                self.replies.append(spoiled)

    def receive(self) -> Reply | None:
        return self.replies.pop(0) if self.replies else None


def drift(seed: int) -> Callable[[Adapter], Adapter]:
    """Return a site that moves both factors by its own seeded noise."""
    import torch

    def move(adapter: Adapter) -> Adapter:
        generator = torch.Generator().manual_seed(seed)
        return Adapter(
            adapter.rank,
            adapter.alpha,
            {
                name: LowRank(
                    f.b_OR + 0.01 * torch.randn(f.b_OR.shape, generator=generator),
                    f.a_RI + 0.01 * torch.randn(f.a_RI.shape, generator=generator),
                )
                for name, f in adapter.modules.items()
            },
        )

    return move


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
        self._replies: dict[str, object] = {}

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def push_messages(self, messages: Sequence[object]) -> list[str]:
        from client.client_app import app

        ids = []
        for message in messages:
            number = f"message-{len(self._replies)}-{len(ids)}"
            message.metadata.__dict__["_message_id"] = number  # as a SuperLink would
            ids.append(message.metadata.message_id)
            context = self.contexts[message.metadata.dst_node_id]
            self._replies[ids[-1]] = app(message, context)
        return ids

    def pull_messages(self, message_ids: Sequence[str]) -> list[object]:
        return [self._replies.pop(name) for name in message_ids if name in self._replies]
