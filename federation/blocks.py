"""Numbers of 8 or 4 bits with one scale a block: how a change of an adapter travels.

A tensor is flattened and cut into blocks (64 numbers for int8, 32 for int4). A block is whole
multiples of one step, ``step = absmax / levels``, itself rounded to bfloat16 first, so that both
sides multiply by the same number. A code times a step is exact in float32 (7 bits times 8), so
decoding gives the same bits on every machine; a block of zeros comes back as zeros. Blocks this
short keep one large entry from silencing more than 63 others, and error feedback (client.feedback)
sends later what was silenced.

Shape letters: N numbers of a tensor, K blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BLOCKS = {"int8": 64, "int4": 32}
"""Numbers that share a scale; the last block of a tensor may be shorter."""
LEVELS = {"int8": 127, "int4": 7}
"""Largest code: symmetric, so that -128 and -8 do not occur."""
SCALE_BYTES = 2


def num_blocks(num_numbers: int, dtype: str) -> int:
    """Return how many blocks hold ``num_numbers``."""
    return -(-num_numbers // BLOCKS[dtype])


def num_code_bytes(num_numbers: int, dtype: str) -> int:
    """Return the bytes of the codes alone; two int4 stand in a byte, the earlier one low."""
    return num_numbers if dtype == "int8" else -(-num_numbers // 2)


def num_bytes(num_numbers: int, dtype: str) -> int:
    """Return the bytes of one tensor: its scales, then its codes."""
    return SCALE_BYTES * num_blocks(num_numbers, dtype) + num_code_bytes(num_numbers, dtype)


def quantize(values_N: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """Round numbers to the steps of their blocks; the error is at most half a step.

    Args:
        values_N: Finite, float32, flat.
        dtype: "int8" or "int4".

    Returns:
        One scale a block [K] bfloat16, and the codes: [N] int8, or [(N + 1) // 2] uint8 with two
        codes + 8 a byte.
    """
    import torch
    from torch.nn.functional import pad

    count, size, levels = values_N.numel(), BLOCKS[dtype], LEVELS[dtype]
    blocks_KS = (pad(values_N, (0, -count % size)) if count % size else values_N).view(-1, size)
    scales_K = (blocks_KS.abs().amax(1) / levels).to(torch.bfloat16)
    steps_K = scales_K.float()
    steps_K[steps_K == 0] = 1
    codes_KS = (blocks_KS / steps_K[:, None]).round_().clamp_(-levels, levels)
    codes_N = codes_KS.to(torch.int8).flatten()[:count]
    if dtype == "int8":
        return scales_K, codes_N
    # Two neighbours at once, as a 16-bit number (little-endian): half the time of every other byte.
    pairs = pad(codes_N, (0, count % 2)).add_(8).view(torch.int16)
    return scales_K, (pairs | pairs >> 4).to(torch.int8).view(torch.uint8)


def dequantize_into(out_N: Tensor, scales_K: Tensor, codes: Tensor, dtype: str) -> None:
    """Fill ``out_N`` with code times scale: the inverse of ``quantize``.

    Args:
        out_N: float32, flat.
        scales_K: As ``quantize`` returns them.
        codes: The bytes of the codes, int8 or uint8.
        dtype: "int8" or "int4".
    """
    import torch

    count, size = out_N.numel(), BLOCKS[dtype]
    if dtype == "int8":
        out_N.copy_(codes.view(torch.int8))
    else:
        pairs = codes.to(torch.int16)
        pairs = (pairs << 4).bitwise_or_(pairs).bitwise_and_(0x0F0F)
        out_N.copy_(pairs.view(torch.int8)[:count].sub_(8))
    whole = count - count % size
    steps_K = scales_K.float()
    out_N[:whole].view(-1, size).mul_(steps_K[: whole // size, None])
    if whole < count:
        out_N[whole:].mul_(steps_K[-1])
