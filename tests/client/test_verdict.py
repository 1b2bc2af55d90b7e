"""Row 2 of issue 4: hostile requests against one policy, each refused with its rule named."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.ledger import Spent
from client.policy import Policy
from client.policy_rules import RULES
from client.request import parse_request
from client.verdict import judge, judge_all
from federation.accountant import PrivacyEvent, epsilon_of
from tests.client.policy_example import (
    ADAPTER,
    BASE,
    BUNDLE,
    NOW,
    NUM_RECORDS,
    OTHER,
    OTHER_RUN,
    POLICY,
    REQUEST,
    RUN,
    SPENT,
    changed,
    epsilon_without_sampling,
    policy,
    refused_by,
    without,
)

HEAD = json.dumps(REQUEST)


def test_the_example_is_allowed_and_every_rule_says_so() -> None:
    assert refused_by(REQUEST) == ""
    findings = judge_all(
        parse_request(HEAD.encode()), policy(), SPENT, NOW, epsilon_without_sampling
    )
    assert list(findings) == list(RULES)
    assert all(finding.is_allowed and not finding.reason for finding in findings.values())


def head_with(before: str, after: str) -> bytes:
    assert before in HEAD
    return HEAD.replace(before, after).encode()


BIG = "9" * 400
HOSTILE: list[tuple[str, str, dict[str, Any] | bytes]] = [
    # each rule by itself
    ("models.base", "another base model", changed(REQUEST, adapter__base_model=OTHER)),
    ("runs.allowed", "another run", changed(REQUEST, run=OTHER_RUN)),
    ("runs.bundles", "another bundle", changed(REQUEST, bundle=OTHER)),
    ("runs.bundles", "a bundle that is not said", changed(REQUEST, bundle="")),
    ("replay", "an answered round, another adapter", changed(REQUEST, server_round=3)),
    ("replay", "an answered round with its adapter", changed(REQUEST, server_round=1)),
    ("replay", "a round that was passed over", changed(REQUEST, server_round=2)),
    (
        "adapter.modules",
        "one module more",
        changed(REQUEST, adapter__modules=[*REQUEST["adapter"]["modules"], "model.embed_tokens"]),
    ),
    (
        "adapter.modules",
        "a module that only begins like one",
        changed(REQUEST, adapter__modules=["model.layers.0.self_attn.q_proj.base_layer"]),
    ),
    ("adapter.max_rank", "one slice more", changed(REQUEST, adapter__rank=17)),
    ("adapter.max_alpha", "the next larger alpha", changed(REQUEST, adapter__alpha=32.0000001)),
    ("training.max_steps", "one step more", changed(REQUEST, training__num_steps=9)),
    ("training.max_steps", "the most steps", changed(REQUEST, training__num_steps=2**63 - 1)),
    ("training.max_batch", "accumulation", changed(REQUEST, training__accumulation=3)),
    ("training.max_batch", "a huge batch", changed(REQUEST, training__batch_size=2**62)),
    ("training.max_tokens", "longer records", changed(REQUEST, training__max_tokens=257)),
    (
        "training.max_learning_rate",
        "a larger learning rate",
        changed(REQUEST, training__learning_rate=5.001e-4),
    ),
    ("training.max_rounds", "a round more", changed(REQUEST, server_round=5)),
    ("traffic.uplink", "more bits", changed(REQUEST, uplink="float32")),
    ("traffic.max_round_bytes", "a byte more", changed(REQUEST, adapter__num_bytes=1001)),
    ("aggregation.kinds", "another aggregation", changed(REQUEST, aggregation="products")),
    ("aggregation.secure_sum_required", "no secure sum", without(REQUEST, "secure_sum")),
    (
        "aggregation.secure_sum_required",
        "a cohort by word alone",
        changed(without(REQUEST, "secure_sum"), cohort=100),
    ),
    (
        "aggregation.min_cohort",
        "a sum that opens with three",
        changed(REQUEST, secure_sum__threshold=3),
    ),
    (
        "aggregation.cohort",
        "a sum of more sites than are listed",
        changed(REQUEST, secure_sum__threshold=5),
    ),
    (
        "metrics.weight",
        "a sum that tells of numbers of records",
        changed(REQUEST, secure_sum__max_examples=2),
    ),
    ("privacy.required", "no noise", changed(REQUEST, training__noise_multiplier=0.0)),
    ("privacy.noise_floor", "less noise", changed(REQUEST, training__noise_multiplier=3.999)),
    ("privacy.noise_floor", "hardly any", changed(REQUEST, training__noise_multiplier=5e-324)),
    (
        "privacy.max_record_clip_norm",
        "a looser clip",
        changed(REQUEST, training__record_clip_norm=0.51),
    ),
    ("privacy.one_factor_only", "both factors", changed(REQUEST, trains="AB")),
    ("metrics.allowed", "a metric more", changed(REQUEST, metrics=["seconds", "num-examples"])),
    ("metrics.allowed", "the metrics of old", without(REQUEST, "metrics")),
    ("adapter", "no adapter", without(REQUEST, "adapter")),
    # several at once: the first in the order of the rules is named
    (
        "models.base",
        "everything",
        changed(
            REQUEST,
            adapter__base_model=OTHER,
            run=OTHER_RUN,
            adapter__rank=1024,
            training__num_steps=10**9,
            training__noise_multiplier=0.0,
            trains="AB",
        ),
    ),
    (
        "runs.allowed",
        "a run of its own that asks too much",
        changed(REQUEST, run=OTHER_RUN, training__noise_multiplier=0.0, metrics=["text"]),
    ),
    (
        "training.max_steps",
        "steps for noise",
        changed(REQUEST, training__num_steps=10**6, training__noise_multiplier=1e4),
    ),
    # not a request at all
    ("request", "NaN noise", head_with('multiplier": 4.0', 'multiplier": NaN')),
    ("request", "infinite noise", head_with('multiplier": 4.0', 'multiplier": Infinity')),
    ("request", "noise beyond doubles", head_with('multiplier": 4.0', 'multiplier": 1e999')),
    ("request", "negative noise", head_with('multiplier": 4.0', 'multiplier": -4.0')),
    ("request", "400 digits of steps", head_with('steps": 8', f'steps": {BIG}')),
    ("request", "400 digits of rank", head_with('rank": 16', f'rank": {BIG}')),
    ("request", "True steps", head_with('steps": 8', 'steps": true')),
    ("request", "True as a round", head_with('round": 4', 'round": true')),
    ("request", "steps as text", head_with('steps": 8', 'steps": "8"')),
    ("request", "noise as text", head_with('multiplier": 4.0', 'multiplier": "4"')),
    ("request", "fewer steps said first", head_with('steps": 8', 'steps": 8, "num_steps": 99')),
    ("request", "a second run", head_with('"bundle"', f'"run": "{OTHER_RUN}", "bundle"')),
    ("request", "a Cyrillic a in the run", head_with(RUN, RUN.replace("a", "\u0430"))),
    ("request", "full-width digits in the base", head_with(BASE, "\uff10" * 64)),
    ("request", "a look-alike module", head_with("q_proj", "q_pr\\u043ej")),
    ("request", "a line end in a module", head_with("q_proj", "q_proj\\n")),
    ("request", "a look-alike field", head_with('"trains"', '"tr\\u0430ins"')),
    ("request", "an unknown field", changed(REQUEST, is_admin=True)),
    ("request", "an unknown training field", changed(REQUEST, training__data="/srv")),
    ("request", "no training", without(REQUEST, "training")),
    ("request", "no run", without(REQUEST, "run")),
    ("request", "a sum of one half", changed(REQUEST, secure_sum__cohort=8)),
    ("request", "a stage without terms", changed(without(REQUEST, "secure_sum"), stage="mask")),
    ("request", "a stage of no attempt", changed(REQUEST, stage="reveal")),
    ("request", "an unknown stage", changed(REQUEST, stage="open", attempt=1)),
    ("request", "two cohorts", changed(REQUEST, cohort=50)),
    ("request", "a lone surrogate", head_with(RUN, "\\ud800" * 32)),
    ("request", "a deep nest", b'{"training": ' + b"[" * 30_000),
    ("request", "70 KB", HEAD.encode() + b" " * 70_000),
]


@pytest.mark.parametrize(
    ("rule", "request_"),
    [pytest.param(rule, request, id=f"{rule}: {name}") for rule, name, request in HOSTILE],
)
def test_a_hostile_request_is_refused_and_its_rule_named(
    rule: str, request_: dict[str, Any] | bytes
) -> None:
    assert refused_by(request_) == rule


def test_every_rule_refuses_something_of_its_own() -> None:
    by_state = {
        "traffic.max_run_bytes": refused_by(
            REQUEST, spent=dataclasses.replace(SPENT, num_bytes=2001)
        ),
        "privacy.sampling_rate": refused_by(
            REQUEST, spent=dataclasses.replace(SPENT, num_records=31)
        ),
        "privacy.delta": refused_by(
            REQUEST, spent=dataclasses.replace(SPENT, num_records=1_000_000)
        ),
        "privacy.epsilon": refused_by(
            REQUEST, spent=dataclasses.replace(SPENT, events=SPENT.events * 4)
        ),
        "metrics.max_count": refused_by(REQUEST, policy(metrics__max_count=1)),
        "quiet_hours": refused_by(REQUEST, now=NOW.replace(minute=1)),
    }
    for rule, seen in by_state.items():
        assert seen == rule
    assert {rule for rule, _, _ in HOSTILE} | set(by_state) >= set(RULES)


def test_the_same_round_with_the_same_adapter_and_settings_is_allowed_and_costs_nothing() -> None:
    digest = parse_request(HEAD.encode()).settings_digest
    answered = dataclasses.replace(
        SPENT,
        answered={**SPENT.answered, 4: ADAPTER, 9: OTHER},
        settings={**SPENT.settings, 4: digest, 9: OTHER},
        num_bytes=3000,
        is_counted=True,
    )
    tight = policy(privacy__epsilon=epsilon_without_sampling(SPENT.events, 1e-6))
    assert refused_by(REQUEST, tight) == "privacy.epsilon"
    assert refused_by(REQUEST, tight, answered) == ""
    assert refused_by(changed(REQUEST, training__seed=1), tight, answered) == "replay"
    assert refused_by(changed(REQUEST, adapter__content_digest=OTHER), tight, answered) == "replay"


@pytest.mark.parametrize(
    ("stage", "is_counted", "rule"),
    [
        ("", False, "traffic.max_run_bytes"),
        ("advertise", False, "traffic.max_run_bytes"),
        ("mask", False, "traffic.max_run_bytes"),
        ("mask", True, ""),
        ("agree", False, ""),
        ("reveal", False, ""),
    ],
)
def test_every_attempt_at_a_secure_sum_sends_bytes_of_its_own(
    stage: str, is_counted: bool, rule: str
) -> None:
    """A second attempt masks the same update anew, so that other bytes leave."""
    spent = dataclasses.replace(
        SPENT,
        answered={4: ADAPTER},
        settings={4: parse_request(HEAD.encode()).settings_digest},
        num_bytes=2001,
        is_counted=is_counted,
    )
    assert (
        refused_by(REQUEST | ({"stage": stage, "attempt": 2} if stage else {}), spent=spent) == rule
    )


def test_a_round_whose_settings_the_ledger_does_not_know_is_no_repeat() -> None:
    assert refused_by(REQUEST, spent=Spent((), NUM_RECORDS, {4: ADAPTER})) == "replay"


def test_the_budget_ends_at_the_round_that_would_pass_it() -> None:
    events: tuple[PrivacyEvent, ...] = ()
    rounds = 0
    while not refused_by(REQUEST, spent=dataclasses.replace(SPENT, events=events)):
        events, rounds = (*events, PrivacyEvent(4.0, 0.032, 8)), rounds + 1
    # rho = 1 / 4 a round; 8 >= rho + 2 sqrt(rho log(1e6)) holds up to rho = 0.9 and not at 1
    assert rounds == 3
    refusal = refused_by(REQUEST, spent=dataclasses.replace(SPENT, events=events))
    assert refusal == "privacy.epsilon"


def test_the_real_accountant_lets_more_rounds_through_for_the_sampling() -> None:
    event = PrivacyEvent(4.0, 0.032, 8)
    enough = epsilon_of([event] * 40, 1e-6)
    asked = parse_request(HEAD.encode())
    for num_before, share, rule in (
        (39, 1.0001, "allowed"),
        (39, 0.9999, "privacy.epsilon"),  # the round costs as much as each before it
        (40, 1.0001, "privacy.epsilon"),
    ):
        tight = policy(privacy__epsilon=enough * share)
        spent = dataclasses.replace(SPENT, events=(event,) * num_before)
        assert judge(asked, tight, spent, NOW, epsilon_of).rule == rule


@pytest.mark.parametrize("epsilon", [math.nan, math.inf])
def test_an_accountant_that_gives_no_number_is_no_permission(epsilon: float) -> None:
    asked = parse_request(HEAD.encode())
    verdict = judge(asked, policy(), SPENT, NOW, lambda _events, _delta: epsilon)
    assert verdict.rule == "privacy.epsilon"


def test_an_accountant_that_fails_is_no_permission() -> None:
    def overflows(events: Sequence[PrivacyEvent], delta: float) -> float:
        return math.exp(1000 * len(events)) * delta

    verdict = judge(parse_request(HEAD.encode()), policy(), SPENT, NOW, overflows)
    assert verdict.rule == "privacy.epsilon"


def test_a_round_without_noise_is_only_for_a_policy_that_says_so() -> None:
    request = changed(REQUEST, training__noise_multiplier=0.0, trains="AB")
    assert refused_by(request) == "privacy.required"
    assert refused_by(request, policy(privacy__required=False)) == ""
    with_noise = policy(privacy__required=False, privacy__epsilon=0.0)
    assert refused_by(REQUEST, with_noise) == "privacy.epsilon"


def test_a_cohort_without_a_secure_sum_is_noted_as_the_servers_word() -> None:
    rules = policy(aggregation__secure_sum_required=False)
    request = without(REQUEST, "secure_sum")
    assert refused_by(request, rules) == "aggregation.min_cohort"
    assert refused_by(changed(request, cohort=3), rules) == "aggregation.min_cohort"
    assert refused_by(changed(request, cohort=4), rules) == ""
    asked = parse_request(json.dumps(changed(request, cohort=4)).encode())
    findings = judge_all(asked, rules, SPENT, NOW, epsilon_without_sampling)
    assert "only the server's word" in findings["aggregation.min_cohort"].note


def test_an_identity_that_is_listed_twice_is_one_site() -> None:
    twice = policy(aggregation__cohort=["1" * 64, "2" * 64, "2" * 64])
    assert refused_by(REQUEST, twice) == "aggregation.cohort"


def test_metrics_that_the_noise_does_not_cover_are_noted() -> None:
    asked = parse_request(HEAD.encode())
    finding = judge_all(asked, policy(), SPENT, NOW, epsilon_without_sampling)["metrics.allowed"]
    assert finding.is_allowed
    assert finding.note.startswith("seconds, train_loss")


def test_a_refusal_does_not_tell_what_depends_on_the_records() -> None:
    spent = Spent((PrivacyEvent(4.0, 0.1, 8),) * 3, 12_345, {}, {}, 0)
    cases: list[tuple[str, dict[str, Any], Policy, Spent]] = [
        ("privacy.epsilon", REQUEST, policy(), spent),
        ("privacy.delta", REQUEST, policy(privacy__delta=0.01), spent),
        (
            "privacy.sampling_rate",
            changed(REQUEST, training__batch_size=8_000),
            policy(training__max_batch=20_000),
            spent,
        ),
    ]
    for rule, request, rules, known in cases:
        asked = parse_request(json.dumps(request).encode())
        verdict = judge(asked, rules, known, NOW, epsilon_without_sampling)
        assert verdict.rule == rule
        epsilon = epsilon_without_sampling(spent.events * 2, 1e-6)
        assert not any(told in verdict.reason for told in ("12345", "12,345", f"{epsilon:.2f}"))
        assert verdict.reason.count(". ") == 0


# One change beyond each bound of a request that is allowed: (rule, path of the field, values).
LARGEST = 2**63 - 1
HEX = st.text("0123456789abcdef", min_size=64, max_size=64)
WORDS = st.from_regex(r"\A[a-z][a-z0-9_-]{0,20}\Z")
BEYOND: list[tuple[str, str, st.SearchStrategy[Any]]] = [
    ("models.base", "adapter__base_model", HEX.filter(lambda digest: digest != BASE)),
    ("runs.allowed", "run", HEX.map(lambda digest: digest[:32]).filter(lambda run: run != RUN)),
    ("runs.bundles", "bundle", HEX.filter(lambda digest: digest != BUNDLE)),
    ("replay", "server_round", st.integers(1, 3)),
    ("training.max_rounds", "server_round", st.integers(5, 1_000_000)),
    ("adapter.modules", "adapter__modules", st.lists(WORDS, min_size=1, max_size=3)),
    ("adapter.max_rank", "adapter__rank", st.integers(17, 1024)),
    ("adapter.max_alpha", "adapter__alpha", st.floats(32.0, 1e6, exclude_min=True)),
    ("training.max_steps", "training__num_steps", st.integers(9, LARGEST)),
    ("training.max_batch", "training__batch_size", st.integers(17, LARGEST)),
    ("training.max_batch", "training__accumulation", st.integers(3, LARGEST)),
    ("training.max_tokens", "training__max_tokens", st.integers(257, LARGEST)),
    ("traffic.uplink", "uplink", st.sampled_from(["float32", "int8", "int4"])),
    ("traffic.max_round_bytes", "adapter__num_bytes", st.integers(1001, 2**53)),
    ("aggregation.kinds", "aggregation", st.sampled_from(["products", "factors", "krum"])),
    ("aggregation.min_cohort", "secure_sum__threshold", st.just(3)),
    ("aggregation.secure_sum_required", "secure_sum", st.none()),
    ("privacy.required", "training__noise_multiplier", st.just(0.0)),
    (
        "privacy.noise_floor",
        "training__noise_multiplier",
        st.floats(0, 4, exclude_min=True, exclude_max=True),
    ),
    (
        "privacy.max_record_clip_norm",
        "training__record_clip_norm",
        st.floats(0.5, 1e6, exclude_min=True),
    ),
    ("privacy.one_factor_only", "trains", st.just("AB")),
    (
        "metrics.allowed",
        "metrics",
        st.lists(WORDS, min_size=1, max_size=4, unique=True).filter(
            lambda names: not set(names) <= set(POLICY["metrics"]["allowed"])
        ),
    ),
]


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_an_allowed_request_with_one_field_beyond_its_bound_is_refused_by_that_bound(
    data: st.DataObject,
) -> None:
    rule, path, values = data.draw(st.sampled_from(BEYOND))
    assert refused_by(changed(REQUEST, **{path: data.draw(values)})) == rule


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_several_fields_beyond_their_bounds_are_refused_by_the_first_rule(
    data: st.DataObject,
) -> None:
    # What is drawn of a secure sum is either none or its threshold.
    kinds = st.lists(
        st.sampled_from(BEYOND),
        min_size=2,
        max_size=4,
        unique_by=lambda beyond: beyond[1].removesuffix("__threshold"),
    )
    chosen = data.draw(kinds)
    request = changed(REQUEST, **{path: data.draw(values) for _, path, values in chosen})
    assert refused_by(request) == min((rule for rule, _, _ in chosen), key=list(RULES).index)


ANYTHING = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([1, 2, 5, 0.5, 1e-300, "A", "AB", "int8", "", [], {}])
)
PATHS = [
    *(name for name, value in REQUEST.items() if not isinstance(value, dict)),
    *(
        f"{table}__{name}"
        for table, value in REQUEST.items()
        if isinstance(value, dict)
        for name in value
    ),
]


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(st.sampled_from(PATHS), ANYTHING, max_size=4))
def test_a_verdict_is_given_for_every_request_and_never_an_error(changes: dict[str, Any]) -> None:
    rule = refused_by(changed(REQUEST, **changes))
    assert rule in ("", "request", "adapter", *RULES)
