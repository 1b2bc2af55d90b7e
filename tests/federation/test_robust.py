"""Robust rules on Gram matrices against dense changes, and against sites that lie."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from federation.adapter import LowRank
from federation.aggregation import AggregationError
from federation.aggregation.products import average_products
from federation.aggregation.robust import (
    changes_gram,
    clip_factors,
    distances,
    geometric_median_weights,
    krum_scores,
    krum_weights,
    median_factors,
    multi_krum_weights,
    robust_weights,
    trimmed_mean_factors,
)

OUT, IN = 20, 28


def adapter(rank: int = 4, seed: int = 0, size: float = 1.0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(OUT, rank, generator=generator, dtype=torch.float64)
    a = torch.randn(rank, IN, generator=generator, dtype=torch.float64)
    return LowRank(size * b, a)


def trained(origin: LowRank, ranks: Sequence[int], *, seed: int = 1, step: float = 0.1) -> list:
    """Sites that took the first slices of the origin and moved them, all a little the same way."""
    generator = torch.Generator().manual_seed(seed)
    b_way = torch.randn(origin.b_OR.shape, generator=generator, dtype=torch.float64)
    a_way = torch.randn(origin.a_RI.shape, generator=generator, dtype=torch.float64)
    sites = []
    for rank in ranks:
        b_own = torch.randn(origin.b_OR.shape, generator=generator, dtype=torch.float64)
        a_own = torch.randn(origin.a_RI.shape, generator=generator, dtype=torch.float64)
        b = origin.b_OR + step * (b_way + 0.5 * b_own)
        a = origin.a_RI + step * (a_way + 0.5 * a_own)
        sites.append(LowRank(b[:, :rank], a[:rank]))
    return sites


def dense(update: LowRank) -> np.ndarray:
    """B @ A in extended precision."""
    return update.b_OR.numpy().astype(np.longdouble) @ update.a_RI.numpy().astype(np.longdouble)


def dense_changes(origin: LowRank, sites: Sequence[LowRank]) -> np.ndarray:
    """[N, O * I]: each site's product minus that of the slices it was sent."""
    return np.stack(
        [
            (
                dense(site)
                - dense(LowRank(origin.b_OR[:, : len(site.a_RI)], origin.a_RI[: len(site.a_RI)]))
            ).ravel()
            for site in sites
        ]
    )


def dense_distances(vectors: np.ndarray) -> np.ndarray:
    return np.square(vectors[:, None] - vectors).sum(axis=2)


def hostile(origin: LowRank, honest: LowRank, kind: str) -> LowRank:
    """A liar's update: what the honest site would have sent, spoiled."""
    b_step, a_step = honest.b_OR - origin.b_OR, honest.a_RI - origin.a_RI
    if kind == "scaled":
        return LowRank(origin.b_OR + 100 * b_step, origin.a_RI + 100 * a_step)
    if kind == "flipped":
        return LowRank(origin.b_OR - 3 * b_step, origin.a_RI - 3 * a_step)
    if kind == "random":
        return adapter(seed=99, size=3.0)
    return LowRank(torch.full_like(honest.b_OR, 1e30), torch.full_like(honest.a_RI, -1e30))


def mean_change(origin: LowRank, sites: Sequence[LowRank], weights: Sequence[float]) -> np.ndarray:
    return np.asarray(weights) @ dense_changes(origin, sites)


# --- Gram matrices


