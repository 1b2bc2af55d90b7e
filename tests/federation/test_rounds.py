import hashlib
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from federation.adapter import Adapter, LowRank, read_adapter
from federation.errors import UserError
from federation.events import (
    AdapterResent,
    Event,
    RoundFinished,
    RoundStarted,
    RunFailed,
    SiteFailed,
    SiteLate,
    UpdateReceived,
    read_events,
)
from federation.exchange import RoundError
from federation.rounds import run_rounds
from federation.settings import FederationSettings, SettingsError, load_settings
from federation.sites import Reply
from federation.status import summarise
from tests.simulated import (
    Fault,
    SimulatedSites,
    Ticks,
    corrupt,
    crash,
    delay,
    drift,
    drop,
    duplicate,
    forge,
    in_rounds,
    moved,
    once,
    say,
    truncate,
)

Settings = Callable[..., FederationSettings]


@pytest.fixture
def settings(tiny_model: Path, tmp_path: Path) -> Settings:
    """Return a maker of settings: keyword arguments change the default run of three sites."""

    def make(**changes: object) -> FederationSettings:
        values: dict[str, object] = {
            "base_model": str(tiny_model),
            "out": str(tmp_path / "run"),
            "num_rounds": 2,
            "num_sites": 3,
            "adapter": {"rank": 4, "alpha": 8.0},
            "round_timeout_s": 5.0,
        }
        return load_settings(FederationSettings, values | changes, "the test")

    return make


def named_sites(scratch: Path, names: str = "abc", order: str = "") -> SimulatedSites:
    scratch.mkdir(parents=True, exist_ok=True)
    return SimulatedSites(scratch, {n: drift(ord(n) - 97) for n in names}, order=order)


def run(sites: SimulatedSites, settings: FederationSettings) -> Path:
    clock = Ticks()
    return run_rounds(sites, settings, clock=clock, sleep=clock.sleep)


def events(settings: FederationSettings, kind: type[Event] = Event) -> list[Event]:
    log = Path(settings.out) / "events.jsonl"
    return [event for _, event in read_events(log) if isinstance(event, kind)]


def weights_of(directory: Path) -> bytes:
    return (directory / "adapter_model.safetensors").read_bytes()


