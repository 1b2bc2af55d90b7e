"""The rounds of a federation: send the adapter, gather updates, average, write.

Our own loop on Flower's messages, because the stock strategies hold every reply in memory, wait for
ever for sites that are gone, and cannot go on after a crash. The exchange spools each reply to
disk; the fold walks over the modules with one module of each site in memory, in the order of
the updates' digests, so the order of arrival changes nothing; the run directory commits a round
in one rename.

`run_rounds` knows nothing of Flower: it speaks to `Sites`, which `grid_sites` implements with a
grid and the tests in memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from federation import events
from federation.adapter import Adapter, LowRank, initial_adapter, write_modules
from federation.aggregation import Aggregation, ModuleAverage, Rule, aggregate
from federation.aggregation.alternating import orthonormalised, trained_factor
from federation.aggregation.server_optimizers import server_step
from federation.errors import FedgeError
from federation.exchange import Exchange, RoundError
from federation.gathering import Gathered, Outgoing
from federation.header import LARGEST_WEIGHT, holds_changes
from federation.lineage import write_lineage
from federation.lost_rounds import LostRound, build_lost_round, read_lost_rounds, stop_if_lost
from federation.metrics import mean_of
from federation.run_directory import RunDirectory
from federation.secure_rounds import SecureExchange
from federation.settings import SettingsError
from federation.wire import (
    Update,
    WireError,
    is_within,
    open_update,
    tensors_of,
    whole_message,
    whole_rows,
    write_message,
)

if TYPE_CHECKING:
    from torch import Tensor

    from federation.settings import FederationSettings
    from federation.sites import Reply, Sites

_NUM_NAMED = 3
"""Sites that are named where an average cannot be sent: one that lies, beside some that do not."""


@dataclass(frozen=True)
class _Run:
    """What stays the same from round to round."""

    settings: FederationSettings
    directory: RunDirectory
    exchange: Exchange | SecureExchange
    log: events.EventLog
    clock: Callable[[], float]
    lost: list[LostRound]
    """Rounds whose secure sum was lost, in order; it grows."""

    @property
    def rule(self) -> Rule:
        s = self.settings
        return Rule(
            kind=s.aggregation,
            rank=s.adapter.rank,
            alpha=s.adapter.alpha,
            # What a robust rule cut off may be what it was to keep out.
            tail_rank=s.tail_rank if s.aggregation == "products" else 0,
            energy=s.adapter.energy,
            max_rank=s.adapter.max_rank,
            num_byzantine=s.robust.num_byzantine,
            clip_norm=s.robust.clip_norm,
        )

    def trains(self, server_round: int) -> str:
        if self.settings.aggregation != "alternating":
            return "AB"
        # Until a sum was opened B is zero and A has no gradient, so that B has its turn again. A
        # later lost round passes its turn on: two sums of the same update say more than one.
        lost = {each.server_round for each in self.lost}
        first_opened = next(number for number in itertools.count(1) if number not in lost)
        return trained_factor(max(server_round - first_opened, 0) + 1)


@dataclass(frozen=True)
class _Folded:
    building: Path
    """The round's adapter, not committed yet."""
    aggregation: Aggregation
    error: float


