import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import edge.gguf
from edge.gguf import SOURCE_DIGEST_KEY, interleave_heads, write_gguf
from edge.llama import Llama
from edge.quantization import MIXES, QuantizationError
from edge.source_model import ModelError, open_source_model
from edge.vocabulary import load_tokenizer, read_vocabulary
from tests.edge.conftest import TEXT, llama_config, write_model, write_tokenizer

TRICKY = [
    "It's 3.14159, isn't it? WE'LL pay $1,234,567.89 on 2026-11-22.",
    "  two spaces,\ttab,\n\nnewlines\r\n   and trailing   ",
    "Café naïve Straße Ελλάδα Кириллица 日本語テスト 한국어 العربية ½ ²",
    "🙂👩‍👩‍👧 <|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
    "def f(x):\n    return {'a': x**2}  # comment 12345678",
    "a",
    " ",
    "\n",
]


def write(model: Path, path: Path, mix: str) -> edge.gguf.WrittenFile:
    source = open_source_model(model)
    vocabulary = read_vocabulary(source, load_tokenizer(model))
    return write_gguf(path, source, vocabulary, MIXES[mix])


def torch_log_probabilities(model: Path, ids: list[int]) -> torch.Tensor:
    source = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        return torch.log_softmax(source(torch.tensor([ids])).logits[0].double(), dim=-1)


def llama_log_probabilities(path: Path, ids: list[int]) -> torch.Tensor:
    with Llama(path, context_tokens=1024, threads=1) as llama:
        rows = [torch.from_numpy(row.copy()) for row in llama.decode(ids, range(len(ids)))]
    return torch.log_softmax(torch.stack(rows).double(), dim=-1)


def largest_divergence(model: Path, path: Path) -> float:
    # Longer than a batch of llama.cpp and than the context that Llama 3's scaling begins at.
    ids = load_tokenizer(model)(" ".join(TEXT * 3))["input_ids"][:300]
    p, q = torch_log_probabilities(model, ids), llama_log_probabilities(path, ids)
    return float((p.exp() * (p - q)).sum(dim=-1).max())


