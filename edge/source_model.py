"""A model directory as the edge room sees it: config, tensor places and rows, read without torch.

The one idea: a safetensors file is a table of contents followed by raw numbers, so that any rows of
any tensor are one read away and a model of any size is converted in bounded memory.
Format: https://github.com/huggingface/safetensors#format

Shape letters: R rows, C columns.
"""

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.errors import UserError
from edge.lineage import sha256_of_file

ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}
"""What this room can convert: the class name in config.json, and llama.cpp's word for it."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "generation_config.json",
)

_COUNTS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
_OPTIONAL_COUNTS = ("num_key_value_heads", "head_dim")
"""Missing or null, they follow from the others."""
_COMPARED_ROWS = 1024
_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_MAX_HEADER_BYTES = 100_000_000


class ModelError(UserError):
    """A model directory is missing, incomplete, or of a kind that this room cannot convert."""


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Of its first byte, from the start of the file."""


@dataclass(frozen=True)
class SourceModel:
    """A Llama- or Qwen2-family model directory whose tensors all have a place."""

    directory: Path
    config: dict[str, Any]
    architecture: str
    """llama.cpp's name of it: llama or qwen2."""
    tensors: dict[str, StoredTensor]

    @property
    def num_parameters(self) -> int:
        """Numbers in all tensors; tied embeddings count once."""
        return sum(math.prod(shape) for shape in expected_shapes(self).values())

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        given = self.config.get("head_dim")
        return int(given or self.config["hidden_size"] // self.config["num_attention_heads"])

    @property
    def is_tied(self) -> bool:
        """Whether the output layer is the embedding table."""
        return bool(self.config.get("tie_word_embeddings", False))

    @property
    def rope(self) -> dict[str, Any]:
        """The rotary embedding's settings, in transformers 5's form (`rope_type`, `rope_theta`)."""
        given = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        kind = given.get("rope_type") or given.get("type") or "default"
        theta = given.get("rope_theta") or self.config.get("rope_theta") or 10000.0
        return {**given, "rope_type": kind, "rope_theta": theta}

    @cached_property
    def digest(self) -> str:
        """One sha256 over config and weights: of the lines sha256sum prints for them."""
        paths = {tensor.path for tensor in self.tensors.values()}
        return _digest([self.directory / "config.json", *sorted(paths)])

    @cached_property
    def tokenizer_digest(self) -> str:
        """One sha256 over the tokenizer's files and the chat template."""
        paths = [self.directory / name for name in TOKENIZER_FILES]
        return _digest([path for path in paths if path.is_file()])

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Return rows ``start`` to ``stop`` of a tensor as float32 [R, C]; a vector is one row."""
        tensor = self.tensors[name]
        width = tensor.shape[-1]
        size = _BYTES[tensor.dtype] * width
        with tensor.path.open("rb") as file:
            file.seek(tensor.offset + start * size)
            raw = file.read((stop - start) * size)
        return _as_float32(raw, tensor.dtype).reshape(stop - start, width)


def open_source_model(directory: Path) -> SourceModel:
    """Return the model in ``directory`` after checking that every tensor is really there.

    Raises:
        ModelError: The directory, its config or its weights are missing, damaged, of an
            architecture that cannot be converted, or quantised already.
    """
    config = _read_config(directory)
    names = config.get("architectures") or ["unnamed"]
    if names[0] not in ARCHITECTURES:
        raise ModelError(
            f"{directory / 'config.json'}: architecture {names[0]} cannot be converted: "
            f"expected {' or '.join(ARCHITECTURES)}"
        )
    if config.get("quantization_config"):
        raise ModelError(
            f"{directory / 'config.json'}: the weights are quantised already: "
            "pass the full-precision model (float32, bfloat16 or float16)"
        )
    model = SourceModel(directory, config, ARCHITECTURES[names[0]], _read_tensors(directory))
    _check_features(model)
    _check_tensors(model)
    return model


def layer_tensors(architecture: str) -> dict[str, str]:
    """Return one layer's tensors: transformers' name -> GGUF's name, both without prefix."""
    names = {
        "input_layernorm.weight": "attn_norm.weight",
        "self_attn.q_proj.weight": "attn_q.weight",
        "self_attn.k_proj.weight": "attn_k.weight",
        "self_attn.v_proj.weight": "attn_v.weight",
        "self_attn.o_proj.weight": "attn_output.weight",
        "post_attention_layernorm.weight": "ffn_norm.weight",
        "mlp.gate_proj.weight": "ffn_gate.weight",
        "mlp.up_proj.weight": "ffn_up.weight",
        "mlp.down_proj.weight": "ffn_down.weight",
    }
    if architecture == "qwen2":
        names |= {f"self_attn.{letter}_proj.bias": f"attn_{letter}.bias" for letter in "qkv"}
    return names


def expected_shapes(model: SourceModel) -> dict[str, tuple[int, ...]]:
    """Return the shape that config.json promises for every tensor, by transformers' name."""
    config, head_dim = model.config, model.head_dim
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    wide = config["num_attention_heads"] * head_dim
    narrow = (config.get("num_key_value_heads") or config["num_attention_heads"]) * head_dim
    one_layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (wide, hidden),
        "self_attn.k_proj.weight": (narrow, hidden),
        "self_attn.v_proj.weight": (narrow, hidden),
        "self_attn.o_proj.weight": (hidden, wide),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if model.architecture == "qwen2":
        biases: dict[str, tuple[int, ...]] = {"q": (wide,), "k": (narrow,), "v": (narrow,)}
        one_layer |= {f"self_attn.{name}_proj.bias": shape for name, shape in biases.items()}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden)
    }
    for layer in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in one_layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not model.is_tied:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def _read_config(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise ModelError(
            f"{directory} does not exist: pass a model directory (Hugging Face layout)"
        )
    config = _read_json(directory / "config.json", f"{directory} is not a model directory")
    if config.get("architectures"):
        _check_numbers(config, directory / "config.json")
    return config


def _check_numbers(config: dict[str, Any], place: Path) -> None:
    for key in (*_COUNTS, *_OPTIONAL_COUNTS, "rms_norm_eps"):
        value = config.get(key)
        if value is None and key in _OPTIONAL_COUNTS:
            continue
        if value is None:
            raise ModelError(f"{place}: '{key}' is missing: fetch the model again")
        kinds = (int, float) if key == "rms_norm_eps" else (int,)
        if not isinstance(value, kinds) or value <= 0:
            raise ModelError(
                f"{place}: '{key}' is {value!r}: expected a number above 0, fetch the model again"
            )


def _read_json(path: Path, meaning: str) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError(f"{path} is missing: {meaning}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not JSON ({error}): fetch the model again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object: fetch the model again")
    return value


def _read_tensors(directory: Path) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for path in _weight_files(directory):
        tensors |= _read_header(path)
    return tensors


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        path = directory / "model.safetensors"
        if not path.is_file():
            raise ModelError(f"{path} is missing: save the model's weights as safetensors")
        return [path]
    weight_map = _read_json(index, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} names no weights: fetch the model again")
    paths = [directory / Path(str(name)).name for name in sorted(set(weight_map.values()))]
    for path in paths:
        if not path.is_file():
            raise ModelError(f"{path} is missing, {index.name} names it: fetch the model again")
    return paths


def _read_header(path: Path) -> dict[str, StoredTensor]:
    damaged = ModelError(f"{path} is cut off or damaged: fetch the model again")
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, _MAX_HEADER_BYTES)))
        except (struct.error, json.JSONDecodeError, UnicodeDecodeError):
            raise damaged from None
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if 8 + length + end > size:
            raise damaged
        tensors[name] = StoredTensor(
            path, entry["dtype"], tuple(entry["shape"]), 8 + int(length) + begin
        )
    return tensors