def run_rounds(
    sites: Sites,
    settings: FederationSettings,
    *,
    check: Callable[[RunDirectory], None] = lambda _: None,
    on_event: Callable[[events.Event], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """Run every round, or those that an interrupted run still lacks; return the last adapter.

    The layout of the run's directory: federation.run_directory.

    Args:
        sites: Whom to ask.
        settings: Of the run; one that is resumed has its own.
        check: Called before anything is written or asked; what it raises ends the run.
        on_event: Hears what the log does.
        clock: Seconds, monotonic.
        sleep: Waits that many seconds.

    Raises:
        UserError: The base model is missing, the run's directory is not empty, or the run to
            resume is not there or damaged.
        RoundError: Too few sites, a round without a quorum of usable updates, or too many lost
            secure sums in a row.
    """
    resumes = bool(settings.resume)
    directory = (
        RunDirectory.resume(Path(settings.resume), settings.signed)
        if resumes
        else RunDirectory.start(settings)
    )
    check(directory)
    settings = directory.settings
    with directory:
        log = events.EventLog(directory.path / "events.jsonl", on_event)
        lost = read_lost_rounds(directory) if settings.secure_sum.enabled else []
        kind = partial(SecureExchange, lost) if settings.secure_sum.enabled else Exchange
        exchange = kind(
            sites,
            settings,
            run=directory.run,
            spool=directory.path / "updates",
            log=log,
            clock=clock,
            sleep=sleep,
        )
        run = _Run(settings, directory, exchange, log, clock, lost)
        started = clock()
        if resumes:
            log.write(events.RunResumed(directory.last_round + 1))
        try:
            served: Update | None = None
            for server_round in range(directory.last_round + 1, settings.num_rounds + 1):
                served = _round(run, server_round, served)
            stop_if_lost(lost, directory)
        except Exception as error:
            reason = str(error) if isinstance(error, FedgeError) else type(error).__name__
            log.write(events.RunFailed(reason))
            raise
        last = directory.round(settings.num_rounds)
        log.write(events.RunFinished(settings.num_rounds, clock() - started, last.name))
    return last


def _round(run: _Run, server_round: int, before: Update | None) -> Update:
    """Run one round from what the round before left on disk, and commit it.

    Args:
        run: What stays the same.
        server_round: The round.
        before: What this returned for the round before, which the sites were sent then; None = look
            on disk.
    """
    stop_if_lost(run.lost, run.directory)
    started = run.clock()
    outgoing = _serve(run, server_round, before)
    release_free_memory()
    gathered = run.exchange.gather(server_round, outgoing, run.trains(server_round))
    release_free_memory()
    fold_started = run.clock()
    replies = gathered.replies
    loss = mean_of([r.train_loss for r in replies], [r.num_examples for r in replies])
    if gathered.lost is None:
        folded = _fold(run, server_round, outgoing, gathered)
        fold_seconds, error = run.clock() - fold_started, folded.error
        _describe(run, server_round, folded, gathered, loss)
        building = folded.building
    else:
        building, fold_seconds, error = _lost(run, gathered.lost), 0.0, 0.0
    path = run.directory.commit(server_round, building)
    run.log.write(
        events.RoundFinished(
            server_round=server_round,
            num_updates=len(replies),
            train_loss=loss,
            aggregation_error=error,
            aggregation_seconds=fold_seconds,
            seconds=run.clock() - started,
            adapter=path.name,
        )
    )
    return outgoing.served


def _serve(run: _Run, server_round: int, before: Update | None) -> Outgoing:
    """Put on disk what the sites of a round are sent.

    What they train is what they can decode: after a downlink of few bits that is not quite the
    adapter. The difference is kept and added to what becomes of the round, so that a number too
    small for the steps of its block grows until it is sent (error feedback, as on the way up).

    Nothing here is waited for, and `opened` does not read back what was just written: until the
    round is committed all of it is made again, with the same bytes, from what the round before left
    on disk, and a resumed run checks what it opens.
    """
    directory, dtype = run.directory, run.settings.wire.downlink
    adapter = _adapter_of(run, server_round)
    digest, path = directory.base_model, directory.served(server_round)
    before = before or _served_before(run, server_round)
    is_same_layout = before is not None and before.rank == adapter.rank
    if dtype == "float32" or (holds_changes(dtype) and not is_same_layout):
        with whole_message(path, adapter, digest, is_synced=False) as served:
            for module, factor in tensors_of(adapter):
                served.add(f"{module}.{factor}", whole_rows(adapter, module, factor))
        return Outgoing(served.opened(), path, before)
    reference = before if holds_changes(dtype) else None
    message, unsent_path = path.with_suffix(f".{dtype}"), path.with_suffix(".unsent")
    with (
        whole_message(path, adapter, digest, is_synced=False) as served,
        whole_message(unsent_path, adapter, digest, is_synced=False) as unsent,
    ):

        def keep(module: str, factor: str, rows_RC: Tensor, sent_RC: Tensor) -> None:
            served.add(f"{module}.{factor}", sent_RC)
            unsent.add(f"{module}.{factor}", rows_RC - sent_RC)

        write_message(
            message,
            adapter,
            dtype=dtype,
            base_model=digest,
            reference=reference,
            sent=keep,
            is_synced=False,
        )
    return Outgoing(
        served.opened(), message, before, is_change=reference is not None, unsent=unsent.opened()
    )


def _served_before(run: _Run, server_round: int) -> Update | None:
    """Return what the sites of the round before were sent; None if it is not there, or damaged.

    Without it the sites are sent the whole adapter. Where changes travel that is not the adapter
    of which they hold the rest, so it is on disk before the round before is over.
    """
    path = run.directory.served(server_round - 1)
    try:
        return open_update(path) if path.is_file() else None
    except WireError:
        return None


def _adapter_of(run: _Run, server_round: int) -> Adapter:
    """Return the adapter that a round begins with.

    Where every round before it was lost and nothing draws noise, A is drawn anew, from the seed and
    the number of the round: the sites that helped to open the last one's sum open no second one
    over the same adapter, and no other factor can have its turn while B is zero.
    """
    if server_round == 1:
        return _first_adapter(run)
    is_none_opened = len(run.lost) == server_round - 1
    if is_none_opened and not run.settings.training.get("noise_multiplier"):
        return _drawn_adapter(run, server_round)
    return run.directory.last_adapter()


def _first_adapter(run: _Run) -> Adapter:
    """Return the adapter that the first round begins with, and say in the log that it begins."""
    adapter = _drawn_adapter(run)
    run.log.write(
        events.RunStarted(
            base_model=run.directory.base_model,
            num_rounds=run.settings.num_rounds,
            aggregation=run.settings.aggregation,
            rank=adapter.rank,
            num_parameters=sum(m.b_OR.numel() + m.a_RI.numel() for m in adapter.modules.values()),
        )
    )
    return adapter


def _drawn_adapter(run: _Run, server_round: int = 1) -> Adapter:
    """Return the adapter that a run's first sum is over: the same for the same seed and round."""
    settings = run.settings
    adapter = initial_adapter(
        Path(settings.base_model),
        rank=settings.adapter.rank,
        alpha=settings.adapter.alpha,
        targets=settings.adapter.targets,
        seed=settings.seed if server_round == 1 else _seed_of(settings.seed, server_round),
    )
    if settings.aggregation == "alternating":
        name, shape = min(adapter.shapes().items(), key=lambda item: min(item[1]))
        if adapter.rank > min(shape):
            raise SettingsError(
                f"adapter.rank is {adapter.rank} and {name} is {shape[0]} x {shape[1]}: "
                f"alternating makes factors orthonormal, so expected a rank of at most {min(shape)}"
            )
        modules = {name: orthonormalised(f, "A") for name, f in adapter.modules.items()}
        adapter = Adapter(adapter.rank, adapter.alpha, modules)
    return adapter


def _seed_of(seed: int, server_round: int) -> int:
    """Return the seed of a later draw; far from those that people choose for other runs."""
    digest = hashlib.sha256(f"{seed}/{server_round}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def _lost(run: _Run, lost: LostRound) -> Path:
    """Build a round that leaves everything as it was; return its directory, not committed yet."""
    is_first = lost.server_round == 1
    adapter = _drawn_adapter(run) if is_first else run.directory.last_adapter()
    building = _new_building(run, lost.server_round)
    build_lost_round(run.directory, building, adapter, lost, Path(run.settings.base_model))
    run.lost.append(lost)
    return building


def _new_building(run: _Run, server_round: int) -> Path:
    """Return where a round's directory is made; nothing of a killed server is left there."""
    building = run.directory.path / f".round-{server_round:04d}"
    shutil.rmtree(building, ignore_errors=True)
    return building


def _fold(run: _Run, server_round: int, outgoing: Outgoing, gathered: Gathered) -> _Folded:
    """Average the spooled updates; adapter and carried state go to disk module by module."""
    states = run.directory.states()
    aggregation = aggregate(
        gathered.updates,
        gathered.weights,
        run.rule,
        origin=outgoing.served,
        trains=run.trains(server_round),
        tails=states.tail,
    )
    building = _new_building(run, server_round)
    errors: list[float] = []
    with run.directory.new_states(server_round) as new_states:

        def modules() -> Iterator[tuple[str, LowRank]]:
            for module in aggregation.modules:
                factors, state = _stepped(
                    run, server_round, outgoing, module, states.read(module.name)
                )
                _check_sendable(server_round, module.name, factors, gathered)
                new_states.write(module.name, state, module.tail)
                errors.append(module.error)
                yield module.name, factors

        write_modules(
            building,
            modules(),
            shapes=outgoing.served.shapes(),
            rank=aggregation.rank,
            alpha=aggregation.alpha,
            base_model=Path(run.settings.base_model).name,
        )
    return _Folded(building, aggregation, max(errors))


def _stepped(
    run: _Run,
    server_round: int,
    outgoing: Outgoing,
    module: ModuleAverage,
    state: Mapping[str, Tensor],
) -> tuple[LowRank, Mapping[str, Tensor]]:
    """Return what the server makes of one module's average, and what it carries on for it."""
    factors, trains = module.factors, run.trains(server_round)
    optimizer = run.settings.server_optimizer
    if optimizer.kind != "none":
        origin = outgoing.served.read(module.name)
        factors, state = server_step(
            origin, factors, state, **optimizer.model_dump(), trains=trains
        )
    else:
        state = {}
    if outgoing.unsent is not None and outgoing.unsent.rank == len(factors.a_RI):
        unsent = outgoing.unsent.read(module.name)
        factors = LowRank(factors.b_OR + unsent.b_OR, factors.a_RI + unsent.a_RI)
    if run.settings.aggregation == "alternating":
        factors = orthonormalised(factors, trains)
    return factors, state


def _check_sendable(server_round: int, module: str, factors: LowRank, gathered: Gathered) -> None:
    """Let a round be committed only if sites will train it.

    Raises:
        RoundError: A number is not finite or too large; names the sites that sent the largest.
    """
    if is_within(factors.b_OR, LARGEST_WEIGHT) and is_within(factors.a_RI, LARGEST_WEIGHT):
        return
    labels = ["of all sites"] if gathered.secure_sum else map(_label, gathered.replies)
    updates = zip(labels, gathered.updates, strict=True)
    norms = {label: _norm(update.read(module)) for label, update in updates}
    largest = sorted(norms, key=lambda label: norms[label], reverse=True)[:_NUM_NAMED]
    named = ", ".join(f"site {label} {norms[label]:.2g}" for label in largest)
    raise RoundError(
        f"round {server_round}: {module} of the average holds NaN, infinity or a number beyond "
        f"{LARGEST_WEIGHT:g}, so some update is absurdly large. The largest norms of its factors "
        f"there: {named}. The last adapter stays: mend or unregister the site at fault and resume "
        "the run"
    )


def _norm(factors: LowRank) -> float:
    """Return the Frobenius norm of both factors together."""
    return math.hypot(*(float(f.double().norm()) for f in (factors.b_OR, factors.a_RI)))


def _describe(
    run: _Run, server_round: int, folded: _Folded, gathered: Gathered, loss: float | None
) -> None:
    """Write the round's lineage: base model, previous round, and the digest of every update."""
    ancestors = {"base_model": Path(run.settings.base_model)}
    if server_round > 1:
        ancestors["previous_round"] = run.directory.round(server_round - 1)
    aggregation = folded.aggregation
    by_site = sorted(gathered.parts, key=lambda part: part.reply.site)
    kind = "masked update" if gathered.secure_sum else "update"
    # In a secure sum nobody but the sites knows what each of them weighs.
    in_words: dict[str, object] = (
        {"secure_sum": dict(gathered.secure_sum)}
        if gathered.secure_sum
        else {"shares": dict(zip(map(_label, gathered.replies), aggregation.shares, strict=True))}
    )
    write_lineage(
        folded.building,
        stage="federate",
        directories=ancestors,
        digests={f"{kind} of site {_label(part.reply)}": part.sha256 for part in by_site},
        parameters={
            "server_round": server_round,
            "aggregation": run.settings.aggregation,
            "rank": aggregation.rank,
            "alpha": aggregation.alpha,
            "base_model_digest": run.directory.base_model,
            "metrics": list(run.settings.asked_metrics),
            "num_examples": {_label(part.reply): part.reply.num_examples for part in by_site},
            **in_words,
            "training": dict(run.settings.training),
        },
        metrics={"aggregation_error": folded.error}
        | ({} if loss is None else {"train_loss": loss}),
    )


def release_free_memory() -> None:
    """Give what was freed back to the system.

    glibc keeps freed tensors of a few MB in its heap: after an adapter went through, that is as
    much as the adapter. Elsewhere than on glibc nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _label(reply: Reply) -> str:
    return f"{reply.name} ({reply.site})" if reply.name else reply.site
