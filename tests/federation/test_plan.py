import json
import math
from pathlib import Path

import pytest

from federation import server_costs
from federation.accountant import PrivacyEvent, epsilon_of
from federation.adapter import TARGETS, initial_adapter
from federation.base_model import ModelError, projection_shapes, read_config, weight_shapes
from federation.header import message_bytes
from federation.plan import Plan, make_plan, privacy_cost
from federation.server_costs import Machine, aggregation_seconds, peak_memory, server_memory
from federation.settings import (
    FederationSettings,
    SettingsError,
    load_settings,
    needed_updates,
)
from federation.traffic import down_traffic, num_asked, up_traffic
from federation.wire import encode

SEVEN_B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}


def settings(**values: object) -> FederationSettings:
    flat = {key.replace("__", "."): value for key, value in values.items()}
    flat.setdefault("quorum", needed_updates(str(flat.get("aggregation")), 1))
    flat["num_sites"] = flat.get("num_sites", 5)
    return load_settings(FederationSettings, {"base_model": "m", "out": "o"} | flat, "test")


def plan(**values: object) -> Plan:
    return make_plan(settings(**values), SEVEN_B)


def shapes_of(directory: Path) -> dict[str, tuple[int, ...]]:
    return {
        name.removesuffix(".weight"): shape
        for name, shape in sorted(weight_shapes(directory).items())
        if name.removesuffix(".weight").rsplit(".", 1)[-1] in TARGETS["all-linear"]
    }


def test_the_config_alone_gives_the_names_and_shapes_that_stand_in_the_weights(
    tiny_model: Path,
) -> None:
    from_config = projection_shapes(read_config(tiny_model))
    assert from_config == shapes_of(tiny_model)
    assert list(from_config) == list(shapes_of(tiny_model))


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
def test_qwen_shapes_are_those_that_transformers_builds(family: str, tmp_path: Path) -> None:
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=32,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=11,
        num_attention_heads=4,
        num_key_value_heads=2,
        **({"head_dim": 20} if family == "Qwen3" else {}),
    )
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(tmp_path)
    assert projection_shapes(read_config(tmp_path)) == shapes_of(tmp_path)


