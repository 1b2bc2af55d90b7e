"""One round's exchange where the server may learn the sum of the updates and none of them.

Five stages after another (federation.secure_messages), each one request to the sites and one reply
of each. The first brings the adapter, and is answered by the sites that have trained it; the others
train nothing. A site that is silent, fails or answers wrongly in a stage has dropped out of the
attempt. Where too few are left, the attempt ends with nothing revealed, and the next one asks anew
with keys of its own: what the sites trained is kept by them, and not trained again.

**A killed server.** An attempt's number is on disk before anything of it is sent and serves once,
so whatever was under way is given up, but for one stage. In the last one the sites show their
shares, and a site that did refuses every other attempt of the round. So what that stage stands on
is on disk before it begins (`SecureSum.opening`), and is gone on with: the same request to the same
members, which they answer with the same bytes. Where they answer no more, or lied, the round is
lost: the adapter stays as it was, and the run goes on.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from federation import events
from federation.cohort import Candidates
from federation.exchange import RoundError
from federation.gathering import Gathered, Outgoing, Part, request_of
from federation.header import WireError, num_numbers
from federation.lost_rounds import LostRound, is_stuck
from federation.metrics import check_metrics, without_unasked
from federation.secure_memory import SecureMemory
from federation.secure_messages import (
    MAX_MESSAGE_BYTES,
    SecureSumError,
    Stage,
    Terms,
    subject_of,
)
from federation.secure_sum import SecureSum
from federation.sites import Reply, Request, Sites
from federation.weighted_sum import SummedFactors
from federation.wire import open_update, write_message

if TYPE_CHECKING:
    from federation.settings import FederationSettings
    from federation.weighted_sum import WeightedSum

_MAX_NAMED = 3
"""Reasons that an error quotes; all are in the log."""


@dataclass
class _Attempt:
    """One attempt at a round's sum."""

    secure: SecureSum
    request: Request
    """What is asked, but for the stage and its message."""
    parts: dict[str, Part] = field(default_factory=dict)
    """Of the sites whose masked vector came."""
    reasons: list[str] = field(default_factory=list)
    refusals: dict[str, str] = field(default_factory=dict)
    """What sites said that did not answer the roster."""


