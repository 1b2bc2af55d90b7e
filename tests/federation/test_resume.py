"""A run that was killed goes on and ends with the same bytes."""

import os
import shutil
from pathlib import Path

import pytest

from federation.adapter import read_adapter
from federation.errors import UserError
from federation.events import RoundStarted, RunResumed, read_events
from federation.exchange import RoundError
from federation.rounds import run_rounds
from federation.run_directory import ResumeError, RunDirectory
from federation.settings import FederationSettings
from federation.status import summarise
from federation.update import open_update
from tests.matrices import run_matrix
from tests.simulated import SimulatedSites, Ticks, crash, drift, in_rounds


def kill_matrix(model: Path, work: Path, mode: str, number: int) -> list[dict[str, object]]:
    cases: list[dict[str, object]] = run_matrix(
        Path(__file__).with_name("run_kill_matrix.py"), model, work, mode, number
    )["cases"]
    return cases


def assert_unharmed(cases: list[dict[str, object]]) -> None:
    assert [case for case in cases if case["code"] != 0 or not case["is_same"]] == []
    assert [case for case in cases if case["lost"] or case["left"]] == []
    assert all(case["states"] == 1 for case in cases)
    # The rename that ends a round comes before its event: one event at most may be missing.
    assert all(case["repeated"] == 0 for case in cases)