def test_an_absent_head_dim_means_what_transformers_makes_of_it(tmp_path: Path) -> None:
    import transformers

    for family in ("Llama", "Qwen3"):
        config = getattr(transformers, f"{family}Config")(
            vocab_size=16,
            hidden_size=64,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        model.save_pretrained(tmp_path / family)
        bare = read_config(tmp_path / family)
        bare.pop("head_dim", None)
        assert projection_shapes(bare) == shapes_of(tmp_path / family), family


@pytest.mark.parametrize(
    ("aggregation", "uplink"),
    [
        *(("products", dtype) for dtype in ("float32", "bfloat16", "int8", "int4")),
        *(("alternating", dtype) for dtype in ("float32", "bfloat16")),
    ],
)
def test_planned_bytes_are_those_of_real_messages(
    tiny_model: Path, uplink: str, aggregation: str
) -> None:
    adapter = initial_adapter(tiny_model, rank=3, alpha=12.5, targets="all-linear", seed=0)
    odd, even = ("B", "A") if aggregation == "alternating" else ("AB", "AB")
    lengths = [
        len(encode(adapter, dtype=uplink, base_model="a" * 64, reference=adapter, factors=factors))
        for factors in (odd, even)
    ]
    run = settings(
        adapter__rank=3, adapter__alpha=12.5, wire__uplink=uplink, aggregation=aggregation
    )
    up = make_plan(run, read_config(tiny_model)).up
    assert [up.site.odd, up.site.even] == lengths


def test_block_formats_take_a_scale_a_block_and_the_last_block_may_be_short() -> None:
    shapes = {"m": (65, 7)}  # B: 65 numbers, A: 7 numbers, at rank 1
    sizes = {dtype: message_bytes(shapes, 1, dtype, alpha=1.0) for dtype in ("int8", "int4")}
    # int8: 65 + 2 scales, 7 + 1. int4: 33 + 3 scales, 4 + 1. The headers are equally long.
    assert sizes["int8"] - sizes["int4"] == (65 + 4 + 7 + 2) - (33 + 6 + 4 + 2)


def test_a_7b_adapter_has_the_known_size_and_the_formats_the_promised_ratios() -> None:
    result = plan()
    assert (result.num_modules, result.num_parameters) == (196, 40_370_176)
    assert result.full_message_bytes / 1e6 == pytest.approx(161.5, abs=0.1)
    full, _, int8, int4 = result.wires
    assert int8.down_bytes / full.down_bytes <= 0.27
    assert int4.down_bytes / full.down_bytes <= 0.15
    assert int8.up_bytes / full.up_bytes <= 0.27
    assert int4.up_bytes / full.up_bytes <= 0.15


def test_attention_alone_has_four_projections_a_layer() -> None:
    assert plan(adapter__targets="attention").num_modules == 4 * 28


def test_alternating_sends_b_in_odd_and_a_in_even_rounds() -> None:
    shapes = {"m": (300, 50)}
    run = settings(aggregation="alternating", num_rounds=5, num_sites=3, adapter__rank=2)
    up = up_traffic(run, shapes)
    assert up.site.first == up.site.odd
    # Both messages differ in the payload and in the digits of the shape: [300,2] and [2,50].
    assert up.site.odd - up.site.even == 4 * 2 * (300 - 50) + 1
    assert up.run == 3 * (3 * up.site.odd + 2 * up.site.even)
    assert plan(aggregation="alternating").up.run < 0.501 * plan().up.run


def test_a_change_goes_down_only_to_sites_that_hold_the_last_adapter() -> None:
    shapes = {"m": (640, 640)}
    whole = down_traffic(settings(num_sites=4, num_rounds=3), shapes)
    changes = down_traffic(settings(num_sites=4, num_rounds=3, wire__downlink="int8"), shapes)
    assert changes.site.first == whole.site.first
    assert changes.run == 4 * whole.site.first + 2 * 4 * changes.site.even
    # Half of the sites a round: half of those asked were not there in the round before.
    drawn = settings(num_sites=4, num_rounds=3, wire__downlink="int8", fraction_train=0.5)
    some = down_traffic(drawn, shapes)
    assert some.all_sites.even == whole.site.first + changes.site.even


def test_the_table_of_formats_adds_up_to_the_plan_of_each() -> None:
    for row in plan(num_rounds=3).wires:
        own = plan(num_rounds=3, wire__downlink=row.dtype, wire__uplink=row.dtype)
        assert row.run_bytes == own.down.run + own.up.run


def test_the_table_of_aggregations_adds_up_to_the_plan_of_each() -> None:
    for row in plan(num_sites=5).aggregations:
        own = plan(num_sites=5, aggregation=row.aggregation)
        assert row.run_bytes == own.down.run + own.up.run
        assert row.aggregation_s == own.aggregation_s
        assert row.memory_bytes == max(own.memory_bytes.values())


@pytest.mark.parametrize(
    ("fraction", "num_sites", "asked"), [(1.0, 7, 7), (0.07, 100, 7), (0.1, 3, 1), (0.5, 5, 3)]
)
def test_a_round_asks_a_share_of_the_sites_rounded_up(
    fraction: float, num_sites: int, asked: int
) -> None:
    assert num_asked(settings(fraction_train=fraction, num_sites=num_sites)) == asked


def test_server_memory_hardly_grows_with_the_sites() -> None:
    shapes = projection_shapes(SEVEN_B)
    sizes = [peak_memory(settings(num_sites=n), shapes) for n in (4, 64)]
    assert sizes[0] == sizes[1]
    stacked = 4 * ((64 * 16 + 32) + 16) * (3584 + 18944)
    averaging = server_memory(settings(num_sites=64), shapes)["averaging"]
    assert averaging - 64 * 1056**2 - stacked == server_costs._FLOWER_BYTES


def test_seconds_are_the_flops_of_the_docstring() -> None:
    flops_only = Machine(
        gemm_flops_per_s=1.0, thin_flops_per_s=math.inf, cube_s=0, read_bytes_per_s=math.inf
    )
    shapes = {"m": (30, 20), "n": (10, 5)}
    run = settings(num_sites=3, adapter__rank=4, tail_rank=6)
    assert aggregation_seconds(run, shapes, flops_only) == 2 * (3 * 4 + 6) ** 2 * 65
    krum = settings(num_sites=5, adapter__rank=4, aggregation="krum")
    assert aggregation_seconds(krum, shapes, flops_only) == 2 * 2 * (6 * 4) ** 2 * 65


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"adapter__energy": 0.9}, "every figure is for rank 64"),
        ({"wire__downlink": "int4", "fraction_train": 0.5, "num_sites": 6}, "asks 3 of 6 sites"),
    ],
)
def test_what_a_figure_leaves_out_is_said(values: dict[str, object], sentence: str) -> None:
    (note,) = plan(**values).notes
    assert sentence in note


PRIVATE = {"training__noise_multiplier": 1.5, "aggregation": "alternating", "metrics": ""}


def test_a_plan_says_what_protects_the_text_and_what_the_coordinator_sees() -> None:
    assert "No differential privacy" in plan().privacy
    assert "update and, beside it, num-examples, train_loss, seconds;" in plan().privacy
    private = plan(**PRIVATE)
    assert "DP-SGD with noise multiplier 1.5" in private.privacy
    assert private.privacy.endswith("each site's update and no number beside it.")
    timed = plan(**PRIVATE | {"metrics": "seconds"}).privacy
    assert timed.endswith("each site's update and, beside it, seconds.")
    assert private.notes == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"metrics": "train_loss,seconds"}, "no noise covers train_loss and seconds, and a site"),
        ({"metrics": "seconds"}, "no noise covers seconds, and a site whose policy does not list"),
        ({"aggregation": "products"}, "both factors of the adapter learn at once"),
    ],
)
def test_a_private_run_that_sites_may_refuse_is_noted(
    change: dict[str, object], sentence: str
) -> None:
    (note,) = plan(**PRIVATE | change).notes
    assert sentence in note


