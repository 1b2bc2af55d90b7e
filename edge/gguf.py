"""The GGUF writer: a model directory becomes one file, tensor by tensor, in bounded memory.

Why our own: any type per tensor, no compiler and no llama.cpp checkout on the build machine, and
every number goes through the same `ggml_quantize_chunk` that the device's runtime brings
(docs/decisions/0004-gguf-written-by-us.md). What we write is proven afterwards by `edge.fidelity`.

Shape letters: R rows, C columns, B bytes of one quantised row, H heads, D head width.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from edge.llama import usable_threads
from edge.quantization import Mix, quantize_rows, quantized_bytes, tensor_type
from edge.source_model import SourceModel, layer_tensors
from edge.vocabulary import Vocabulary

SOURCE_DIGEST_KEY = "fedge.source_digest"
_CHUNK_NUMBERS = 4 << 20
"""Numbers quantised at once: 16 MiB of float32 a thread."""


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the file to be written."""

    name: str
    source: str | None
    """transformers' name; None for the rotary factors, which are computed."""
    shape: tuple[int, ...]
    kind: Type
    fell_back: bool
    num_heads: int = 0
    """Heads whose rows are interleaved for llama.cpp's rotary embedding; 0 for none."""


@dataclass(frozen=True)
class WrittenFile:
    """What a GGUF file came to hold."""

    tensor_types: dict[str, int]
    """How many tensors of each type."""
    num_fallbacks: int
    """Tensors whose row length the wanted type's blocks do not divide."""


def write_gguf(
    path: Path,
    model: SourceModel,
    vocabulary: Vocabulary,
    mix: Mix,
    on_progress: Callable[[int, int], None] | None = None,
) -> WrittenFile:
    """Write ``model`` to ``path`` in the types of ``mix``.

    One tensor's quantised bytes and a chunk of float32 a thread are all that is in memory: never
    the model. The same weights give the same tensors, however they are split into files.

    Args:
        path: To be written; what stood there is overwritten.
        model: Where the numbers come from.
        vocabulary: Its tokenizer.
        mix: Of ``edge.quantization.MIXES``.
        on_progress: Called with the bytes written and the bytes to write after each tensor.

    Raises:
        QuantizationError: A weight is not finite, or does not fit float16.
    """
    plan = plan_tensors(model, mix)
    writer = gguf.GGUFWriter(path, model.architecture)
    try:
        _add_model_metadata(writer, model, mix)
        _add_vocabulary(writer, vocabulary)
        total = 0
        for tensor in plan:
            size = quantized_bytes(tensor.kind, tensor.shape)
            writer.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=tensor.kind
            )
            total += size
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        _write_tensors(writer.fout[0], model, plan, lambda done: _tell(on_progress, done, total))
    finally:
        writer.close()
    types = Counter(tensor.kind.name for tensor in plan)
    return WrittenFile(dict(types), sum(tensor.fell_back for tensor in plan))


