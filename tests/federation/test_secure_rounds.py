"""Rounds that are secure sums, through real trainers, policies and ledgers of four tiny sites."""

import json
import tomllib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.identity import public_identity
from client.ledger import LEDGER, read_ledger
from client.policy import Policy
from client.policy_template import policy_template
from federation.adapter import Adapter, read_adapter
from federation.events import RoundFinished, SiteFailed, SumOpened, UpdateReceived
from federation.exchange import RoundError
from federation.plan import make_plan
from federation.run_directory import RunDirectory
from federation.secure_messages import Stage
from federation.settings import FederationSettings, SettingsError, load_settings
from federation.sites import Reply
from federation.status import summarise
from federation.update import open_update
from tests.federation.runs import dense, events
from tests.federation.secure_runs import (
    CLIP,
    RANK,
    SHORT,
    Make,
    die,
    once,
    run,
    secure_settings,
)
from tests.secure_sites import SecureSites

BOUND = CLIP / (2**15 - 1) * RANK**0.5
"""On a number of B @ A: each of R numbers of B is rounded by less than a step, and A's rows are
orthonormal."""


@pytest.fixture
def settings(tiny_model: Path, tmp_path: Path) -> Make:
    return partial(secure_settings, tiny_model, out=str(tmp_path / "run"))


@pytest.fixture
def sites(tiny_model: Path, tmp_path: Path) -> Iterator[SecureSites]:
    with SecureSites(tiny_model, tmp_path / "sites") as made:
        yield made


def distance(one: Adapter, other: Adapter) -> float:
    """Return the largest difference of a number of the products: QR turns the factors."""
    pairs = [(dense(one.modules[name]), dense(other.modules[name])) for name in one.modules]
    return max(float(np.abs(a - b).max()) for a, b in pairs)


def run_id(directory: Path) -> str:
    return json.loads((directory / "run.json").read_text())["run"]


def expected(sites: SecureSites, out: Path, names: str) -> dict[str, np.ndarray]:
    """Return the products of round 1, from what lies on the disks of the sites in the sum."""
    served = open_update(out / "served" / "round-0001.update")
    changes = [
        np.fromfile(each.site.state / "answers" / run_id(out) / "1.update", "<f4")
        for name, each in sites.institutions.items()
        if name in names
    ]
    mean_N, start, products = np.mean(np.float64(changes), axis=0), 0, {}
    for module, (num_out, _) in sorted(served.shapes().items()):
        factors = served.read(module)
        b_RO = factors.b_OR.double().numpy().T
        b_RO = b_RO + mean_N[start : start + RANK * num_out].reshape(RANK, num_out)
        products[module] = b_RO.T @ factors.a_RI.double().numpy()
        start += RANK * num_out
    assert start == len(mean_N)
    return products


def assert_mean_of(sites: SecureSites, settings: FederationSettings, names: str) -> None:
    adapter = read_adapter(Path(settings.out) / "round-0001")
    for module, product in expected(sites, Path(settings.out), names).items():
        assert np.abs(dense(adapter.modules[module]) - product).max() < BOUND


def test_a_secure_round_gives_the_alternating_average(
    settings: Make, sites: SecureSites, tiny_model: Path, tmp_path: Path
) -> None:
    secure = read_adapter(run(sites, settings()))
    (opened,) = events(settings(), SumOpened)
    assert opened.sites == ["a", "b", "c", "d"]
    plain_settings = settings(secure_sum={"enabled": False}, out=str(tmp_path / "plain"))
    open_policy = {
        "aggregation__secure_sum_required": False,
        "aggregation__min_cohort": 1,
    }
    with SecureSites(tiny_model, tmp_path / "open", **open_policy) as others:
        plain = read_adapter(run(others, plain_settings))
    assert 0 < distance(secure, plain) < BOUND


@pytest.mark.parametrize("stage", list(Stage))
def test_a_site_that_drops_out_at_any_stage_leaves_the_sum_of_those_whose_vectors_came(
    settings: Make, sites: SecureSites, stage: Stage
) -> None:
    sites.silent["b"] = stage
    run(sites, settings(training=SHORT))
    came = "abcd" if stage in (Stage.AGREE, Stage.REVEAL) else "acd"
    (opened,) = events(settings(), SumOpened)
    assert (opened.sites, opened.attempt) == (list(came), 1)
    (failed,) = events(settings(), SiteFailed)
    assert (failed.site, failed.reason.partition(":")[0]) == ("b", f"stage {stage}")
    assert_mean_of(sites, settings(), came)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Stage.ADVERTISE, Stage.MASK),
        (Stage.SHARE, Stage.REVEAL),
        (Stage.MASK, Stage.MASK),
        (Stage.MASK, Stage.AGREE),
        (Stage.AGREE, Stage.REVEAL),
    ],
)
def test_two_of_five_sites_may_drop_out_at_different_stages(
    settings: Make, tiny_model: Path, tmp_path: Path, first: Stage, second: Stage
) -> None:
    made = settings(training=SHORT, num_sites=5)
    with SecureSites(tiny_model, tmp_path / "sites", names="abcde") as sites:
        sites.silent = {"a": first, "d": second}
        run(sites, made)
        late = (Stage.AGREE, Stage.REVEAL)
        came = "".join(name for name in "abcde" if sites.silent.get(name, late[0]) in late)
        assert events(made, SumOpened)[0].sites == list(came)
        assert_mean_of(sites, made, came)


