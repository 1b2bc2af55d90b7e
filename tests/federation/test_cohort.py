"""Whom an attempt at a secure sum asks."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from federation.cohort import Candidates
from federation.events import RoundStarted, SiteFailed, SumOpened
from federation.exchange import RoundError
from federation.lost_rounds import LostRound
from federation.secure_messages import Stage
from tests.federation.runs import events
from tests.federation.secure_runs import SHORT, Make, die, once, run, secure_settings
from tests.secure_sites import SecureSites


@pytest.fixture
def settings(tiny_model: Path, tmp_path: Path) -> Make:
    return partial(secure_settings, tiny_model, out=str(tmp_path / "run"), training=SHORT)


@pytest.fixture
def sites(tiny_model: Path, tmp_path: Path) -> Iterator[SecureSites]:
    """Six, of which a round asks four."""
    with SecureSites(tiny_model, tmp_path / "sites", names="abcdef") as made:
        yield made


def drawn(
    candidates: Candidates, count: int, connected: str = "abcdef", *, server_round: int = 1
) -> set[str]:
    """Return every site that some seed draws."""
    seeds = (str(seed) for seed in range(200))
    draws = (candidates.drawn(connected, count, seed, server_round) for seed in seeds)
    return {site for each in draws for site in each}


def test_a_draw_is_the_same_for_the_same_seed_and_takes_no_more_than_there_are() -> None:
    candidates = Candidates([])
    assert candidates.drawn("fedcba", 4, "s", 1) == candidates.drawn("abcdef", 4, "s", 1)
    assert candidates.drawn("abc", 4, "s", 1) == ["a", "b", "c"]
    assert drawn(candidates, 4) == set("abcdef")


def test_sites_that_failed_are_asked_last_until_they_are_asked_and_do_not_fail() -> None:
    candidates = Candidates([])
    for site in "ab":
        candidates.fail(site, 1)
    assert drawn(candidates, 4) == set("cdef")
    assert all({*"cdef"} < set(candidates.drawn("abcdef", 5, str(n), 1)) for n in range(20))
    candidates.ask("a")
    assert drawn(candidates, 4) == set("acdef")


def test_a_failure_is_forgotten_after_two_rounds() -> None:
    """Else one slip would leave a site out for good where more are connected than are asked."""
    candidates = Candidates([])
    candidates.fail("a", 3)
    among = ["a" in drawn(candidates, 4, server_round=number) for number in range(3, 8)]
    assert among == [False, False, False, True, True]
    candidates.fail("a", 6)
    assert "a" not in drawn(candidates, 4, server_round=8)


def test_sites_that_lied_are_asked_last_for_good() -> None:
    lost = [LostRound(1, "", suspects=("a", "b", "c", "d"), named=("b",))]
    candidates = Candidates(lost)
    candidates.doubt(["c"])
    candidates.ask("abcdef")
    assert drawn(candidates, 2) == set("ef")
    assert drawn(candidates, 4) == set("adef")
    assert candidates.drawn("bc", 2, "s", 1) == ["b", "c"]


def test_the_more_sums_were_lost_with_a_site_the_later_it_is_asked() -> None:
    lost = [LostRound(1, "", tuple("abcd"))]
    candidates = Candidates(lost)
    assert drawn(candidates, 2) == set("ef")
    lost.append(LostRound(2, "", tuple("aefc")))  # the list grows while the run lasts
    assert drawn(candidates, 2) == set("bdef")
    assert drawn(candidates, 4) == set("bdef")


def test_a_stranger_is_what_most_of_the_others_call_one() -> None:
    identities = {site: site * 64 for site in "abcdef"}
    refusal = f"error 1001: identity {'f' * 16}… is not one of the 5 that this site's policy lists"
    lie = refusal.replace("f" * 16, "a" * 16)
    for refusals, found in [
        ({"a": refusal, "b": refusal, "c": refusal}, ["f"]),
        ({"a": refusal, "b": refusal, "c": "error 1001: busy"}, []),
        ({"b": lie, "c": lie, "a": lie}, []),  # its own word does not count
        ({"a": refusal, "b": refusal, "c": refusal, "d": refusal, "f": lie}, ["f"]),
    ]:
        candidates = Candidates([])
        for site in refusals:
            candidates.fail(site, 1)
        assert candidates.leave_strangers_out(identities, refusals) == found
        assert drawn(candidates, 6) == set("abcdef") - set(found)
        # The others did not fail: it was in their way.
        assert drawn(candidates, 3) >= (set(refusals) - set(found) if found else set())


@pytest.mark.parametrize("stage", [Stage.SHARE, Stage.MASK])
def test_a_site_that_answers_wrongly_is_asked_last(
    settings: Make, sites: SecureSites, stage: Stage
) -> None:
    """It answers, in time, and so never was among the silent ones."""
    made = settings(num_rounds=3)
    sites.spoil["a", stage] = lambda raw: raw[:-3]
    run(sites, made)
    asked = [event.asked for event in events(made, RoundStarted)]
    first = next(number for number, names in enumerate(asked) if "a" in names)
    assert first < 2
    assert all("a" not in names for names in asked[first + 1 :])


def test_a_site_that_answers_with_an_error_is_asked_last(
    settings: Make, sites: SecureSites
) -> None:
    made = settings(num_rounds=3)
    broken = sites.institutions["a"]
    broken.policy = broken.policy.model_copy(
        update={"adapter": broken.policy.adapter.model_copy(update={"max_rank": 1})}
    )
    run(sites, made)
    asked = [event.asked for event in events(made, RoundStarted)]
    first = next(number for number, names in enumerate(asked) if "a" in names)
    assert first < 2
    assert all("a" not in names for names in asked[first + 1 :])
    assert {event.site for event in events(made, SiteFailed)} == {"a"}


def test_a_resumed_server_draws_another_cohort_for_its_next_attempt(
    settings: Make, sites: SecureSites
) -> None:
    """Else a run that ends because of whom it drew would end so for ever."""
    made = settings()
    for _ in range(3):
        sites.before[Stage.SHARE] = once(die)
        with pytest.raises(SystemExit):
            run(sites, made)
        made = settings(resume=settings().out)
    run(sites, made)
    started = events(settings(), RoundStarted)
    assert [event.attempt for event in started] == [1, 2, 3, 4]
    assert len({tuple(event.asked) for event in started}) > 1


def test_one_stranger_does_not_end_every_attempt_of_the_others(
    settings: Make, tiny_model: Path, tmp_path: Path
) -> None:
    """No site answers a roster with a member that its policy does not list, but the stranger."""
    made = settings(num_rounds=2)
    with SecureSites(tiny_model, tmp_path / "sites") as sites:
        sites.institutions["d"].identity = Ed25519PrivateKey.from_private_bytes(b"\x63" * 32)
        run(sites, made)
    assert [event.sites for event in events(made, SumOpened)] == [list("abc")] * 2
    assert [(e.attempt, e.asked) for e in events(made, RoundStarted)] == [
        (1, list("abcd")),
        (2, list("abc")),
        (1, list("abc")),
    ]
    reasons = [event.reason for event in events(made, SiteFailed) if event.site == "d"]
    assert "do not list its identity in their policies" in reasons[-1]


def test_where_all_are_strangers_to_each_other_the_attempts_end(
    settings: Make, tiny_model: Path, tmp_path: Path
) -> None:
    with SecureSites(tiny_model, tmp_path / "sites") as sites:
        for number, each in enumerate(sites.institutions.values()):
            each.identity = Ed25519PrivateKey.from_private_bytes(bytes([100 + number]) * 32)
        with pytest.raises(RoundError, match="no secure sum in 2 attempts"):
            run(sites, settings())
