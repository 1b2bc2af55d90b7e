"""The rules of a site's policy: one function each, from a request and what is known to a finding.

They read no file, no clock and no state, and never raise for what a request holds. The order of
``RULES`` puts who and what first, then what it costs, then what leaks; the one rule that takes
time (epsilon) is computed only for requests within the bounds of those that it rests on.

``Finding.reason`` goes to the other side, so it holds numbers of the request and limits of the
policy, and never a number that depends on the records: not how many there are, not the epsilon
spent so far. Those stand in ``Finding.value`` and ``limit``, which are for this site's own log.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from functools import cached_property

from client.ledger import EpsilonOf, Spent
from client.policy import ANY, Policy
from client.request import AdapterFacts, SiteRequest
from client.settings import LEAST_CLIP_NORM
from federation.accountant import PrivacyEvent
from federation.metrics import DATA_METRICS
from federation.run_signature import difference, is_over, is_signed_by, parse_description

_MAX_SHOWN = 80


@dataclass(frozen=True)
class Finding:
    """What one rule says of a request. For this site's eyes: the value may depend on its data."""

    is_allowed: bool
    value: str
    limit: str
    reason: str
    """Why it is refused: one sentence that may leave the site. Empty when it is allowed."""
    note: str = ""
    """What the officer should know of this rule in this case."""


@dataclass(frozen=True)
class Case:
    """Everything that a verdict depends on."""

    request: SiteRequest
    policy: Policy
    spent: Spent
    now: datetime
    epsilon_of: EpsilonOf
    facts: AdapterFacts

    @property
    def is_repeat(self) -> bool:
        """Whether the very same was answered before: it is sent again, not trained again."""
        asked, spent = self.request, self.spent
        return (
            spent.is_kept
            and spent.answered.get(asked.server_round) == self.facts.content_digest
            and spent.settings.get(asked.server_round) == asked.settings_digest
        )

    @property
    def sends_anew(self) -> bool:
        """Whether an update would leave whose bytes the ledger does not have yet.

        A plain answer is sent again as it is. Each attempt at a secure sum masks its update anew,
        and sends it in the stage ``mask``; what follows are signatures and shares.
        """
        if self.request.secure_sum is None:
            return not self.is_repeat
        return self.request.stage not in ("agree", "reveal") and not self.spent.is_counted

    @cached_property
    def unsigned(self) -> str:
        """Why no signer of the policy vouches for the run as it is asked here; "" = one does."""
        asked, signers = self.request, self.policy.runs.signers
        if not asked.signature:
            return "no signature"
        if not any(is_signed_by(key, asked.signature, asked.description) for key in signers):
            return "a signature that no listed signer gave to this description"
        try:
            signed = parse_description(asked.description)
        except ValueError as error:
            return f"a signature, of {error}"
        if is_over(signed, self.now):
            return f"a signature that ended at {signed.not_after}"
        if not asked.num_rounds:
            return "a signature, but does not say num_rounds"
        fault = difference(signed, asked.described(self.facts))
        return f"a signature of another description: {fault}" if fault else ""


def event_of(request: SiteRequest, num_records: int) -> PrivacyEvent:
    """Return what training as a request asks spends of a data set; noise 0 where it has none.

    Args:
        request: One whose batch is no larger than the data set, if it is private.
        num_records: Of the data set, after cleaning.
    """
    settings = request.training_settings
    rate = min(1.0, request.batch / num_records)
    return PrivacyEvent(settings.noise_multiplier, rate, settings.num_steps)


def _finding(is_allowed: bool, value: str, limit: str, reason: str, note: str = "") -> Finding:
    """Return a finding; ``reason`` is why it would be refused."""
    return Finding(is_allowed, value, limit, "" if is_allowed else reason, note)


def _at_most(what: str, value: float, limit: float) -> Finding:
    reason = f"{what} is {value:.15g}, at most {limit:.15g} is allowed"
    # The comparison is False for NaN.
    return _finding(value <= limit, f"{value:.15g}", f"at most {limit:.15g}", reason)


