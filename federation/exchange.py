"""One round's exchange: draw sites, send the adapter, take in updates until there are enough.

A reply is checked and spooled to disk as it arrives and then forgotten, so memory is flat in the
number of sites. A round needs a quorum by its deadline; without one it is tried again, keeping
the updates that did come (they trained this very adapter), and asking the other sites.

A site that answers after its round is named, and its update dropped or folded into the round in
which it comes. Until it answers (or its request expires) it is busy, and is asked nothing new.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from federation import events
from federation.errors import FedgeError
from federation.gathering import Gathered, Outgoing, Part, draw, request_of
from federation.metrics import check_metrics, weight_of, without_unasked
from federation.rebased import RebasedUpdate
from federation.sites import Reply, Sites
from federation.traffic import num_asked
from federation.update import Readable
from federation.wire import Update, WireError, open_update

if TYPE_CHECKING:
    from federation.settings import FederationSettings

HEADER_SLACK = 1 << 12
"""By how much the header of an update may be longer than the adapter's that was sent."""
LIFETIME = 2
"""A request expires this many round timeouts after it was sent: later, a reply is lost unnamed."""


class RoundError(FedgeError):
    """Too few sites sent an update that can be used."""


@dataclass(frozen=True)
class Received:
    """An update on disk, and what its site said beside it."""

    update: Readable
    sha256: str
    """Of the message as it came."""
    reply: Reply
    """Without its bytes, and without the numbers that the run did not ask for."""


@dataclass(frozen=True)
class _Busy:
    """A site that did not answer in its round."""

    server_round: int
    expires: float