def _check_features(model: SourceModel) -> None:
    place, config = model.directory / "config.json", model.config
    if config.get("hidden_act", "silu") != "silu":
        raise ModelError(f"{place}: hidden_act is {config['hidden_act']}: expected silu")
    if config.get("use_sliding_window"):
        raise ModelError(
            f"{place}: use_sliding_window is true, which llama.cpp's {model.architecture} does not "
            "do: set it to false if the context fits max_position_embeddings"
        )
    turned = model.rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if turned not in (None, 1):
        raise ModelError(
            f"{place}: partial_rotary_factor is {turned}: expected 1, heads that are turned in "
            "part cannot be converted"
        )
    kinds = (
        ("default", "linear", "llama3") if model.architecture == "llama" else ("default", "linear")
    )
    if model.rope["rope_type"] not in kinds:
        raise ModelError(
            f"{place}: rope type {model.rope['rope_type']} cannot be converted for "
            f"{model.architecture}: expected {' or '.join(kinds)}"
        )


def _check_tensors(model: SourceModel) -> None:
    expected = expected_shapes(model)
    for name, shape in expected.items():
        tensor = model.tensors.get(name)
        if tensor is None:
            raise ModelError(f"{model.directory}: tensor {name} is missing: fetch the model again")
        if tensor.shape != shape:
            raise ModelError(
                f"{tensor.path}: tensor {name} is {list(tensor.shape)}, "
                f"config.json asks for {list(shape)}: the two do not belong together"
            )
        if tensor.dtype not in _BYTES:
            raise ModelError(
                f"{tensor.path}: tensor {name} is {tensor.dtype}: "
                "save the model in float32, bfloat16 or float16"
            )
    unknown = sorted(model.tensors.keys() - expected.keys() - _ignorable(model))
    if unknown:
        raise ModelError(
            f"{model.directory}: {len(unknown)} tensors have no place in a "
            f"{model.architecture} GGUF, the first is {unknown[0]}: merge adapters and remove "
            "extra heads before the build"
        )
    if model.is_tied and "lm_head.weight" in model.tensors and not _heads_are_equal(model):
        raise ModelError(
            f"{model.directory}: tie_word_embeddings is true in config.json, but lm_head.weight is "
            "not model.embed_tokens.weight: set it to false, or remove lm_head.weight"
        )