def _listed(what: str, value: str, allowed: Sequence[str]) -> Finding:
    shown = _brief(value) or "not said"
    reason = f"{what} {shown} is not on the list of what is allowed"
    return _finding(ANY in allowed or value in allowed, shown, _names(allowed), reason)


def _names(names: Sequence[str]) -> str:
    return _shown(", ".join(map(_brief, names))) or "none"


def _brief(name: str) -> str:
    """Return the beginning of a digest, and any other name as it is."""
    return f"{name[:16]}…" if re.fullmatch("[0-9a-f]{64}", name) else _shown(name)


def _shown(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 1]}…"


def _required(is_required: bool) -> str:
    return "required" if is_required else "not required"


def _base(case: Case) -> Finding:
    return _listed("base model", case.facts.base_model, case.policy.models.base)


def _run(case: Case) -> Finding:
    rules, asked = case.policy.runs, case.request
    finding = _listed("run", asked.run, rules.allowed)
    limit = f"{finding.limit}; or signed by one of {len(rules.signers)} signers"
    if finding.is_allowed:
        return _finding(True, asked.run, limit, "")
    if not case.unsigned:
        return _finding(True, f"{asked.run}, signed", limit, "")
    reason = f"{finding.reason}, and has {case.unsigned}"
    return _finding(False, f"{asked.run}, {case.unsigned}", limit, reason)


def _bundle(case: Case) -> Finding:
    bundle = case.request.bundle
    finding = _listed("bundle", bundle, case.policy.runs.bundles)
    if not finding.is_allowed and bundle and not case.unsigned:
        return _finding(True, f"{_brief(bundle)}, signed", finding.limit, "")
    return finding


def _replay(case: Case) -> Finding:
    number, answered = case.request.server_round, case.spent.answered
    last = max(answered, default=0)
    limit = f"after round {last}, or the same again" if last else "any round"
    if case.is_repeat:
        return _finding(True, f"round {number}, the same again", limit, "")
    if number in answered:
        is_same = answered[number] == case.facts.content_digest
        other = "other settings" if is_same else "another adapter"
        reason = f"round {number} of this run was answered before, for {other}"
        if is_same and case.spent.settings.get(number) == case.request.settings_digest:
            other = "its answer gone"
            reason = f"round {number} of this run was answered before, and its answer is not kept"
        return _finding(False, f"round {number}, {other}", limit, reason)
    reason = f"round {number} of this run was passed over: round {last} was answered already"
    return _finding(number > last, f"round {number}", limit, reason)


def _modules(case: Case) -> Finding:
    patterns, names = case.policy.adapter.modules, case.facts.modules
    outside = [n for n in names if not any(fnmatchcase(n, pattern) for pattern in patterns)]
    value = f"{len(names)} modules, {len(outside)} outside"
    reason = f"module {_shown(outside[0])} is none of those allowed" if outside else ""
    return _finding(not outside, value, _names(patterns), reason)


def _run_bytes(case: Case) -> Finding:
    total = case.spent.num_bytes + (case.facts.num_bytes if case.sends_anew else 0)
    return _at_most("the bytes of the run's updates", total, case.policy.traffic.max_run_bytes)


def _secure_sum(case: Case) -> Finding:
    is_secure, is_required = (
        case.request.secure_sum is not None,
        case.policy.aggregation.secure_sum_required,
    )
    value = "secure sum" if is_secure else "the server sees this site's update by itself"
    reason = "a secure sum is required, and the request has no secure_sum"
    return _finding(is_secure or not is_required, value, _required(is_required), reason)


def _cohort(case: Case) -> Finding:
    least, terms = case.policy.aggregation.min_cohort, case.request.secure_sum
    seen = case.request.cohort if terms is None else terms.threshold
    what = "cohort" if terms is None else "secure_sum.threshold"
    said = f"{what} is {seen}" if seen else f"{what} is not said"
    reason = f"{said}, at least {least} sites must be in a sum"
    note = "" if terms else "without a secure sum the cohort is only the server's word"
    return _finding(max(seen, 1) >= least, said, f"at least {least}", reason, note)


