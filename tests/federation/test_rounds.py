"""A run of rounds: what it leaves, its order, whom it asks, what it refuses."""

import hashlib
import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from federation.adapter import Adapter, LowRank, read_adapter
from federation.errors import UserError
from federation.events import (
    RoundStarted,
    UpdateReceived,
)
from federation.exchange import RoundError
from federation.settings import FederationSettings, SettingsError
from tests.federation.runs import Settings, dense, events, named_sites, run, weights_of
from tests.simulated import (
    SimulatedSites,
    Ticks,
    drift,
    moved,
)


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
    from federation.exchange import Exchange
    from federation.gathering import Outgoing
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
    sentence = r"of the average holds NaN, infinity .* norms .*: site c \S+e[+]1\d, site [ab] "
    with pytest.raises(RoundError, match=sentence):
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


@pytest.mark.parametrize(("b", "a"), [(9e14, 1e14), (1e8, 1e3)], ids=["message", "site"])
def test_an_average_that_could_not_be_trained_is_not_committed(
    settings: Settings, tmp_path: Path, b: float, a: float
) -> None:
    """Finite, but beyond what a message holds, or what sites train: no run could get past it."""

    def absurd(adapter: Adapter) -> Adapter:
        modules = {
            name: LowRank(torch.full_like(f.b_OR, b), f.a_RI * a)
            for name, f in adapter.modules.items()
        }
        return Adapter(adapter.rank, adapter.alpha, modules)

    sites = named_sites(tmp_path / "s")
    sites.moves["c"] = lambda adapter: absurd(adapter) if len(sites.requests) == 2 else adapter
    with pytest.raises(RoundError, match=r"of the average .* norms .*: site c \S+e[+]\d+, site"):
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
