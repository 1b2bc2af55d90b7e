"""Sites that train for real in this process, one after the other, and one of them may lie.

They stand where the rounds expect `Sites` and answer with `client.round`, so that a benchmark runs
the product's own federation without Flower around it: the base is loaded once a process, and the
same seed gives the same bits. A liar trains as the others do and then sends something else.

Shape letters: O out features, I in features, R rank.
"""

import math
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from client.round import RoundRequest, answer_round
from client.settings import TrainingSettings
from client.site import Site
from federation.adapter import Adapter, LowRank
from federation.errors import FedgeError
from federation.sites import Reply, Request
from federation.wire import MissingReferenceError, encode, open_update

if TYPE_CHECKING:
    from torch import Tensor

Attack = Callable[[Adapter, Adapter, int], Adapter]
"""What a liar makes of the adapter that it was sent and the one that it trained; and a seed."""


class TrainingSites:
    """Sites of a federation that train when their reply is asked for."""

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        num_examples: int | None = None,
        attacks: Mapping[str, Attack] | None = None,
        forgets: bool = False,
        measures_changes: bool = False,
    ) -> None:
        """Know every site by its name; nothing is loaded before the first reply.

        Args:
            sites: All of them, each with a name of its own.
            num_examples: What every site claims; None = the records that it has.
            attacks: What the liars among them do, by name. They send float32, both factors.
            forgets: Every site loses all that it kept after each reply: no error feedback.
            measures_changes: Fill ``change_norms``.
        """
        self._sites = {site.name: site for site in sites}
        self._num_examples = num_examples
        self._attacks = dict(attacks or {})
        self._forgets = forgets
        self._measures_changes = measures_changes
        self._asked: deque[tuple[str, Request]] = deque()
        self.change_norms: dict[str, list[float]] = {name: [] for name in self._sites}
        """Frobenius norm of what each site's update changes in the whole model, one a round."""

    def wait_for(self, count: int, timeout_s: float) -> list[str]:  # noqa: ARG002 - all are here
        """Return every site."""
        return list(self._sites)

    def send(self, sites: Sequence[str], request: Request) -> None:
        """Note whom to let train."""
        self._asked.extend((name, request) for name in sites)

    def receive(self) -> Reply | None:
        """Let the next site train, and return what it sends."""
        return self._answer(*self._asked.popleft()) if self._asked else None

    def _answer(self, name: str, request: Request) -> Reply:
        site, started = self._sites[name], time.perf_counter()
        asked = RoundRequest(
            server_round=request.server_round,
            uplink=request.uplink,
            downlink=request.downlink,
            trains=request.trains,
            run=request.run,
        )
        settings = TrainingSettings.model_validate(dict(request.training))
        with tempfile.TemporaryDirectory() as scratch:
            try:
                answer = answer_round(request.message, site, settings, asked)
                update = self._sent(name, request, answer.update, Path(scratch) / "update")
            except FedgeError as error:
                return Reply(
                    name,
                    request.server_round,
                    error=str(error),
                    lacks_reference=isinstance(error, MissingReferenceError),
                )
        if self._forgets:
            shutil.rmtree(site.state, ignore_errors=True)
        return Reply(
            name,
            request.server_round,
            update=update,
            num_examples=self._num_examples or answer.num_examples,
            train_loss=answer.train_loss,
            seconds=time.perf_counter() - started,
            name=name,
        )

    def _sent(self, name: str, request: Request, update: bytes, path: Path) -> bytes:
        """Return what the site sends in the end, and note how far it moves the model."""
        attack = self._attacks.get(name)
        if attack is None and not self._measures_changes:
            return update
        path.write_bytes(update)
        received, honest = open_update(request.message), open_update(path)
        origin, sent = received.adapter(), honest.adapter()
        if attack is not None:
            sent = attack(origin, sent, request.server_round)
            update = encode(sent, dtype="float32", base_model=received.base_model)
        self.change_norms[name].append(change_norm(origin, sent))
        return update


def change_norm(origin: Adapter, sent: Adapter) -> float:
    """Return ||alpha / rank * (B A - B_0 A_0)|| over all modules: what robust.clip_norm bounds."""
    from federation.aggregation.robust import changes_gram

    squares = [
        float(changes_gram(origin.modules[name], [factors])[0, 0])
        for name, factors in sent.modules.items()
    ]
    return origin.scale * math.sqrt(sum(squares))


def scaled(times: float) -> Attack:
    """Send the honest change of B and of A, each ``times`` over.

    The product then moves by more than that, since both of its factors do.
    """

    def attack(origin: Adapter, trained: Adapter, seed: int) -> Adapter:  # noqa: ARG001
        return _moved(origin, trained, lambda change: times * change)

    return attack


def random_change(times: float) -> Attack:
    """Send noise instead of a change: normal, in each factor ``times`` the honest change's norm."""

    def attack(origin: Adapter, trained: Adapter, seed: int) -> Adapter:
        import torch

        generator = torch.Generator().manual_seed(seed)

        def noise(change: "Tensor") -> "Tensor":
            drawn = torch.randn(change.shape, generator=generator)
            return drawn * (times * float(change.norm()) / float(drawn.norm()))

        return _moved(origin, trained, noise)

    return attack


def _moved(origin: Adapter, trained: Adapter, become: Callable[["Tensor"], "Tensor"]) -> Adapter:
    """Return what was sent to the site plus what ``become`` makes of the change of each factor."""
    modules = {}
    for name, factors in trained.modules.items():
        start = origin.modules[name]
        modules[name] = LowRank(
            start.b_OR + become(factors.b_OR - start.b_OR),
            start.a_RI + become(factors.a_RI - start.a_RI),
        )
    return Adapter(trained.rank, trained.alpha, modules)
