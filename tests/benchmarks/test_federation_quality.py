import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import quality_report
from benchmarks.federation_quality import FinishedRuns, plans_of
from benchmarks.processes import ROOT
from benchmarks.quality_studies import (
    ATTACKS,
    Inputs,
    Plan,
    aggregation_plans,
    halve,
    reference_plan,
    run_plan,
    wire_plans,
)
from benchmarks.training_sites import TrainingSites, change_norm, random_change, scaled
from client.site import Site
from federation import server_app
from federation.adapter import Adapter, LowRank, read_adapter
from federation.rounds import run_rounds
from federation.settings import FederationSettings, load_settings
from tests.conftest import write_records
from tests.simulated import LocalGrid

NAMES = ("bank", "billing", "hospital", "security")


def write_institutions(data: Path, names: Sequence[str] = NAMES) -> None:
    for index, name in enumerate(names):
        write_records(data / name / "train.jsonl", 20 + 4 * index, topic=name)
        write_records(data / name / "heldout.jsonl", 8, topic=name, start=100)


@pytest.fixture
def inputs(tiny_model: Path, tmp_path: Path) -> Inputs:
    write_institutions(tmp_path / "data", NAMES[:2])
    halve(tmp_path / "data", tmp_path / "halves")
    return Inputs(tmp_path / "data", tiny_model, tmp_path / "halves")


