"""Between a question and its answer: this site's policy before the training, its ledger after it.

`client.trainer` calls in this order: `admit` before a message is opened, `allow` before anything is
trained, `release` for the numbers beside the update, `record` once the answer is on disk and before
a byte of it leaves. For a secure sum `record_training` comes before the site says its keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Self

from client.fingerprint import fingerprint, read_secret
from client.identity import public_identity, read_identity
from client.ledger import Entry, EpsilonOf, Ledger, Row, utc_now
from client.policy import ANY, Policy
from client.policy_file import PolicyFile
from client.policy_rules import event_of
from client.reasons import Refused
from client.request import SiteRequest, parse_request, with_claims, with_facts
from client.site_ledger import open_site_ledger
from client.verdict import Verdict, judge, rounded
from federation import accountant
from federation.accountant import PrivacyEvent

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from client.answers import Kept
    from client.fingerprint import Fingerprint
    from client.secure_sum import Membership
    from client.site_settings import SiteSettings
    from client.trainer import Question, Said
    from federation.header import Header

STAGE = "update"
"""What the ledger calls an update that leaves by itself, not in a secure sum."""
TRAINED_STAGE = "trained"
"""And a training for a secure sum. It has no bytes, and all the cost: that a site goes on to say
its keys tells that its training went well. They, shares and signatures hold nothing of the data."""
SECURE_STAGE = "secure"
"""And a masked vector of that training: it has bytes, and no cost."""
FAILED_STAGE = "failed"
"""And the one sentence that a private round failed: it has no bytes, and costs as much as an update
since whether a round fails may be told by the records."""


class SiteGate:
    """One site's policy and ledger, for one data set."""

    def __init__(
        self,
        policy: Policy | PolicyFile,
        ledger: Ledger,
        data_set: Fingerprint,
        *,
        say: Callable[..., None],
        now: Callable[[], datetime] = utc_now,
        epsilon_of: EpsilonOf = accountant.epsilon_of,
        identity: Ed25519PrivateKey | None = None,
        knows_bundle: bool = True,
    ) -> None:
        """Nothing is read or written yet.

        Args:
            policy: Of the site; of a file what it says before each judgement.
            ledger: Open for writing.
            data_set: Of the records that are trained on.
            say: Called with the name of an event and its values, for the log.
            now: Clock of the quiet hours.
            epsilon_of: The accountant.
            identity: This site's key in secure sums; None = it takes part in none.
            knows_bundle: Whether a bundle that a question names is the node's word, and not that
                of the run's own app, which a stock SuperNode lets speak for itself.
        """
        self._knows_bundle = knows_bundle
        self._identity = identity
        self._file = policy if isinstance(policy, PolicyFile) else None
        self._policy = policy if isinstance(policy, Policy) else policy.current()
        self._ledger = ledger
        self._data_set = data_set
        self._say = say
        self._now = now
        self._epsilon_of = epsilon_of

    @classmethod
    def open(cls, settings: SiteSettings, say: Callable[..., None]) -> Self:
        """Read a site's policy, open its ledger, and take the fingerprint of its records.

        Raises:
            UserError: The policy, the identity or the data are missing or wrong.
            LedgerError: The ledger is broken, gone, or older than an answer of this site.
        """
        from client.round import site_records

        policy = PolicyFile(settings.policy, say)
        records = site_records(settings.data)
        has_identity = settings.identity_key is not None or settings.identity.exists()
        identity = read_identity(settings.identity) if has_identity else None
        ledger = open_site_ledger(settings.state)
        try:
            data_set = fingerprint(records, read_secret(settings.state))
        except BaseException:
            ledger.close()
            raise
        knows_bundle = settings.node == "resident"
        return cls(policy, ledger, data_set, say=say, identity=identity, knows_bundle=knows_bundle)

    def admit(self, said: Said, header: Header, rank: int) -> None:
        """Return unless the policy refuses a message by its head and header; refusals are logged.

        Where a rule asks for the content, it is taken to be that of the adapter that the round was
        answered for before: `allow` judges it when it is known.

        Args:
            said: Head of the message.
            header: What the message says of itself.
            rank: Slices that this site will train.

        Raises:
            Refused: With the rule that it breaks.
            RequestError: It is no request.
        """
        self._read_policy()
        asked = self._parsed(said.content)
        spent = self._ledger.spent(self._data_set, asked.run)
        digest = spent.answered.get(asked.server_round, "0" * 64)
        claimed = with_claims(asked, header, rank=rank, content_digest=digest)
        verdict = judge(claimed, self._policy, spent, self._now(), self._epsilon_of)
        if not verdict.is_allowed:
            self._conclude(asked, verdict)

    def allow(self, question: Question) -> PrivacyEvent | None:
        """Return what a question that the policy allows costs; every verdict is in the log.

        Raises:
            Refused: With the rule that it breaks.
            RequestError: It is no request.
        """
        self._read_policy()
        asked = self._request_of(question)
        spent = self._ledger.spent(self._data_set, asked.run)
        is_counted = self._has_row(asked, lambda row: row.sha256 == question.leaving)
        spent = replace(spent, is_kept=question.is_repeated, is_counted=is_counted)
        verdict = judge(asked, self._policy, spent, self._now(), self._epsilon_of)
        self._conclude(asked, verdict)
        return event_of(asked, self._data_set.num_records) if asked.is_private else None

    def _read_policy(self) -> None:
        """Judge from here on by what the policy's file says now.

        What follows a verdict (`release`, `record`, `membership`) keeps to the policy of it.

        Raises:
            Refused: The file is no policy now.
        """
        if self._file is not None:
            self._policy = self._file.current()

    def _conclude(self, asked: SiteRequest, verdict: Verdict) -> None:
        self._say(
            "judged",
            run=asked.run,
            server_round=asked.server_round,
            is_allowed=verdict.is_allowed,
            rule=verdict.rule,
            reason=verdict.reason,
            policy=self._file.digest[:16] if self._file else "",
        )
        if not verdict.is_allowed:
            raise Refused(verdict.rule, verdict.reason)

    def release(self, question: Question, measured: Mapping[str, float]) -> dict[str, float]:
        """Return the numbers that leave beside the update, as the policy rounds them."""
        return rounded(measured, self._policy, self._request_of(question).metrics)

    def record(self, question: Question, kept: Kept) -> None:
        """Put an answer into the ledger; the spend is on disk when this returns.

        What is charged is what the training did, as it was kept with the answer.

        Raises:
            LedgerError: It could not be written: nothing may leave.
        """
        asked = self._request_of(question)
        if asked.adapter is None or kept.num_bytes > asked.adapter.num_bytes:
            raise AssertionError(f"{kept.num_bytes} bytes would leave, fewer were allowed")
        event = kept.event or event_of(asked, self._data_set.num_records)
        stage = STAGE if asked.secure_sum is None else SECURE_STAGE
        if kept.is_failed:
            stage = FAILED_STAGE
        elif stage == SECURE_STAGE:
            # As `Row.is_training_of`, of a row that is still to be written.
            training = (question.adapter, asked.settings_digest, self._data_set.digest)
            if not self._has_row(
                asked,
                lambda row: (
                    row.charges_sum and (row.adapter, row.settings, row.data_set) == training
                ),
            ):
                raise AssertionError("a masked vector would leave whose training is not charged")
            event = replace(event, steps=0)
        self._append(question, kept, stage, event)

    def record_training(self, question: Question, kept: Kept) -> None:
        """Charge a training for a secure sum; the spend is on disk when this returns.

        Raises:
            LedgerError: It could not be written: the site may not go on to say its keys.
        """
        event = kept.event or event_of(self._request_of(question), self._data_set.num_records)
        # Not the digest of the update: it does not leave, and a digest would let it be guessed.
        nothing = replace(kept, sha256=hashlib.sha256().hexdigest(), num_bytes=0, metrics={})
        self._append(question, nothing, TRAINED_STAGE, event)

    def _append(self, question: Question, kept: Kept, stage: str, event: PrivacyEvent) -> None:
        asked = self._request_of(question)
        if asked.is_private != (kept.event is not None):
            raise AssertionError("an answer of a private round knows what it cost, and no other")
        self._ledger.append(
            Entry(
                run=asked.run,
                bundle=asked.bundle,
                server_round=asked.server_round,
                stage=stage,
                adapter=question.adapter,
                settings=asked.settings_digest,
                sha256=kept.sha256,
                num_bytes=kept.num_bytes,
                metrics=kept.metrics,
                clip_norm=asked.training_settings.record_clip_norm if asked.is_private else 0.0,
                event=event,
                batch=asked.batch,
                delta=self._policy.privacy.delta,
                data_set=self._data_set,
            )
        )

    def membership(self) -> Membership:
        """Return who this site is in secure sums, and with whom it may be in one.

        Raises:
            Refused: It has no identity.
        """
        from client.secure_sum import Membership

        rules = self._policy.aggregation
        if self._identity is None:
            raise Refused("identity", "this site has no identity for secure sums")
        own = public_identity(self._identity)
        listed = frozenset() if ANY in rules.cohort else frozenset({own, *rules.cohort})
        return Membership(self._identity, rules.min_cohort, listed)

    @property
    def data_set(self) -> str:
        """Digest of the records that are trained on now."""
        return self._data_set.digest

    def _has_row(self, asked: SiteRequest, is_it: Callable[[Row], bool]) -> bool:
        """Return whether the ledger has a row of the round that is such a one."""
        place = (asked.run, asked.server_round)
        rows = self._ledger.rows()
        return any((row.run, row.server_round) == place and is_it(row) for row in rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ledger.close()

    def _parsed(self, content: bytes) -> SiteRequest:
        """Return the request of a head, without what only the run's own app says."""
        request = parse_request(content)
        return request if self._knows_bundle else request.model_copy(update={"bundle": ""})

    def _request_of(self, question: Question) -> SiteRequest:
        """Return the request of a question, with what the message itself says of its adapter."""
        return with_facts(
            self._parsed(question.content),
            shapes=question.shapes,
            rank=question.rank,
            served_rank=question.served_rank,
            alpha=question.alpha,
            base_model=question.base_model,
            content_digest=question.adapter,
        )
