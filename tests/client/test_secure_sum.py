import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from client.reasons import Refused
from client.secure_sum import advertise
from client.secure_sum_state import SecureSumSite
from client.site_state import KEPT_S, SiteStateError
from federation.secure_messages import SecureSumError, Stage, Terms, read, session_of, write
from tests.matrices import run_matrix
from tests.secure_cohort import HALF, LENGTH, Cohort, terms_of


class OnDisk:
    """One site of a cohort with its state on disk, started anew for every call."""

    def __init__(self, directory: Path, cohort: Cohort) -> None:
        self.directory, self.cohort = directory, cohort
        self.member = cohort.sites["s0"].member

    @property
    def site(self) -> SecureSumSite:
        return SecureSumSite(self.directory, self.cohort.terms.run, lambda: self.member)

    def answer(self, stage: Stage, request: bytes, terms: Terms) -> bytes:
        if stage == Stage.ADVERTISE:
            return self.site.advertise(terms)
        if stage == Stage.MASK:
            return self.masked(request).read_bytes()
        return self.site.answer(stage, request)

    def masked(self, request: bytes, values: object = None, num_examples: int = 1) -> Path:
        own = [self.cohort.sites["s0"].values] if values is None else values
        return self.site.masked_vector(request, own, num_examples, np.random.default_rng(0))


def cohort_on_disk(directory: Path, size: int = 4, threshold: int = 3) -> tuple[Cohort, OnDisk]:
    cohort = Cohort(size, threshold)
    site = OnDisk(directory / "secure", cohort)
    memory = cohort.sites["s0"]
    site.values = memory.values
    cohort.sites["s0"] = site
    site.cohort = Cohort(size, threshold)  # for the values and the terms
    return cohort, site


def test_a_site_that_is_started_anew_before_every_stage_takes_part(tmp_path: Path) -> None:
    cohort, site = cohort_on_disk(tmp_path)
    assert cohort.sum() == cohort.plain_sum(cohort.sites)
    assert site.directory.stat().st_mode & 0o777 == 0o700
    state = json.loads((site.directory / "run-beef" / "attempt.json").read_text())
    assert state["secrets"] is None


def test_a_kill_at_any_change_of_the_disk_gives_one_answer_a_stage_and_the_right_sum(
    tmp_path: Path,
) -> None:
    kills = run_matrix(Path(__file__).with_name("secure_sum_kill_matrix.py"), tmp_path)
    assert list(kills) == list(Stage)
    assert min(kills.values()) >= 3
    assert kills["mask"] >= 6  # the vector and the note of it


def test_a_site_that_died_after_its_vector_helps_to_open_the_sum_as_one_that_dropped_out(
    tmp_path: Path,
) -> None:
    cohort, _ = cohort_on_disk(tmp_path)
    cohort.until(Stage.MASK)
    cohort.sites["s0"].answer(Stage.MASK, cohort.server.request(), cohort.terms)  # and it is lost
    cohort.run_stage({"s0": Stage.MASK})
    cohort.server.close()
    assert cohort.sum() == cohort.plain_sum(["s1", "s2", "s3"])


def test_there_is_one_masked_vector_an_attempt(tmp_path: Path) -> None:
    cohort, site = cohort_on_disk(tmp_path)
    request = cohort.until(Stage.MASK)
    first = site.masked(request).read_bytes()
    assert len(first) == cohort.terms.masked_bytes
    assert site.masked(request, values=iter(())).read_bytes() == first
    fewer = json.loads(request)
    fewer["senders"], fewer["sealed"] = fewer["senders"][:3], fewer["sealed"][:3]
    with pytest.raises(SecureSumError, match="another request"):
        site.masked(json.dumps(fewer).encode())


def test_only_the_site_knows_how_many_numbers_were_clipped(tmp_path: Path) -> None:
    cohort, site = cohort_on_disk(tmp_path)
    values = np.zeros(LENGTH, np.float32)
    values[:5] = [HALF + 1, -HALF - 1, HALF, 0.5, 1e9]
    site.masked(cohort.until(Stage.MASK), values=[values])
    assert site.site.num_clipped == 3


