"""The rounds of a federation: send the adapter, take updates one by one, average, write.

Our own loop on Flower's messages, because the stock strategies hold every reply in memory. A reply
is checked and spooled to disk as it arrives and then forgotten; after the last one the fold walks
over the modules with one module of each site in memory. Updates are folded in the order of their
digests, so the order of arrival changes nothing, and are deleted when the round is over: what
remains of a site's update is its digest in the round's lineage.

`run_rounds` knows nothing of Flower: it speaks to `Sites`, which `server_app` implements with a
grid and the tests in memory.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from federation import events
from federation.adapter import initial_adapter, write_adapter
from federation.aggregation import aggregate
from federation.atomic import refuse_existing, write_atomically
from federation.base_model import model_digest
from federation.errors import FedgeError
from federation.lineage import write_lineage
from federation.wire import Update, WireError, encode, open_update

if TYPE_CHECKING:
    from federation.adapter import Adapter
    from federation.settings import FederationSettings


MAX_EXAMPLES = 1_000_000_000
"""A count beyond it is a mistake or an attack: it would own the average."""


class RoundError(FedgeError):
    """No site sent an update that can be used."""


@dataclass(frozen=True)
class Request:
    """What a site gets each round."""

    server_round: int
    adapter: bytes
    """In the format of federation.wire."""
    training: Mapping[str, Any]


@dataclass(frozen=True)
class Reply:
    """What a site sends back: an update, or the reason why there is none."""

    site: str
    update: bytes | None
    error: str | None = None
    name: str = ""
    """What the site calls itself, for people; ``site`` is who it is."""
    num_examples: int = 0
    train_loss: float = 0.0
    seconds: float = 0.0


class Sites(Protocol):
    """The sites of a federation as the rounds see them."""

    def wait_for(self, count: int, timeout_s: float) -> list[str]:
        """Return the sites once there are ``count`` of them, or those there are at the timeout."""
        ...

    def send(self, sites: Sequence[str], request: Request) -> None:
        """Send the same request to every site."""
        ...

    def receive(self) -> Reply | None:
        """Return one reply to the last request, or None when none has arrived yet."""
        ...


@dataclass(frozen=True)
class _Received:
    update: Update
    reply: Reply


@dataclass(frozen=True)
class _Run:
    """What stays the same from round to round."""

    sites: Sites
    settings: FederationSettings
    base_model_digest: str
    log: events.EventLog
    clock: Callable[[], float]
    sleep: Callable[[float], None]

    @property
    def out(self) -> Path:
        return Path(self.settings.out)

    def directory(self, server_round: int) -> Path:
        return self.out / f"round-{server_round:04d}"


def run_rounds(
    sites: Sites,
    settings: FederationSettings,
    *,
    on_event: Callable[[events.Event], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """Run every round and return the directory of the last adapter.

    The run's directory afterwards: `events.jsonl`, `round-0001/ …` (each a PEFT adapter directory
    with its lineage) and `adapter`, a link to the newest round, switched atomically.

    Raises:
        UserError: The base model is missing, or the run's directory is not empty.
        RoundError: Too few sites, or a round in which no site sent a usable update.
    """
    out, base_model = Path(settings.out), Path(settings.base_model)
    refuse_existing(out)
    digest = model_digest(base_model)
    adapter = initial_adapter(
        base_model,
        rank=settings.adapter.rank,
        alpha=settings.adapter.alpha,
        targets=settings.adapter.targets,
        seed=settings.seed,
    )
    log = events.EventLog(out / "events.jsonl", on_event)
    run = _Run(sites, settings, digest, log, clock, sleep)
    started = clock()
    run.log.write(
        events.RunStarted(
            base_model=digest,
            num_rounds=settings.num_rounds,
            aggregation=settings.aggregation,
            rank=adapter.rank,
            num_parameters=sum(m.b_OR.numel() + m.a_RI.numel() for m in adapter.modules.values()),
        )
    )
    try:
        for server_round in range(1, settings.num_rounds + 1):
            round_started = clock()
            received = _exchange(run, server_round, adapter)
            adapter = _fold(run, server_round, received, round_started)
    except Exception as error:
        reason = str(error) if isinstance(error, FedgeError) else type(error).__name__
        run.log.write(events.RunFailed(reason))
        raise
    finally:
        shutil.rmtree(run.out / "updates", ignore_errors=True)
    last = run.directory(settings.num_rounds)
    run.log.write(events.RunFinished(settings.num_rounds, clock() - started, last.name))
    return last


def _exchange(run: _Run, server_round: int, adapter: Adapter) -> list[_Received]:
    """Send the adapter to the sites and spool their updates until all answered or time is up."""
    settings = run.settings
    needed = settings.num_sites if server_round == 1 else 1
    names = run.sites.wait_for(needed, settings.round_timeout_s)
    if len(names) < needed:
        raise RoundError(
            f"round {server_round}: {len(names)} of {needed} sites are connected after "
            f"{settings.round_timeout_s:g} s: start the others, or lower num_sites"
        )
    message = encode(adapter, dtype=settings.wire_dtype, base_model=run.base_model_digest)
    run.log.write(events.RoundStarted(server_round, sorted(names), len(message)))
    run.sites.send(names, Request(server_round, message, settings.training))
    deadline = run.clock() + settings.round_timeout_s

    spool = run.out / "updates"
    shutil.rmtree(spool, ignore_errors=True)
    pending, received, reasons = set(names), list[_Received](), list[str]()
    while pending and run.clock() < deadline:
        reply = run.sites.receive()
        if reply is None:
            run.sleep(0.05)
            continue
        if reply.site not in pending:
            continue
        pending.remove(reply.site)
        try:
            update = _spool(reply, spool, adapter, run.base_model_digest)
        except WireError as error:
            reasons.append(str(error))
            run.log.write(events.SiteFailed(server_round, reply.site, str(error)))
            continue
        # The bytes are on disk: only the digest and the numbers stay in memory.
        received.append(_Received(update, replace(reply, update=None)))
        run.log.write(_received_event(server_round, received[-1]))
    for site in sorted(pending):
        reasons.append(f"no reply within {settings.round_timeout_s:g} s")
        run.log.write(events.SiteFailed(server_round, site, reasons[-1]))
    if not received:
        raise RoundError(
            f"round {server_round}: none of {len(names)} sites sent a usable update "
            f"({reasons[0]}); every reason is in {run.log.path}"
        )
    return sorted(received, key=lambda item: (item.update.sha256, item.reply.site))


def _received_event(server_round: int, item: _Received) -> events.UpdateReceived:
    return events.UpdateReceived(
        server_round=server_round,
        site=item.reply.site,
        name=item.reply.name,
        sha256=item.update.sha256,
        num_bytes=item.update.num_bytes,
        num_examples=item.reply.num_examples,
        train_loss=item.reply.train_loss,
        seconds=item.reply.seconds,
    )


def _spool(reply: Reply, spool: Path, adapter: Adapter, digest: str) -> Update:
    """Put one update on disk and check it against what was asked for."""
    if reply.update is None:
        raise WireError(reply.error or "the site sent neither an update nor an error")
    if not 1 <= reply.num_examples <= MAX_EXAMPLES:
        raise WireError(f"num_examples is {reply.num_examples}: expected 1 to {MAX_EXAMPLES}")
    if not math.isfinite(reply.train_loss) or not math.isfinite(reply.seconds):
        raise WireError("train_loss or seconds is not a finite number")
    path = spool / f"{reply.site}.update"
    write_atomically(path, reply.update)
    update = open_update(path)
    if update.base_model != digest:
        raise WireError(
            f"the update belongs to base model {update.base_model[:16]}…, this run trains "
            f"{digest[:16]}…"
        )
    expected = {
        name: (factors.b_OR.shape[0], factors.a_RI.shape[1])
        for name, factors in adapter.modules.items()
    }
    if update.shapes() != expected:
        raise WireError("the update's modules or shapes are not those of this run's adapter")
    return update


def _fold(
    run: _Run, server_round: int, received: Sequence[_Received], round_started: float
) -> Adapter:
    """Average the spooled updates and put the new adapter, with its lineage, on disk."""
    settings = run.settings
    fold_started = run.clock()
    weights = [item.reply.num_examples for item in received]
    adapter, error = aggregate(
        [item.update for item in received],
        weights,
        kind=settings.aggregation,
        rank=settings.adapter.rank,
        alpha=settings.adapter.alpha,
    )
    factors = [f for module in adapter.modules.values() for f in (module.b_OR, module.a_RI)]
    if not all(factor.isfinite().all() for factor in factors):
        raise RoundError(
            f"round {server_round}: the average is not finite, so some update is absurdly large: "
            "the last adapter stays; look at the sites' losses in the event log"
        )
    aggregation_seconds = run.clock() - fold_started
    losses = [item.reply.train_loss for item in received]
    loss = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)

    directory = run.directory(server_round)
    building = directory.with_name(f".{directory.name}")
    shutil.rmtree(building, ignore_errors=True)
    write_adapter(building, adapter, Path(settings.base_model).name)
    _describe(run, building, server_round, adapter, received, loss, error)
    building.replace(directory)
    _switch_link(run.out / "adapter", directory.name)
    shutil.rmtree(run.out / "updates")
    run.log.write(
        events.RoundFinished(
            server_round=server_round,
            num_updates=len(received),
            train_loss=loss,
            aggregation_error=error,
            aggregation_seconds=aggregation_seconds,
            seconds=run.clock() - round_started,
            adapter=directory.name,
        )
    )
    return adapter


def _describe(
    run: _Run,
    building: Path,
    server_round: int,
    adapter: Adapter,
    received: Sequence[_Received],
    loss: float,
    error: float,
) -> None:
    """Write the round's lineage: base model, previous round, and the digest of every update."""
    ancestors = {"base_model": Path(run.settings.base_model)}
    if server_round > 1:
        ancestors["previous_round"] = run.directory(server_round - 1)
    by_site = sorted(received, key=lambda item: item.reply.site)
    write_lineage(
        building,
        stage="federate",
        directories=ancestors,
        digests={f"update of site {_label(item.reply)}": item.update.sha256 for item in by_site},
        parameters={
            "server_round": server_round,
            "aggregation": run.settings.aggregation,
            "rank": adapter.rank,
            "alpha": adapter.alpha,
            "base_model_digest": run.base_model_digest,
            "num_examples": {_label(item.reply): item.reply.num_examples for item in by_site},
            "training": dict(run.settings.training),
        },
        metrics={"train_loss": loss, "aggregation_error": error},
    )


def _label(reply: Reply) -> str:
    return f"{reply.name} ({reply.site})" if reply.name else reply.site


def _switch_link(link: Path, target: str) -> None:
    """Point ``link`` at ``target`` in one step: a reader finds the old round or the new one."""
    fresh = link.with_name(f".{link.name}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(link)
