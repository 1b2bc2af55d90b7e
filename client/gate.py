"""Between a question and its answer: this site's policy before the training, its ledger after it.

`client.trainer` calls in this order: `allow` before anything is trained, `release` for the numbers
beside the update, `record` once the answer is on disk and before a byte of it leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Self

from client import accountant
from client.accountant import PrivacyEvent
from client.fingerprint import fingerprint, read_secret
from client.ledger import LEDGER, Entry, EpsilonOf, Ledger, utc_now
from client.policy import Policy, read_policy
from client.reasons import Refused
from client.request import SiteRequest, parse_request, with_facts
from client.verdict import judge, rounded

if TYPE_CHECKING:
    from client.answers import Kept
    from client.fingerprint import Fingerprint
    from client.site_settings import SiteSettings
    from client.trainer import Question

STAGE = "update"
"""What the ledger calls an update that leaves by itself, not in a secure sum."""


class SiteGate:
    """One site's policy and ledger, for one data set."""

    def __init__(
        self,
        policy: Policy,
        ledger: Ledger,
        data_set: Fingerprint,
        *,
        say: Callable[..., None],
        now: Callable[[], datetime] = utc_now,
        epsilon_of: EpsilonOf = accountant.epsilon_of,
    ) -> None:
        """Nothing is read or written yet.

        Args:
            policy: Of the site.
            ledger: Open for writing.
            data_set: Of the records that are trained on.
            say: Called with the name of an event and its values, for the log.
            now: Clock of the quiet hours.
            epsilon_of: The accountant.
        """
        self._policy = policy
        self._ledger = ledger
        self._data_set = data_set
        self._say = say
        self._now = now
        self._epsilon_of = epsilon_of

    @classmethod
    def open(cls, settings: SiteSettings, say: Callable[..., None]) -> Self:
        """Read a site's policy, open its ledger, and take the fingerprint of its records.

        Raises:
            UserError: The policy or the data are missing or wrong.
            LedgerError: The ledger is broken.
        """
        from client.round import site_records

        policy = read_policy(settings.policy)
        data_set = fingerprint(site_records(settings.data), read_secret(settings.state))
        return cls(policy, Ledger.open(settings.state / LEDGER), data_set, say=say)

    def allow(self, question: Question) -> None:
        """Return when the policy allows a question; every verdict is in the log.

        Raises:
            Refused: With the rule that it breaks.
            RequestError: It is no request.
        """
        asked = _request_of(question)
        spent = self._ledger.spent(self._data_set, asked.run)
        verdict = judge(asked, self._policy, spent, self._now(), self._epsilon_of)
        self._say(
            "judged",
            run=asked.run,
            server_round=asked.server_round,
            is_allowed=verdict.is_allowed,
            rule=verdict.rule,
            reason=verdict.reason,
        )
        if not verdict.is_allowed:
            raise Refused(verdict.rule, verdict.reason)

    def release(self, question: Question, measured: Mapping[str, float]) -> dict[str, float]:
        """Return the numbers that leave beside the update, as the policy rounds them."""
        return rounded(measured, self._policy, _request_of(question).metrics)

    def record(self, question: Question, kept: Kept) -> None:
        """Put an answer into the ledger; the spend is on disk when this returns.

        Raises:
            LedgerError: It could not be written: nothing may leave.
        """
        asked = _request_of(question)
        settings = asked.training_settings
        self._ledger.append(
            Entry(
                run=asked.run,
                bundle=asked.bundle,
                server_round=asked.server_round,
                stage=STAGE,
                adapter=question.adapter,
                settings=asked.settings_digest,
                sha256=kept.sha256,
                num_bytes=kept.num_bytes,
                metrics=kept.metrics,
                clip_norm=settings.record_clip_norm if asked.is_private else 0.0,
                event=PrivacyEvent(
                    settings.noise_multiplier,
                    min(1.0, asked.batch / self._data_set.num_records),
                    settings.num_steps,
                ),
                delta=self._policy.privacy.delta,
                data_set=self._data_set,
            )
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ledger.close()


def _request_of(question: Question) -> SiteRequest:
    """Return the request of a question, with what the message itself says of its adapter."""
    request = parse_request(question.content)
    return with_facts(
        request,
        shapes=question.shapes,
        rank=question.rank,
        alpha=question.alpha,
        base_model=question.base_model,
        content_digest=question.adapter,
    )
