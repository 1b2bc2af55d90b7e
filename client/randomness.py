"""Random numbers that nobody else can foresee: which records a private step sees, and its noise.

torch's generators are made for speed: the one on a CPU starts from 32 bits, and a few thousand of
its numbers tell the rest. Here AES-256 in counter mode stretches a key of 256 bits from the
operating system. A normal number is made in float64 (Box and Muller, 1958); that the last bits of a
float could give the number under the noise away (Mironov, CCS 2012) is `client.privacy`'s business:
it rounds onto a grid.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

KEY_BYTES = 32
_WORDS = 1 << 64
"""Values of one random word."""


class RandomStream:
    """An endless stream of random words; what was drawn is not drawn again."""

    def __init__(self, key: bytes | None = None) -> None:
        """Begin a stream.

        Args:
            key: 32 bytes; the same ones give the same stream, which is for tests. None = drawn from
                the operating system.
        """
        from cryptography.hazmat.primitives.ciphers import Cipher
        from cryptography.hazmat.primitives.ciphers.algorithms import AES256
        from cryptography.hazmat.primitives.ciphers.modes import CTR

        if key is None:
            key = secrets.token_bytes(KEY_BYTES)
        # Counter mode from 0 is safe: a key of the system's is used for one stream.
        self._cipher = Cipher(AES256(key), CTR(bytes(16))).encryptor()

    def chosen(self, count: int, rate: float) -> list[int]:
        """Return the indices below ``count`` of a Poisson sample: each is in it with ``rate``.

        Args:
            count: Items to choose from.
            rate: In (0, 1]. It is rounded down to a multiple of 2**-64.
        """
        threshold = int(rate * _WORDS)
        if threshold == 0:
            return []
        return np.flatnonzero(self._words(count) <= np.uint64(threshold - 1)).tolist()

    def normal(self, count: int) -> NDArray[np.float64]:
        """Return ``count`` independent standard normal numbers.

        They end at 9.4 standard deviations, beyond which a pair lies with probability 2**-64.
        """
        half = (count + 1) // 2
        words = self._words(2 * half).astype(np.float64)
        radius = np.sqrt(-2.0 * np.log((words[:half] + 1.0) / _WORDS))
        angle = words[half:] * (2.0 * np.pi / _WORDS)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]

    def _words(self, count: int) -> NDArray[np.uint64]:
        return np.frombuffer(self._cipher.update(bytes(8 * count)), dtype="<u8")
