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
