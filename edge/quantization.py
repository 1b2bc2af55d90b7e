"""How many bits each tensor gets, and the call that gives them.

A format is a mix: most matrices take its type, the sensitive ones take more bits, vectors stay
float32. The mixes are llama.cpp's own (Q4_0 and Q4_K_M), so that our files have the sizes and the
quality people expect under these names. The rounding is ggml's `ggml_quantize_chunk`, called row
by row through ctypes: the very code that reads the file on the device.

Shape letters: R rows, C columns, B bytes of one quantised row.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from edge.errors import EdgeError
from edge.llama import load_library

FLOAT_TYPES = (Type.F32, Type.F16, Type.BF16)
_LARGEST_FLOAT16 = 65504.0


class QuantizationError(EdgeError):
    """A tensor's numbers do not fit the type that was asked for."""


@dataclass(frozen=True)
class Mix:
    """A named choice of types."""

    name: str
    base: Type
    """Of most matrices."""
    file_type: int
    """llama.cpp's number for it (general.file_type)."""

    @property
    def is_full_precision(self) -> bool:
        """Whether the weights are floats: such a build must agree with its source."""
        return self.base in FLOAT_TYPES


MIXES = {
    mix.name: mix
    for mix in (
        Mix("f32", Type.F32, 0),
        Mix("f16", Type.F16, 1),
        Mix("bf16", Type.BF16, 32),
        Mix("q8_0", Type.Q8_0, 7),
        Mix("q4_0", Type.Q4_0, 2),
        Mix("q4_k", Type.Q4_K, 15),
    )
}

_FALLBACKS = {Type.Q4_K: Type.Q5_0, Type.Q6_K: Type.Q8_0}
"""For rows that are no multiple of 256: the type of 32-blocks that llama.cpp takes instead."""


def tensor_type(
    mix: Mix, name: str, shape: Sequence[int], num_layers: int, *, is_tied: bool
) -> tuple[Type, bool]:
    """Return the type of one tensor, and whether its row length forced a fallback.

    Follows llama.cpp's `llama_tensor_get_type` for Q4_0 and Q4_K_M: the output matrix (or the
    table that serves as one) gets Q6_K; Q4_K_M gives Q6_K also to the values and the
    down-projections of the first and last eighth of the layers and of every third between.

    Args:
        mix: What was asked for.
        name: GGUF's name of the tensor.
        shape: Rows first; the last one is the row length that blocks must divide.
        num_layers: Of the model.
        is_tied: Whether the embedding table is the output matrix too.
    """
    if len(shape) < 2:
        return Type.F32, False
    if mix.is_full_precision:
        return mix.base, False
    wanted = mix.base
    is_output = name == "output.weight" or (is_tied and name == "token_embd.weight")
    if is_output and shape[-1] % _block_size(mix.base):
        wanted = Type.Q8_0
    elif is_output and mix.base != Type.Q8_0:
        wanted = Type.Q6_K
    elif mix.name == "q4_k" and name.endswith(("attn_v.weight", "ffn_down.weight")):
        layer = int(name.split(".")[1])
        wanted = Type.Q6_K if _gets_more_bits(layer, num_layers) else mix.base
    return _fitting(wanted, shape[-1])


def quantized_bytes(kind: Type, shape: Sequence[int]) -> int:
    """Return the size of a tensor of ``shape`` in ``kind``."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // int(block) * int(size)


def quantize_rows(rows_RC: NDArray[np.float32], kind: Type) -> NDArray[np.uint8]:
    """Return the bytes [R, B] of ``rows_RC`` in ``kind``.

    Raises:
        QuantizationError: A number is not finite, or too large for float16.
    """
    if not np.isfinite(rows_RC).all():
        raise QuantizationError("a weight is not a finite number: the model is damaged or diverged")
    rows_RC = np.ascontiguousarray(rows_RC, dtype=np.float32)
    if kind == Type.F32:
        return rows_RC.view(np.uint8)
    if kind == Type.F16:
        largest = float(np.abs(rows_RC).max(initial=0.0))
        if largest > _LARGEST_FLOAT16:
            raise QuantizationError(
                f"a weight of {largest:.4g} is above float16's {_LARGEST_FLOAT16:.0f}: "
                "build gguf:bf16 or gguf:f32"
            )
        return rows_RC.astype(np.float16).view(np.uint8)
    if kind == Type.BF16:
        quantized: NDArray[np.uint8] = gguf.quantize(rows_RC, kind)
        return quantized
    return _quantize_blocks(rows_RC, kind)


def _quantize_blocks(rows_RC: NDArray[np.float32], kind: Type) -> NDArray[np.uint8]:
    num_rows, width = rows_RC.shape
    bytes_RB = np.empty((num_rows, quantized_bytes(kind, (width,))), dtype=np.uint8)
    load_library().ggml_quantize_chunk(
        int(kind),
        rows_RC.ctypes.data_as(ctypes.c_void_p),
        bytes_RB.ctypes.data_as(ctypes.c_void_p),
        0,
        num_rows,
        width,
        None,
    )
    return bytes_RB


def _fitting(wanted: Type, width: int) -> tuple[Type, bool]:
    kind = wanted
    if width % _block_size(kind):
        kind = _FALLBACKS.get(kind, Type.F16)
    if width % _block_size(kind):
        kind = Type.F16
    return kind, kind != wanted


def _block_size(kind: Type) -> int:
    return int(gguf.GGML_QUANT_SIZES[kind][0])


def _gets_more_bits(layer: int, num_layers: int) -> bool:
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2