class Exchange:
    """Asks the sites of a run, round after round."""

    def __init__(
        self,
        sites: Sites,
        settings: FederationSettings,
        *,
        run: str,
        spool: Path,
        log: events.EventLog,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        """Nothing is sent before `gather`.

        Args:
            sites: Whom to ask.
            settings: Quorum, deadline, share of the sites, formats.
            run: Id of the run.
            spool: Directory of the updates in flight; emptied when a round begins.
            log: Hears who was asked, who answered and who did not.
            clock: Seconds, monotonic.
            sleep: Waits that many seconds.
        """
        self._sites = sites
        self._settings = settings
        self._run = run
        self._spool = spool
        self._log = log
        self._clock = clock
        self._sleep = sleep
        self._busy: dict[str, _Busy] = {}
        self._holders: set[str] = set()

    def gather(self, server_round: int, outgoing: Outgoing, trains: str) -> Gathered:
        """Return a quorum of updates in a fixed order: by digest.

        Raises:
            RoundError: There was none in any attempt, or too few sites for the first round.
        """
        shutil.rmtree(self._spool, ignore_errors=True)
        self._spool.mkdir(parents=True)
        attempt = _Attempt(server_round, outgoing, trains)
        quorum = self._settings.quorum
        for number in range(1, self._settings.round_attempts + 1):
            self._ask(attempt, number)
            self._collect(attempt)
            if len(attempt.received) >= quorum:
                break
        self._remember(attempt)
        if len(attempt.received) < quorum:
            raise RoundError(
                f"round {server_round}: {len(attempt.received)} of the {quorum} updates that make "
                f"the quorum came in {self._settings.round_attempts} attempts "
                f"({attempt.first_reason}); every reason is in {self._log.path}. The last adapter "
                "stays: mend the sites and resume the run"
            )
        received = sorted(
            attempt.received.values(), key=lambda item: (item.sha256, item.reply.site)
        )
        return Gathered(
            updates=[item.update for item in received],
            weights=[weight_of(item.reply) for item in received],
            parts=[Part(item.reply, item.sha256) for item in received],
        )

    def _remember(self, attempt: _Attempt) -> None:
        """Note who holds this round's adapter, and who is still busy with it."""
        self._holders = {
            site
            for site, item in attempt.received.items()
            if item.reply.server_round == attempt.server_round
        }
        for site, expires in attempt.waiting.items():
            self._busy[site] = _Busy(attempt.server_round, expires)

    def _ask(self, attempt: _Attempt, number: int) -> None:
        """Draw sites, as the seed has it, and send them the adapter."""
        settings = self._settings
        first = attempt.server_round == 1 and number == 1
        needed = settings.num_sites if first else settings.quorum
        connected = self._sites.wait_for(needed, settings.round_timeout_s)
        if len(connected) < needed:
            reason = (
                f"{len(connected)} of {needed} sites are connected after "
                f"{settings.round_timeout_s:g} s"
            )
            attempt.reasons.append(reason)
            if first:
                raise RoundError(f"round 1: {reason}: start the others, or lower num_sites")
        now = self._clock()
        self._busy = {site: busy for site, busy in self._busy.items() if busy.expires > now}
        taken = attempt.received.keys() | attempt.waiting.keys()
        free = sorted(set(connected) - taken - self._busy.keys())
        # Those that were silent in an attempt may still answer, but others are asked beside them.
        count = num_asked(settings, len(connected)) - len(attempt.received)
        drawn = draw(free, count, f"{settings.seed}/{attempt.server_round}/{number}")
        holders = self._holders if attempt.outgoing.is_change else set(drawn)
        in_full = [site for site in drawn if site not in holders]
        outgoing = attempt.outgoing
        self._log.write(
            events.RoundStarted(
                server_round=attempt.server_round,
                asked=drawn,
                num_bytes=outgoing.message.stat().st_size,
                attempt=number,
                in_full=in_full,
                num_bytes_in_full=outgoing.served.num_bytes if in_full else 0,
            )
        )
        self._send([site for site in drawn if site in holders], attempt, outgoing.message)
        self._send(in_full, attempt, outgoing.served.path)

    def _send(self, sites: Sequence[str], attempt: _Attempt, message: Path) -> None:
        if not sites:
            return
        settings = self._settings
        request = request_of(settings, self._run, attempt.server_round, message, attempt.trains)
        longest = attempt.outgoing.served.num_bytes + HEADER_SLACK
        request = replace(request, max_reply_bytes=longest)
        self._sites.send(sites, request)
        expires = self._clock() + LIFETIME * settings.round_timeout_s
        attempt.waiting |= dict.fromkeys(sites, expires)
        attempt.got_whole |= set(sites) if message == attempt.outgoing.served.path else set()

    def _collect(self, attempt: _Attempt) -> None:
        """Take in replies until every site that was asked answered, or time is up.

        Where these make no quorum, a site that is busy with an earlier round is waited for too: its
        answer may be folded in, and frees it for another attempt.
        """
        timeout_s = self._settings.round_timeout_s
        deadline = self._clock() + timeout_s
        while self._is_worth_waiting(attempt) and self._clock() < deadline:
            if not self._take_next(attempt):
                self._sleep(0.05)
        while attempt.waiting and self._take_next(attempt):
            pass  # what had come by then counts, however long the checks before it took
        for site in sorted(attempt.waiting):
            self._fail(attempt, site, f"no reply within {timeout_s:g} s")
        if not attempt.waiting and len(attempt.received) < self._settings.quorum:
            for site, busy in sorted(self._busy.items()):
                attempt.reasons.append(f"site {site} is busy with round {busy.server_round}")

    def _is_worth_waiting(self, attempt: _Attempt) -> bool:
        has_quorum = len(attempt.received) >= self._settings.quorum
        return bool(attempt.waiting) or (bool(self._busy) and not has_quorum)

    def _take_next(self, attempt: _Attempt) -> bool:
        """Take in one reply, if one is there; its bytes are let go before the next one's come."""
        reply = self._sites.receive()
        if reply is None:
            return False
        if reply.server_round != attempt.server_round:
            self._take_late(reply, attempt)
        elif reply.site in attempt.waiting:  # anything else came twice, or was not asked for
            self._take(reply, attempt)
        return True

    def _take(self, reply: Reply, attempt: _Attempt) -> None:
        """Spool and check one reply to this round."""
        del attempt.waiting[reply.site]
        if reply.lacks_reference and reply.site not in attempt.got_whole:
            served = attempt.outgoing.served
            self._log.write(
                events.AdapterResent(attempt.server_round, reply.site, served.num_bytes)
            )
            self._send([reply.site], attempt, served.path)
            return
        try:
            update = self._check(reply, attempt.trains, attempt.outgoing.served)
        except WireError as error:
            self._fail(attempt, reply.site, str(error))
            return
        self._keep(attempt, reply, update, update.sha256)

    def _take_late(self, reply: Reply, attempt: _Attempt) -> None:
        """Name a reply to an earlier round; fold it into this one if wanted and possible."""
        busy = self._busy.pop(reply.site, None)
        if busy is None or busy.server_round != reply.server_round:
            return
        outgoing, server_round = attempt.outgoing, attempt.server_round
        is_kept = False
        if reply.update is None:
            self._fail(attempt, reply.site, f"in round {reply.server_round}: {reply.error}")
            return
        if (
            self._settings.late_replies == "fold"
            and reply.server_round == server_round - 1
            and outgoing.before is not None
            and attempt.trains == "AB"
        ):
            try:
                late = self._check(reply, "AB", outgoing.before)
                rebased = RebasedUpdate(late, outgoing.before, outgoing.served)
                self._keep(attempt, reply, rebased, late.sha256)
                is_kept = True
            except WireError as error:
                self._fail(attempt, reply.site, str(error))
        self._log.write(events.SiteLate(server_round, reply.site, reply.server_round, kept=is_kept))

    def _keep(self, attempt: _Attempt, reply: Reply, update: Readable, sha256: str) -> None:
        # The bytes are on disk: only the digest and the numbers stay in memory.
        reply = replace(without_unasked(reply, self._settings.asked_metrics), update=None)
        attempt.received[reply.site] = Received(update, sha256, reply)
        self._log.write(
            events.UpdateReceived(
                server_round=attempt.server_round,
                site=reply.site,
                name=reply.name,
                sha256=sha256,
                num_bytes=update.num_bytes,
                num_examples=reply.num_examples,
                train_loss=reply.train_loss,
                seconds=reply.seconds,
                rounds_late=attempt.server_round - reply.server_round,
            )
        )

    def _fail(self, attempt: _Attempt, site: str, reason: str) -> None:
        attempt.reasons.append(reason)
        self._log.write(events.SiteFailed(attempt.server_round, site, reason))

    def _check(self, reply: Reply, trains: str, served: Update) -> Update:
        """Put one update on disk and check it against what was asked for.

        Raises:
            WireError: It is not that.
        """
        if reply.update is None:
            raise WireError(reply.error or "the site sent neither an update nor an error")
        check_metrics(reply, self._settings.asked_metrics)
        if len(reply.update) > served.num_bytes + HEADER_SLACK:
            raise WireError(
                f"the update has {len(reply.update)} bytes, the whole adapter that was sent "
                f"{served.num_bytes}"
            )
        path = self._spool / f"{hashlib.sha256(reply.site.encode()).hexdigest()[:16]}.update"
        with path.open("wb") as file:
            file.write(reply.update)
        return open_update(
            path, reference=served, refuse=lambda update: _compare(update, trains, served)
        )


@dataclass
class _Attempt:
    """What a round has so far; its attempts go on where the one before stopped."""

    server_round: int
    outgoing: Outgoing
    trains: str

    def __post_init__(self) -> None:
        self.received: dict[str, Received] = {}
        self.waiting: dict[str, float] = {}
        """Sites that were asked and have not answered, and when their request expires."""
        self.got_whole: set[str] = set()
        """Sites that got the whole adapter, so that they cannot lack a reference."""
        self.reasons: list[str] = []

    @property
    def first_reason(self) -> str:
        return self.reasons[0] if self.reasons else "no site was free to be asked"


def _compare(update: Update, trains: str, served: Update) -> None:
    """Compare what an update says of itself with the adapter that was sent.

    Raises:
        WireError: It is no update of that adapter; names the first difference.
    """
    if update.base_model != served.base_model:
        raise WireError(
            f"the update belongs to base model {update.base_model[:16]}…, this run trains "
            f"{served.base_model[:16]}…"
        )
    if update.factors != trains:
        raise WireError(f"the update holds factors {update.factors}, the round trains {trains}")
    if update.rank > served.rank:
        raise WireError(f"the update has rank {update.rank}, this run's adapter has {served.rank}")
    scale, expected_scale = update.alpha / update.rank, served.alpha / served.rank
    if not math.isclose(scale, expected_scale, rel_tol=1e-9):
        raise WireError(
            f"the update has scale (alpha / rank) {scale:g}, this run's adapter {expected_scale:g}"
        )
    sent, expected = update.shapes(), served.shapes()
    if only := _names_apart(sent, expected):
        raise WireError(
            f"the update's modules are not those of this run's adapter: {len(only)} differ"
        )
    for name, shape in expected.items():
        if sent[name] != shape:
            raise WireError(
                f"{name} is {sent[name][0]} x {sent[name][1]} in the update, "
                f"{shape[0]} x {shape[1]} in this run's adapter"
            )


def _names_apart(one: Collection[str], other: Collection[str]) -> set[str]:
    return set(one) ^ set(other)