@pytest.mark.parametrize("stage", [each for each in Stage if each != Stage.REVEAL])
def test_below_the_threshold_every_attempt_ends_with_nothing_opened(
    settings: Make, sites: SecureSites, stage: Stage
) -> None:
    sites.silent = {"b": stage, "c": stage}
    with pytest.raises(RoundError, match=f"2 sites answered in stage {stage}, 3 are needed"):
        run(sites, settings(training=SHORT))
    assert events(settings(), SumOpened) == []
    attempts = sorted({attempt for _, attempt, _ in sites.asked})
    assert attempts == [1, 2]
    assert not any(stage == Stage.REVEAL for _, _, stage in sites.asked)
    # Nothing of a site's secrets was told: no share but sealed ones.
    assert {reply.stage for reply in sites.arrived} <= set(Stage) - {Stage.REVEAL}
    # The next life of the server asks anew, and the sites do not train again.
    sites.silent = {}
    resumed = settings(resume=settings().out)
    run(sites, resumed)
    (opened,) = events(settings(), SumOpened)
    assert opened.attempt == 3
    assert_mean_of(sites, settings(), "abcd")
    for each in sites.institutions.values():
        trained = [values for event, values in each.said if event == "trained"]
        assert len(trained) == 1


@pytest.mark.parametrize("stage", list(Stage))
def test_a_server_that_is_killed_between_two_stages_never_mixes_two_attempts(
    settings: Make, sites: SecureSites, stage: Stage
) -> None:
    sites.before[stage] = once(die)
    with pytest.raises(SystemExit):
        run(sites, settings(training=SHORT))
    run(sites, settings(resume=settings().out))
    (opened,) = events(settings(), SumOpened)
    # Before the last stage all begins anew; in it, the very same is asked once more.
    assert opened.attempt == (1 if stage == Stage.REVEAL else 2)
    assert opened.sites == list("abcd")
    assert_mean_of(sites, settings(), "abcd")