@pytest.mark.parametrize("family", ["llama_model", "llama3_model", "qwen2_model"])
@pytest.mark.parametrize(("mix", "nats"), [("f32", 1e-5), ("f16", 1e-4), ("bf16", 2e-2)])
def test_float_gguf_gives_the_logits_of_torch(
    family: str, mix: str, nats: float, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(family)
    write(model, tmp_path / "model.gguf", mix)
    assert largest_divergence(model, tmp_path / "model.gguf") <= nats


def test_a_head_in_the_wrong_order_is_seen(
    llama_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge.gguf, "interleave_heads", lambda rows, _: rows)
    write(llama_model, tmp_path / "model.gguf", "f32")
    assert largest_divergence(llama_model, tmp_path / "model.gguf") > 1e-2


def test_linear_rotary_scaling_gives_the_logits_of_torch(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    rope = {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0}
    write_model(tmp_path, LlamaForCausalLM(llama_config(rope_parameters=rope)))
    write_tokenizer(tmp_path, "gpt-2")
    write(tmp_path, tmp_path / "model.gguf", "f32")
    assert largest_divergence(tmp_path, tmp_path / "model.gguf") <= 1e-5


def test_interleaved_heads_turn_neighbours_by_the_same_angle() -> None:
    heads, width = 3, 8
    rows = np.arange(heads * width, dtype=np.float32)[:, None]
    expected = [
        h * width + half * width // 2 + i for h in range(3) for i in range(4) for half in (0, 1)
    ]
    assert interleave_heads(rows, heads)[:, 0].tolist() == expected


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_the_files_own_tokenizer_gives_the_ids_of_transformers(
    kind: str, llama_model: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((llama_model / name).read_bytes())
    write_tokenizer(tmp_path, kind)
    write(tmp_path, tmp_path / "model.gguf", "q8_0")
    tokenizer = load_tokenizer(tmp_path)
    assert gguf_field(tmp_path / "model.gguf", "tokenizer.ggml.pre") == kind
    with Llama(tmp_path / "model.gguf", context_tokens=256) as llama:
        for text in TRICKY:
            assert llama.tokenize(text, add_special=True) == tokenizer(text)["input_ids"], text
            assert b"".join(map(llama.piece, llama.tokenize("naïve 🙂"))).decode() == "naïve 🙂"
        assert llama.chat_template == tokenizer.chat_template


def gguf_field(path: Path, key: str) -> Any:
    return gguf.GGUFReader(path).fields[key].contents()


def test_metadata_names_the_source_and_the_special_tokens(
    llama_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    write(llama_model, path, "q4_k")
    expected = {
        "general.architecture": "llama",
        "general.file_type": 15,
        "llama.context_length": 1024,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        SOURCE_DIGEST_KEY: open_source_model(llama_model).digest,
    }
    assert {key: gguf_field(path, key) for key in expected} == expected
    tokens = gguf_field(path, "tokenizer.ggml.tokens")
    types = gguf_field(path, "tokenizer.ggml.token_type")
    assert len(tokens) == len(types) == 400
    assert (tokens[1], types[1]) == ("<|im_start|>", 3)
    assert (tokens[399], types[399]) == ("[PAD399]", 5)


def tensors(path: Path) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("mix", ["f16", "q4_k"])
def test_shards_and_chunks_change_no_bit(
    mix: str, llama_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(llama_model, tmp_path / "whole.gguf", mix)
    sharded = tmp_path / "sharded"
    model = AutoModelForCausalLM.from_pretrained(llama_model, dtype=torch.float32)
    model.save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    write_tokenizer(sharded, "smollm")
    monkeypatch.setattr(edge.gguf, "_CHUNK_NUMBERS", 1000)
    write(sharded, tmp_path / "sharded.gguf", mix)
    assert tensors(tmp_path / "sharded.gguf") == tensors(tmp_path / "whole.gguf")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_are_read_as_torch_reads_them(
    dtype: torch.dtype, llama_model: Path, tmp_path: Path
) -> None:
    weights = {k: v.to(dtype) for k, v in load_file(llama_model / "model.safetensors").items()}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((llama_model / "config.json").read_bytes())
    source = open_source_model(tmp_path)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        rows = source.rows(name, 0, (1, *source.tensors[name].shape)[-2])
        assert np.array_equal(rows.squeeze(), weights[name].float().numpy())
    assert source.num_parameters == sum(math.prod(tensor.shape) for tensor in weights.values())


def test_a_weight_beyond_float16_is_refused_and_a_nan_too(
    llama_model: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((llama_model / name).read_bytes())
    weights = load_file(llama_model / "model.safetensors")
    for value, message in ((70000.0, "build gguf:bf16 or gguf:f32"), (math.nan, "not a finite")):
        weights["model.layers.0.mlp.up_proj.weight"][0, 0] = value
        save_file(weights, tmp_path / "model.safetensors")
        with pytest.raises(QuantizationError, match=message):
            write(tmp_path, tmp_path / "model.gguf", "f16")


def change_tokenizer(model: Path, place: Path, **changes: Any) -> Path:
    for file in model.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    definition = json.loads((place / "tokenizer.json").read_text())
    (place / "tokenizer.json").write_text(json.dumps({**definition, **changes}))
    return place


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
        {"normalizer": {"type": "Lowercase"}},
        {
            "pre_tokenizer": {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": True,
                "use_regex": True,
            }
        },
    ],
)
def test_an_unknown_pre_tokenizer_is_refused(
    changes: dict[str, Any], llama_model: Path, tmp_path: Path
) -> None:
    model = change_tokenizer(llama_model, tmp_path, **changes)
    with pytest.raises(ModelError, match="no name for this pre-tokenizer"):
        read_vocabulary(open_source_model(model), load_tokenizer(model))