@pytest.mark.parametrize("ranks", [[4, 4, 4], [1, 4, 2, 3], [4], [6, 2, 4]])
def test_changes_gram_is_the_gram_of_the_dense_changes(ranks: list[int]) -> None:
    widest = adapter(rank=6)
    origin = LowRank(widest.b_OR[:, :4], widest.a_RI[:4])
    sites = trained(widest, ranks)
    vectors = dense_changes(origin, sites)
    gram = changes_gram(origin, sites).numpy()
    np.testing.assert_allclose(gram, (vectors @ vectors.T).astype(float), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(
        distances(torch.from_numpy(gram)).numpy(),
        dense_distances(vectors).astype(float),
        rtol=1e-8,
        atol=1e-7,
    )


@pytest.mark.parametrize(("out", "inn"), [(9001, 12), (12, 9001)])
def test_rows_longer_than_a_slab_are_all_counted(out: int, inn: int) -> None:
    generator = torch.Generator().manual_seed(3)
    origin, *sites = (
        LowRank(torch.randn(out, 2, generator=generator), torch.randn(2, inn, generator=generator))
        for _ in range(4)
    )
    changes = [
        site.b_OR.double() @ site.a_RI.double() - origin.b_OR.double() @ origin.a_RI.double()
        for site in sites
    ]
    expected = [[float((one * other).sum()) for other in changes] for one in changes]
    np.testing.assert_allclose(changes_gram(origin, sites).numpy(), expected, rtol=1e-8)
    middle = median_factors(sites, 2)
    assert torch.equal(middle.a_RI, torch.stack([site.a_RI for site in sites]).median(0).values)
    assert torch.equal(middle.b_OR, torch.stack([site.b_OR for site in sites]).median(0).values)


def test_a_small_step_on_a_large_adapter_keeps_its_digits() -> None:
    origin = adapter(size=1e4)
    sites = trained(origin, [4, 4, 4], step=1e-6)
    vectors = dense_changes(origin, sites)
    expected = (vectors @ vectors.T).astype(float)
    np.testing.assert_allclose(changes_gram(origin, sites).numpy(), expected, rtol=1e-7)
    nothing = LowRank(origin.b_OR[:, :0], origin.a_RI[:0])
    products = changes_gram(nothing, [origin, *sites]).numpy()
    as_difference = products[1:, 1:] - products[1:, :1] - products[:1, 1:] + products[0, 0]
    assert np.abs(as_difference / expected - 1).max() > 1e-3


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("trick", ["cancelling slices", "small gauge", "large gauge"])
def test_a_liar_cannot_hide_behind_rounding(trick: str, seed: int) -> None:
    """A huge pair of slices that cancels makes float64 noise of any size around a bad product."""
    origin = adapter()
    *honest, liar = trained(origin, [4] * 5, seed=seed)
    b = origin.b_OR + 5 * (liar.b_OR - origin.b_OR)
    if trick == "cancelling slices":
        noise = 1e7 * adapter(rank=1, seed=seed).b_OR
        row = adapter(rank=1, seed=seed).a_RI
        liar = LowRank(torch.cat([b, noise, noise], 1), torch.cat([liar.a_RI, row, -row]))
    else:
        gauge = 1e-10 if trick == "small gauge" else 1e10
        liar = LowRank(b * gauge, liar.a_RI / gauge)
    sites = [*honest, liar]
    true = dense_distances(dense_changes(origin, sites)).astype(float)
    gram = changes_gram(origin, sites)
    assert (distances(gram).numpy() >= true * (1 - 1e-12)).all()
    assert float(gram[-1, -1]) >= np.square(dense_changes(origin, [liar])).sum() * (1 - 1e-12)
    assert krum_weights(gram, 1)[-1] == 0.0


@pytest.mark.parametrize("size", [0.0, 0.01])
def test_rounding_costs_an_honest_site_next_to_nothing(size: float) -> None:
    """In the largest module of a 7B model: 18,944 x 3,584, rank 16, B zero and not."""
    generator = torch.Generator().manual_seed(4)
    b = size * torch.randn(18_944, 16, generator=generator)
    a = (torch.rand(16, 3_584, generator=generator) * 2 - 1) / 3_584**0.5
    sites = [
        LowRank(
            b + 1e-3 * torch.randn(b.shape, generator=generator),
            a + 1e-3 * torch.randn(a.shape, generator=generator),
        )
        for _ in range(3)
    ]
    gram = changes_gram(LowRank(b, a), sites).numpy()
    squared_norms = []
    for site in sites:  # <X Y, X Y> of the rank-32 change, with nothing added
        x = torch.cat([site.b_OR.double() - b, site.b_OR.double()], 1)
        y = torch.cat([a.double(), site.a_RI.double() - a])
        squared_norms.append(float(((x.mT @ x) * (y @ y.mT)).sum()))
    excess = np.diagonal(gram) / np.array(squared_norms) - 1
    assert (excess > 0).all()
    assert (excess < 1e-9).all()


def test_out_by_in_is_never_allocated() -> None:
    sites = [
        LowRank(torch.randn(20_000, 4), torch.randn(4, 20_000, generator=torch.manual_seed(seed)))
        for seed in range(4)
    ]
    largest = 0

    class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for item in result if isinstance(result, tuple | list) else [result]:
                if isinstance(item, torch.Tensor):
                    largest = max(largest, item.numel())
            return result

    with LargestTensor():
        changes_gram(sites[0], sites[1:])
        median_factors(sites, 4)
    assert 0 < largest <= 20_000 * 20_000 / 1000


def test_updates_that_do_not_fit_or_are_not_finite_are_refused() -> None:
    origin, other = adapter(), LowRank(torch.zeros(OUT + 1, 4).double(), adapter().a_RI)
    with pytest.raises(AggregationError, match="different shapes"):
        changes_gram(origin, [other])
    with pytest.raises(AggregationError, match="0 weights for 0 updates"):
        changes_gram(origin, [])
    broken = LowRank(origin.b_OR * float("inf"), origin.a_RI)
    with pytest.raises(AggregationError, match="update 2 of 3 holds values that are not finite"):
        changes_gram(origin, [origin, broken, origin])


# --- rules


@pytest.mark.parametrize(("count", "liars"), [(3, 0), (5, 1), (8, 1), (8, 2), (11, 4)])
def test_krum_is_flowers_krum_on_the_dense_products(count: int, liars: int) -> None:
    from flwr.app import Array, ArrayRecord, RecordDict
    from flwr.serverapp.strategy.multikrum import select_multikrum

    origin = adapter()
    sites = trained(origin, [4] * count, seed=count)
    sites[0] = hostile(origin, sites[0], "scaled")
    vectors = dense_changes(origin, sites).astype(float)
    contents = [RecordDict({"arrays": ArrayRecord({"x": Array(vector)})}) for vector in vectors]
    gram = changes_gram(origin, sites)
    for selected in (1, count - liars):
        chosen = select_multikrum(contents, liars, selected)
        expected = [content in chosen for content in contents]
        weights = multi_krum_weights(gram, liars, selected)
        assert [weight > 0 for weight in weights] == expected
        assert sum(weights) == pytest.approx(1)
        assert len({weight for weight in weights if weight}) == 1
    assert multi_krum_weights(gram, liars) == multi_krum_weights(gram, liars, count - liars)


def test_krum_scores_are_the_sums_of_the_nearest_distances() -> None:
    origin = adapter()
    sites = trained(origin, [4] * 7)
    apart = dense_distances(dense_changes(origin, sites)).astype(float)
    expected = [sum(sorted(np.delete(row, index))[:3]) for index, row in enumerate(apart)]
    scores = krum_scores(changes_gram(origin, sites), num_byzantine=2)
    np.testing.assert_allclose(scores, expected, rtol=1e-8)


def test_krum_ties_go_to_the_first() -> None:
    gram = torch.eye(5, dtype=torch.float64)
    assert krum_weights(gram, 1) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert multi_krum_weights(gram, 1, 2) == [0.5, 0.5, 0.0, 0.0, 0.0]
    assert multi_krum_weights(gram, 1) == [0.25, 0.25, 0.25, 0.25, 0.0]


def test_krum_with_too_few_updates_says_what_to_do() -> None:
    gram = torch.eye(4, dtype=torch.float64)
    message = r"1 liars among 5 updates or more, and there are 4: .*num_byzantine.*quorum.*median"
    with pytest.raises(AggregationError, match=message):
        krum_weights(gram, 1)
    with pytest.raises(ValueError, match="num_selected is 5"):
        multi_krum_weights(gram, 0, 5)
    with pytest.raises(ValueError, match="num_byzantine is -1"):
        krum_scores(gram, -1)


@pytest.mark.parametrize("count", [3, 4, 7, 12])
def test_geometric_median_is_that_of_the_dense_changes(count: int) -> None:
    origin = adapter()
    sites = trained(origin, [4] * count, seed=count)
    vectors = dense_changes(origin, sites).astype(float)
    point = vectors.mean(axis=0)
    for _ in range(5000):  # Weiszfeld, from elsewhere
        closeness = 1 / np.linalg.norm(vectors - point, axis=1)
        point = closeness @ vectors / closeness.sum()
    weights = geometric_median_weights(changes_gram(origin, sites))
    assert sum(weights) == pytest.approx(1, abs=1e-12)
    got = np.asarray(weights) @ vectors
    assert np.linalg.norm(got - point) <= 1e-6 * np.linalg.norm(vectors - point)


@pytest.mark.parametrize("kind", ["scaled", "flipped", "random", "huge"])
def test_geometric_median_with_liars_has_no_direction_left_to_go(kind: str) -> None:
    """At the optimum the unit vectors to all points cancel: a certificate that needs no oracle."""
    origin = adapter()
    sites = trained(origin, [4] * 8)
    sites[:3] = [hostile(origin, site, kind) for site in sites[:3]]
    vectors = dense_changes(origin, sites)
    weights = geometric_median_weights(changes_gram(origin, sites))
    away = vectors - np.asarray(weights, dtype=np.longdouble) @ vectors
    unit = away / np.sqrt(np.square(away).sum(axis=1, keepdims=True))
    assert np.linalg.norm(unit.sum(axis=0).astype(float)) <= 1e-5


def test_geometric_median_at_a_site_is_that_site() -> None:
    """Three corners and their middle: the middle is the median, where 1 / distance has no bound."""
    corners = np.array([[1.0, 0.0], [-0.5, 3**0.5 / 2], [-0.5, -(3**0.5) / 2], [0.0, 0.0]]) + 7
    weights = geometric_median_weights(torch.from_numpy(corners @ corners.T))
    np.testing.assert_allclose(np.asarray(weights) @ corners, [7, 7], atol=1e-6)


@pytest.mark.parametrize("num_sites", [1, 2])
def test_geometric_median_of_one_or_two_sites_is_their_mean(num_sites: int) -> None:
    origin = adapter()
    gram = changes_gram(origin, trained(origin, [4] * num_sites))
    np.testing.assert_allclose(geometric_median_weights(gram), [1 / num_sites] * num_sites)


@pytest.mark.parametrize("num_sites", [1, 2, 3, 5, 8])
def test_identical_sites_and_sites_that_changed_nothing_give_that(num_sites: int) -> None:
    origin = adapter()
    (site,) = trained(origin, [4])
    for same in (origin, site):
        sites = [same] * num_sites
        gram = changes_gram(origin, sites)
        rules = [geometric_median_weights(gram)]
        if num_sites >= 3:
            rules += [krum_weights(gram, 0), multi_krum_weights(gram, 0)]
        for weights in rules:
            np.testing.assert_allclose(
                mean_change(origin, sites, weights).astype(float),
                dense_changes(origin, [same])[0].astype(float),
                rtol=1e-12,
            )
        for update in (median_factors(sites, 4), trimmed_mean_factors(sites, 4, 0)):
            torch.testing.assert_close(update.b_OR, same.b_OR)
            torch.testing.assert_close(update.a_RI, same.a_RI)
    assert not changes_gram(origin, [origin] * num_sites).any()


@pytest.mark.parametrize("kind", ["scaled", "flipped", "random", "huge"])
@pytest.mark.parametrize("rule", ["krum", "multi_krum", "geometric_median", "median", "trimmed"])
def test_a_liar_among_eight_moves_the_result_no_further_than_the_honest_lie_apart(
    rule: str, kind: str
) -> None:
    origin = adapter()
    honest = trained(origin, [4] * 7)
    sites = [*honest, hostile(origin, honest[0], kind)]
    if rule == "median":
        (result,) = dense_changes(origin, [median_factors(sites, 4)])
    elif rule == "trimmed":
        (result,) = dense_changes(origin, [trimmed_mean_factors(sites, 4, 1)])
    else:
        weights, clips = robust_weights(
            changes_gram(origin, sites), [1 / 8] * 8, kind=rule, num_byzantine=1
        )
        assert clips == [1.0] * 8
        result = mean_change(origin, sites, weights)
    centre = mean_change(origin, honest, [1 / 7] * 7)
    honest_spread = np.sqrt(np.square(dense_changes(origin, honest) - centre).sum(axis=1)).max()
    assert np.sqrt(np.square(result - centre).sum()) <= honest_spread
    plain = mean_change(origin, sites, [1 / 8] * 8)
    assert np.sqrt(np.square(plain - centre).sum()) > np.sqrt(np.square(result - centre).sum())


# --- clipping


def test_clipped_changes_are_no_longer_than_the_bound() -> None:
    origin = adapter()
    sites = [*trained(origin, [4] * 4), hostile(origin, origin, "huge"), origin]
    vectors = dense_changes(origin, sites)
    norms = np.sqrt(np.square(vectors).sum(axis=1)).astype(float)
    bound = float(np.median(norms))
    factors = clip_factors(changes_gram(origin, sites), bound)
    np.testing.assert_allclose(factors[:-1], np.minimum(1, bound / norms[:-1]), rtol=1e-8)
    assert factors[-1] == 1.0  # changed nothing
    assert (np.asarray(factors) * norms <= bound * (1 + 1e-15)).all()
    with pytest.raises(ValueError, match="clip_norm is 0"):
        clip_factors(changes_gram(origin, sites), 0)


@pytest.mark.parametrize("ranks", [[4] * 6, [4, 1, 4, 2, 4, 3]])
@pytest.mark.parametrize("rule", ["products", "krum", "multi_krum", "geometric_median"])
def test_weights_on_products_and_origin_are_the_rule_on_clipped_changes(
    rule: str, ranks: list[int]
) -> None:
    origin = adapter()
    sites = [*trained(origin, ranks), hostile(origin, adapter(), "random")]
    vectors = dense_changes(origin, sites).astype(float)
    norms = np.linalg.norm(vectors, axis=1)
    bound = float(np.sort(norms)[2])
    fractions = [(index + 1) / 28 for index in range(7)]
    chosen, clips = robust_weights(
        changes_gram(origin, sites), fractions, kind=rule, num_byzantine=1, clip_norm=bound
    )
    weights = [weight * clip for weight, clip in zip(chosen, clips, strict=True)]
    rest = 1 - sum(weights)
    unsent = [LowRank(origin.b_OR[:, len(s.a_RI) :], origin.a_RI[len(s.a_RI) :]) for s in sites]
    products = np.stack([(dense(s) + dense(u)).ravel() for s, u in zip(sites, unsent, strict=True)])
    start = dense(origin).ravel().astype(float)
    clipped = vectors * np.minimum(1, bound / norms)[:, None]
    gram = torch.from_numpy(clipped @ clipped.T)
    inner = {
        "products": fractions,
        "krum": krum_weights(gram, 1),
        "multi_krum": multi_krum_weights(gram, 1),
        "geometric_median": geometric_median_weights(gram),
    }[rule]
    assert sum(chosen) == pytest.approx(1)
    assert min(*weights, rest) >= -1e-12
    np.testing.assert_allclose(
        np.asarray(weights) @ products.astype(float) + rest * start,
        start + np.asarray(inner) @ clipped,
        atol=1e-5,
    )


def test_a_kind_that_weights_no_products_is_refused() -> None:
    with pytest.raises(ValueError, match="'median' is no rule"):
        robust_weights(torch.eye(3, dtype=torch.float64), [1 / 3] * 3, kind="median")


# --- the gauge


@pytest.mark.parametrize("rule", ["products", "multi_krum", "geometric_median"])
def test_a_site_cannot_force_its_gauge_on_the_others(rule: str) -> None:
    start = adapter()
    origin = LowRank(torch.zeros_like(start.b_OR), start.a_RI)  # the first round
    *honest, last = trained(origin, [4] * 8)
    sites = [*honest, LowRank(last.b_OR / 1e6, last.a_RI * 1e6)]
    weights, _ = robust_weights(
        changes_gram(origin, sites), [1 / 8] * 8, kind=rule, num_byzantine=1
    )
    counted = [(site, weight) for site, weight in zip(sites, weights, strict=True) if weight > 0]
    average = average_products(*zip(*counted, strict=True), 4).factors
    assert float(average.a_RI.norm() / origin.a_RI.norm()) < 2
    twins = [(last if site is sites[-1] else site, weight) for site, weight in counted]
    honestly_sent = average_products(*zip(*twins, strict=True), 4).factors
    np.testing.assert_allclose(
        dense(average).astype(float), dense(honestly_sent).astype(float), atol=1e-6
    )


# --- coordinates of factors


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_median_is_numpys(count: int) -> None:
    sites = trained(adapter(), [4] * count)
    median = median_factors(sites, 4)
    for name in ("b_OR", "a_RI"):
        stack = np.stack([getattr(site, name).numpy() for site in sites])
        np.testing.assert_allclose(getattr(median, name).numpy(), np.median(stack, axis=0))


@pytest.mark.parametrize(("count", "cut"), [(1, 0), (4, 1), (5, 2), (8, 1)])
def test_trimmed_mean_is_flowers(count: int, cut: int) -> None:
    from flwr.serverapp.strategy.fedtrimmedavg import trim_mean

    sites = trained(adapter(), [4] * count)
    trimmed = trimmed_mean_factors(sites, 4, cut)
    for name in ("b_OR", "a_RI"):
        stack = np.stack([getattr(site, name).numpy() for site in sites])
        expected = trim_mean(stack, (cut + 0.5) / (count + 1))
        np.testing.assert_allclose(getattr(trimmed, name).numpy(), expected)


def test_each_slice_is_that_of_the_sites_that_have_it() -> None:
    ranks = [1, 2, 4, 4, 4, 6]
    sites = trained(adapter(rank=6), ranks)
    median, trimmed = median_factors(sites, 7), trimmed_mean_factors(sites, 7, 2)
    assert median.b_OR.shape == (OUT, 7)
    for index in range(7):
        owners = [site for site in sites if len(site.a_RI) > index]
        if not owners:
            assert not median.b_OR[:, index].any()
            assert not trimmed.a_RI[index].any()
            continue
        rows = np.sort(np.stack([site.a_RI[index].numpy() for site in owners]), axis=0)
        columns = np.stack([site.b_OR[:, index].numpy() for site in owners])
        np.testing.assert_allclose(median.b_OR[:, index].numpy(), np.median(columns, axis=0))
        np.testing.assert_allclose(median.a_RI[index].numpy(), np.median(rows, axis=0))
        # Four or fewer owners: trimmed down to their median.
        expected = rows[2:-2].mean(axis=0) if len(owners) > 4 else np.median(rows, axis=0)
        np.testing.assert_allclose(trimmed.a_RI[index].numpy(), expected)


def test_a_result_of_smaller_rank_holds_the_first_slices() -> None:
    sites = trained(adapter(), [4, 4, 2])
    narrow, wide = median_factors(sites, 3), median_factors(sites, 4)
    assert torch.equal(narrow.b_OR, wide.b_OR[:, :3])
    assert torch.equal(narrow.a_RI, wide.a_RI[:3])


def test_coordinates_stay_between_honest_values_and_in_float32() -> None:
    """The largest float32 number twice: their sum is not finite in float32."""
    largest = torch.finfo(torch.float32).max
    honest = [LowRank(s.b_OR.float(), s.a_RI.float()) for s in trained(adapter(), [4] * 3)]
    liars = [LowRank(torch.full((OUT, 4), largest), torch.full((4, IN), largest))] * 2
    for result in (
        median_factors([*honest, *liars], 4),
        trimmed_mean_factors([*honest, *liars], 4, 2),
    ):
        stack = torch.stack([site.a_RI for site in honest])
        assert result.a_RI.dtype == torch.float32
        assert bool((result.a_RI <= stack.amax(0)).all())
        assert bool((result.a_RI >= stack.amin(0)).all())
    assert bool(torch.isfinite(median_factors(liars, 4).a_RI).all())


def test_trimming_more_than_there_are_says_what_to_do() -> None:
    sites = trained(adapter(), [4] * 4)
    message = r"more than 4 updates, and there are 4: .*num_byzantine.*quorum.*median"
    with pytest.raises(AggregationError, match=message):
        trimmed_mean_factors(sites, 4, 2)
    with pytest.raises(AggregationError, match="0 weights for 0 updates"):
        median_factors([], 4)
    with pytest.raises(ValueError, match="num_trimmed is -1"):
        trimmed_mean_factors(sites, 4, -1)


def test_any_finite_float32_values_give_finite_results() -> None:
    largest = torch.finfo(torch.float32).max
    origin = LowRank(torch.full((OUT, 4), -largest), torch.full((4, IN), largest))
    sites = [LowRank(s.b_OR.float(), s.a_RI.float()) for s in trained(adapter(), [4] * 5)]
    sites.append(LowRank(torch.full((OUT, 4), largest), torch.full((4, IN), largest)))
    gram = sum(changes_gram(origin, sites) for _ in range(500))
    assert bool(torch.isfinite(distances(gram)).all())
    assert np.isfinite(krum_scores(gram, 1)).all()
    assert np.isfinite(geometric_median_weights(gram)).all()
    assert np.isfinite(clip_factors(gram, 1.0)).all()
    for rule in ("products", "krum", "multi_krum", "geometric_median"):
        both = robust_weights(gram, [1 / 6] * 6, kind=rule, num_byzantine=1, clip_norm=1.0)
        assert np.isfinite(both).all()