def test_a_server_that_is_killed_after_all_was_revealed_opens_the_same_sum_again(
    settings: Make, sites: SecureSites, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(RunDirectory, "commit", lambda *_: die())
        run(sites, settings(training=SHORT))
    before = {r.site: r.update for r in sites.arrived if r.stage == Stage.REVEAL}
    sites.arrived.clear()
    run(sites, settings(resume=settings().out))
    assert {r.stage for r in sites.arrived} == {Stage.REVEAL}
    assert {r.site: r.update for r in sites.arrived} == before
    assert [event.attempt for event in events(settings(), SumOpened)] == [1, 1]
    assert_mean_of(sites, settings(), "abcd")


def test_sites_that_are_gone_when_shares_are_shown_are_waited_for_over_a_resume(
    settings: Make, sites: SecureSites
) -> None:
    sites.silent = {"b": Stage.REVEAL, "c": Stage.REVEAL}
    with pytest.raises(RoundError, match="start them again and resume the run"):
        run(sites, settings(training=SHORT))
    sites.silent = {}
    run(sites, settings(resume=settings().out))
    (opened,) = events(settings(), SumOpened)
    assert opened.attempt == 1
    assert_mean_of(sites, settings(), "abcd")


def test_two_rounds_train_b_then_a_and_the_lineage_says_what_was_summed(
    settings: Make, sites: SecureSites, tiny_model: Path
) -> None:
    run(sites, settings(training=SHORT, num_rounds=2, metrics="train_loss"))
    out = Path(settings().out)
    statement = json.loads((out / "round-0002" / "lineage.json").read_text())
    text = json.dumps(statement)
    for name in "abcd":
        assert f"masked update of site {name} ({name})" in text
    parameters = statement["predicate"]["parameters"]
    assert parameters["secure_sum"] == {
        "sites": ["a", "b", "c", "d"],
        "attempt": 1,
        "cohort": 4,
        "threshold": 3,
        "clip": CLIP,
        "bits": 16,
        "max_examples": 1,
    }
    assert "shares" not in parameters
    assert set(parameters["num_examples"].values()) == {None}
    for each in sites.institutions.values():
        rows = read_ledger(each.site.state / LEDGER).rows
        both = [(number, stage) for number in (1, 2) for stage in ("trained", "secure")]
        assert [(row.server_round, row.stage) for row in rows] == both
    config = json.loads((tiny_model / "config.json").read_text())
    planned = make_plan(settings(num_rounds=2), config).up.site
    seen = {(e.server_round, e.num_bytes) for e in events(settings(), UpdateReceived)}
    assert seen == {(1, planned.first), (2, planned.even)}
    losses = [event.train_loss for event in events(settings(), RoundFinished)]
    assert all(loss is not None for loss in losses)
    summary = summarise(out / "events.jsonl")
    assert (summary["state"], summary["rounds"][1]["num_updates"]) == ("finished", 4)


def test_the_policy_of_a_new_site_lets_a_private_secure_run_in_once_it_names_who(
    settings: Make, sites: SecureSites
) -> None:
    """Differential privacy and a secure sum, both required: what `client init` writes."""
    cohort = [public_identity(each.identity) for each in sites.institutions.values()]
    text = (
        policy_template()
        .replace("base = []", 'base = ["any"]')
        .replace("allowed = []", 'allowed = ["any"]')
        .replace("cohort = []", f"cohort = {json.dumps(cohort)}")
    )
    for each in sites.institutions.values():
        each.policy = load_settings(Policy, tomllib.loads(text), "the template")
    private = SHORT | {"noise_multiplier": 4.0, "record_clip_norm": 0.5}
    made = settings(training=private, num_rounds=2, metrics="")
    run(sites, made)
    assert [event.sites for event in events(made, SumOpened)] == [list("abcd")] * 2
    for each in sites.institutions.values():
        first, masked, second, _ = read_ledger(each.site.state / LEDGER).rows
        assert (first.stage, first.noise_multiplier, first.steps) == ("trained", 4.0, 1)
        assert (masked.stage, masked.steps) == ("secure", 0)
        assert 0 < first.epsilon == masked.epsilon < second.epsilon
        assert first.metrics == masked.metrics == {}


def test_sums_of_both_factors_are_the_usual_average(
    settings: Make, tiny_model: Path, tmp_path: Path
) -> None:
    made = settings(training=SHORT, aggregation="factors")
    with SecureSites(tiny_model, tmp_path / "sites") as sites:
        run(sites, made)
        secure = read_adapter(Path(made.out) / "round-0001")
        served = open_update(Path(made.out) / "served" / "round-0001.update")
        changes = [
            np.fromfile(each.site.state / "answers" / run_id(Path(made.out)) / "1.update", "<f4")
            for each in sites.institutions.values()
        ]
    mean_N, start = np.mean(changes, axis=0), 0
    for module, (num_out, num_in) in sorted(served.shapes().items()):
        for factor, length in (("B", num_out), ("A", num_in)):
            change_RC = mean_N[start : start + RANK * length].reshape(RANK, length)
            start += RANK * length
            wanted_RC = served.rows(module, factor, RANK).numpy() + change_RC
            seen_RC = secure.rows(module, factor, RANK).numpy()
            assert np.abs(seen_RC - wanted_RC).max() < CLIP / (2**15 - 1)


def test_a_reply_of_another_attempt_is_passed_over(settings: Make, sites: SecureSites) -> None:
    def late() -> None:
        sites.late(Reply("a", 1, Stage.ADVERTISE, 7, update=b"of another attempt"))
        sites.late(Reply("a", 1, "", 0, update=b"a plain update"))

    sites.before[Stage.ADVERTISE] = late
    run(sites, settings(training=SHORT))
    assert events(settings(), SiteFailed) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"aggregation": "products"}, "use alternating, or factors"),
        ({"wire": {"uplink": "bfloat16"}}, "leave it at"),
        ({"wire": {"downlink": "int8"}}, "use float32 or bfloat16"),
        ({"aggregation": "factors", "late_replies": "fold"}, "late_replies"),
        ({"num_sites": 2}, "expected 3 to 64"),
        ({"secure_sum": {"threshold": 2}}, "more than half and at most all"),
        ({"secure_sum": {"threshold": 5}}, "more than half and at most all"),
        ({"quorum": 4}, "raise secure_sum.threshold"),
        ({"simulated_sites": "sites"}, "client daemon"),
    ],
)
def test_settings_that_do_not_fit_a_secure_sum_are_refused(
    settings: Make, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(SettingsError, match=f"secure_sum.enabled is true and .*{sentence}"):
        settings(**changes)
