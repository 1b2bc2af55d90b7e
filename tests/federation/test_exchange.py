"""One round's exchange: faults, quorum, deadline, late replies."""

from pathlib import Path

import numpy as np
import pytest
import torch

from federation.adapter import read_adapter
from federation.events import (
    RoundFinished,
    RoundStarted,
    RunFailed,
    SiteFailed,
    SiteLate,
    UpdateReceived,
)
from federation.exchange import RoundError
from federation.sites import Reply
from federation.status import summarise
from tests.federation.runs import Settings, events, named_sites, run, weights_of
from tests.simulated import (
    Fault,
    corrupt,
    crash,
    delay,
    drop,
    duplicate,
    forge,
    in_rounds,
    once,
    say,
    truncate,
)

# --- faults: one of four sites


def poison(header: dict[str, object], tensors: bytearray) -> None:
    tensors[:4] = np.float32(np.nan).tobytes()


def widen(header: dict[str, object], tensors: bytearray) -> None:
    name, (rows, columns) = header["tensors"][0]
    header["tensors"][0] = [name, [rows, columns + 1]]
    tensors[:0] = bytes(4 * rows)


def rename_model(header: dict[str, object], tensors: bytearray) -> None:
    header["base_model"] = "e" * 64


def control_codes(header: dict[str, object], tensors: bytearray) -> None:
    header["base_model"] = "\x1b[2J\nround 9: ok"


def swell(header: dict[str, object], tensors: bytearray) -> None:
    header["tensors"].append(["x.A", [4, 1 << 16]])
    tensors += bytes(1 << 20)


def one_tensor(header: dict[str, object], tensors: bytearray) -> None:
    """As many bytes as the adapter, all in the two tensors of one module."""
    columns = len(tensors) // (2 * 2 * header["rank"])
    header["dtype"] = "bfloat16"
    header["tensors"] = [[f"x.{factor}", [header["rank"], columns]] for factor in "BA"]
    tensors[:] = np.full(2 * columns * header["rank"], 0x7FC0, np.uint16).tobytes()  # NaN


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (drop, "no reply within 5 s"),
        (delay(99), "no reply within 5 s"),
        (crash, "ClientApp stopped responding"),
        (forge(poison), "holds NaN"),
        (forge(widen), "65 x 128 in the update, 64 x 128 in this run's adapter"),
        (forge(rename_model), "belongs to base model eeeeeeeeeeeeeeee…, this run trains"),
        (truncate, "cut off or altered"),
        (corrupt, "checksum"),
        (say(num_examples=0), "num_examples is 0"),
        (say(num_examples=10**18), "expected 1 to"),
        (say(num_examples=10**400), "expected 1 to"),
        (say(train_loss=float("nan")), "not a number up to"),
        (say(train_loss=1.7e308), "not a number up to"),
        (say(seconds=float("inf")), "not a number up to"),
        (forge(control_codes), "expected a digest in hex"),
        (forge(one_tensor), "modules are not those of this run's adapter"),
        (forge(swell), "the whole adapter that was sent"),
    ],
)
def test_a_faulty_site_is_named_with_the_cause_and_changes_nothing(
    settings: Settings, tmp_path: Path, fault: Fault, reason: str
) -> None:
    clean = settings(out=str(tmp_path / "without"))
    expected = weights_of(run(named_sites(tmp_path / "c"), clean))
    faulty = named_sites(tmp_path / "f", "abcd")
    faulty.faults["d"] = fault
    with_fault = settings(num_sites=4)
    assert weights_of(run(faulty, with_fault)) == expected
    failures = events(with_fault, SiteFailed)
    assert {failure.site for failure in failures} == {"d"}
    assert [f.reason for f in failures if reason not in f.reason] == []
    assert all(failure.reason.isprintable() for failure in failures)
    assert ": NaN" not in (Path(with_fault.out) / "events.jsonl").read_text()
    summary = summarise(Path(with_fault.out) / "events.jsonl")
    assert summary["state"] == "finished"
    assert [row["num_updates"] for row in summary["rounds"]] == [3, 3]


