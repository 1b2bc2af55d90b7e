"""Runs over few bits: what is sent to whom, and what rounding costs."""

from pathlib import Path

import numpy as np
import pytest
import torch

from federation.adapter import Adapter, LowRank, read_adapter
from federation.events import (
    AdapterResent,
    RoundStarted,
    SiteFailed,
)
from federation.status import summarise
from tests.federation.runs import Settings, dense, events, named_sites, run, weights_of
from tests.simulated import (
    SimulatedSites,
    crash,
    in_rounds,
)


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


def test_a_newcomer_gets_no_more_bytes_than_others_where_a_message_stands_alone(
    settings: Settings, tmp_path: Path
) -> None:
    sites = named_sites(tmp_path / "s")
    sites.faults["c"] = in_rounds({1}, crash)
    narrow = settings(wire={"downlink": "bfloat16"})
    run(sites, narrow)
    assert [event.in_full for event in events(narrow, RoundStarted)] == [[], []]