def test_a_server_killed_at_any_change_to_its_disk_ends_with_the_same_bytes(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Every seventh change of a run of two rounds; `make test-slow` takes every one."""
    cases = kill_matrix(tiny_model, tmp_path, "changes", 7)
    assert len(cases) > 15
    assert_unharmed(cases)


@pytest.mark.slow
def test_a_server_killed_at_every_single_change_ends_with_the_same_bytes(
    tiny_model: Path, tmp_path: Path
) -> None:
    cases = kill_matrix(tiny_model, tmp_path, "changes", 1)
    assert len(cases) > 200
    assert_unharmed(cases)


@pytest.mark.slow
def test_a_server_killed_at_twenty_random_moments_ends_with_the_same_bytes(
    tiny_model: Path, tmp_path: Path
) -> None:
    cases = kill_matrix(tiny_model, tmp_path, "moments", 20)
    assert len(cases) == 20
    assert_unharmed(cases)


@pytest.fixture
def settings(tiny_model: Path, tmp_path: Path) -> FederationSettings:
    return FederationSettings(
        base_model=str(tiny_model),
        out=str(tmp_path / "run"),
        num_rounds=3,
        num_sites=2,
        adapter={"rank": 4, "alpha": 8.0},
        round_timeout_s=5.0,
    )


def two_sites(scratch: Path) -> SimulatedSites:
    scratch.mkdir()
    return SimulatedSites(scratch, {name: drift(index) for index, name in enumerate("ab")})


def resume(path: Path) -> FederationSettings:
    return FederationSettings(resume=str(path))


def failed_in_round_two(settings: FederationSettings, scratch: Path) -> SimulatedSites:
    sites = two_sites(scratch)
    sites.faults = dict.fromkeys("ab", in_rounds({2}, crash))
    clock = Ticks()
    with pytest.raises(RoundError):
        run_rounds(sites, settings, clock=clock, sleep=clock.sleep)
    return sites


def test_a_failed_run_goes_on_under_the_settings_that_it_began_with(
    settings: FederationSettings, tmp_path: Path
) -> None:
    whole = settings.model_copy(update={"out": str(tmp_path / "whole")})
    expected = read_adapter(run_rounds(two_sites(tmp_path / "w"), whole))
    sites = failed_in_round_two(settings, tmp_path / "s")
    assert summarise(tmp_path / "run" / "events.jsonl")["state"] == "failed"
    sites.faults.clear()
    last = run_rounds(sites, resume(tmp_path / "run"))
    assert last == tmp_path / "run" / "round-0003"
    for module, factors in read_adapter(last).modules.items():
        assert factors.a_RI.equal(expected.modules[module].a_RI)
        assert factors.b_OR.equal(expected.modules[module].b_OR)
    events = [event for _, event in read_events(tmp_path / "run" / "events.jsonl")]
    assert [e.server_round for e in events if isinstance(e, RunResumed)] == [2]
    assert len({request.run for _, request in sites.requests}) == 1, "sites keep state by this id"
    assert summarise(tmp_path / "run" / "events.jsonl")["state"] == "finished"


@pytest.mark.parametrize("downlink", ["int8", "bfloat16", "float32"])
def test_a_run_that_lost_power_sends_the_sites_of_its_round_the_same_adapter_again(
    settings: FederationSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, downlink: str
) -> None:
    """A site that answered a round refuses to answer it for another adapter.

    A loss of power leaves, at its worst, what was waited for and nothing else of `served`.
    """
    on_disk: set[int] = set()
    fsync = os.fsync

    def note(descriptor: int) -> None:
        fsync(descriptor)
        on_disk.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", note)
    wire = settings.wire.model_copy(update={"downlink": downlink})
    sites = failed_in_round_two(settings.model_copy(update={"wire": wire}), tmp_path / "s")
    served = tmp_path / "run" / "served"
    asked = open_update(served / "round-0002.update").sha256_of_content
    names_are_safe = served.stat().st_ino in on_disk
    for path in served.iterdir():
        if path.stat().st_ino not in on_disk or not names_are_safe:
            path.write_bytes(b"")
    clock = Ticks()
    with pytest.raises(RoundError):
        run_rounds(sites, resume(tmp_path / "run"), clock=clock, sleep=clock.sleep)
    assert open_update(served / "round-0002.update").sha256_of_content == asked


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_resumed_run_that_lost_what_it_sent_last_sends_the_whole_adapter(
    settings: FederationSettings, tmp_path: Path, damage: str
) -> None:
    """As when somebody removed it."""
    narrow = settings.model_copy(
        update={"wire": settings.wire.model_copy(update={"downlink": "int8"})}
    )
    sites = failed_in_round_two(narrow, tmp_path / "s")
    served = tmp_path / "run" / "served" / "round-0001.update"
    if damage == "cut":
        served.write_bytes(served.read_bytes()[:-100])
    else:
        served.unlink()
    sites.faults.clear()
    assert run_rounds(sites, resume(tmp_path / "run")) == tmp_path / "run" / "round-0003"
    events = [event for _, event in read_events(tmp_path / "run" / "events.jsonl")]
    sizes = [event.num_bytes for event in events if isinstance(event, RoundStarted)]
    assert sizes[-2] == sizes[0], "whole again"
    assert sizes[-1] < 0.5 * sizes[0], "and a change again"


def test_a_run_killed_between_a_commit_and_its_event_loses_no_round(
    settings: FederationSettings, tmp_path: Path
) -> None:
    run_rounds(two_sites(tmp_path / "s"), settings)
    log = tmp_path / "run" / "events.jsonl"
    whole = summarise(log)
    lines = log.read_text().splitlines(keepends=True)
    assert ["RoundFinished" in line for line in lines[-2:]] == [True, False]
    log.write_text("".join(lines[:-2]))
    run_rounds(two_sites(tmp_path / "t"), resume(tmp_path / "run"))
    resumed = summarise(log)
    assert (resumed["state"], resumed["rounds_done"]) == ("finished", 3)
    assert len(resumed["rounds"]) == 3
    for seen, expected in zip(resumed["rounds"], whole["rounds"], strict=True):
        assert seen == {key: expected[key] for key in seen}
        assert {"adapter", "train_loss", "num_updates"} <= seen.keys()


def test_a_finished_run_that_is_resumed_asks_nobody(
    settings: FederationSettings, tmp_path: Path
) -> None:
    run_rounds(two_sites(tmp_path / "s"), settings)
    again = two_sites(tmp_path / "t")
    assert run_rounds(again, resume(tmp_path / "run")) == tmp_path / "run" / "round-0003"
    assert not again.requests


def test_a_run_cannot_be_resumed_twice_at_once(
    settings: FederationSettings, tmp_path: Path
) -> None:
    run_rounds(two_sites(tmp_path / "s"), settings)
    with (
        RunDirectory.resume(tmp_path / "run"),
        pytest.raises(ResumeError, match="another process runs"),
        RunDirectory.resume(tmp_path / "run"),
    ):
        pass


def test_what_a_kill_left_before_the_run_was_described_is_no_run(
    settings: FederationSettings, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / ".run.json.x7").write_text("{")
    (out / "lock").touch()
    (out / ".snapshot").mkdir()  # a file server's own
    with pytest.raises(UserError, match="exists already.*resume="):
        run_rounds(two_sites(tmp_path / "s"), settings)
    (out / ".snapshot").rmdir()
    run_rounds(two_sites(tmp_path / "t"), settings)
    assert not (out / ".run.json.x7").exists()


def test_a_run_that_carries_nothing_on_is_resumed_too(
    settings: FederationSettings, tmp_path: Path
) -> None:
    bare = settings.model_copy(update={"tail_rank": 0})
    sites = failed_in_round_two(bare, tmp_path / "s")
    sites.faults.clear()
    assert run_rounds(sites, resume(tmp_path / "run")) == tmp_path / "run" / "round-0003"


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            lambda run, _: (run / "run.json").unlink(),
            "takes the directory that the run's out named",
        ),
        (lambda run, _: (run / "run.json").write_text("{"), "run.json is damaged"),
        (
            lambda run, _: (run / "round-0003" / "adapter_model.safetensors").write_bytes(b"x"),
            "cannot go on.*damaged",
        ),
        (
            lambda run, _: next((run / "state-0003").iterdir()).write_bytes(b"x"),
            "state-0003.*damaged",
        ),
        (lambda run, _: shutil.rmtree(run / "state-0003"), "state-0003 is gone"),
        (
            lambda run, _: next((run / "state-0003").iterdir()).unlink(),
            r"state-0003/\S+\.safetensors is gone",
        ),
        (
            lambda _, model: (model / "config.json").write_text('{"vocab_size": 1}'),
            "put the run's base model back",
        ),
    ],
)
def test_what_cannot_be_resumed_is_refused_in_one_sentence(
    settings: FederationSettings, tiny_model: Path, tmp_path: Path, spoil: object, sentence: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    short = settings.model_copy(update={"base_model": str(model)})
    run_rounds(two_sites(tmp_path / "s"), short)
    description = tmp_path / "run" / "run.json"
    description.write_text(description.read_text().replace('"num_rounds": 3', '"num_rounds": 4'))
    spoil(tmp_path / "run", model)
    with pytest.raises(ResumeError, match=sentence):
        run_rounds(two_sites(tmp_path / "t"), resume(tmp_path / "run"))