class SecureExchange:
    """Asks the sites of a run for a sum, round after round."""

    def __init__(
        self,
        lost: Sequence[LostRound],
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
            lost: Rounds of this run whose sums were lost; it grows while the run lasts.
            sites: This and the other arguments as of `federation.exchange.Exchange`.
            settings: See there.
            run: See there.
            spool: See there.
            log: See there.
            clock: See there.
            sleep: See there.
        """
        self._sites = sites
        self._settings = settings
        self._run = run
        self._spool = spool
        self._memory = SecureMemory(spool.with_name("secure"))
        self._log = log
        self._clock = clock
        self._sleep = sleep
        self._lost = lost
        self._candidates = Candidates(lost)

    def gather(self, server_round: int, outgoing: Outgoing, trains: str) -> Gathered:
        """Return the mean of the sites' updates as one, or the adapter as it was sent.

        Raises:
            RoundError: No sum was opened in any attempt, or too few sites for the first round.
        """
        shutil.rmtree(self._spool, ignore_errors=True)
        self._spool.mkdir(parents=True)
        subject = subject_of(
            outgoing.served.sha256_of_content,
            trains,
            {key: value for key, value in self._settings.training.items() if value is not None},
        )
        request = request_of(self._settings, self._run, server_round, outgoing.message, trains)
        request = replace(request, secure_sum=self._settings.secure_terms, cohort=self._cohort)
        held = self._memory.opening(server_round, subject)
        if held is not None:
            secure, parts = held
            attempt = _Attempt(secure, replace(request, attempt=secure.terms.attempt), dict(parts))
        else:
            attempt = self._masked(request, outgoing, subject)
            self._memory.keep_opening(attempt.secure, attempt.parts)
        total = self._open(attempt)
        if isinstance(total, LostRound):
            return Gathered([], [], [], lost=total)
        return self._averaged(attempt, total, outgoing, trains)

    @property
    def _cohort(self) -> int:
        return int(self._settings.secure_terms["cohort"])

    def _masked(self, request: Request, outgoing: Outgoing, subject: str) -> _Attempt:
        """Make attempts until one has all masked vectors summed and signed for.

        Raises:
            RoundError: None had.
        """
        settings, reasons, num_tries = self._settings, [], 0
        while num_tries < settings.round_attempts:
            is_first = request.server_round == 1 and num_tries == 0
            number = self._memory.next_attempt(request.server_round)
            asked = self._asked(request.server_round, number, is_first=is_first)
            terms = Terms(
                run=self._run,
                server_round=request.server_round,
                attempt=number,
                subject=subject,
                num_coordinates=num_numbers(
                    outgoing.served.shapes(), outgoing.served.rank, request.trains
                ),
                **settings.secure_terms,
            )
            num_tries += 1
            if len(asked) < terms.threshold:
                reasons.append(f"{len(asked)} sites can be asked, {terms.threshold} are needed")
                continue
            attempt = _Attempt(SecureSum(terms, asked), replace(request, attempt=number))
            try:
                while attempt.secure.stage != Stage.REVEAL:
                    self._run_stage(attempt)
                    attempt.secure.close()
            except SecureSumError as error:
                reasons += [str(error), *attempt.reasons[:_MAX_NAMED]]
                strangers = self._candidates.leave_strangers_out(
                    attempt.secure.identities, attempt.refusals
                )
                for site in strangers:
                    said = "most of the others do not list its identity in their policies"
                    self._fail(attempt, site, Stage.SHARE, f"{said}: it is asked no more")
                num_tries -= bool(strangers)  # each is found once
                continue
            return attempt
        way_out = "mend the sites and resume the run"
        if is_stuck(self._lost, request.server_round - 1, settings):
            way_out = (
                "begin a new run: this one's rounds before "
                "were lost, and without training.noise_multiplier a site helps to open no second "
                "sum over the same adapter"
            )
        raise RoundError(
            f"round {request.server_round}: no secure sum in {settings.round_attempts} attempts "
            f"({'; '.join(reasons[:_MAX_NAMED])}); every reason is in {self._log.path}. Nothing "
            f"was opened and the last adapter stays: {way_out}"
        )

    def _asked(self, server_round: int, number: int, *, is_first: bool) -> list[str]:
        """Return whom an attempt asks, as the seed draws them.

        A number of an attempt serves once, so a server that was killed draws anew: the sites that
        it had drawn may have been the reason.

        Raises:
            RoundError: Too few sites for the first round.
        """
        settings = self._settings
        needed = settings.num_sites if is_first else int(settings.secure_terms["threshold"])
        connected = self._sites.wait_for(needed, settings.round_timeout_s)
        if is_first and len(connected) < needed:
            raise RoundError(
                f"round 1: {len(connected)} of {needed} sites are connected after "
                f"{settings.round_timeout_s:g} s: start the others, or lower num_sites"
            )

        seed = f"{settings.seed}/{server_round}/{number}"
        return self._candidates.drawn(connected, self._cohort, seed, server_round)

    def _run_stage(self, attempt: _Attempt) -> None:
        """Ask the sites of a stage, and take in replies until all answered or time is up."""
        secure, settings = attempt.secure, self._settings
        stage, asked = _stage(secure), sorted(secure.waiting)
        message = attempt.request.message
        timeout_s = settings.round_timeout_s
        if stage == Stage.ADVERTISE:
            number = secure.terms.attempt
            self._log.write(
                events.RoundStarted(
                    attempt.request.server_round, asked, message.stat().st_size, number
                )
            )
        else:
            message, timeout_s = self._spool / stage, settings.secure_sum.stage_timeout_s
            message.write_bytes(secure.request())
        longest = secure.terms.masked_bytes if stage == Stage.MASK else MAX_MESSAGE_BYTES
        request = replace(attempt.request, stage=stage, message=message, max_reply_bytes=longest)
        self._candidates.ask(asked)
        self._sites.send(asked, request)
        deadline = self._clock() + timeout_s
        while secure.waiting and self._clock() < deadline:
            if not self._take_next(attempt, stage):
                self._sleep(0.05)
        while secure.waiting and self._take_next(attempt, stage):
            pass  # what had come by then counts, however long the checks before it took
        for site in sorted(secure.waiting):
            self._fail(attempt, site, stage, f"no reply within {timeout_s:g} s")

    def _take_next(self, attempt: _Attempt, stage: Stage) -> bool:
        """Take in one reply, if one is there; what was not asked in this stage is passed over."""
        reply = self._sites.receive()
        if reply is None:
            return False
        request, secure = attempt.request, attempt.secure
        is_asked = (reply.server_round, reply.attempt, reply.stage) == (
            *(request.server_round, request.attempt),
            stage,
        )
        if not is_asked or reply.site not in secure.waiting:
            return True
        try:
            self._take(attempt, stage, reply)
        except (SecureSumError, WireError) as error:
            secure.drop(reply.site)
            if stage == Stage.SHARE:
                attempt.refusals[reply.site] = str(error)
            self._fail(attempt, reply.site, stage, str(error))
        return True

    def _take(self, attempt: _Attempt, stage: Stage, reply: Reply) -> None:
        if reply.update is None:
            raise WireError(reply.error or "the site sent neither an answer nor an error")
        if stage != Stage.MASK:
            attempt.secure.take(reply.site, reply.update)
            return
        asked = self._settings.asked_metrics
        check_metrics(reply, asked)
        attempt.secure.take(reply.site, reply.update)
        digest, num_bytes = hashlib.sha256(reply.update).hexdigest(), len(reply.update)
        reply = replace(without_unasked(reply, asked), update=None)
        attempt.parts[reply.site] = Part(reply, digest)
        self._log.write(
            events.UpdateReceived(
                server_round=reply.server_round,
                site=reply.site,
                name=reply.name,
                sha256=digest,
                num_bytes=num_bytes,
                num_examples=reply.num_examples,
                train_loss=reply.train_loss,
                seconds=reply.seconds,
            )
        )

    def _fail(self, attempt: _Attempt, site: str, stage: Stage, reason: str) -> None:
        self._candidates.fail(site, attempt.request.server_round)
        attempt.reasons.append(f"site {site}, stage {stage}: {reason}")
        self._log.write(
            events.SiteFailed(attempt.request.server_round, site, f"stage {stage}: {reason}")
        )

    def _open(self, attempt: _Attempt) -> WeightedSum | LostRound:
        """Return the opened sum, or what is said of it where it can never be opened.

        Raises:
            RoundError: Too few sites showed their shares, and they may do so later.
        """
        secure, tries = attempt.secure, self._settings.round_attempts
        threshold, members = secure.terms.threshold, set(secure.waiting)
        self._sites.wait_for(threshold, self._settings.round_timeout_s)
        for _ in range(tries):
            secure.waiting = {site for site in members if site not in secure.revealed}
            self._run_stage(attempt)
            if secure.num_came >= threshold:
                break
        server_round = attempt.request.server_round
        if secure.num_came < threshold and not self._memory.is_tried:
            self._memory.note_tried()
            raise RoundError(
                f"round {server_round}: {secure.num_came} sites answered in stage "
                f"{Stage.REVEAL}, {threshold} are needed "
                f"({'; '.join(attempt.reasons[:_MAX_NAMED])}). Nothing was opened, and the sites "
                "refuse another sum of this round: start them again and resume the run, which asks "
                "the same once more"
            )
        lost: LostRound | None = None
        try:
            secure.close()
        except SecureSumError as error:
            lost = LostRound(
                server_round,
                str(error),
                suspects=tuple(sorted(secure.suspects)),
                named=tuple(sorted(secure.doubted)),
                terms=_in_words(attempt),
            )
            self._log.write(
                events.SumLost(server_round, lost.reason, list(lost.suspects), list(lost.named))
            )
        self._name_liars(attempt)
        return lost or secure.result

    def _name_liars(self, attempt: _Attempt) -> None:
        """Say whose shares did not fit, and ask those last that are at odds with most.

        Where that cannot be told, both are said and neither is asked later: else a site could put
        another behind itself.
        """
        secure, server_round = attempt.secure, attempt.request.server_round
        at_odds: dict[str, set[str]] = {site: set() for site in secure.doubted}
        for pair in secure.misfits:
            for site, other in (pair, pair[::-1]):
                if site in secure.doubted or other not in secure.doubted:
                    at_odds.setdefault(site, set()).add(other)
        for site, others in sorted(at_odds.items()):
            reason = f"shares between it and site {', '.join(sorted(others))} do not fit"
            if not others:
                reason = "its secret cannot be put together from the shares that it dealt"
            if site in secure.doubted:
                self._fail(attempt, site, Stage.REVEAL, f"{reason}: it is asked last from now on")
            else:
                said = f"stage {Stage.REVEAL}: {reason}: one of them lied, or others together"
                self._log.write(events.SiteFailed(server_round, site, said))
        self._candidates.doubt(secure.doubted)

    def _averaged(
        self, attempt: _Attempt, total: WeightedSum, outgoing: Outgoing, trains: str
    ) -> Gathered:
        served = outgoing.served
        path = self._spool / "sum.update"
        write_message(
            path,
            SummedFactors(total, served, trains),
            dtype="float32",
            base_model=served.base_model,
            reference=served,
            factors=trains,
        )
        terms = total.terms
        says_weights = terms.max_examples > 1
        self._log.write(
            events.SumOpened(
                terms.server_round,
                attempt=terms.attempt,
                sites=list(total.sites),
                cohort=terms.cohort,
                threshold=terms.threshold,
                total_examples=total.total_examples if says_weights else None,
            )
        )
        facts = {"sites": list(total.sites), **_in_words(attempt)}
        if says_weights:
            facts["total_examples"] = total.total_examples
        parts = [attempt.parts[site] for site in total.sites]
        return Gathered([open_update(path, reference=served)], [1], parts, facts)


def _stage(secure: SecureSum) -> Stage:
    if secure.stage is None:
        raise AssertionError("an attempt that is over is not gone on with")
    return secure.stage


def _in_words(attempt: _Attempt) -> dict[str, object]:
    """Return the terms of an attempt for the lineage."""
    names = {"attempt", "cohort", "threshold", "clip", "bits", "max_examples"}
    return attempt.secure.terms.model_dump(include=names)
