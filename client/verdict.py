"""Whether a request may be answered: one pure function, and nothing is allowed that a rule refuses.

`judge` walks over the rules in their order and stops at the first that is broken; `judge_all` walks
over all of them, for the officer who wants to see the whole list. Both take everything they know
as arguments, and never raise for what a request holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from client.ledger import EpsilonOf, Spent
from client.policy import Policy
from client.policy_rules import RULES, Case, Finding
from client.request import SiteRequest


@dataclass(frozen=True)
class Verdict:
    """Whether a request may be answered, and if not, which rule says so."""

    is_allowed: bool
    rule: str
    """The broken rule, or "allowed"."""
    reason: str
    """One sentence that may leave the site."""


def judge(
    request: SiteRequest,
    policy: Policy,
    spent: Spent,
    now: datetime,
    epsilon_of: EpsilonOf,
) -> Verdict:
    """Return whether a request may be answered, or the first rule that it breaks.

    Args:
        request: With the facts of its adapter (`client.request.with_facts`).
        policy: Of the site.
        spent: From the ledger, for the data set at hand and the run that asks.
        now: With a time zone.
        epsilon_of: The accountant.
    """
    for rule, finding in _findings(request, policy, spent, now, epsilon_of):
        if not finding.is_allowed:
            return Verdict(False, rule, f"refused by this site's policy ({rule}): {finding.reason}")
    return Verdict(True, "allowed", "every rule of this site's policy allows it")


def judge_all(
    request: SiteRequest,
    policy: Policy,
    spent: Spent,
    now: datetime,
    epsilon_of: EpsilonOf,
) -> dict[str, Finding]:
    """Return what every rule says of a request, in the order of ``RULES``.

    Without the facts of an adapter there is one finding, of the rule "adapter".
    """
    return dict(_findings(request, policy, spent, now, epsilon_of))


def rounded(metrics: Mapping[str, float], policy: Policy, asked: Sequence[str]) -> dict[str, float]:
    """Return the metrics that leave: asked, allowed, finite, and rounded to the policy's digits.

    Args:
        metrics: All that the training measured.
        policy: Of the site.
        asked: Names that the request has.
    """
    digits = policy.metrics.digits
    names = [name for name in metrics if name in asked and name in policy.metrics.allowed]
    kept = {name: float(f"{metrics[name]:.{digits}g}") for name in names}
    return {name: value for name, value in kept.items() if math.isfinite(value)}


def _findings(
    request: SiteRequest, policy: Policy, spent: Spent, now: datetime, epsilon_of: EpsilonOf
) -> Iterator[tuple[str, Finding]]:
    """Yield what each rule says; the next one is computed only when it is asked for."""
    if request.adapter is None:
        reason = "the request comes without an adapter: expected a message with one"
        yield "adapter", Finding(False, "none", "one adapter", reason)
        return
    case = Case(request, policy, spent, now, epsilon_of, request.adapter)
    for rule, look in RULES.items():
        yield rule, look(case)
