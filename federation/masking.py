"""Numbers as elements of a ring, and the masks that hide them there.

A secure sum adds integers modulo 2**bits: in a ring a uniform mask hides a value perfectly, which
no floating-point noise does. Real numbers are clipped to a public bound and rounded at random, up
or down so that the mean is right. Masks are AES-256-CTR keystreams of keys that are used once,
taken straight into the ring's array, a piece at a time.

``bits`` is a whole number of bytes, so that packing is a slice. The ring is held in the next wider
unsigned integers, which wrap by themselves: 2**bits divides their modulus, so what stands above
``bits`` may be anything and is cut off when it is packed.

Shape letters: N numbers of a piece of the vector.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

Ring: TypeAlias = NDArray[np.unsignedinteger[Any]]

KEY_BYTES = 32
_PIECE_BYTES = 1 << 18
"""Of keystream at a time: it stays in the cache between the cipher and the addition."""
_AES_BLOCK = 16
_ZEROS = bytes(_PIECE_BYTES)


def ring_bits(levels: int, cohort: int) -> int:
    """Return the bits of the smallest ring, in whole bytes, that holds a sum without wrapping.

    Args:
        levels: Values that one number of one site can take, symmetric about 0: an odd number.
        cohort: Sites at most.

    Raises:
        ValueError: There is no such ring of up to 64 bits, or an argument is out of range.
    """
    if levels < 3 or levels % 2 == 0 or cohort < 1:
        raise ValueError(f"{levels} levels, cohort {cohort}: expected an odd number >= 3, and >= 1")
    values = cohort * (levels - 1) + 1
    bits = -(-(values - 1).bit_length() // 8) * 8
    if bits > 64:
        raise ValueError(f"{levels} levels of {cohort} sites need {bits} bits: expected at most 64")
    return bits


def ring_dtype(bits: int) -> np.dtype[np.unsignedinteger[Any]]:
    """Return the unsigned little-endian integers in which a ring of ``bits`` is held."""
    return np.dtype(f"<u{next(size for size in (1, 2, 4, 8) if size * 8 >= bits)}")


def pack(ring_N: Ring, bits: int) -> bytes:
    """Return the elements as bytes, ``bits`` / 8 each, little-endian."""
    bytes_NB = np.ascontiguousarray(ring_N).view(np.uint8).reshape(len(ring_N), -1)
    return bytes_NB[:, : bits // 8].tobytes()


def unpack(packed: bytes | memoryview, bits: int) -> Ring:
    """Return what ``pack`` packed, as an array of its own."""
    dtype = ring_dtype(bits)
    given_NB = np.frombuffer(packed, np.uint8).reshape(-1, bits // 8)
    bytes_NB = np.zeros((len(given_NB), dtype.itemsize), np.uint8)
    bytes_NB[:, : bits // 8] = given_NB
    return bytes_NB.view(dtype).reshape(-1)


def signed(ring_N: Ring, bits: int) -> NDArray[np.int64]:
    """Return the elements as integers in [-2**(bits - 1), 2**(bits - 1))."""
    shift = 64 - bits
    wide_N = ring_N.astype(np.uint64) << np.uint64(shift)
    return wide_N.view(np.int64) >> np.int64(shift)


def quantize(
    values_N: NDArray[np.floating[Any]],
    *,
    clip: float,
    half: int,
    share: float,
    rng: np.random.Generator,
) -> tuple[NDArray[np.int64], int]:
    """Return the numbers as integers in [-half, half], and how many were clipped.

    A number becomes ``value * share * half / clip``, rounded up or down at random so that the
    expectation is right. What the randomness is, is no secret: it hides nothing.

    Args:
        values_N: Finite numbers.
        clip: Numbers beyond it in either direction are set to it, before ``share`` counts.
        half: Largest integer, at most 2**31.
        share: Weight of this site, in (0, 1].
        rng: Draws the roundings.
    """
    wide_N = values_N.astype(np.float64)
    num_clipped = int(np.count_nonzero(np.abs(wide_N) > clip))
    np.clip(wide_N, -clip, clip, out=wide_N)
    wide_N *= share * half / clip
    wide_N += rng.random(len(wide_N))
    np.floor(wide_N, out=wide_N)
    np.clip(wide_N, -half, half, out=wide_N)  # clip * (half / clip) may be a hair above half
    return wide_N.astype(np.int64), num_clipped


class Mask:
    """A keystream that is added to the ring, or taken from it, piece after piece."""

    def __init__(self, key: bytes, *, is_added: bool) -> None:
        """Nothing is expanded before ``apply``.

        Args:
            key: 32 bytes that serve for this one vector and no other: the counter starts at 0.
            is_added: Whether the mask is added; else it is subtracted.
        """
        self._encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(_AES_BLOCK))).encryptor()
        self._apply = np.add if is_added else np.subtract
        self._buffer = bytearray(_PIECE_BYTES + _AES_BLOCK - 1)

    def apply(self, ring_N: Ring) -> None:
        """Mask the next elements in place; flat memory, whatever their number."""
        size = ring_N.dtype.itemsize
        step = _PIECE_BYTES // size
        zeros = memoryview(_ZEROS)
        for start in range(0, len(ring_N), step):
            piece = ring_N[start : start + step]
            self._encryptor.update_into(zeros[: len(piece) * size], self._buffer)
            stream = np.frombuffer(self._buffer, ring_N.dtype, len(piece))
            self._apply(piece, stream, out=piece)
