"""Blocks against an oracle in numpy that was written from the format, not from the code."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from federation.blocks import BLOCKS, LEVELS, dequantize_into, num_bytes, quantize

VALUES = arrays.arrays(
    np.float32,
    st.integers(1, 300),
    elements=st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False)
    | st.floats(-1, 1, width=32, allow_subnormal=False),
)


def decoded(values: np.ndarray, dtype: str) -> np.ndarray:
    scales, codes = quantize(torch.from_numpy(values.copy()), dtype)
    out = torch.full((len(values),), float("nan"))
    dequantize_into(out, scales, codes.view(torch.uint8), dtype)
    return out.numpy()


def nearest_bfloat16(value: np.float32) -> np.float32:
    """Round to the upper 16 bits, ties to even, on the integer itself."""
    bits = int(np.float32(value).view(np.uint32))
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return np.uint32(bits).view(np.float32)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@settings(deadline=None)
@given(values=VALUES)
def test_a_number_comes_back_within_half_a_step_of_its_block(
    values: np.ndarray, dtype: str
) -> None:
    back = decoded(values, dtype)
    for start in range(0, len(values), BLOCKS[dtype]):
        block = values[start : start + BLOCKS[dtype]].astype(np.float64)
        step = float(nearest_bfloat16(np.float32(np.abs(block).max()) / np.float32(LEVELS[dtype])))
        error = np.abs(back[start : start + len(block)] - block).max()
        assert error <= step / 2 * (1 + 1e-6) or np.abs(block).max() < 1e-30
        if step:
            steps = back[start : start + len(block)] / step
            assert np.array_equal(steps, np.round(steps)), "whole multiples of the step, exactly"
            assert np.abs(steps).max() <= LEVELS[dtype]


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129])
def test_the_bytes_are_those_that_were_planned(dtype: str, count: int) -> None:
    scales, codes = quantize(torch.randn(count), dtype)
    assert 2 * scales.numel() + codes.numel() * codes.element_size() == num_bytes(count, dtype)
    assert scales.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_blocks_of_zeros_stay_exactly_zero_beside_others(dtype: str) -> None:
    values = np.zeros(200, dtype=np.float32)
    values[130] = 3.0
    back = decoded(values, dtype)
    start = 130 - 130 % BLOCKS[dtype]
    assert not np.delete(back, range(start, start + BLOCKS[dtype])).any()
    assert back[130] == pytest.approx(3.0, rel=2**-8)


def test_two_int4_stand_in_a_byte_the_earlier_one_low() -> None:
    scales, codes = quantize(torch.tensor([7.0, -7.0, 1.0]), "int4")
    assert scales.tolist() == [1.0]
    assert codes.tolist() == [(7 + 8) | (-7 + 8) << 4, (1 + 8) | (0 + 8) << 4]