def test_a_reply_that_comes_twice_counts_once(settings: Settings, tmp_path: Path) -> None:
    once_only = run(named_sites(tmp_path / "c"), settings(out=str(tmp_path / "once")))
    sites = named_sites(tmp_path / "t")
    sites.faults = dict.fromkeys("abc", duplicate)
    assert weights_of(run(sites, settings())) == weights_of(once_only)
    assert len(events(settings(), UpdateReceived)) == 6


# --- quorum and deadline


def test_a_round_without_quorum_is_tried_again_with_what_came(
    settings: Settings, tmp_path: Path
) -> None:
    calm = run(named_sites(tmp_path / "c"), settings(out=str(tmp_path / "calm"), quorum=3))
    sites = named_sites(tmp_path / "s")
    sites.faults["b"] = once(crash)
    assert weights_of(run(sites, settings(quorum=3))) == weights_of(calm)
    started = events(settings(), RoundStarted)
    assert [(e.server_round, e.attempt, e.asked) for e in started] == [
        (1, 1, ["a", "b", "c"]),
        (1, 2, ["b"]),  # the others' updates are of this very adapter
        (2, 1, ["a", "b", "c"]),
    ]


def test_a_round_asks_the_others_when_those_that_were_drawn_are_silent(
    settings: Settings, tmp_path: Path
) -> None:
    sites = named_sites(tmp_path / "s", "abcd")
    send = sites.send

    def send_and_lose_the_first(names: list[str], request: object) -> None:
        sites.faults = {} if sites.requests else dict.fromkeys("abcd", drop)
        send(names, request)

    sites.send = send_and_lose_the_first
    half = settings(num_sites=4, quorum=2, fraction_train=0.5, num_rounds=1)
    run(sites, half)
    first, second = (event.asked for event in events(half, RoundStarted))
    assert sorted(first + second) == list("abcd")


@pytest.mark.parametrize("fault", [delay(1), drop])
def test_a_round_without_quorum_waits_for_a_site_that_is_busy(
    settings: Settings, tmp_path: Path, fault: Fault
) -> None:
    """Until it answers, late, or its request expires: then it is asked."""
    sites = named_sites(tmp_path / "s")
    sites.faults["c"] = in_rounds({1}, fault)
    sites.wait_for = lambda *_: list("ac" if sites.requests else "abc")
    run(sites, settings(quorum=2))
    asked = [e.asked for e in events(settings(), RoundStarted) if e.server_round == 2]
    assert asked == [["a"], ["c"]]


def test_a_round_in_which_every_site_is_busy_ends_with_the_reason(
    settings: Settings, tmp_path: Path
) -> None:
    sites = named_sites(tmp_path / "s")
    sites.faults["c"] = drop
    sites.wait_for = lambda *_: list("c" if sites.requests else "abc")
    with pytest.raises(RoundError, match="round 2: 0 of the 1.*site c is busy with round 1"):
        run(sites, settings(round_attempts=1))


def test_a_run_ends_without_quorum_and_the_last_adapter_stays(
    settings: Settings, tmp_path: Path
) -> None:
    sites = named_sites(tmp_path / "s")
    sites.faults = dict.fromkeys("abc", in_rounds({2}, crash))
    with pytest.raises(RoundError, match="round 2: 0 of the 1 updates.*2 attempts.*resume the run"):
        run(sites, settings())
    out = Path(settings().out)
    assert (out / "adapter").resolve().name == "round-0001"
    assert read_adapter(out / "adapter").rank == 4
    assert isinstance(events(settings())[-1], RunFailed)
    assert len(events(settings(), RoundFinished)) == 1
    assert not (out / "updates").exists()