def random_adapter(seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    modules = {
        f"layers.{layer}.q_proj": LowRank(
            torch.randn(7, 2, generator=generator), torch.randn(2, 5, generator=generator)
        )
        for layer in range(2)
    }
    return Adapter(2, 8.0, modules)


def test_sites_in_this_process_train_the_adapter_that_sites_behind_flower_train(
    inputs: Inputs, tmp_path: Path
) -> None:
    ranks = (2, 4)
    common = {
        "base_model": str(inputs.base_model),
        "num_rounds": 2,
        "num_sites": 2,
        "adapter.rank": 4,
        "wire.uplink": "int4",
        "wire.downlink": "int4",
        "training.num_steps": 2,
        "training.batch_size": 4,
        "training.max_tokens": 64,
        "training.dtype": "float32",
    }
    run_config = common | {"out": str(tmp_path / "flower")}
    nodes = [
        {
            "data": str(inputs.data / name / "train.jsonl"),
            "base_model": str(inputs.base_model),
            "state": str(tmp_path / "node-state" / name),
            "rank": rank,
        }
        for name, rank in zip(NAMES[:2], ranks, strict=True)
    ]
    grid = LocalGrid(nodes, run_config)
    server_app.main(grid, grid.server_context)
    sites = [
        Site(
            inputs.base_model, inputs.data / name / "train.jsonl", name, tmp_path / "own" / name, r
        )
        for name, r in zip(NAMES[:2], ranks, strict=True)
    ]
    values = common | {"out": str(tmp_path / "memory")}
    run_rounds(TrainingSites(sites), load_settings(FederationSettings, values, "the test"))
    expected = read_adapter(tmp_path / "flower" / "adapter").modules
    for name, factors in read_adapter(tmp_path / "memory" / "adapter").modules.items():
        assert torch.equal(factors.b_OR, expected[name].b_OR)
        assert torch.equal(factors.a_RI, expected[name].a_RI)


def test_a_liar_scales_the_change_of_each_factor() -> None:
    origin, trained = random_adapter(0), random_adapter(1)
    for times in (100, -1):
        sent = scaled(times)(origin, trained, 0)
        for name, factors in sent.modules.items():
            start, end = origin.modules[name], trained.modules[name]
            change = factors.b_OR - start.b_OR, factors.a_RI - start.a_RI
            honest = end.b_OR - start.b_OR, end.a_RI - start.a_RI
            for seen, one in zip(change, honest, strict=True):
                torch.testing.assert_close(seen, times * one, rtol=1e-4, atol=1e-4)


def test_noise_has_a_hundred_times_the_norm_of_the_honest_change() -> None:
    origin, trained = random_adapter(0), random_adapter(1)
    sent = random_change(100)(origin, trained, 3)
    for name, factors in sent.modules.items():
        seen = (factors.b_OR - origin.modules[name].b_OR).norm()
        honest = trained.modules[name].b_OR - origin.modules[name].b_OR
        assert float(seen) == pytest.approx(100 * float(honest.norm()), rel=1e-5)
    again = random_change(100)(origin, trained, 3)
    other = random_change(100)(origin, trained, 4)
    first = next(iter(sent.modules))
    assert torch.equal(sent.modules[first].a_RI, again.modules[first].a_RI)
    assert not torch.equal(sent.modules[first].a_RI, other.modules[first].a_RI)


def test_the_norm_of_a_change_is_that_of_the_dense_matrices() -> None:
    origin, trained = random_adapter(0), random_adapter(1)
    squares = [
        ((4.0 * (f.b_OR @ f.a_RI - origin.modules[n].b_OR @ origin.modules[n].a_RI)) ** 2).sum()
        for n, f in trained.modules.items()
    ]
    expected = float(torch.stack(squares).sum().sqrt())
    assert change_norm(origin, trained) == pytest.approx(expected, rel=1e-5)


def test_every_site_of_the_poison_study_has_half_of_an_institution(inputs: Inputs) -> None:
    for name in NAMES[:2]:
        parts = [(inputs.halves / f"{name}-{n}" / "train.jsonl").read_bytes() for n in (1, 2)]
        assert b"".join(parts) == (inputs.data / name / "train.jsonl").read_bytes()
        assert parts[0].count(b"\n") == parts[1].count(b"\n")


def test_a_run_is_scored_on_every_institution_and_can_be_repeated(
    inputs: Inputs, tmp_path: Path
) -> None:
    def short(plan: Plan) -> dict[str, object]:
        plan = dataclasses.replace(plan, num_rounds=2, num_steps=1, batch_size=2)
        return run_plan(plan, inputs, tmp_path / "work")

    by_name = {plan.name: plan for plan in aggregation_plans(1)}
    base, pooled, federated = (short(by_name[name]) for name in ("base", "pooled", "factors"))
    for record in (base, pooled, federated):
        assert set(record["losses"]) == set(NAMES[:2])
        assert record["loss"] == pytest.approx(sum(record["losses"].values()) / 2)
    assert pooled["loss"] < base["loss"]
    assert federated["loss"] < base["loss"]
    assert len(federated["train_loss"]) == 2
    assert not (tmp_path / "work").exists()
    assert short(by_name["factors"])["losses"] == federated["losses"], "a run can be repeated"


@pytest.mark.slow
def test_sites_that_forget_what_they_owe_part_from_the_others_in_their_second_update(
    inputs: Inputs, tmp_path: Path
) -> None:
    keeps, forgets = (
        run_plan(
            dataclasses.replace(plan, num_rounds=3, num_steps=1, batch_size=2),
            inputs,
            tmp_path / "work",
        )
        for plan in wire_plans(1)
        if plan.name.startswith("int4")
    )
    # What is trained in round 2 comes from the first updates, before which nobody owes anything.
    assert forgets["train_loss"][:2] == keeps["train_loss"][:2]
    assert forgets["train_loss"][2] != keeps["train_loss"][2]


def test_the_liar_is_the_last_site_and_absent_in_the_reference(
    inputs: Inputs, tmp_path: Path
) -> None:
    plan = dataclasses.replace(reference_plan(), num_rounds=1, num_steps=1, batch_size=2)
    honest = run_plan(plan, inputs, tmp_path / "work")
    assert list(honest["change_norms"]) == ["bank-1", "bank-2", "billing-1"]
    lying = run_plan(dataclasses.replace(plan, attack="scaled x100"), inputs, tmp_path / "work")
    norms = {name: rounds[0] for name, rounds in lying["change_norms"].items()}
    assert norms.pop("billing-2") > 90 * max(norms.values())
    assert norms == {name: rounds[0] for name, rounds in honest["change_norms"].items()}
    assert lying["losses"] != honest["losses"]


def test_a_run_that_a_liar_ends_is_scored_at_the_last_adapter_before(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ATTACKS, "beyond the wire", scaled(1e20))
    base = run_plan(aggregation_plans(1)[0], inputs, tmp_path / "work")
    plan = dataclasses.replace(
        reference_plan(), num_steps=1, batch_size=2, attack="beyond the wire"
    )
    ended = run_plan(plan, inputs, tmp_path / "work")
    assert ended["failed"].startswith("round 1: 3 of the 4 updates")
    assert ended["losses"] == base["losses"]


def test_runs_that_are_there_are_found_again_and_a_torn_line_is_not(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    first, second = Plan("a", 0, ranks=(1, 2)), Plan("a", 1)
    runs = FinishedRuns(path, "inputs")
    runs.add({**dataclasses.asdict(first), "loss": 2.0})
    runs.add({**dataclasses.asdict(second), "loss": 3.0})
    path.write_text(path.read_text()[:-5])
    again = FinishedRuns(path, "inputs")
    assert again.find(first)["loss"] == 2.0
    assert again.find(second) is None
    assert again.find(dataclasses.replace(first, num_rounds=6)) is None
    assert FinishedRuns(path, "other inputs").find(first) is None


def test_poisoned_runs_wait_for_the_honest_one_and_clip_at_its_median_change(
    tmp_path: Path,
) -> None:
    runs = FinishedRuns(tmp_path / "runs.jsonl", "inputs")
    assert plans_of("poison", runs, 1) == [reference_plan()]
    norms = {"a": [1.0, 2.0], "b": [3.0]}
    runs.add({**dataclasses.asdict(reference_plan()), "change_norms": norms})
    plans = plans_of("poison", runs, 1)
    assert len(plans) == 1 + 7 * (len(ATTACKS) + 1)
    clipped = [plan for plan in plans if "robust.clip_norm" in plan.settings]
    assert {plan.settings["robust.clip_norm"] for plan in clipped} == {2.0}


def record(name: str, seed: int, loss: float | None, **more: object) -> dict[str, object]:
    losses = {"bank": loss, "clinic": loss}
    row = {
        "name": name,
        "seed": seed,
        "loss": loss,
        "losses": losses,
        "attack": "",
        "forgets": False,
    }
    row |= more
    return {"bytes_up": 10, "bytes_down": 10, "change_norms": {"a": [1.0]}, **row}


def test_gaps_and_differences_are_paired_by_seed() -> None:
    records = [
        *(record("base", 0, 4.0), record("pooled", 0, 3.0), record("pooled", 1, 2.0)),
        *(record("factors", 0, 3.2), record("factors", 1, 2.5)),
        *(record("products + tail", 0, 3.1), record("products + tail", 1, 2.5)),
        record("products + tail", 2, 2.0),
    ]
    summary = quality_report.aggregations(records)
    assert summary["factors"]["gap_closed"]["each"] == pytest.approx([0.8, 0.75])
    assert summary["products + tail"]["minus_factors"]["each"] == pytest.approx([-0.1, 0.0])
    assert summary["products + tail"]["minus_factors"]["mean"] == pytest.approx(-0.05)
    assert summary["products + tail"]["minus_factors"]["sd"] == pytest.approx(0.1 / 2**0.5)
    table = quality_report.markdown("aggregations", records).splitlines()
    assert table[4].startswith("| factors | 2.850 | 2.850 | 2.8500 ± 0.4950 | 0.775 ± 0.035 |")


def test_a_format_is_compared_with_float32_of_its_seed() -> None:
    records = [
        *(record("products + tail", 0, 2.0), record("products + tail", 1, 4.0)),
        *(record("int4", 0, 2.02, bytes_up=1, bytes_down=2), record("int4", 1, 4.0)),
    ]
    summary = quality_report.wire(records)["int4"]
    assert summary["relative"]["each"] == pytest.approx([0.01, 0.0])
    assert summary["largest_of_a_site"] == pytest.approx(0.01)
    assert "+0.50% ± 0.71%" in quality_report.markdown("wire", records)


def test_a_loss_that_is_not_finite_is_shown_as_that() -> None:
    reference = record("products without the liar", 0, 2.0)
    lost = record(
        "products", 0, None, attack="scaled x100", failed="round 2: the average is not finite"
    )
    held = record("median", 0, 2.02, attack="scaled x100")
    rules = quality_report.poison([reference, lost, held])["rules"]
    assert rules["products"]["scaled x100"]["relative"] is None
    assert rules["median"]["scaled x100"]["relative"] == pytest.approx(0.01)
    table = quality_report.markdown("poison", [reference, lost, held])
    assert "| products | not finite, run failed |" in table
    assert "| median | +1.00% |" in table


@pytest.mark.slow
def test_the_benchmark_goes_on_where_it_stopped_and_prints_one_json_line(
    tiny_model: Path, tmp_path: Path
) -> None:
    write_institutions(tmp_path / "data", NAMES[:2])

    def run(*options: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "benchmarks.federation_quality", "--seeds", "1"]
        command += ["--data", str(tmp_path / "data"), "--model", str(tiny_model)]
        command += ["--out", str(tmp_path / "out"), "--study", "wire", *options]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)

    whole = run()
    assert "[4/4" in whole.stderr
    (line,) = whole.stdout.splitlines()
    names = {"products + tail", "int8", "int4", "int4, no feedback"}
    assert set(json.loads(line)["wire"]) == names
    runs = tmp_path / "out" / "runs.jsonl"
    runs.write_text("".join(runs.read_text().splitlines(keepends=True)[:3]))
    again = run()
    assert "[1/1" in again.stderr
    assert json.loads(again.stdout) == json.loads(line)
    assert run("--report").stdout.startswith("### wire\n\n| wire | bytes to float32 |")
