"""Keys of prefixes: a SHA-256 chain over full blocks.

``key[i] = SHA-256(key[i - 1] + token ids of block i as int32)``, and ``key[-1] = SHA-256(cache_salt)``. Requests with different
salts never share a block, and no prompt can be made that meets another's key.
"""

from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from vllm_traits.batch import IntArray


def root_key(cache_salt: str | None) -> bytes:
    """The key before the first block."""
    return sha256(b"" if cache_salt is None else b"salt:" + cache_salt.encode("utf-8", "surrogatepass")).digest()


def extend_keys(keys: list[bytes], root: bytes, token_ids: IntArray, block_size: int) -> None:
    """Append the keys of all full blocks of ``token_ids`` (int32 ``[num_tokens]``) that ``keys`` does not have yet."""
    first, full = len(keys), len(token_ids) // block_size
    if first >= full:
        return
    data = np.ascontiguousarray(token_ids[first * block_size : full * block_size], np.int32).tobytes()
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
