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
from client.identity import public_identity, read_identity
from client.ledger import LEDGER, Entry, EpsilonOf, Ledger, utc_now
from client.policy import ANY, Policy, read_policy
from client.reasons import Refused
from client.request import SiteRequest, parse_request, with_facts
from client.verdict import judge, rounded

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from client.answers import Kept
    from client.fingerprint import Fingerprint
    from client.secure_sum import Membership
    from client.site_settings import SiteSettings
    from client.trainer import Question

STAGE = "update"
"""What the ledger calls an update that leaves by itself, not in a secure sum."""
SECURE_STAGE = "secure"
"""And a masked vector of a secure sum. Keys, shares and signatures hold nothing of the data."""


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
        identity: Ed25519PrivateKey | None = None,
    ) -> None:
        """Nothing is read or written yet.

        Args:
            policy: Of the site.
            ledger: Open for writing.
            data_set: Of the records that are trained on.
            say: Called with the name of an event and its values, for the log.
            now: Clock of the quiet hours.
            epsilon_of: The accountant.
            identity: This site's key in secure sums; None = it takes part in none.
        """
        self._identity = identity
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
            UserError: The policy, the identity or the data are missing or wrong.
            LedgerError: The ledger is broken.
        """
        from client.round import site_records

        policy = read_policy(settings.policy)
        data_set = fingerprint(site_records(settings.data), read_secret(settings.state))
        has_identity = settings.identity_key is not None or settings.identity.exists()
        identity = read_identity(settings.identity) if has_identity else None
        ledger = Ledger.open(settings.state / LEDGER)
        return cls(policy, ledger, data_set, say=say, identity=identity)

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
        is_secure = asked.secure_sum is not None
        # Another attempt masks the update that was charged with the first.
        is_charged = is_secure and self._is_masked_before(asked, kept.sha256)
        self._ledger.append(
            Entry(
                run=asked.run,
                bundle=asked.bundle,
                server_round=asked.server_round,
                stage=SECURE_STAGE if is_secure else STAGE,
                adapter=question.adapter,
                settings=asked.settings_digest,
                sha256=kept.sha256,
                num_bytes=kept.num_bytes,
                metrics=kept.metrics,
                clip_norm=settings.record_clip_norm if asked.is_private else 0.0,
                event=PrivacyEvent(
                    settings.noise_multiplier,
                    min(1.0, asked.batch / self._data_set.num_records),
                    0 if is_charged else settings.num_steps,
                ),
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

    def _is_masked_before(self, asked: SiteRequest, sha256: str) -> bool:
        """Return whether the round's first masked vector is another one than these bytes."""
        first = next(
            (
                row.sha256
                for row in self._ledger.rows()
                if (row.run, row.server_round, row.stage)
                == (asked.run, asked.server_round, SECURE_STAGE)
            ),
            sha256,
        )
        return first != sha256

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
