"""What a secure sum costs a site, when it is charged, and what is charged to nobody twice."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.answers import MAX_BEGUN
from client.chain import LedgerError
from client.ledger import LEDGER, Ledger, read_ledger
from client.ledger_audit import check_epsilons
from client.randomness import RandomStream
from client.secure_sum_state import SecureSumSite
from federation.accountant import PrivacyEvent, epsilon_of
from federation.secure_messages import Stage
from tests.client.ledgers import entry
from tests.client.test_secure_round import (
    PRIVATE,
    PRIVATE_LIMITS,
    RUN,
    TRAINING,
    Asks,
    change_of,
    errors,
    maker,
    rows_of,
    run_stage,
    run_until,
    stages_of,
    sum_of,
)
from tests.matrices import run_matrix
from tests.secure_sites import SecureSites

SENTENCE = "error 1001: the site failed in this private round; its own log says why"


@pytest.fixture
def asks(tiny_model: Path, tmp_path: Path) -> Asks:
    return maker(tiny_model, tmp_path)


@pytest.fixture
def sites(tiny_model: Path, tmp_path: Path) -> Iterator[SecureSites]:
    with SecureSites(tiny_model, tmp_path / "sites", **PRIVATE_LIMITS) as made:
        yield made


def die(*_: object, **__: object) -> None:
    raise SystemExit


def killed_in(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, sites: SecureSites, **changes: Any
) -> None:
    """Ask site a for its keys; it dies when it calls a method. It is started anew after that."""
    asks = changes.pop("asks")
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(owner, name, die)
        sites.send(["a"], asks(training=PRIVATE, stage="advertise", **changes))
    sites.institutions["a"].stop()


def secure_directory(sites: SecureSites, name: str) -> Path:
    return sites.institutions[name].site.state / "secure" / f"run-{RUN}"


def test_a_training_is_charged_before_the_site_says_its_keys(
    sites: SecureSites, asks: Asks, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_in(monkeypatch, SecureSumSite, "advertise", sites, asks=asks)
    (row,) = rows_of(sites, "a")
    assert (row.stage, row.steps, row.num_bytes) == ("trained", 2, 0)
    assert row.epsilon == pytest.approx(epsilon_of([row.event], row.delta))
    change = change_of(sites, "a")
    # Nobody knows of it, and it is paid: another life says its keys for the same training.
    run_until(sites, asks(training=PRIVATE))
    assert np.array_equal(change_of(sites, "a"), change)
    assert stages_of(sites, "a") == [("trained", 2), ("secure", 0)]


def test_no_keys_leave_where_the_ledger_takes_no_row(
    sites: SecureSites, asks: Asks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise LedgerError("the disk is full")

    request = asks(training=PRIVATE)
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "append", full)
        assert errors(run_stage(sites, request, sum_of(request))) == {SENTENCE}
    assert not (secure_directory(sites, "a") / "attempt.json").exists()
    run_until(sites, request)
    assert stages_of(sites, "a") == [("trained", 2), ("secure", 0)]


def test_a_kill_between_the_training_and_its_row_leads_to_the_same_update_and_one_row(
    sites: SecureSites, asks: Asks, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_in(monkeypatch, Ledger, "append", sites, asks=asks)
    change = change_of(sites, "a")
    assert rows_of(sites, "a") == []
    run_until(sites, asks(training=PRIVATE), Stage.SHARE)
    assert np.array_equal(change_of(sites, "a"), change)
    assert stages_of(sites, "a") == [("trained", 2)]


def test_verify_computes_the_epsilons_of_trainings_and_of_masked_vectors(
    sites: SecureSites, asks: Asks
) -> None:
    run_until(sites, asks(training=PRIVATE), Stage.AGREE)
    run_until(sites, asks(training=PRIVATE, attempt=2))
    run_until(sites, asks(seed=1, training=PRIVATE, server_round=2))
    path = sites.institutions["a"].site.state / LEDGER
    contents = read_ledger(path)
    check_epsilons(path, contents)
    first, _, _, last, _ = contents.rows
    assert [row.epsilon for row in contents.rows] == pytest.approx(
        [epsilon_of([first.event], first.delta)] * 3
        + [epsilon_of([first.event, last.event], first.delta)] * 2
    )


def test_verify_sees_a_masked_vector_whose_training_nobody_was_charged_for(tmp_path: Path) -> None:
    path = tmp_path / LEDGER
    free: dict[str, Any] = {"stage": "secure", "event": PrivacyEvent(1.0, 0.1, 0)}
    with Ledger.open(path) as book:
        book.append(entry(1, stage="trained", num_bytes=0))
        book.append(entry(1, **free))
    check_epsilons(path, read_ledger(path))
    with Ledger.open(path) as book:
        book.append(entry(2, **free))
    with pytest.raises(LedgerError, match="row 4 charges nothing, and no row before it charges"):
        check_epsilons(path, read_ledger(path))


@pytest.mark.parametrize(
    "other", [{"adapter": "f" * 64}, {"settings": "e" * 64}, {"stage": "failed"}]
)
def test_verify_takes_no_vector_for_a_row_that_charges_something_else(
    other: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / LEDGER
    with Ledger.open(path) as book:
        book.append(entry(1, **({"stage": "trained", "num_bytes": 0} | other)))
        book.append(entry(1, stage="secure", event=PrivacyEvent(1.0, 0.1, 0)))
    with pytest.raises(LedgerError, match="row 3 charges nothing, and no row before it charges"):
        check_epsilons(path, read_ledger(path))


def test_a_secure_round_whose_trainer_is_killed_again_and_again_is_charged_as_a_failure(
    sites: SecureSites, asks: Asks, monkeypatch: pytest.MonkeyPatch
) -> None:
    for attempt in range(1, MAX_BEGUN + 1):
        killed_in(monkeypatch, RandomStream, "chosen", sites, asks=asks, attempt=attempt)
    assert rows_of(sites, "a") == []
    for attempt in (MAX_BEGUN + 1, MAX_BEGUN + 2):
        sites.send(["a"], asks(training=PRIVATE, stage="advertise", attempt=attempt))
        reply = sites.receive()
        assert reply is not None
        assert reply.error == SENTENCE
        assert stages_of(sites, "a") == [("failed", 2)]
    assert not (secure_directory(sites, "a") / "attempt.json").exists()


def test_a_round_below_one_that_was_trained_is_not_trained(sites: SecureSites, asks: Asks) -> None:
    run_until(sites, asks(training=PRIVATE, server_round=2), Stage.SHARE)
    below = asks(seed=1, training=PRIVATE, attempt=5)
    for _ in range(2):
        replies = run_stage(sites, below, sum_of(below))
        assert all("replay" in reason for reason in errors(replies))
        # What the site remembers of the protocol is gone: its ledger still knows.
        sites.institutions["a"].stop()
        shutil.rmtree(secure_directory(sites, "a"), ignore_errors=True)
    assert [each.count("trained") for each in sites.institutions.values()] == [1] * 4
    assert stages_of(sites, "a") == [("trained", 2)]


def test_without_noise_an_adapter_whose_sum_was_opened_is_not_trained_in_another_round(
    tiny_model: Path, tmp_path: Path, asks: Asks
) -> None:
    with SecureSites(tiny_model, tmp_path / "plain") as sites:
        run_until(sites, asks())
        run_until(sites, asks(seed=1, server_round=2))
        again = asks(server_round=3)
        before = stages_of(sites, "a")
        for _ in range(2):
            replies = run_stage(sites, again, sum_of(again))
            assert all("replay: this site has helped to open" in one for one in errors(replies))
            sites.institutions["a"].stop()
        assert stages_of(sites, "a") == before
        assert sites.institutions["a"].count("trained") == 2
        # Another adapter is another matter.
        run_until(sites, asks(seed=2, server_round=3))


@pytest.mark.parametrize(
    "spelling",
    [{"weight_decay": 0.0}, {"weight_decay": -0.0}, {"accumulation": 1}, {"record_clip_norm": 0.5}],
)
def test_settings_that_come_to_the_same_open_no_second_sum_however_they_are_spelled(
    spelling: dict[str, Any], tiny_model: Path, tmp_path: Path, asks: Asks
) -> None:
    with SecureSites(tiny_model, tmp_path / "plain") as sites:
        run_until(sites, asks())
        again = asks(server_round=2, training=TRAINING | spelling)
        assert sum_of(again).terms.subject != sum_of(asks(server_round=2)).terms.subject
        replies = run_stage(sites, again, sum_of(again))
        assert all("replay: this site has helped to open" in one for one in errors(replies))
        run_until(sites, asks(server_round=2, training=TRAINING | {"weight_decay": 0.1}))


def test_with_noise_a_run_goes_on_from_the_same_adapter(sites: SecureSites, asks: Asks) -> None:
    """After a sum that was lost: the update is drawn anew, and charged."""
    run_until(sites, asks(training=PRIVATE))
    first = change_of(sites, "a")
    run_until(sites, asks(training=PRIVATE, server_round=2))
    assert not np.array_equal(change_of(sites, "a", 2), first)
    assert stages_of(sites, "a") == [("trained", 2), ("secure", 0)] * 2


def test_the_bytes_of_every_attempt_count_once_and_end_at_the_bound(
    tiny_model: Path, tmp_path: Path, asks: Asks
) -> None:
    num_bytes = sum_of(asks()).terms.masked_bytes
    limits = PRIVATE_LIMITS | {"traffic__max_run_bytes": 2 * num_bytes}
    with SecureSites(tiny_model, tmp_path / "few", **limits) as sites:
        run_until(sites, asks(training=PRIVATE), Stage.AGREE)
        second = asks(training=PRIVATE, attempt=2)
        secure = run_until(sites, second, Stage.MASK)
        first = run_stage(sites, second, secure)["a"]
        # The very vector that was sent is sent again, in another life too, and counts once.
        sites.institutions["a"].stop()
        path = second.message.with_name("stage")
        sites.send(["a"], replace(second, stage="mask", message=path))
        again = sites.receive()
        assert again is not None
        assert again.update == first.update
        secure.close()
        while secure.stage is not None:
            run_stage(sites, second, secure)
            secure.close()
        assert secure.result.sites == ("a", "b", "c", "d")
        assert [row.num_bytes for row in rows_of(sites, "a")] == [0, num_bytes, num_bytes]


def test_a_third_attempt_beyond_the_bytes_of_a_run_is_refused(
    tiny_model: Path, tmp_path: Path, asks: Asks
) -> None:
    num_bytes = sum_of(asks()).terms.masked_bytes
    limits = PRIVATE_LIMITS | {"traffic__max_run_bytes": 3 * num_bytes - 1}
    with SecureSites(tiny_model, tmp_path / "few", **limits) as sites:
        for attempt in (1, 2):
            run_until(sites, asks(training=PRIVATE, attempt=attempt), Stage.AGREE)
        third = asks(training=PRIVATE, attempt=3)
        replies = run_stage(sites, third, sum_of(third))
        assert all("traffic.max_run_bytes" in reason for reason in errors(replies))
        assert stages_of(sites, "a") == [("trained", 2), ("secure", 0), ("secure", 0)]


def test_a_round_can_be_opened_when_the_next_one_was_begun_and_killed(
    sites: SecureSites, asks: Asks, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = asks(training=PRIVATE)
    secure = run_until(sites, request, Stage.AGREE)
    killed_in(monkeypatch, RandomStream, "chosen", sites, asks=asks, seed=1, server_round=2)
    while secure.stage is not None:
        assert errors(run_stage(sites, request, secure)) == {""}
        secure.close()
    assert secure.result.sites == ("a", "b", "c", "d")


@pytest.mark.parametrize(
    ("every", "least"), [(4, 8), pytest.param(1, 30, marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_a_site_that_is_killed_anywhere_in_a_secure_sum_is_charged_once_and_before_its_keys_leave(
    tmp_path: Path, every: int, least: int
) -> None:
    report = run_matrix(Path(__file__).with_name("secure_kill_matrix.py"), tmp_path, every)
    print(report)
    assert report["advertise"]["kills"] >= least
    for stage in report.values():
        assert 0 < stage["charged"] < stage["kills"], "some died before their row, some after it"