def plan_tensors(model: SourceModel, mix: Mix) -> list[PlannedTensor]:
    """Return every tensor of the file to be, in file order."""
    names = {"token_embd.weight": "model.embed_tokens.weight"}
    num_layers = int(model.config["num_hidden_layers"])
    for layer in range(num_layers):
        for source, target in layer_tensors(model.architecture).items():
            names[f"blk.{layer}.{target}"] = f"model.layers.{layer}.{source}"
    names["output_norm.weight"] = "model.norm.weight"
    if not model.is_tied:
        names["output.weight"] = "lm_head.weight"
    plan = []
    for name, source in names.items():
        shape = model.tensors[source].shape
        kind, fell_back = tensor_type(mix, name, shape, num_layers, is_tied=model.is_tied)
        plan.append(
            PlannedTensor(name, source, shape, kind, fell_back, _num_interleaved(model, name))
        )
    if model.rope["rope_type"] == "llama3":
        plan.append(
            PlannedTensor("rope_freqs.weight", None, (model.head_dim // 2,), Type.F32, False)
        )
    return plan


def interleave_heads(rows_RC: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Return the rows of a query or key matrix in the order of llama.cpp's `llama` architecture.

    transformers rotates dimension i of a head with dimension i + D/2, llama.cpp rotates
    neighbours (2i, 2i + 1): row h * D + half * D/2 + i moves to h * D + 2i + half. Attention
    scores do not change: queries and keys move alike. Qwen2 keeps transformers' order.
    """
    rows_HDC = rows_RC.reshape(num_heads, 2, -1, rows_RC.shape[-1])
    return rows_HDC.swapaxes(1, 2).reshape(rows_RC.shape)


def rope_factors(model: SourceModel) -> NDArray[np.float32]:
    """Return what llama.cpp divides each rotary frequency by [D/2], for Llama 3's scaling.

    Long waves are stretched by `factor`, short ones kept, those between interpolated smoothly.
    Source: transformers' `_compute_llama3_parameters`, which multiplies where llama.cpp divides.
    """
    rope = model.rope
    factor, context = rope["factor"], rope["original_max_position_embeddings"]
    slow, fast = rope["low_freq_factor"], rope["high_freq_factor"]
    dims = np.arange(0, model.head_dim, 2, dtype=np.float64)
    turns = context / (2 * math.pi) * float(rope["rope_theta"]) ** (-dims / model.head_dim)
    smooth = np.clip((turns - slow) / (fast - slow), 0.0, 1.0)
    factors: NDArray[np.float32] = (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)
    return factors


def _num_interleaved(model: SourceModel, name: str) -> int:
    if model.architecture != "llama" or not name.endswith(("attn_q.weight", "attn_k.weight")):
        return 0
    heads = int(model.config["num_attention_heads"])
    is_query = name.endswith("attn_q.weight")
    return heads if is_query else int(model.config.get("num_key_value_heads") or heads)


def _add_model_metadata(writer: gguf.GGUFWriter, model: SourceModel, mix: Mix) -> None:
    config, rope = model.config, model.rope
    heads = int(config["num_attention_heads"])
    writer.add_type("model")
    writer.add_name(model.directory.resolve().name)
    writer.add_file_type(mix.file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_vocab_size(int(config["vocab_size"]))
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    writer.add_string(SOURCE_DIGEST_KEY, model.digest)


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.token_types)
    writer.add_token_merges(vocabulary.merges)
    if vocabulary.bos_id is not None:
        writer.add_bos_token_id(vocabulary.bos_id)
    if vocabulary.eos_id is not None:
        writer.add_eos_token_id(vocabulary.eos_id)
    if vocabulary.pad_id is not None:
        writer.add_pad_token_id(vocabulary.pad_id)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_chat_template(vocabulary.chat_template)


def _write_tensors(
    file: IO[bytes],
    model: SourceModel,
    plan: list[PlannedTensor],
    on_written: Callable[[int], None],
) -> None:
    # GGUFWriter.write_tensor_data wants whole tensors; its alignment is all that we need of it.
    alignment, done = gguf.GGUF_DEFAULT_ALIGNMENT, 0
    file.write(bytes(-file.tell() % alignment))
    with ThreadPoolExecutor(usable_threads()) as pool:
        for tensor in plan:
            start = file.tell()
            for piece_RB in _quantized(tensor, model, pool):
                file.write(piece_RB.data)
            size = file.tell() - start
            file.write(bytes(-size % alignment))
            done += size
            on_written(done)


def _quantized(
    tensor: PlannedTensor, model: SourceModel, pool: ThreadPoolExecutor
) -> Iterator[NDArray[np.uint8]]:
    if tensor.source is None:
        yield quantize_rows(rope_factors(model)[None, :], tensor.kind)
        return
    source = tensor.source
    num_rows, width = (1, *tensor.shape)[-2:]
    # Heads are interleaved one by one, so a chunk holds whole heads.
    unit = num_rows // tensor.num_heads if tensor.num_heads else 1
    step = max(1, _CHUNK_NUMBERS // (unit * width)) * unit

    def quantize_from(start: int) -> NDArray[np.uint8]:
        rows_RC = model.rows(source, start, min(start + step, num_rows))
        if tensor.num_heads:
            rows_RC = interleave_heads(rows_RC, len(rows_RC) // unit)
        return quantize_rows(rows_RC, tensor.kind)

    yield from pool.map(quantize_from, range(0, num_rows, step))


def _tell(on_progress: Callable[[int, int], None] | None, done: int, total: int) -> None:
    if on_progress:
        on_progress(done, total)
