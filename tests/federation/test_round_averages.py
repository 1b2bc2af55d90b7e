"""Runs with each average: alternating, tail, rank slices, energy, liars."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from federation.adapter import Adapter, LowRank, read_adapter
from federation.events import (
    RoundFinished,
    RoundStarted,
    UpdateReceived,
)
from tests.federation.runs import Settings, dense, events, named_sites, run
from tests.simulated import (
    SimulatedSites,
    crash,
    drift,
    in_rounds,
)


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
@pytest.mark.parametrize("change", [0.0, 1e-3])
def test_no_rank_slice_decays_where_its_owners_make_a_constant_change_or_none(
    settings: Settings, tmp_path: Path, aggregation: str, change: float
) -> None:
    """Ranks 4, 8, 16 and 32 for 20 rounds; padding short sites with zeros would halve and halve."""
    mixed = settings(
        num_rounds=21,
        num_sites=4,
        aggregation=aggregation,
        adapter={"rank": 32, "alpha": 32.0},
        tail_rank=0,
    )
    # The change of the later rounds has the direction of the first one, so that nothing cancels.
    start, later = drift(9, 0.1), drift(9, change)
    first = {"done": False}

    def move(adapter: Adapter) -> Adapter:
        return later(adapter) if first["done"] else start(adapter)

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
