"""Keys of prefixes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm_core.prefix_cache import extend_keys, root_key

tokens = st.lists(st.integers(0, 3), max_size=20)


def keys_of(token_ids: list[int], salt: str | None = None, block_size: int = 4) -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, root_key(salt), np.array(token_ids, np.int32), block_size)
    return keys


@given(tokens, tokens)
def test_keys_are_equal_exactly_as_far_as_prefixes_are(a: list[int], b: list[int]) -> None:
    for i, (x, y) in enumerate(zip(keys_of(a), keys_of(b), strict=False)):
        assert (x == y) == (a[: 4 * i + 4] == b[: 4 * i + 4])


@given(tokens, st.integers(0, 20))
def test_keys_grow_with_the_tokens(token_ids: list[int], cut: int) -> None:
    keys = keys_of(token_ids[:cut])
    extend_keys(keys, root_key(None), np.array(token_ids, np.int32), 4)
    assert keys == keys_of(token_ids)
    assert len(keys) == len(token_ids) // 4


def test_salts_separate() -> None:
    assert len({keys_of([1, 2, 3, 4], salt)[0] for salt in (None, "", "a", "b")}) == 4
