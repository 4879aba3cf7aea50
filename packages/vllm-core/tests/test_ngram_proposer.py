"""Prompt lookup finds what stood there before, in the same sequence alone."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm_core.ngram_proposer import NgramProposer
from vllm_core.proposer import DraftRows
from vllm_traits.batch import BatchState
from vllm_traits.ids import SeqId, SlotId


def rows_of(state: BatchState, sequences: dict[int, list[int]], wanted: int) -> DraftRows:
    for slot, tokens in sequences.items():
        state.token_ids[slot, : len(tokens)] = tokens
        state.num_tokens[slot] = len(tokens)
    num = len(sequences)
    slots = np.array(list(sequences), np.int32)
    seq_ids = tuple(SeqId(slot + 1) for slot in sequences)
    return DraftRows(state, slots, seq_ids, np.full(num, wanted, np.int32), [b""] * num, [[]] * num)


def test_the_longest_match_wins_and_the_latest_of_equals() -> None:
    proposer = NgramProposer(4, 2, 3)
    tokens = [1, 2, 3, 40, 9, 2, 3, 50, 8, 2, 3, 60, 1, 2, 3]
    assert proposer.propose(rows_of(BatchState(4, 64, 4), {0: tokens}, 2)) == [[40, 9]]
    tokens = [7, 2, 3, 40, 9, 2, 3, 50, 8, 1, 2, 3]
    assert proposer.propose(rows_of(BatchState(4, 64, 4), {1: tokens}, 2)) == [[50, 8]]


def test_a_loop_goes_on() -> None:
    proposer = NgramProposer(1, 2, 4)
    assert proposer.propose(rows_of(BatchState(1, 64, 4), {0: [5, 6, 7, 5, 6, 7, 5, 6]}, 7)) == [[7, 5, 6, 7, 5, 6, 7]]


def test_nothing_is_found_in_others_or_after_the_slot_was_left() -> None:
    state, proposer = BatchState(2, 64, 4), NgramProposer(2, 2, 2)
    assert proposer.propose(rows_of(state, {0: [1, 2, 3, 4], 1: [9, 1, 2]}, 3)) == [[], []]
    proposer.forget(state, SlotId(0), b"")
    rows = rows_of(state, {0: [8, 1, 2]}, 3)
    other = DraftRows(state, rows.slots, (SeqId(77),), rows.num_wanted, rows.roots, rows.keys)
    assert proposer.propose(other) == [[]]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 3), st.integers(0, 2), st.integers(1, 6))
def test_as_a_plain_search(tokens: list[int], least: int, more: int, wanted: int) -> None:
    """Token by token, the guesses are those of a search from the end."""
    state, proposer = BatchState(1, 64, 4), NgramProposer(1, least, least + more, bits=16)
    for known in range(1, len(tokens) + 1):
        now = tokens[:known]
        expected: list[int] = []
        for order in range(least + more, least - 1, -1):
            places = [end for end in range(order, known) if now[end - order : end] == now[known - order :]]
            if known > order and places:
                period = known - places[-1]
                expected = [now[places[-1] + i % period] for i in range(wanted)]
                break
        assert proposer.propose(rows_of(state, {0: now}, wanted)) == [expected]
