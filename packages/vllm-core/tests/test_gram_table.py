"""Windows of tokens are found where they were last."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm_core.gram_table import FEW, GramTable

TOKENS = st.lists(st.integers(0, 200_000), min_size=1, max_size=40)


@given(TOKENS, st.integers(1, 4), st.integers(0, 2**63 - 1), st.integers(1, 2 * FEW))
def test_what_is_found_was_noted_and_is_the_last(tokens: list[int], order: int, salt: int, piece: int) -> None:
    """In pieces of any size: one by one and as arrays the same places are taken."""
    table = GramTable(order, 20)
    array = np.array(tokens, np.int32)
    for start in range(0, len(tokens), piece):
        first = max(0, start - order + 1)
        table.insert(array[first : start + piece], first + order, salt)
    for end in range(order, len(tokens) + 1):
        gram = tokens[end - order : end]
        last = max(e for e in range(order, len(tokens) + 1) if tokens[e - order : e] == gram)
        assert table.find(gram, salt) == last


def test_other_salts_find_other_places() -> None:
    table = GramTable(2, 20)
    table.insert(np.array([1, 2, 3], np.int32), 2, 7)
    assert table.find([1, 2], 7) == 2
    assert table.find([1, 2], 8) is None


def test_it_never_grows() -> None:
    table = GramTable(2, 4)
    table.insert(np.arange(1000, dtype=np.int32), 2, 0)
    assert table._places.nbytes == 8 * 16
    assert table.find([998, 999], 0) == 1000