def test_too_few_sites_end_the_run_with_a_way_out(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(RoundError, match="3 of 4 sites.*lower num_sites"):
        run(named_sites(tmp_path / "s"), settings(num_sites=4))


def test_a_site_that_leaves_does_not_end_the_run(settings: Settings, tmp_path: Path) -> None:
    sites = named_sites(tmp_path / "s")
    send = sites.send

    def send_and_lose_one(names: list[str], request: object) -> None:
        send(names, request)
        sites.moves.pop("c", None)

    sites.send = send_and_lose_one
    run(sites, settings())
    assert [e.num_updates for e in events(settings(), RoundFinished)] == [3, 2]


def test_an_unexpected_error_ends_the_run_on_record_and_leaves_no_updates(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("federation.rounds.aggregate", broken)
    with pytest.raises(MemoryError):
        run(named_sites(tmp_path / "s"), settings())
    out = Path(settings().out)
    assert summarise(out / "events.jsonl")["reason"] == "MemoryError"
    assert not (out / "updates").exists()


# --- late replies


def test_a_late_reply_is_named_and_dropped(settings: Settings, tmp_path: Path) -> None:
    sites = named_sites(tmp_path / "s")
    sites.faults["c"] = in_rounds({1}, delay(1))
    run(sites, settings(num_rounds=3))
    (late,) = events(settings(), SiteLate)
    assert (late.server_round, late.site, late.trained_round, late.kept) == (2, "c", 1, False)
    asked = [event.asked for event in events(settings(), RoundStarted)]
    assert asked == [["a", "b", "c"], ["a", "b"], ["a", "b", "c"]], "a busy site is asked nothing"
    assert [e.num_updates for e in events(settings(), RoundFinished)] == [2, 2, 3]


def test_a_late_error_is_named_with_its_cause(settings: Settings, tmp_path: Path) -> None:
    sites = named_sites(tmp_path / "s")
    reasons = [(1, Reply("c", 1, error="error 1001: the disk is full"))]
    sites.faults["c"] = in_rounds({1}, lambda _: reasons)
    run(sites, settings(num_rounds=3))
    failures = [(e.server_round, e.site, e.reason) for e in events(settings(), SiteFailed)]
    assert failures == [
        (1, "c", "no reply within 5 s"),
        (2, "c", "in round 1: error 1001: the disk is full"),
    ]


def test_a_late_reply_is_folded_in_as_a_change_of_the_present_adapter(
    settings: Settings, tmp_path: Path
) -> None:
    late = settings(late_replies="fold", aggregation="factors")
    sites = named_sites(tmp_path / "s")
    sites.faults["c"] = in_rounds({1}, delay(1))
    folded = read_adapter(run(sites, late)).modules
    (event,) = events(late, SiteLate)
    assert event.kept
    assert [e.rounds_late for e in events(late, UpdateReceived)].count(1) == 1
    first = read_adapter(Path(late.out) / "round-0001")
    # drift adds the same noise to whatever it gets, so a late change is that of a punctual site.
    expected = [sites.moves[name](first).modules for name in "abc"]
    for module, factors in folded.items():
        for factor in ("b_OR", "a_RI"):
            mean = sum(
                w / 60 * getattr(m[module], factor)
                for w, m in zip((10, 20, 30), expected, strict=True)
            )
            torch.testing.assert_close(getattr(factors, factor), mean, rtol=1e-4, atol=1e-6)


def test_a_request_that_expired_frees_its_site(settings: Settings, tmp_path: Path) -> None:
    sites = named_sites(tmp_path / "s")
    sites.faults["c"] = in_rounds({1}, drop)
    slow = in_rounds({2}, drop)
    sites.faults["b"] = slow  # keeps round 2 waiting until c's request is past its time
    run(sites, settings(num_rounds=3))
    asked = [event.asked for event in events(settings(), RoundStarted)]
    assert asked == [["a", "b", "c"], ["a", "b"], ["a", "c"]]
