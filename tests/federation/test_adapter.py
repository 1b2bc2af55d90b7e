from pathlib import Path

import pytest
import torch

from client.model import add_adapter, load_model, merged_model
from federation.adapter import (
    Adapter,
    LowRank,
    initial_adapter,
    read_adapter,
    read_from_model,
    write_adapter,
)
from federation.base_model import ModelError, model_digest, weight_shapes


def moved(tiny_model: Path, seed: int = 0) -> Adapter:
    start = initial_adapter(tiny_model, rank=4, alpha=8.0, targets="all-linear", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        4,
        8.0,
        {
            name: LowRank(torch.randn(f.b_OR.shape, generator=generator) * 0.1, f.a_RI)
            for name, f in start.modules.items()
        },
    )


def test_initial_adapter_has_every_projection_and_changes_nothing(tiny_model: Path) -> None:
    adapter = initial_adapter(tiny_model, rank=4, alpha=8.0, targets="all-linear", seed=1)
    assert len(adapter.modules) == 2 * 7
    base = load_model(tiny_model, "float32")
    ids = torch.arange(3, 20)[None]
    before = base(ids).logits
    after = add_adapter(base, adapter)(ids).logits
    torch.testing.assert_close(after, before)


def test_initial_adapter_depends_on_the_seed_alone(tiny_model: Path) -> None:
    def first(seed: int) -> torch.Tensor:
        made = initial_adapter(tiny_model, rank=4, alpha=8.0, targets="attention", seed=seed)
        assert len(made.modules) == 2 * 4
        return made.modules["model.layers.0.self_attn.q_proj"].a_RI

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
    assert first(1).abs().max() <= 1 / 64**0.5


def test_adapter_directory_round_trip(tiny_model: Path, tmp_path: Path) -> None:
    adapter = moved(tiny_model)
    write_adapter(tmp_path / "adapter", adapter, "tiny")
    loaded = read_adapter(tmp_path / "adapter")
    assert (loaded.rank, loaded.alpha) == (4, 8.0)
    assert loaded.modules.keys() == adapter.modules.keys()
    for name, factors in adapter.modules.items():
        assert torch.equal(loaded.modules[name].b_OR, factors.b_OR)
        assert torch.equal(loaded.modules[name].a_RI, factors.a_RI)


def test_a_rank_of_one_is_written_whatever_the_stride_of_its_columns(tmp_path: Path) -> None:
    wide = torch.arange(96, dtype=torch.float32).view(3, 32)
    factors = LowRank(wide[:, 5:6], wide.T[:4, 1:2].T)
    name = "model.layers.0.self_attn.q_proj"
    write_adapter(tmp_path / "out", Adapter(1, 1.0, {name: factors}), "tiny")
    again = read_adapter(tmp_path / "out").modules[name]
    assert torch.equal(again.b_OR, wide[:, 5:6])
    assert torch.equal(again.a_RI, wide[1:2, :4])


def test_peft_itself_loads_the_directory_to_the_same_logits(
    tiny_model: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    adapter = moved(tiny_model)
    write_adapter(tmp_path / "adapter", adapter, "tiny")
    ids = torch.arange(3, 40)[None]
    ours = add_adapter(load_model(tiny_model, "float32"), adapter)(ids).logits
    theirs = PeftModel.from_pretrained(load_model(tiny_model, "float32"), tmp_path / "adapter")
    torch.testing.assert_close(theirs(ids).logits, ours)


def test_merged_is_base_plus_scaled_product(tiny_model: Path, tmp_path: Path) -> None:
    adapter = moved(tiny_model)
    write_adapter(tmp_path / "adapter", adapter, "tiny")
    base = load_model(tiny_model, "float32").state_dict()
    merged = merged_model(tiny_model, tmp_path / "adapter", "float32").state_dict()
    name = "model.layers.1.mlp.up_proj"
    factors = adapter.modules[name]
    expected = base[f"{name}.weight"] + 8.0 / 4 * factors.b_OR @ factors.a_RI
    torch.testing.assert_close(merged[f"{name}.weight"], expected)
    untouched = "model.layers.1.input_layernorm.weight"
    assert torch.equal(merged[untouched], base[untouched])


def test_factors_read_from_a_model_are_those_written(tiny_model: Path) -> None:
    adapter = moved(tiny_model)
    model = add_adapter(load_model(tiny_model, "bfloat16"), adapter)
    again = read_from_model(model, rank=4, alpha=8.0)
    for name, factors in adapter.modules.items():
        assert torch.equal(again.modules[name].b_OR, factors.b_OR)
        assert torch.equal(again.modules[name].a_RI, factors.a_RI)


def test_an_adapter_for_another_model_is_refused(tiny_model: Path) -> None:
    adapter = moved(tiny_model)
    name = "model.layers.0.mlp.up_proj"
    cut = dict(adapter.modules)
    cut[name] = LowRank(cut[name].b_OR[:-1], cut[name].a_RI)
    with pytest.raises(ModelError, match="another base model"):
        add_adapter(load_model(tiny_model, "float32"), Adapter(4, 8.0, cut))


def test_other_kinds_of_adapters_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", moved(tiny_model), "tiny")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"bias"', '"use_dora": true, "bias"'))
    with pytest.raises(ModelError, match="use_dora"):
        read_adapter(tmp_path / "adapter")
    with pytest.raises(ModelError, match="adapter_config.json is missing"):
        read_adapter(tmp_path / "nothing")


def test_shapes_and_digest_come_from_the_files(tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    shapes = weight_shapes(tiny_model)
    state = load_model(tiny_model, "float32").state_dict()
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (64, 128)
    assert all(tuple(state[name].shape) == shape for name, shape in shapes.items())
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    assert model_digest(copy) == model_digest(tiny_model)
    weights = copy / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert model_digest(copy) != model_digest(tiny_model)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda d: None, "does not exist"),
        (lambda d: d.mkdir(), "config.json is missing"),
        (lambda d: (d.mkdir(), (d / "config.json").write_text("{")), "is not JSON"),
        (lambda d: (d.mkdir(), (d / "config.json").write_text("{}")), "no \\*.safetensors"),
        (
            lambda d: (
                d.mkdir(),
                (d / "config.json").write_text("{}"),
                (d / "model.safetensors").write_bytes(b"\1"),
            ),
            "cut off or damaged",
        ),
    ],
)
def test_broken_model_directories_get_one_sentence(
    tmp_path: Path, break_it: object, message: str
) -> None:
    directory = tmp_path / "model"
    break_it(directory)
    with pytest.raises(ModelError, match=message):
        initial_adapter(directory, rank=2, alpha=2.0, targets="attention", seed=0) if (
            directory / "config.json"
        ).is_file() and (directory / "config.json").read_text() == "{}" else model_digest(directory)