def test_a_noise_that_is_no_number_is_one_sentence() -> None:
    # Of `--set training.noise_multiplier=…` there is text to be read; the sites read the rest.
    assert "multiplier 0.7." in plan(training__noise_multiplier="0.7").privacy
    with pytest.raises(SettingsError, match="noise_multiplier is 'much': expected a number"):
        plan(training__noise_multiplier="much")


def test_plain_settings_need_no_note() -> None:
    assert plan().notes == []


def test_liars_borne_are_none_where_too_few_sites_are_asked() -> None:
    borne = {row.aggregation: row.num_liars for row in plan(num_sites=4).aggregations}
    assert borne == {
        **dict.fromkeys(("products", "factors", "alternating", "krum", "multi_krum"), 0),
        "median": 1,
        "trimmed_mean": 1,
        "geometric_median": 1,
    }
    assert {row.aggregation: row.num_liars for row in plan(num_sites=5).aggregations}["krum"] == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"architectures is \['GPT2LMHeadModel'\]"),
        ({"architectures": None}, "architectures is None: expected one of Llama"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_key_value_heads": None}, "num_key_value_heads is missing"),
        ({"intermediate_size": "big"}, "intermediate_size is 'big'"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"hidden_size": 3585}, "3585 is no multiple of num_attention_heads 28"),
    ],
)
def test_a_config_that_cannot_be_planned_is_one_sentence(
    change: dict[str, object], sentence: str
) -> None:
    config = {key: value for key, value in (SEVEN_B | change).items() if value is not None}
    with pytest.raises(ModelError, match=sentence) as caught:
        make_plan(settings(), config)
    assert "\n" not in str(caught.value)


def test_the_plan_of_a_rank_counts_what_an_adapter_of_it_holds(tiny_model: Path) -> None:
    result = make_plan(settings(adapter__rank=4), read_config(tiny_model))
    adapter = initial_adapter(tiny_model, rank=4, alpha=32.0, targets="all-linear", seed=0)
    assert result.num_parameters == sum(
        m.b_OR.numel() + m.a_RI.numel() for m in adapter.modules.values()
    )
    assert json.loads(json.dumps(result.as_json()))["num_parameters"] == result.num_parameters


COSTED = {
    "num_rounds": 20,
    "aggregation": "alternating",
    "metrics": "",
    "training.noise_multiplier": "1.0",
    "training.num_steps": "8",
    "training.batch_size": "8",
    "training.accumulation": "2",
}


def test_what_a_run_costs_a_site_is_the_accountants_sum_over_its_rounds() -> None:
    cost = privacy_cost(settings(**COSTED), 4000, 1e-6, 1.0)
    assert (cost.steps, cost.sampling_rate) == (160, 16 / 4000)
    rounds = [PrivacyEvent(1.0, 16 / 4000, 8)] * 20
    assert cost.epsilon == epsilon_of(rounds, 1e-6)
    assert cost.noise_for_target is not None
    within = [PrivacyEvent(cost.noise_for_target, 16 / 4000, 8)] * 20
    assert 0.99 < epsilon_of(within, 1e-6) <= 1.0


def test_a_run_without_noise_has_no_epsilon() -> None:
    cost = privacy_cost(settings(**COSTED | {"training.noise_multiplier": 0}), 4000, 1e-6)
    assert (cost.epsilon, cost.noise_for_target) == (None, None)


@pytest.mark.parametrize(
    ("changed", "num_records", "delta", "epsilon", "sentence"),
    [
        ({}, 0, 1e-6, None, "--records is 0"),
        ({}, 4000, 1e-3, None, "--delta 0.001"),
        ({}, 4000, float("nan"), None, "--delta nan"),
        ({}, 4000, 1e-6, 0.0, "--epsilon is 0.0"),
        ({}, 10, 1e-6, None, "a step takes 16 records and the site has 10"),
        ({"training.num_steps": ""}, 4000, 1e-6, None, "training.num_steps is ''"),
        ({"training.batch_size": "4.5"}, 4000, 1e-6, None, "training.batch_size is '4.5'"),
    ],
)
def test_a_cost_that_cannot_be_told_is_one_sentence(
    changed: dict[str, object],
    num_records: int,
    delta: float,
    epsilon: float | None,
    sentence: str,
) -> None:
    with pytest.raises(SettingsError, match=sentence):
        privacy_cost(settings(**COSTED | changed), num_records, delta, epsilon)
