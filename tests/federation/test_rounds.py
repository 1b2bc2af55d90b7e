import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from federation.adapter import read_adapter
from federation.errors import UserError
from federation.events import RoundFinished, RunFailed, SiteFailed, UpdateReceived, read_events
from federation.rounds import Reply, RoundError, run_rounds
from federation.settings import FederationSettings
from federation.status import summarise
from tests.simulated import SimulatedSites, drift


@pytest.fixture
def settings(tiny_model: Path, tmp_path: Path) -> FederationSettings:
    return FederationSettings(
        base_model=str(tiny_model),
        out=str(tmp_path / "run"),
        num_rounds=2,
        num_sites=3,
        adapter={"rank": 4, "alpha": 8.0},
        round_timeout_s=5.0,
    )


def three_sites(scratch: Path, order: str = "abc") -> SimulatedSites:
    moves = {name: drift(seed) for seed, name in enumerate("abc")}
    return SimulatedSites(scratch, moves, order=list(order))


def kinds(out: str) -> list[str]:
    return [type(event).__name__ for _, event in read_events(Path(out) / "events.jsonl")]


def test_every_round_leaves_a_peft_adapter_and_the_link_names_the_last(
    settings: FederationSettings, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    last = run_rounds(three_sites(tmp_path), settings)
    assert last == Path(settings.out) / "round-0002"
    assert (Path(settings.out) / "adapter").resolve() == last.resolve()
    assert not (Path(settings.out) / "updates").exists()
    base = LlamaForCausalLM.from_pretrained(settings.base_model)
    loaded = PeftModel.from_pretrained(base, Path(settings.out) / "adapter")
    ours = read_adapter(last).modules["model.layers.1.mlp.down_proj"]
    theirs = loaded.base_model.model.model.layers[1].mlp.down_proj.lora_A["default"].weight
    torch.testing.assert_close(theirs.detach(), ours.a_RI)


def test_the_first_round_is_the_weighted_mean_of_the_products(
    settings: FederationSettings, tmp_path: Path
) -> None:
    sites = three_sites(tmp_path)
    one_round = settings.model_copy(
        update={"num_rounds": 1, "adapter": settings.adapter.model_copy(update={"rank": 12})}
    )
    run_rounds(sites, one_round)
    averaged = read_adapter(Path(settings.out) / "adapter").modules
    (tmp_path / "start").write_bytes(sites.requests[0].adapter)
    from federation.wire import open_update

    start = open_update(tmp_path / "start").adapter()
    moved = [sites.moves[name](start).modules for name in "abc"]
    for module, factors in averaged.items():
        mean = sum(
            weight / 60 * (m[module].b_OR.double() @ m[module].a_RI.double())
            for weight, m in zip((10, 20, 30), moved, strict=True)
        ).numpy()
        u, s, vh = np.linalg.svd(mean)
        best = (u[:, :12] * s[:12]) @ vh[:12]
        got = (factors.b_OR.double() @ factors.a_RI.double()).numpy()
        assert np.linalg.norm(got - best) <= 1e-6 * np.linalg.norm(best)


def test_the_order_of_arrival_changes_no_bit(settings: FederationSettings, tmp_path: Path) -> None:
    digests = set()
    for order in ("abc", "cab", "bca", "cba"):
        run = settings.model_copy(update={"out": str(tmp_path / order)})
        last = run_rounds(three_sites(tmp_path, order), run)
        digests.add(hashlib.sha256((last / "adapter_model.safetensors").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_a_failing_site_is_named_and_the_round_goes_on(
    settings: FederationSettings, tmp_path: Path
) -> None:
    sites = three_sites(tmp_path)
    sites.spoil["b"] = lambda reply: Reply(reply.site, None, "error 1001: no such file")
    run_rounds(sites, settings)
    failures = [
        e for _, e in read_events(Path(settings.out) / "events.jsonl") if isinstance(e, SiteFailed)
    ]
    assert [(f.server_round, f.site) for f in failures] == [(1, "b"), (2, "b")]
    assert "no such file" in failures[0].reason
    summary = summarise(Path(settings.out) / "events.jsonl")
    assert summary["state"] == "finished"
    assert [row["num_updates"] for row in summary["rounds"]] == [2, 2]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            lambda r: dataclasses.replace(r, update=r.update[:-9] + b"\0" + r.update[-8:]),
            "checksum",
        ),
        (lambda r: dataclasses.replace(r, update=r.update[:2000]), "cut off"),
        (lambda r: dataclasses.replace(r, num_examples=0), "num_examples is 0"),
        (lambda _: None, "no reply within"),
    ],
)
def test_a_spoiled_update_never_reaches_the_average(
    settings: FederationSettings, tmp_path: Path, spoil: object, reason: str
) -> None:
    clean = SimulatedSites(tmp_path, {name: drift(i) for i, name in enumerate("ab")})
    without = settings.model_copy(update={"out": str(tmp_path / "without"), "num_sites": 2})
    run_rounds(clean, without)
    spoiled = three_sites(tmp_path)
    spoiled.spoil["c"] = spoil
    ticks = iter(range(10_000_000))
    run_rounds(spoiled, settings, clock=lambda: float(next(ticks)) / 10, sleep=lambda _: None)
    reasons = [
        e.reason
        for _, e in read_events(Path(settings.out) / "events.jsonl")
        if isinstance(e, SiteFailed)
    ]
    assert len(reasons) == 2
    assert all(reason in text for text in reasons)
    same = [Path(run.out) / "adapter" / "adapter_model.safetensors" for run in (without, settings)]
    assert same[0].read_bytes() == same[1].read_bytes()