def _heads_are_equal(model: SourceModel) -> bool:
    # transformers ties the two only if they are equal, and uses the head that is stored otherwise.
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    if model.tensors[table].shape != model.tensors[head].shape:
        return False
    if model.tensors[head].dtype not in _BYTES:
        return False
    num_rows = model.tensors[table].shape[0]
    places = range(0, num_rows, _COMPARED_ROWS)
    stops = (min(start + _COMPARED_ROWS, num_rows) for start in places)
    return all(
        np.array_equal(model.rows(table, start, stop), model.rows(head, start, stop))
        for start, stop in zip(places, stops, strict=True)
    )


def _ignorable(model: SourceModel) -> set[str]:
    # A tied model may store its table twice; old Llama checkpoints store the rotary frequencies.
    names = {name for name in model.tensors if name.endswith("rotary_emb.inv_freq")}
    return names | ({"lm_head.weight"} if model.is_tied else set())


def _as_float32(raw: bytes, dtype: str) -> NDArray[np.float32]:
    if dtype == "F32":
        return np.frombuffer(raw, dtype="<f4")
    if dtype == "F16":
        return np.frombuffer(raw, dtype="<f2").astype(np.float32)
    # bfloat16 is the upper half of a float32.
    return (np.frombuffer(raw, dtype="<u2").astype(np.uint32) << 16).view(np.float32)


def _digest(paths: list[Path]) -> str:
    lines = "".join(f"{sha256_of_file(path)}  {path.name}\n" for path in paths)
    return hashlib.sha256(lines.encode()).hexdigest()
