import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from federation.masking import Mask, pack, quantize, ring_bits, ring_dtype, signed, unpack


@pytest.mark.parametrize(
    ("levels", "cohort", "bits"),
    [
        (3, 3, 8),
        (255, 1, 8),
        (255, 2, 16),  # 2 * 254 + 1 values
        (65535, 8, 24),
        (4095, 16, 16),  # 16 * 4094 + 1 = 65505 values
        (4095, 17, 24),
        (2**32 - 1, 64, 40),
    ],
)
def test_the_ring_holds_every_sum_in_whole_bytes(levels: int, cohort: int, bits: int) -> None:
    assert ring_bits(levels, cohort) == bits
    most = cohort * (levels // 2)
    assert most < 2 ** (bits - 1)
    assert bits == 8 or cohort * (levels - 1) + 1 > 2 ** (bits - 8)
    ends = np.array([most, -most]).astype(ring_dtype(bits))
    assert signed(unpack(pack(ends, bits), bits), bits).tolist() == [most, -most]


def test_a_ring_beyond_64_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 64"):
        ring_bits(2**64 - 1, 3)
    with pytest.raises(ValueError, match="odd number"):
        ring_bits(4, 3)


@given(st.lists(st.integers(-(2**23), 2**23 - 1), min_size=1, max_size=40))
def test_packed_elements_are_the_integers_modulo_the_ring(values: list[int]) -> None:
    ring = np.array(values).astype(ring_dtype(24))
    packed = pack(ring, 24)
    assert packed == b"".join((v % 2**24).to_bytes(3, "little") for v in values)
    assert signed(unpack(packed, 24), 24).tolist() == values


@pytest.mark.parametrize("bits", [8, 16, 24, 40])
def test_a_mask_is_the_keystream_of_aes_in_counter_mode_whatever_the_pieces(bits: int) -> None:
    key, dtype = bytes(range(32)), ring_dtype(bits)
    length = (1 << 18) // dtype.itemsize + 1234  # more than the piece that is expanded at once
    ring = np.zeros(length, dtype)
    mask, taken = Mask(key, is_added=True), Mask(key, is_added=False)
    for piece in np.split(ring, [1, 7, 1000]):
        mask.apply(piece)
    blocks = -(-length * dtype.itemsize // 16)
    counters = b"".join(n.to_bytes(16, "big") for n in range(blocks))
    encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305 - the oracle
    expected = encryptor.update(counters)[: ring.nbytes]
    assert ring.tobytes() == expected
    taken.apply(ring)
    assert not ring.any()


def test_rounding_is_right_in_the_mean_and_never_off_by_a_level() -> None:
    values = np.linspace(-1.2, 1.2, 49)
    rng = np.random.default_rng(0)
    draws = np.stack(
        [quantize(values, clip=1.0, half=7, share=0.5, rng=rng)[0] for _ in range(4000)]
    )
    exact = np.clip(values, -1, 1) * 0.5 * 7
    assert np.abs(draws - exact).max() < 1
    # The standard deviation of a rounding is at most a half, of the mean of 4000 below 0.008.
    assert np.abs(draws.mean(0) - exact).max() < 0.04


def test_clipped_numbers_are_counted_and_stay_within_the_levels() -> None:
    values = np.array([-5.0, -1.0, 0.0, 1.0, 1.0000001, 5.0], np.float64)
    integers, num_clipped = quantize(
        values, clip=1.0, half=127, share=1.0, rng=np.random.default_rng(0)
    )
    assert integers.tolist() == [-127, -127, 0, 127, 127, 127]
    assert num_clipped == 3