def _identities(case: Case) -> Finding:
    listed, terms = case.policy.aggregation.cohort, case.request.secure_sum
    if terms is None:
        return Finding(True, "no secure sum", "for secure sums", "")
    value = "any site" if ANY in listed else f"{len(set(listed))} sites listed"
    reason = (
        f"secure_sum.threshold is {terms.threshold}, and this site's policy lists too few others "
        "that may be in a sum with it"
    )
    note = "with any site in it, a server can play the others itself" if ANY in listed else ""
    # This site itself need not be on its own list.
    is_enough = ANY in listed or len(set(listed)) + 1 >= terms.threshold
    return _finding(is_enough, value, f"{terms.threshold - 1} others", reason, note)


def _weight(case: Case) -> Finding:
    terms, allowed = case.request.secure_sum, case.policy.metrics.allowed
    largest = 1 if terms is None else terms.max_examples
    reason = (
        f"secure_sum.max_examples is {largest}: the sum would tell of the number of records, which "
        "no noise covers; set it to 1"
    )
    is_allowed = largest == 1 or not case.request.is_private or "num-examples" in allowed
    limit = "1 under noise, unless num-examples may leave"
    return _finding(is_allowed, f"{largest}", limit, reason)


def _private(case: Case) -> Finding:
    is_private, is_required = case.request.is_private, case.policy.privacy.required
    noise = case.request.training_settings.noise_multiplier
    reason = "differential privacy is required, and training.noise_multiplier is 0"
    note = "" if is_private else "no noise: what the update reveals has no bound"
    return _finding(
        is_private or not is_required, f"noise {noise:.15g}", _required(is_required), reason, note
    )


def _noise(case: Case) -> Finding:
    noise, floor = case.request.training_settings.noise_multiplier, case.policy.privacy.noise_floor
    reason = f"training.noise_multiplier is {noise:.15g}, at least {floor:.15g} is needed"
    return _finding(noise >= floor, f"{noise:.15g}", f"at least {floor:.15g}", reason)


def _clip_norm(case: Case) -> Finding:
    bound = case.request.training_settings.record_clip_norm
    finding = _at_most("training.record_clip_norm", bound, case.policy.privacy.max_record_clip_norm)
    if bound >= LEAST_CLIP_NORM:
        return finding
    # No request can say it; a rule that rests on that would fall with it.
    limit = f"at least {LEAST_CLIP_NORM:g}, {finding.limit}"
    reason = f"training.record_clip_norm is {bound:.15g}, at least {LEAST_CLIP_NORM:g} is needed"
    return _finding(False, finding.value, limit, reason)


def _one_factor(case: Case) -> Finding:
    trains, is_one_only = case.request.trains, case.policy.privacy.one_factor_only
    reason = f"trains is {trains}, and under noise only one factor may learn"
    limit = "A or B" if is_one_only else "any factor"
    return _finding(len(trains) == 1 or not is_one_only, trains, limit, reason)


def _sampling(case: Case) -> Finding:
    batch, num_records = case.request.batch, case.spent.num_records
    reason = f"a step of {batch} records is more than this site's data allow"
    return _finding(batch <= num_records, f"{batch} a step", f"of {num_records} records", reason)


def _delta(case: Case) -> Finding:
    delta, num_records = case.policy.privacy.delta, case.spent.num_records
    reason = "this site's delta is too large for its data: its own officer must lower it"
    limit = f"below 1 / {num_records} records"
    return _finding(delta * num_records < 1, f"{delta:.15g}", limit, reason)


def _epsilon(case: Case) -> Finding:
    rules = case.policy.privacy
    limit = f"at most {rules.epsilon:.15g} for life at delta {rules.delta:.15g}"
    # What the computation rests on, and what bounds its cost.
    if not all(look(case).is_allowed for look in (_noise, _sampling, _steps)):
        reason = "the request is outside of the bounds within which epsilon is computed"
        return _finding(False, "not computed", limit, reason)
    asked = event_of(case.request, case.spent.num_records)
    events = case.spent.events if case.is_repeat else (*case.spent.events, asked)
    try:
        epsilon = case.epsilon_of(events, rules.delta)
    except (ArithmeticError, ValueError):  # an accountant at its own limits is no permission
        epsilon = float("inf")
    reason = (
        f"the privacy budget of this site's data (epsilon {rules.epsilon:.15g} for life) does not "
        "cover this round"
    )
    # The comparison is False for NaN.
    return _finding(epsilon <= rules.epsilon, f"{epsilon:.4g} with this round", limit, reason)