def test_every_round_leaves_a_peft_adapter_and_the_link_names_the_last(
    settings: Settings, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    last = run(named_sites(tmp_path / "s"), settings())
    out = Path(settings().out)
    assert last == out / "round-0002"
    assert (out / "adapter").resolve() == last.resolve()
    assert not (out / "updates").exists()
    base = LlamaForCausalLM.from_pretrained(settings().base_model)
    loaded = PeftModel.from_pretrained(base, out / "adapter")
    ours = read_adapter(last).modules["model.layers.1.mlp.down_proj"]
    theirs = loaded.base_model.model.model.layers[1].mlp.down_proj.lora_A["default"].weight
    torch.testing.assert_close(theirs.detach(), ours.a_RI)


def dense(factors: LowRank) -> np.ndarray:
    return (factors.b_OR.double() @ factors.a_RI.double()).numpy()


def test_the_first_round_is_the_weighted_mean_of_the_products(
    settings: Settings, tmp_path: Path
) -> None:
    sites = named_sites(tmp_path / "s")
    one_round = settings(num_rounds=1, adapter={"rank": 12, "alpha": 24.0})
    averaged = read_adapter(run(sites, one_round)).modules
    from federation.wire import open_update

    start = open_update(tmp_path / "s" / "a-1-1").adapter()
    sent = [sites.moves[name](start).modules for name in "abc"]
    for module, factors in averaged.items():
        mean = sum(w / 60 * dense(m[module]) for w, m in zip((10, 20, 30), sent, strict=True))
        u, s, vh = np.linalg.svd(mean)
        best = (u[:, :12] * s[:12]) @ vh[:12]
        assert np.linalg.norm(dense(factors) - best) <= 1e-6 * np.linalg.norm(best)


# --- the order of arrival


def test_neither_the_order_of_arrival_nor_a_repetition_changes_a_bit(
    settings: Settings, tmp_path: Path
) -> None:
    names = "abcdefgh"
    orders = [names, names, names[::-1]]
    orders += [
        "".join(random.Random(seed).sample(names, 8))  # noqa: S311
        for seed in range(12)
    ]
    digests = set()
    for number, order in enumerate(orders):
        out = settings(out=str(tmp_path / f"run{number}"), num_sites=8)
        last = run(named_sites(tmp_path / f"s{number}", names, order), out)
        digests.add(hashlib.sha256(weights_of(last)).hexdigest())
    assert len(digests) == 1


@pytest.mark.slow
def test_every_permutation_of_eight_replies_is_folded_in_the_same_order(tmp_path: Path) -> None:
    """All 40320 of them, through the exchange that decides the order of the fold."""
    from federation.events import EventLog
    from federation.exchange import Exchange, Outgoing
    from federation.wire import open_update, write_message

    one = Adapter(1, 1.0, {"layer.q_proj": LowRank(torch.zeros(2, 1), torch.ones(1, 2))})
    served = tmp_path / "served"
    write_message(served, one, dtype="float32", base_model="m")
    outgoing = Outgoing(open_update(served), served)
    values = FederationSettings(base_model="m", out="o", num_sites=8)
    log = EventLog(tmp_path / "events.jsonl")
    log.write = lambda _: None
    sites = named_sites(tmp_path / "s", "abcdefgh")
    replies = {}

    class Canned(SimulatedSites):
        def send(self, names: list[str], request: object) -> None:
            if not replies:
                super().send(names, request)
                replies.update({reply.site: reply for _, reply in self._arrivals})
            self._arrivals = [(0, replies[name]) for name in self.order]

    canned = Canned(sites.scratch, sites.moves)
    seen = set()
    for order in itertools.permutations("abcdefgh"):
        canned.order = list(order)
        clock = Ticks()
        exchange = Exchange(
            canned, values, run="0", spool=tmp_path / "u", log=log, clock=clock, sleep=clock.sleep
        )
        seen.add(tuple(item.sha256 for item in exchange.gather(1, outgoing, "AB")))
    assert len(seen) == 1


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


@pytest.mark.parametrize("rule", ["products", "alternating"])
def test_no_round_is_committed_that_cannot_be_sent(
    settings: Settings, tmp_path: Path, rule: str
) -> None:
    sites = named_sites(tmp_path / "s")

    def huge(adapter: Adapter) -> Adapter:
        generator = torch.Generator().manual_seed(0)
        return moved(
            adapter,
            lambda f: LowRank(
                1e15 * torch.randn(f.b_OR.shape, generator=generator).sign(),
                -0.5 * f.a_RI if rule == "products" else f.a_RI,
            ),
        )

    honest, sites.moves["c"] = sites.moves["c"], huge
    sites.num_examples["c"] = 60
    with pytest.raises(RoundError, match="of the average holds NaN, infinity or a number beyond"):
        run(sites, settings(aggregation=rule))
    sites.moves["c"] = honest
    run(sites, settings().model_copy(update={"resume": settings().out}))


# --- sampling


def test_sites_are_drawn_by_the_seed_and_on_record(settings: Settings, tmp_path: Path) -> None:
    def drawn(seed: int, out: str) -> list[list[str]]:
        some = settings(
            out=str(tmp_path / out), num_sites=8, num_rounds=6, fraction_train=0.5, seed=seed
        )
        run(named_sites(tmp_path / f"s{out}", "abcdefgh"), some)
        return [event.asked for event in events(some, RoundStarted)]

    first = drawn(3, "one")
    assert all(len(names) == 4 for names in first)
    assert len({tuple(names) for names in first}) > 1
    assert drawn(3, "again") == first
    assert drawn(4, "other") != first


# --- the wire


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_a_run_over_few_bits_ends_near_the_exact_one(
    settings: Settings, tmp_path: Path, dtype: str
) -> None:
    exact = read_adapter(
        run(named_sites(tmp_path / "e"), settings(out=str(tmp_path / "exact"), num_rounds=4))
    )
    few = settings(num_rounds=4, wire={"uplink": dtype, "downlink": dtype})
    near = read_adapter(run(named_sites(tmp_path / "n"), few))
    distance = sum(
        np.linalg.norm(dense(near.modules[m]) - dense(f)) for m, f in exact.modules.items()
    )
    size = sum(np.linalg.norm(dense(f)) for f in exact.modules.values())
    assert distance / size < {"bfloat16": 0.02, "int8": 0.02, "int4": 0.25}[dtype]
    started = events(few, RoundStarted)
    if dtype != "bfloat16":
        assert [e.in_full for e in started] == [[], [], [], []]
        assert started[1].num_bytes < 0.3 * started[0].num_bytes


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_a_small_change_beside_a_large_one_is_not_rounded_away_on_the_way_down(
    settings: Settings, tmp_path: Path, dtype: str
) -> None:
    """One row of B grows by 1 a round, the others by 0.004: about half a step of int8."""

    def move(adapter: Adapter) -> Adapter:
        modules = {}
        for name, f in adapter.modules.items():
            b_OR = f.b_OR + 0.004
            b_OR[0] += 1
            modules[name] = LowRank(b_OR, f.a_RI)
        return Adapter(adapter.rank, adapter.alpha, modules)

    (tmp_path / "s").mkdir()
    sites = SimulatedSites(tmp_path / "s", dict.fromkeys("abc", move))
    few = settings(num_rounds=12, aggregation="factors", wire={"downlink": dtype})
    for factors in read_adapter(run(sites, few)).modules.values():
        torch.testing.assert_close(
            factors.b_OR[1:], torch.full_like(factors.b_OR[1:], 12 * 0.004), rtol=1e-3, atol=0
        )
        torch.testing.assert_close(
            factors.b_OR[0], torch.full_like(factors.b_OR[0], 12 * 1.004), rtol=1e-5, atol=0
        )


def test_a_site_without_the_reference_gets_the_whole_adapter(
    settings: Settings, tmp_path: Path
) -> None:
    few = settings(num_rounds=3, wire={"downlink": "int8"})
    calm = run(
        named_sites(tmp_path / "c"),
        settings(out=str(tmp_path / "calm"), num_rounds=3, wire={"downlink": "int8"}),
    )
    forgetful = named_sites(tmp_path / "f")
    send = forgetful.send

    def send_and_forget(names: list[str], request: object) -> None:
        send(names, request)
        if request.server_round == 1:
            del forgetful._held["b"]

    forgetful.send = send_and_forget
    assert weights_of(run(forgetful, few)) == weights_of(calm)
    assert not events(few, SiteFailed)
    (resent,) = events(few, AdapterResent)
    down = sum(len(e.asked) * e.num_bytes for e in events(few, RoundStarted)) + resent.num_bytes
    rows = summarise(Path(few.out) / "events.jsonl")["rounds"]
    assert sum(row["bytes_down"] for row in rows) == down
    messages = [(r.server_round, names, r.message.suffix) for names, r in forgetful.requests]
    assert messages[1:3] == [(2, ["a", "b", "c"], ".int8"), (2, ["b"], ".update")]


def test_a_site_that_missed_a_round_gets_the_whole_adapter_at_once(
    settings: Settings, tmp_path: Path
) -> None:
    few = settings(num_rounds=3, wire={"downlink": "int8"})
    sites = named_sites(tmp_path / "s")
    sites.faults["c"] = in_rounds({1}, crash)
    run(sites, few)
    started = events(few, RoundStarted)
    assert [event.in_full for event in started] == [[], ["c"], []]
    assert started[1].num_bytes_in_full > 3 * started[1].num_bytes


# --- other averages


def test_a_newcomer_gets_no_more_bytes_than_others_where_a_message_stands_alone(
    settings: Settings, tmp_path: Path
) -> None:
    sites = named_sites(tmp_path / "s")
    sites.faults["c"] = in_rounds({1}, crash)
    narrow = settings(wire={"downlink": "bfloat16"})
    run(sites, narrow)
    assert [event.in_full for event in events(narrow, RoundStarted)] == [[], []]


def test_alternating_rounds_train_one_factor_and_keep_the_product(
    settings: Settings, tmp_path: Path
) -> None:
    turns = settings(aggregation="alternating", num_rounds=4)
    sites = named_sites(tmp_path / "s")
    run(sites, turns)
    assert [request.trains for _, request in sites.requests] == ["B", "A", "B", "A"]
    sizes = [
        sum(e.num_bytes for e in events(turns, UpdateReceived) if e.server_round == r)
        for r in (1, 2)
    ]
    full = sum(e.num_bytes for e in events(turns, RoundStarted)[:1]) * 3
    assert 0.9 * full < sum(sizes) < 1.1 * full
    from federation.wire import open_update

    for number in range(1, 5):
        served = open_update(tmp_path / "s" / f"a-{number}-{number}").adapter()
        sent = [sites.moves[name](served).modules for name in "abc"]
        adapter = read_adapter(Path(turns.out) / f"round-{number:04d}")
        for module, factors in adapter.modules.items():
            before = served.modules[module]
            if number % 2:  # B is trained against the served A, whose rows are orthonormal
                torch.testing.assert_close(
                    before.a_RI @ before.a_RI.mT, torch.eye(4), atol=1e-5, rtol=0
                )
                products = [dense(LowRank(m[module].b_OR, before.a_RI)) for m in sent]
            else:
                torch.testing.assert_close(
                    before.b_OR.mT @ before.b_OR, torch.eye(4), atol=1e-5, rtol=0
                )
                products = [dense(LowRank(before.b_OR, m[module].a_RI)) for m in sent]
            mean = sum(w / 60 * p for w, p in zip((10, 20, 30), products, strict=True))
            assert np.linalg.norm(dense(factors) - mean) <= 1e-5 * np.linalg.norm(mean)


def test_the_tail_gives_back_what_the_cut_lost(settings: Settings, tmp_path: Path) -> None:
    """Sites that send constants: adapter + tail is the whole mean."""
    generator = torch.Generator().manual_seed(5)

    targets: dict[str, dict[str, LowRank]] = {}

    def towards(name: str) -> Callable[[Adapter], Adapter]:
        def move(adapter: Adapter) -> Adapter:
            own = targets.setdefault(
                name,
                {
                    module: LowRank(
                        torch.randn(f.b_OR.shape, generator=generator),
                        torch.randn(f.a_RI.shape, generator=generator),
                    )
                    for module, f in adapter.modules.items()
                },
            )
            return Adapter(adapter.rank, adapter.alpha, own)

        return move

    sites = SimulatedSites(tmp_path, {name: towards(name) for name in "abc"})
    with_tail = settings(num_rounds=1, tail_rank=8)
    last = run(sites, with_tail)
    from safetensors.torch import load_file

    for module, factors in read_adapter(last).modules.items():
        state = load_file(Path(with_tail.out) / "state-0001" / f"{module}.safetensors")
        mean = sum(
            w / 60 * dense(targets[n][module]) for w, n in zip((10, 20, 30), "abc", strict=True)
        )
        tail = dense(LowRank(state["tail_b"].mT, state["tail_a"]))
        assert np.linalg.norm(dense(factors) + tail - mean) <= 1e-5 * np.linalg.norm(mean)
        assert np.linalg.norm(tail) > 0.1 * np.linalg.norm(mean)


@pytest.mark.parametrize("aggregation", ["products", "factors", "alternating"])
def test_no_rank_slice_decays_where_its_owners_change_nothing(
    settings: Settings, tmp_path: Path, aggregation: str
) -> None:
    """Ranks 4, 8, 16 and 32 for 20 rounds; padding short sites with zeros would halve and halve."""
    mixed = settings(
        num_rounds=21,
        num_sites=4,
        aggregation=aggregation,
        adapter={"rank": 32, "alpha": 32.0},
        tail_rank=0,
    )
    start = drift(9, 0.1)
    first = {"done": False}

    def move(adapter: Adapter) -> Adapter:
        return adapter if first["done"] else start(adapter)

    sites = SimulatedSites(tmp_path / "s", dict.fromkeys("abcd", move))
    (tmp_path / "s").mkdir()
    sites.ranks = dict(zip("abcd", (4, 8, 16, 32), strict=True))
    send = sites.send

    def send_and_stop(names: list[str], request: object) -> None:
        send(names, request)
        first["done"] = True

    sites.send = send_and_stop
    run(sites, mixed)

    def energies(server_round: int) -> torch.Tensor:
        modules = read_adapter(Path(mixed.out) / f"round-{server_round:04d}").modules.values()
        return torch.stack([f.b_OR.norm(dim=0) * f.a_RI.norm(dim=1) for f in modules])

    before, after = energies(1), energies(21)
    if aggregation == "alternating":  # slices turn with the QR: the product must stay
        before, after = before.square().sum(), after.square().sum()
    assert (before > 0).all()
    assert (after >= 0.999 * before).all()


@pytest.mark.parametrize(
    "aggregation", ["products", "factors", "alternating", "median", "trimmed_mean"]
)
def test_slices_whose_only_owner_is_absent_stay_as_they_were(
    settings: Settings, tmp_path: Path, aggregation: str
) -> None:
    mixed = settings(aggregation=aggregation, robust={"num_byzantine": 0})
    sites = named_sites(tmp_path / "s")
    sites.ranks = {"a": 2, "b": 2}
    sites.faults["c"] = in_rounds({2}, crash)
    run(sites, mixed)
    before, after = (
        read_adapter(Path(mixed.out) / name).modules for name in ("round-0001", "round-0002")
    )
    for module, factors in after.items():
        if aggregation == "alternating":  # B is frozen in round 2, and A turns with the QR
            assert np.linalg.matrix_rank(dense(factors)) == 4
            continue
        own, kept = (LowRank(f.b_OR[:, 2:], f.a_RI[2:]) for f in (before[module], factors))
        size = np.linalg.norm(dense(own))
        assert size > 0
        assert np.linalg.norm(dense(kept) - dense(own)) <= 0.1 * size


def test_the_rank_grows_to_the_energy_that_is_asked_for(settings: Settings, tmp_path: Path) -> None:
    grows = settings(
        num_rounds=3, adapter={"rank": 2, "alpha": 4.0, "energy": 0.99, "max_rank": 12}
    )
    last = read_adapter(run(named_sites(tmp_path / "s"), grows))
    assert 2 < last.rank <= 12
    assert last.alpha / last.rank == 2.0
    errors = [event.aggregation_error for event in events(grows, RoundFinished)]
    assert errors[0] ** 2 <= 0.01 + 1e-9


def lying(lie: str) -> Callable[[Adapter], Adapter]:
    """Return a site that sends its honest change a hundred times, turned round, or noise."""

    def move(adapter: Adapter) -> Adapter:
        if lie == "random":
            return drift(99, 1.0)(adapter)
        honest, size = drift(7)(adapter), {"scaled": 100.0, "flipped": -10.0}[lie]
        modules = {
            name: LowRank(
                f.b_OR + size * (honest.modules[name].b_OR - f.b_OR),
                f.a_RI + size * (honest.modules[name].a_RI - f.a_RI),
            )
            for name, f in adapter.modules.items()
        }
        return Adapter(adapter.rank, adapter.alpha, modules)

    return move


@pytest.mark.parametrize("lie", ["scaled", "flipped", "random"])
def test_a_liar_among_eight_is_borne_by_every_robust_rule_and_not_by_the_mean(
    settings: Settings, tmp_path: Path, lie: str
) -> None:
    """No robust average may lie further from the seven honest than the farthest of them does."""

    def one_round(name: str, names: str, **changes: object) -> tuple[SimulatedSites, Adapter]:
        sites = named_sites(tmp_path / f"s-{name}", names)
        sites.num_examples = dict.fromkeys(names, 10)
        if "h" in names:
            sites.moves["h"] = lying(lie)
        asked = settings(
            out=str(tmp_path / name), num_sites=len(names), quorum=7, num_rounds=1, **changes
        )
        return sites, read_adapter(run(sites, asked))

    seven, honest = one_round("honest", "abcdefg")
    from federation.wire import open_update

    start = open_update(tmp_path / "s-honest" / "a-1-1").adapter()
    sent = [seven.moves[name](start) for name in "abcdefg"]

    def distance(adapter: Adapter) -> float:
        squares = (
            np.square(dense(adapter.modules[m]) - dense(f)).sum() for m, f in honest.modules.items()
        )
        return float(np.sqrt(sum(squares)))

    farthest = max(distance(adapter) for adapter in sent)
    norm = max(
        float(np.sqrt(sum(np.square(dense(f)).sum() for f in a.modules.values()))) for a in sent
    )
    rules = ["krum", "multi_krum", "geometric_median", "median", "trimmed_mean"]
    borne = {rule: distance(one_round(rule, "abcdefgh", aggregation=rule)[1]) for rule in rules}
    clipped = {"num_byzantine": 1, "clip_norm": honest.scale * norm}
    borne["clip"] = distance(one_round("clip", "abcdefgh", robust=clipped)[1])
    assert {rule: d for rule, d in borne.items() if d > farthest} == {}
    assert distance(one_round("plain", "abcdefgh")[1]) > farthest


# --- settings that do not fit together


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"aggregation": "krum", "quorum": 3}, "needs 5 updates: raise quorum"),
        ({"quorum": 4}, "quorum is 4 and num_sites 3"),
        ({"aggregation": "median", "robust": {"clip_norm": 1.0}}, "use products, krum"),
        ({"aggregation": "alternating", "wire": {"uplink": "int8"}}, "use float32 or bfloat16"),
        ({"aggregation": "alternating", "late_replies": "fold"}, 'set late_replies="drop"'),
        ({"aggregation": "factors", "adapter": {"energy": 0.9}}, "only products"),
        ({"server_optimizer": {"kind": "fedadam"}}, "expected at most 0.1"),
        (
            {"aggregation": "alternating", "server_optimizer": {"kind": "fedavgm"}},
            "momentum of the old ones",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused_with_a_way_out(
    settings: Settings, change: dict[str, object], sentence: str
) -> None:
    with pytest.raises(SettingsError, match=sentence):
        settings(**change)


def test_an_average_that_could_not_be_sent_is_not_committed(
    settings: Settings, tmp_path: Path
) -> None:
    """Finite, but beyond what a message holds: a resumed run could not get past it."""

    def absurd(adapter: Adapter) -> Adapter:
        modules = {
            name: LowRank(torch.full_like(f.b_OR, 9e14), f.a_RI * 1e14)
            for name, f in adapter.modules.items()
        }
        return Adapter(adapter.rank, adapter.alpha, modules)

    sites = named_sites(tmp_path / "s")
    sites.moves["c"] = lambda adapter: absurd(adapter) if len(sites.requests) == 2 else adapter
    with pytest.raises(RoundError, match="down_proj of the average holds .*beyond 1e"):
        run(sites, settings(num_rounds=3))
    sites.moves["c"] = drift(2)
    assert run(sites, settings(resume=settings().out)).name == "round-0003"


def test_alternating_at_a_rank_beyond_a_module_is_refused_before_anything_is_sent(
    settings: Settings, tmp_path: Path
) -> None:
    sites = named_sites(tmp_path / "s")
    wide = settings(aggregation="alternating", adapter={"rank": 80, "alpha": 80.0})
    with pytest.raises(SettingsError, match="adapter.rank is 80 .* a rank of at most"):
        run(sites, wide)
    assert not sites.requests


def test_a_used_directory_is_refused_before_anything_is_sent(
    settings: Settings, tmp_path: Path
) -> None:
    run(named_sites(tmp_path / "s"), settings())
    again = named_sites(tmp_path / "t")
    with pytest.raises(UserError, match="exists already"):
        run(again, settings())
    assert not again.requests


def test_lineage_of_a_round_names_every_update(settings: Settings, tmp_path: Path) -> None:
    last = run(named_sites(tmp_path / "s"), settings())
    seen = events(settings(), UpdateReceived)
    statement = json.loads((last / "lineage.json").read_text())
    named = {m["name"]: m["digest"]["sha256"] for m in statement["predicate"]["materials"]}
    for event in seen:
        if event.server_round == 2:
            assert named[f"update of site {event.site}"] == event.sha256
    previous = named["previous_round"]
    first = json.loads((last / "lineage" / f"{previous}.json").read_text())
    names = {m["digest"]["sha256"] for m in first["predicate"]["materials"]}
    assert {e.sha256 for e in seen if e.server_round == 1} <= names
    subject = {s["name"]: s["digest"]["sha256"] for s in statement["subject"]}
    assert subject["adapter_model.safetensors"] == hashlib.sha256(weights_of(last)).hexdigest()
    shares = statement["predicate"]["parameters"]["shares"]
    assert shares == {"a": 10 / 60, "b": 20 / 60, "c": 30 / 60}
