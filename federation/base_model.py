"""What the server needs to know of a base model, without loading it: digest, config, shapes.

A safetensors file begins with the shapes of everything in it, so the adapter of a 7B model is laid
out from a few kilobytes. Format: https://github.com/huggingface/safetensors#format
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from federation.errors import UserError
from federation.lineage import sha256_of_file

TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""What turns text into token ids."""

FAMILIES = {"LlamaForCausalLM": 0, "Qwen2ForCausalLM": 0, "Qwen3ForCausalLM": 128}
"""Decoders whose projections we know by name, with the head_dim that an absent one means in
transformers 5.23; 0 = hidden_size / num_attention_heads."""


class ModelError(UserError):
    """A model directory is missing, incomplete, or does not fit what it is used with."""


def read_config(directory: Path) -> dict[str, Any]:
    """Return config.json of a model directory.

    Raises:
        ModelError: The directory or its config is missing or not JSON.
    """
    if not directory.is_dir():
        raise ModelError(
            f"{directory} does not exist: pass a model directory (Hugging Face layout)"
        )
    path = directory / "config.json"
    if not path.is_file():
        raise ModelError(f"{path} is missing: {directory} is not a model directory")
    return read_config_file(path)


def read_config_file(path: Path) -> dict[str, Any]:
    """Return a config.json that stands anywhere, without a model beside it.

    Raises:
        ModelError: It is no JSON object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON ({error}): fetch the model again") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds no JSON object: fetch the model again")
    return config


def projection_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return (out features, in features) of every projection of a decoder, from its config alone.

    The names and shapes are those that `weight_shapes` reads from the weights, without ".weight".

    Args:
        config: What config.json holds.

    Returns:
        Seven modules a layer by name, sorted as the wire sorts them.

    Raises:
        ModelError: Another family than Llama, Qwen2 and Qwen3, or a key that is missing or no size.
    """
    family = _family(config)
    hidden, layers, inner, heads = (
        _size(config, key)
        for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
    )
    # The first Llamas have no num_key_value_heads: as many as heads.
    is_plain = family == "LlamaForCausalLM" and config.get("num_key_value_heads") is None
    kv_heads = heads if is_plain else _size(config, "num_key_value_heads")
    if config.get("head_dim") is not None:
        width = _size(config, "head_dim")
    else:
        width = FAMILIES[family] or hidden // heads
        if not FAMILIES[family] and hidden % heads:
            raise ModelError(
                f"config.json: hidden_size {hidden} is no multiple of num_attention_heads {heads}, "
                "and head_dim is missing: add it"
            )
    one_layer = {
        "self_attn.q_proj": (heads * width, hidden),
        "self_attn.k_proj": (kv_heads * width, hidden),
        "self_attn.v_proj": (kv_heads * width, hidden),
        "self_attn.o_proj": (hidden, heads * width),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return dict(
        sorted(
            (f"model.layers.{layer}.{name}", shape)
            for layer in range(layers)
            for name, shape in one_layer.items()
        )
    )


def _family(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or named[0] not in FAMILIES:
        raise ModelError(
            f"config.json: architectures is {named!r}: expected one of {', '.join(FAMILIES)}"
        )
    return str(named[0])


def _size(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if value is None:
        raise ModelError(f"config.json: {key} is missing: fetch the model's config.json again")
    if type(value) is not int or value < 1:
        raise ModelError(f"config.json: {key} is {value!r}: expected a whole number from 1 on")
    return value


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a model directory, sorted by name.

    Raises:
        ModelError: There is none.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{directory} holds no *.safetensors: convert the weights to safetensors")
    return files


def weight_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a model, by name, from the file headers alone.

    Raises:
        ModelError: A file is too short for its own header.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(directory):
        with path.open("rb") as file:
            try:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(min(length, 100_000_000)))
            except (struct.error, json.JSONDecodeError, UnicodeDecodeError):
                raise ModelError(f"{path} is cut off or damaged: fetch the model again") from None
        header.pop("__metadata__", None)
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items()}
    return shapes


def model_digest(directory: Path) -> str:
    """Return one sha256 over config, weights, tokenizer and chat template.

    Two sites with equal digests turn the same text into the same numbers. It is the digest of the
    lines `sha256  name`, as sha256sum would print them, for those files that there are, sorted by
    kind and name. Costs one read of the weights (about 2 GB/s).
    """
    read_config(directory)
    text = [path for name in TEXT_FILES if (path := directory / name).is_file()]
    files = [directory / "config.json", *weight_files(directory), *text]
    lines = "".join(f"{sha256_of_file(path)}  {path.name}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()
