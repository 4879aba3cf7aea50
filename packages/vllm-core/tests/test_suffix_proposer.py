"""What earlier requests said is found by later ones of the same root."""

import numpy as np

from vllm_core.proposer import DraftRows
from vllm_core.suffix_proposer import SuffixProposer
from vllm_traits.batch import BatchState
from vllm_traits.ids import SeqId, SlotId

ROOT, OTHER = b"root" * 8, b"else" * 8


def learn(proposer: SuffixProposer, tokens: list[int], root: bytes = ROOT) -> None:
    state = BatchState(1, 4096, 4)
    state.token_ids[0, : len(tokens)] = tokens
    state.num_tokens[0] = len(tokens)
    proposer.forget(state, SlotId(0), root)


def guess(proposer: SuffixProposer, tokens: list[int], wanted: int, root: bytes = ROOT) -> list[int]:
    state = BatchState(1, 4096, 4)
    state.token_ids[0, : len(tokens)] = tokens
    state.num_tokens[0] = len(tokens)
    rows = DraftRows(state, np.zeros(1, np.int32), (SeqId(1),), np.array([wanted], np.int32), [root], [[]])
    return proposer.propose(rows)[0]


def test_a_second_request_hears_the_first() -> None:
    proposer = SuffixProposer()
    assert guess(proposer, [1, 2, 3, 4], 3) == []
    learn(proposer, [9, 1, 2, 3, 4, 5, 6, 7])
    assert guess(proposer, [8, 8, 1, 2, 3, 4], 3) == [5, 6, 7]
    assert guess(proposer, [8, 8, 1, 2, 3, 4], 2) == [5, 6]
    assert guess(proposer, [3, 4], 2) == []
    assert guess(proposer, [4, 5, 6, 7], 2) == []


def test_another_salt_hears_nothing() -> None:
    proposer = SuffixProposer()
    learn(proposer, [1, 2, 3, 4, 5])
    learn(proposer, [9, 9, 9, 9, 9], OTHER)
    assert guess(proposer, [1, 2, 3, 4], 3, OTHER) == []
    assert guess(proposer, [1, 2, 3, 4], 3) == [5], "not what another said after it"


def test_the_ring_forgets_the_oldest_and_never_tells_a_mixture() -> None:
    proposer = SuffixProposer(order=2, bits=6)
    found = 0
    for i in range(50):
        tokens = [1000 + 40 * i + j for j in range(20)]
        learn(proposer, tokens)
        told = guess(proposer, tokens[:5], 40)
        assert told in ([], tokens[5:])  # two windows can fall on one place
        found += told != []
    assert found >= 40
    assert guess(proposer, [1000, 1001], 3) == []
    learn(proposer, list(range(100, 300)))  # longer than the ring: its end is kept
    assert any(guess(proposer, [i, i + 1], 3) == [i + 2, i + 3, i + 4] for i in range(280, 295))
    assert guess(proposer, [100, 101], 3) == []
