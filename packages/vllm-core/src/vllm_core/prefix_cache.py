"""Prefixes that are computed once. A key is a SHA-256 chain over full blocks:

``key[i] = SHA-256(key[i - 1] + token ids of block i as int32)``, and ``key[-1] = SHA-256(cache_salt)``. Requests with different
salts never share a block, and no prompt can be made that meets another's key.
"""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from itertools import takewhile

import numpy as np

from vllm_core.block_pool import BlockPool
from vllm_core.sequence import Sequence
from vllm_traits.batch import IntArray
from vllm_traits.errors import InvalidRequestError
from vllm_traits.ids import BlockId


def root_key(cache_salt: str | None) -> bytes:
    """The key before the first block.

    Raises:
        InvalidRequestError: The salt is no string.
    """
    if cache_salt is not None and not isinstance(cache_salt, str):
        raise InvalidRequestError(f"cache_salt is {cache_salt!r}; it must be a string.", "cache_salt")
    return sha256(b"" if cache_salt is None else b"salt:" + cache_salt.encode("utf-8", "surrogatepass")).digest()


def extend_keys(keys: list[bytes], root: bytes, token_ids: IntArray, block_size: int) -> None:
    """Append the keys of all full blocks of ``token_ids`` (int32 ``[num_tokens]``) that ``keys`` does not have yet."""
    first, full = len(keys), len(token_ids) // block_size
    if first >= full:
        return
    data = token_ids[first * block_size : full * block_size].astype(np.int32, copy=False).tobytes()
    width = 4 * block_size
    key = keys[-1] if keys else root
    for start in range(0, len(data), width):
        key = sha256(key + data[start : start + width]).digest()
        keys.append(key)


@dataclass(slots=True)
class PrefixCacheStats:
    """Counted once for every sequence that is admitted, in tokens."""

    num_queried_tokens: int = 0
    num_hit_tokens: int = 0


class PrefixCache:
    """Finds the blocks of known prefixes, and knows who is computing more of them.

    Args:
        pool: Holds the blocks and their keys.
        block_size: Tokens of a block.
        enabled: Otherwise nothing is found and nothing kept.
        wake: Called with a key that others may wait for, when its block is there or will not come from who computed it.
    """

    def __init__(self, pool: BlockPool, block_size: int, *, enabled: bool, wake: Callable[[bytes], None]) -> None:
        self.pool, self.block_size, self.enabled = pool, block_size, enabled
        self.stats = PrefixCacheStats()
        self._wake = wake
        self._computing: dict[bytes, Sequence] = {}  # keys that a running sequence is going to register

    def prepare(self, sequence: Sequence) -> None:
        """Make the keys of a new sequence's prompt."""
        if self.enabled:
            extend_keys(sequence.keys, sequence.root, sequence.prompt, self.block_size)

    def match(self, sequence: Sequence) -> tuple[list[BlockId], bytes | None]:
        """The cached blocks of its prefix, and if another sequence is computing what comes next, the last key of that."""
        hits: list[BlockId] = []
        lookup = self.pool.lookup
        keys = sequence.keys[: self._most_hits(sequence)]
        for place, key in enumerate(keys):
            block = lookup(key)
            if block is None:
                return hits, self._awaited(keys[place:])
            hits.append(block)
        return hits, None

    def _awaited(self, keys: list[bytes]) -> bytes | None:
        """The last of these keys that whoever computes the first is computing: to wait for less would be to wait again."""
        by = self._computing.get(keys[0])
        if by is None:
            return None
        return list(takewhile(lambda key: self._computing.get(key) is by, keys))[-1]

    def count_hits(self, sequence: Sequence) -> int:
        """About how many leading blocks are cached: from what it was the last time, which takes two look-ups if it still is."""
        most, hits, lookup = self._most_hits(sequence), sequence.num_hits, self.pool.lookup
        while hits and lookup(sequence.keys[hits - 1]) is None:
            hits -= 1
        while hits < most and lookup(sequence.keys[hits]) is not None:
            hits += 1
        sequence.num_hits = hits
        return hits

    def admit(self, sequence: Sequence, num_hits: int) -> None:
        """A sequence begins to compute what comes after its first ``num_hits`` blocks."""
        if self.enabled:
            for key in sequence.keys[num_hits:]:
                self._computing.setdefault(key, sequence)
        if self.enabled and not sequence.was_admitted:
            self.stats.num_queried_tokens += len(sequence.prompt)
            self.stats.num_hit_tokens += num_hits * self.block_size

    def register(self, sequence: Sequence, token_ids: IntArray, end: int) -> None:
        """Let others find its first ``end`` blocks, which are computed by now; ``token_ids`` (int32) are at least theirs."""
        keys, blocks, computing = sequence.keys, sequence.blocks, self._computing
        if len(keys) < end:
            extend_keys(keys, sequence.root, token_ids[: end * self.block_size], self.block_size)
        for i in range(sequence.num_registered, end):
            self.pool.register(blocks[i], keys[i])
            if keys[i] in computing:
                self._settle(keys[i], sequence)
        sequence.num_registered = end

    def leave(self, sequence: Sequence) -> None:
        """A sequence computes no more."""
        for key in sequence.keys[sequence.num_registered :]:
            self._settle(key, sequence)

    def is_computing(self, key: bytes) -> bool:
        """Whether a running sequence is going to register this key."""
        return key in self._computing

    def check_integrity(self, running: list[Sequence]) -> None:
        """Prove that what is still to be computed is computed by somebody who runs, and is not there.

        Raises:
            AssertionError: It is not so.
        """
        for key, sequence in self._computing.items():
            assert sequence in running, "nobody computes a key that others wait for"
            assert key in sequence.keys[sequence.num_registered :], "a key is still computed that is there"

    def _most_hits(self, sequence: Sequence) -> int:
        """At least one token must run, to give logits; a prompt that is scored runs whole."""
        if sequence.params.prompt_logprobs is not None:
            return 0
        return min(len(sequence.keys), (sequence.num_tokens - 1) // self.block_size)

    def _settle(self, key: bytes, sequence: Sequence) -> None:
        if self._computing.get(key) is sequence:
            del self._computing[key]
            self._wake(key)
