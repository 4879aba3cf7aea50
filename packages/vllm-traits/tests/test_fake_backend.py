"""The fast mode of the fake backend: no cache, tokens of seed and position."""

import dataclasses

import numpy as np

from vllm_traits.batch import BatchState
from vllm_traits.conformance import batch_of
from vllm_traits.fake_backend import FakeBackend, fast_tokens


def test_fast_tokens_and_guesses() -> None:
    backend = FakeBackend(keep_kv=False, max_draft_tokens=3)
    state = BatchState(4, 64, 4)
    backend.initialize(state, num_blocks=1 << 40, max_num_batched_tokens=64)
    truth = fast_tokens(np.array([[7], [8]]), np.arange(5, 9), 256)
    state.seed[:2] = 7, 8
    state.num_tokens[:2] = 5
    batch = batch_of(state, [(0, 4), (1, 4)])
    assert backend.submit(batch).result().token_ids.tolist() == truth[:, :1].tolist()
    # Two guesses right and one wrong for the first, none for the second.
    guesses = [*truth[0, :2].tolist(), (int(truth[0, 2]) + 1) % 256]
    batch = dataclasses.replace(
        batch,
        token_ids=np.array([0, *guesses, 0], np.int32),
        query_start=np.array([0, 4, 5], np.int32),
        num_draft=np.array([3, 0], np.int32),
    )
    tokens = backend.submit(batch).result().token_ids
    assert tokens.tolist() == [[*truth[0, :3].tolist(), -1], [int(truth[1, 0]), -1, -1, -1]]
