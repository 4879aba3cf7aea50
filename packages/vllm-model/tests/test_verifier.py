"""Which tokens are sampled, and which guesses stand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_model.verifier import accept_guesses, guess_table, sampled_entries
from vllm_traits import Batch, BatchState, SeqId
from vllm_traits.ids import StepId


def batch_with(rows: list[tuple[int, list[int], int, bool]]) -> Batch:
    """Of ``(num_computed, tokens, num_draft, sample)`` rows."""
    lengths = [len(tokens) for _, tokens, _, _ in rows]
    slots = np.arange(len(rows), dtype=np.int32)
    return Batch(
        step_id=StepId(1),
        state=BatchState(max(1, len(rows)), 128, 16),
        slots=slots,
        seq_ids=tuple(SeqId(i) for i in range(len(rows))),
        token_ids=np.array([token for _, tokens, _, _ in rows for token in tokens], np.int32),
        query_start=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        num_computed=np.array([computed for computed, _, _, _ in rows], np.int32),
        sample=np.array([sample for _, _, _, sample in rows], np.bool_),
        num_draft=np.array([draft for _, _, draft, _ in rows], np.int32),
        changed_slots=slots,
    )


def test_entries_of_a_mixed_step() -> None:
    batch = batch_with(
        [
            (5, [10, 11, 12, 13], 2, True),  # two known tokens, two guesses
            (0, [1, 2, 3], 0, False),  # a chunk of a prompt
            (7, [4], 0, True),
            (30, [6, 7, 8, 9], 3, True),
        ]
    )
    entries = sampled_entries(batch)
    assert entries.rows.tolist() == [0, 0, 0, 2, 3, 3, 3, 3]
    assert entries.places.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert entries.tokens.tolist() == [1, 2, 3, 7, 8, 9, 10, 11]
    assert entries.positions.tolist() == [7, 8, 9, 8, 31, 32, 33, 34]
    assert (len(entries), entries.width) == (8, 4)
    assert guess_table(batch, entries.width).tolist() == [[12, 13, -1], [-1, -1, -1], [-1, -1, -1], [7, 8, 9]]
    assert guess_table(batch, 5).tolist() == [[12, 13, -1, -1], [-1] * 4, [-1] * 4, [7, 8, 9, -1]]


def test_without_guesses_the_last_token_of_a_row_counts() -> None:
    batch = batch_with([(0, [1, 2, 3], 0, True), (4, [5], 0, True), (0, [6, 7], 0, False)])
    entries = sampled_entries(batch)
    assert entries.tokens.tolist() == [2, 3]
    assert entries.positions.tolist() == [3, 5]
    assert entries.width == 1
    assert guess_table(batch, 1).shape == (3, 0)
    assert accept_guesses(torch.tensor([[4], [9], [-1]]), torch.from_numpy(guess_table(batch, 1))).tolist() == [[4], [9], [-1]]


@pytest.mark.parametrize(
    ("sampled", "guesses", "expected"),
    [
        ([7, 8, 9], [7, 8], [7, 8, 9]),  # all stand, and one more
        ([7, 8, 9], [7, 5], [7, 8, -1]),  # the second is corrected
        ([7, 8, 9], [5, 8], [7, -1, -1]),  # a guess behind a wrong one counts for nothing
        ([7, 8, 9], [7, -1], [7, 8, -1]),  # one guess only
        ([7, -1, -1], [-1, -1], [7, -1, -1]),
        ([-1, -1, 9], [-1, -1], [-1, -1, -1]),  # does not sample, whatever stands behind
    ],
)
def test_the_longest_right_prefix_stands(sampled: list[int], guesses: list[int], expected: list[int]) -> None:
    out = accept_guesses(torch.tensor([sampled]), torch.tensor([guesses], dtype=torch.int32))
    assert out.dtype == torch.int32
    assert out.tolist() == [expected]


@given(st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=5), st.booleans()), min_size=1, max_size=6), st.data())
def test_it_is_a_loop_over_rows(rows: list[tuple[list[int], bool]], data: st.DataObject) -> None:
    batch = batch_with([(3, [9, *guesses], len(guesses) if sample else 0, sample) for guesses, sample in rows])
    width = int(batch.num_draft.max()) + 1 + data.draw(st.integers(0, 2))
    sampled = np.array(
        data.draw(st.lists(st.lists(st.integers(0, 2), min_size=width, max_size=width), min_size=len(rows), max_size=len(rows)))
    )
    sampled[~batch.sample, 0] = -1
    expected = np.full((len(rows), width), -1)
    for row, (guesses, sample) in enumerate(rows):
        for place in range(len(guesses) + 1 if sample else 0):
            expected[row, place] = sampled[row, place]
            if place < len(guesses) and guesses[place] != sampled[row, place]:
                break
    out = accept_guesses(torch.from_numpy(sampled), torch.from_numpy(guess_table(batch, width)))
    np.testing.assert_array_equal(out.numpy(), expected)
