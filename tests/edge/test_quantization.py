import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from edge.quantization import MIXES, quantize_rows, quantized_bytes, tensor_type

# Relative error of Gaussian weights, about a fifth above what was measured with 2048 x 2048.
BOUNDS = {
    Type.F32: 0.0,
    Type.F16: 3e-4,
    Type.BF16: 2.5e-3,
    Type.Q8_0: 7e-3,
    Type.Q6_K: 0.022,
    Type.Q5_0: 0.05,
    Type.Q4_K: 0.085,
    Type.Q4_0: 0.1,
}


@pytest.mark.parametrize("kind", BOUNDS)
def test_dequantised_weights_are_near_the_original(kind: Type) -> None:
    rows_RC = np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32)
    bytes_RB = quantize_rows(rows_RC, kind)
    assert bytes_RB.nbytes == quantized_bytes(kind, rows_RC.shape)
    # gguf-py reads the floats by their own types, and the blocks as bytes.
    stored = {Type.F32: np.float32, Type.F16: np.float16}.get(kind, np.uint8)
    back_RC = gguf.dequantize(bytes_RB.reshape(64, -1).view(stored), kind)
    error = np.linalg.norm(back_RC - rows_RC) / np.linalg.norm(rows_RC)
    assert error <= BOUNDS[kind]
    assert error > 0 or kind == Type.F32


def test_rows_are_quantised_each_by_itself() -> None:
    rows_RC = np.random.default_rng(1).normal(size=(8, 256)).astype(np.float32)
    whole = quantize_rows(rows_RC, Type.Q4_K)
    parts = [quantize_rows(rows_RC[row : row + 1], Type.Q4_K) for row in range(8)]
    assert np.array_equal(whole, np.concatenate(parts))


def names(num_layers: int, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (1000, hidden),
        "output_norm.weight": (hidden,),
    }
    for layer in range(num_layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up"):
            shapes[f"blk.{layer}.{name}.weight"] = (hidden, hidden)
        shapes[f"blk.{layer}.ffn_down.weight"] = (hidden, inner)
        shapes[f"blk.{layer}.attn_norm.weight"] = (hidden,)
        shapes[f"blk.{layer}.ffn_norm.weight"] = (hidden,)
    return shapes


def histogram(
    mix: str, shapes: dict[str, tuple[int, ...]], is_tied: bool
) -> tuple[dict[str, int], int]:
    num_layers = sum(name.endswith("attn_q.weight") for name in shapes)
    chosen = [
        tensor_type(MIXES[mix], name, shape, num_layers, is_tied=is_tied)
        for name, shape in shapes.items()
    ]
    types = [kind.name for kind, _ in chosen]
    return {kind: types.count(kind) for kind in set(types)}, sum(fell for _, fell in chosen)


def test_smollm2_gets_the_types_that_llama_cpp_gives_it() -> None:
    # llama-quantize Q4_K_M on SmolLM2-135M: "180 of 272 tensors required fallback", 105.5 MB.
    found = histogram("q4_k", names(30, 576, 1536), is_tied=True)
    assert found == ({"F32": 61, "Q4_K": 16, "Q5_0": 166, "Q6_K": 14, "Q8_0": 15}, 180)
    found = histogram("q4_0", names(30, 576, 1536), is_tied=True)
    assert found == ({"F32": 61, "Q4_0": 210, "Q8_0": 1}, 1)


def test_a_model_of_256_blocks_needs_no_fallback() -> None:
    shapes = names(28, 2048, 11008) | {"output.weight": (1000, 2048)}
    # More bits for the first 3, the last 4 and every third layer between (2 mod 3 from layer 3).
    more = len({*range(3), *range(24, 28), *range(5, 24, 3)})
    expected = {"F32": 57, "Q4_K": 28 * 7 + 1 - 2 * more, "Q6_K": 2 * more + 1}
    assert histogram("q4_k", shapes, is_tied=False) == (expected, 0)
    assert histogram("q4_0", shapes, is_tied=False) == ({"F32": 57, "Q4_0": 197, "Q6_K": 1}, 0)
    assert histogram("q8_0", shapes, is_tied=False) == ({"F32": 57, "Q8_0": 198}, 0)


def test_a_row_that_no_block_divides_stays_float16() -> None:
    kind, fell_back = tensor_type(MIXES["q4_k"], "blk.0.attn_q.weight", (50, 50), 2, is_tied=True)
    assert (kind, fell_back) == (Type.F16, True)