@pytest.mark.parametrize(
    "values",
    [
        [np.full(LENGTH, np.nan)],
        [np.full(LENGTH, np.inf)],
        [np.zeros(LENGTH - 1)],
        [np.zeros(LENGTH), np.zeros(1)],
    ],
)
def test_an_update_that_is_no_update_leaves_nothing_and_may_be_mended(
    tmp_path: Path, values: list[object]
) -> None:
    cohort, site = cohort_on_disk(tmp_path)
    request = cohort.until(Stage.MASK)
    with pytest.raises(SecureSumError, match="37 numbers"):
        site.masked(request, values=values)
    assert not (site.directory / "run-beef" / "masked").exists()
    assert cohort.sum() == cohort.plain_sum(cohort.sites)


def test_a_site_without_examples_sends_nothing(tmp_path: Path) -> None:
    cohort, site = cohort_on_disk(tmp_path)
    with pytest.raises(SecureSumError, match="num_examples is 0"):
        site.masked(cohort.until(Stage.MASK), num_examples=0)


def test_a_round_that_a_site_helped_to_open_is_not_opened_again(tmp_path: Path) -> None:
    cohort, site = cohort_on_disk(tmp_path)
    cohort.sum()
    with pytest.raises(SecureSumError, match="has helped to open the sum of round 1"):
        site.site.advertise(terms_of(4, 3, attempt=2))
    assert site.site.advertise(terms_of(4, 3, server_round=2, subject="6" * 64))
    assert not (site.directory / "run-beef" / "masked").exists()


def test_without_noise_no_subject_is_opened_in_two_rounds_of_a_run(tmp_path: Path) -> None:
    cohort, site = cohort_on_disk(tmp_path)
    cohort.sum()
    other, again = (
        terms_of(4, 3, server_round=2, subject="6" * 64),
        terms_of(4, 3, server_round=3),
    )
    assert site.site.advertise(other)
    # The attempt that opened the sum is no longer held, and the site is started anew.
    for _ in range(2):
        with pytest.raises(Refused, match="replay: .* the sum of round 1 of this run") as caught:
            site.site.advertise(again)
        assert caught.value.rule == "replay"
    # What was asked before the refusal is still answered, with the same bytes.
    assert site.site.advertise(other) == site.site.advertise(other)
    assert site.site.advertise(again, is_private=True)


def test_a_subject_that_was_not_opened_may_be_tried_in_another_round(tmp_path: Path) -> None:
    cohort, site = cohort_on_disk(tmp_path)
    cohort.until(Stage.REVEAL)
    assert site.site.advertise(terms_of(4, 3, server_round=2))


def test_what_was_opened_is_remembered_when_the_run_has_slept_for_weeks(tmp_path: Path) -> None:
    cohort, site = cohort_on_disk(tmp_path)
    cohort.sum()
    directory, asleep = site.directory / "run-beef", site.directory / "run-abc"
    asleep.mkdir()
    (asleep / "attempt.json").write_text("{}")
    for old in (directory, asleep):
        os.utime(old, (0, old.stat().st_mtime - KEPT_S - 60))
    another = SecureSumSite(site.directory, "dead", lambda: site.member)
    assert another.advertise(terms_of(4, 3, run="dead"))
    assert ([path.name for path in directory.iterdir()], asleep.exists()) == (["revealed"], False)
    with pytest.raises(Refused, match="the sum of round 1 of this run"):
        site.site.advertise(terms_of(4, 3, server_round=2))


def test_a_list_of_opened_sums_that_is_damaged_opens_nothing(tmp_path: Path) -> None:
    cohort, site = cohort_on_disk(tmp_path)
    cohort.sum()
    (site.directory / "run-beef" / "revealed").write_text("one two three")
    with pytest.raises(SiteStateError, match="revealed is damaged"):
        site.site.advertise(terms_of(4, 3, server_round=2))


def test_an_attempt_that_failed_is_followed_by_one_with_other_keys(tmp_path: Path) -> None:
    cohort, site = cohort_on_disk(tmp_path)
    request = cohort.until(Stage.AGREE)
    first = site.site.advertise(cohort.terms)
    second = site.site.advertise(terms_of(4, 3, attempt=2))
    assert json.loads(first)["mask_key"] != json.loads(second)["mask_key"]
    with pytest.raises(SecureSumError, match="agree is asked, and share comes next"):
        site.site.answer(Stage.AGREE, request)
    for terms in (cohort.terms, terms_of(4, 3, attempt=2, clip=1.0)):
        with pytest.raises(SecureSumError, match="expected a higher number"):
            site.site.advertise(terms)


