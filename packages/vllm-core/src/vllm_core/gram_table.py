"""Where some tokens in a row were seen last."""

import numpy as np

from vllm_traits.batch import IntArray, LongArray

_FACTOR = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
FEW = 4
"""Windows up to which one by one is faster than arrays."""


class GramTable:
    """A map from (salt, ``order`` tokens) to a place, of fixed size: later entries overwrite earlier ones, their own and those
    that fall together with them. So whoever finds a place must look whether the tokens stand there.

    Args:
        order: Tokens of an entry.
        bits: It has ``2**bits`` places.
    """

    def __init__(self, order: int, bits: int) -> None:
        self.order = order
        self._shift = 64 - bits
        self._places: LongArray = np.full(1 << bits, -1, np.int64)

    def insert(self, tokens: IntArray, first: int, salt: int) -> None:
        """Note all windows of ``tokens`` (int32 ``[n]``): the one that begins with ``tokens[i]`` ends before ``first + i``."""
        count = len(tokens) - self.order + 1
        if count <= FEW:
            for i in range(count):
                self._places[self._index(tokens[i : i + self.order].tolist(), salt)] = first + i
            return
        hashes = np.full(count, salt, np.uint64)
        for i in range(self.order):
            hashes = (hashes ^ tokens[i : i + count].astype(np.uint64)) * np.uint64(_FACTOR)
            hashes ^= hashes >> np.uint64(29)
        index = ((hashes * np.uint64(_FACTOR)) >> np.uint64(self._shift)).astype(np.int64)
        self._places[index] = np.arange(first, first + count)

    def find(self, tokens: list[int], salt: int) -> int | None:
        """The place noted last for these ``order`` tokens, or for others."""
        place = int(self._places[self._index(tokens, salt)])
        return None if place < 0 else place

    def _index(self, tokens: list[int], salt: int) -> int:
        """The same hash as in ``insert``, of one window."""
        value = salt
        for token in tokens:
            value = (value ^ token) * _FACTOR & _MASK
            value ^= value >> 29
        return (value * _FACTOR & _MASK) >> self._shift