def _steps(case: Case) -> Finding:
    num_steps = case.request.training_settings.num_steps
    return _at_most("training.num_steps", num_steps, case.policy.training.max_steps)


def _metrics(case: Case) -> Finding:
    asked, allowed = case.request.metrics, case.policy.metrics.allowed
    refused = [name for name in asked if name not in allowed]
    reason = f"metric {_shown(refused[0])} is not allowed: ask without it" if refused else ""
    bare = [name for name in asked if name in DATA_METRICS and case.request.is_private]
    note = f"{', '.join(bare)}: told by the records, and no noise covers it" if bare else ""
    return _finding(not refused, _names(asked), _names(allowed), reason, note)


def _quiet(case: Case) -> Finding:
    quiet = case.policy.quiet_hours
    reason = "this is a quiet hour at this site: ask again later"
    limit = f"outside {len(quiet.windows)} windows ({quiet.time_zone})"
    return _finding(not quiet.hold(case.now), f"{case.now:%Y-%m-%d %H:%M %Z}", limit, reason)


def _if_private(look: Callable[[Case], Finding]) -> Callable[[Case], Finding]:
    """Return a rule that says nothing of a round without noise: `privacy.required` does."""

    def looked(case: Case) -> Finding:
        if case.request.is_private:
            return look(case)
        return Finding(True, "no noise", "for rounds with noise", "")

    return looked


RULES: dict[str, Callable[[Case], Finding]] = {
    "models.base": _base,
    "runs.allowed": _run,
    "runs.bundles": _bundle,
    "replay": _replay,
    "adapter.modules": _modules,
    "adapter.max_rank": lambda c: _at_most("rank", c.facts.rank, c.policy.adapter.max_rank),
    "adapter.max_alpha": lambda c: _at_most("alpha", c.facts.alpha, c.policy.adapter.max_alpha),
    "training.max_steps": _steps,
    "training.max_batch": lambda c: _at_most(
        "training.batch_size * accumulation", c.request.batch, c.policy.training.max_batch
    ),
    "training.max_tokens": lambda c: _at_most(
        "training.max_tokens", c.request.training_settings.max_tokens, c.policy.training.max_tokens
    ),
    "training.max_learning_rate": lambda c: _at_most(
        "training.learning_rate",
        c.request.training_settings.learning_rate,
        c.policy.training.max_learning_rate,
    ),
    "training.max_rounds": lambda c: _at_most(
        "server_round", c.request.server_round, c.policy.training.max_rounds
    ),
    "traffic.uplink": lambda c: _listed("uplink", c.request.uplink, c.policy.traffic.uplink),
    "traffic.max_round_bytes": lambda c: _at_most(
        "the update's bytes", c.facts.num_bytes, c.policy.traffic.max_round_bytes
    ),
    "traffic.max_run_bytes": _run_bytes,
    "aggregation.kinds": lambda c: _listed(
        "aggregation", c.request.aggregation, c.policy.aggregation.kinds
    ),
    "aggregation.secure_sum_required": _secure_sum,
    "aggregation.min_cohort": _cohort,
    "aggregation.cohort": _identities,
    "privacy.required": _private,
    "privacy.noise_floor": _if_private(_noise),
    "privacy.max_record_clip_norm": _if_private(_clip_norm),
    "privacy.one_factor_only": _if_private(_one_factor),
    "privacy.sampling_rate": _if_private(_sampling),
    "privacy.delta": _if_private(_delta),
    "privacy.epsilon": _if_private(_epsilon),
    "metrics.allowed": _metrics,
    "metrics.weight": _weight,
    "metrics.max_count": lambda c: _at_most(
        "the number of metrics", len(c.request.metrics), c.policy.metrics.max_count
    ),
    "quiet_hours": _quiet,
}
"""Every rule, in the order in which they are judged."""