def test_a_round_without_updates_ends_the_run_and_keeps_the_last_adapter(
    settings: FederationSettings, tmp_path: Path
) -> None:
    sites = three_sites(tmp_path)
    good = iter([True, True, True])
    for name in "abc":
        sites.spoil[name] = lambda r: r if next(good, False) else Reply(r.site, None, "disk full")
    with pytest.raises(RoundError, match="round 2: none of 3 sites.*disk full"):
        run_rounds(sites, settings)
    out = Path(settings.out)
    assert (out / "adapter").resolve().name == "round-0001"
    assert read_adapter(out / "adapter").rank == 4
    events = [event for _, event in read_events(out / "events.jsonl")]
    assert isinstance(events[-1], RunFailed)
    assert sum(isinstance(event, RoundFinished) for event in events) == 1


def test_too_few_sites_end_the_run_with_a_way_out(
    settings: FederationSettings, tmp_path: Path
) -> None:
    many = settings.model_copy(update={"num_sites": 4})
    with pytest.raises(RoundError, match="3 of 4 sites.*lower num_sites"):
        run_rounds(three_sites(tmp_path), many)


def test_a_used_directory_is_refused_before_anything_is_sent(
    settings: FederationSettings, tmp_path: Path
) -> None:
    run_rounds(three_sites(tmp_path), settings)
    again = three_sites(tmp_path)
    with pytest.raises(UserError, match="exists already"):
        run_rounds(again, settings)
    assert not again.requests


def test_lineage_of_a_round_names_every_update(
    settings: FederationSettings, tmp_path: Path
) -> None:
    last = run_rounds(three_sites(tmp_path), settings)
    seen = [
        e
        for _, e in read_events(Path(settings.out) / "events.jsonl")
        if isinstance(e, UpdateReceived)
    ]
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
    weights = (last / "adapter_model.safetensors").read_bytes()
    assert subject["adapter_model.safetensors"] == hashlib.sha256(weights).hexdigest()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_examples": 10**18}, "expected 1 to"),
        ({"num_examples": 10**400}, "expected 1 to"),
        ({"train_loss": float("nan")}, "not a finite number"),
        ({"seconds": float("inf")}, "not a finite number"),
    ],
)
def test_absurd_numbers_of_one_site_cost_that_site_its_place(
    settings: FederationSettings, tmp_path: Path, change: dict[str, object], reason: str
) -> None:
    sites = three_sites(tmp_path)
    sites.spoil["a"] = lambda reply: dataclasses.replace(reply, **change)
    run_rounds(sites, settings)
    log = (Path(settings.out) / "events.jsonl").read_text()
    assert "NaN" not in log
    failures = [
        e for _, e in read_events(Path(settings.out) / "events.jsonl") if isinstance(e, SiteFailed)
    ]
    assert len(failures) == 2
    assert all(reason in failure.reason for failure in failures)


def test_an_unexpected_error_ends_the_run_on_record_and_leaves_no_updates(
    settings: FederationSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("federation.rounds.aggregate", broken)
    with pytest.raises(MemoryError):
        run_rounds(three_sites(tmp_path), settings)
    out = Path(settings.out)
    assert summarise(out / "events.jsonl")["reason"] == "MemoryError"
    assert not (out / "updates").exists()


def test_a_site_that_leaves_after_the_first_round_does_not_end_the_run(
    settings: FederationSettings, tmp_path: Path
) -> None:
    sites = three_sites(tmp_path)
    send = sites.send

    def send_and_lose_one(names: list[str], request: object) -> None:
        send(names, request)
        if len(sites.requests) == 1:
            del sites.moves["c"]
            sites.order.remove("c")

    sites.send = send_and_lose_one
    run_rounds(sites, settings)
    rows = summarise(Path(settings.out) / "events.jsonl")["rounds"]
    assert [row["num_updates"] for row in rows] == [3, 2]