def test_a_repeated_stage_gives_the_same_bytes(tmp_path: Path) -> None:
    cohort, site = cohort_on_disk(tmp_path)
    while (stage := cohort.server.stage) is not None:
        request = cohort.server.request()
        cohort.run_stage()
        again = site.answer(stage, request, cohort.terms)
        assert again == cohort.arrived[stage]["s0"]
        cohort.server.close()


def test_a_cohort_below_the_policy_is_refused_at_every_stage(tmp_path: Path) -> None:
    cohort, site = cohort_on_disk(tmp_path)
    site.member = dataclasses.replace(site.member, min_cohort=5)
    with pytest.raises(SecureSumError, match="policy asks for 5"):
        site.site.advertise(cohort.terms)
    assert not site.directory.exists()
    site.member = dataclasses.replace(site.member, min_cohort=4)
    cohort.run_stage({"s3": Stage.ADVERTISE})
    cohort.server.close()
    with pytest.raises(SecureSumError, match="3 sites take part: this site's policy asks for 4"):
        cohort.run_stage()


def test_a_sum_below_the_cohort_of_the_policy_is_not_opened(tmp_path: Path) -> None:
    cohort, site = cohort_on_disk(tmp_path)
    site.member = dataclasses.replace(site.member, min_cohort=4)
    cohort.until(Stage.MASK)
    cohort.run_stage({"s3": Stage.MASK})
    cohort.server.close()
    with pytest.raises(SecureSumError, match="3 survivors: expected at least 4"):
        cohort.run_stage()


def test_nothing_secret_of_an_attempt_is_drawn_a_second_time() -> None:
    """The same terms, so that equal commitments would be equal seeds."""
    cohort = Cohort(4, 3)
    member = cohort.sites["s0"].member
    made = [advertise(cohort.terms, member) for _ in range(3)]
    for name in ("seal_key", "mask_key", "seed"):
        assert len({getattr(held.secrets, name) for held in made}) == 3, name
    assert len({json.loads(held.answers[Stage.ADVERTISE])["commitment"] for held in made}) == 3


def test_a_vector_for_a_cohort_below_the_policy_is_not_even_masked(tmp_path: Path) -> None:
    cohort, site = cohort_on_disk(tmp_path)
    site.member = dataclasses.replace(site.member, min_cohort=4)
    cohort.until(Stage.SHARE)
    cohort.run_stage({"s3": Stage.SHARE})
    cohort.server.close()
    with pytest.raises(SecureSumError, match="3 members that shared: expected at least 4"):
        site.masked(cohort.server.request())
    assert not (site.directory / "run-beef" / "masked").exists()


def test_a_run_is_not_the_name_of_a_file(tmp_path: Path) -> None:
    cohort, site = cohort_on_disk(tmp_path)
    for run in ("", "../up", "BEEF", "a" * 65):
        with pytest.raises(SecureSumError, match="expected 1 to 64 hex digits"):
            SecureSumSite(tmp_path, run, lambda: site.member)
    with pytest.raises(SecureSumError, match="the terms are for run beef, this is dead"):
        SecureSumSite(tmp_path, "dead", lambda: site.member).advertise(cohort.terms)
    with pytest.raises(SecureSumError, match="advertise first"):
        SecureSumSite(tmp_path, "dead", lambda: site.member).answer(Stage.SHARE, b"")


def test_damaged_state_is_named(tmp_path: Path) -> None:
    cohort, site = cohort_on_disk(tmp_path)
    site.site.advertise(cohort.terms)
    (site.directory / "run-beef" / "attempt.json").write_text('{"terms": 1}')
    with pytest.raises(SiteStateError, match="damaged: remove"):
        _ = site.site


def test_the_terms_of_two_rounds_attempts_or_subjects_have_two_names() -> None:
    terms = [terms_of(4, 3, **change) for change in _CHANGES]
    assert len({session_of(one) for one in terms}) == len(terms)
    assert all(session_of(read(Terms, write(one))) == session_of(one) for one in terms)


_CHANGES: list[dict[str, object]] = [
    {},
    {"run": "dead"},
    {"server_round": 2},
    {"attempt": 2},
    {"subject": "6" * 64},
    {"clip": 0.1},
    {"bits": 9},
    {"num_coordinates": 3},
    {"max_examples": 2},
]
