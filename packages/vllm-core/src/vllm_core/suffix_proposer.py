"""What followed the last tokens in an earlier request.

Sequences that have left the engine stand one after the other in a ring. The idea is that of suffix decoding (Oliaro et al.
2024): agents and pipelines say the same again and again.
"""

import numpy as np

from vllm_core.gram_table import GramTable
from vllm_core.proposer import DraftRows
from vllm_traits.batch import BatchState, IntArray, LongArray
from vllm_traits.ids import SlotId


class SuffixProposer:
    """Learns from every sequence that leaves, for those with the same root.

    Args:
        order: Last tokens that must agree.
        bits: It remembers the last ``2**bits`` tokens, in some 50 bytes each.
    """

    name = "suffix"

    def __init__(self, order: int = 4, bits: int = 18) -> None:
        self._table = GramTable(order, bits + 2)
        self._tokens: IntArray = np.zeros(1 << bits, np.int32)
        self._salts: LongArray = np.zeros(1 << bits, np.int64)
        self._sequences: LongArray = np.zeros(1 << bits, np.int64)  # counted from 1
        self._num_sequences = 0
        self._end = 0

    def propose(self, rows: DraftRows) -> list[list[int]]:
        state, order = rows.state, self._table.order
        guesses = []
        for slot, root, wanted in zip(rows.slots.tolist(), rows.roots, rows.num_wanted.tolist(), strict=True):
            known = int(state.num_tokens[slot])
            guesses.append(self._guess(state.token_ids[slot, max(0, known - order) : known], _salt(root), wanted))
        return guesses

    def forget(self, state: BatchState, slot: SlotId, root: bytes) -> None:
        tokens = state.token_ids[slot, : state.num_tokens[slot]][-len(self._tokens) :]
        if self._end + len(tokens) > len(self._tokens):
            self._end = 0
        place, salt = self._end, _salt(root)
        self._num_sequences += 1
        self._sequences[place : place + len(tokens)] = self._num_sequences
        self._tokens[place : place + len(tokens)] = tokens
        self._salts[place : place + len(tokens)] = salt
        self._table.insert(tokens[:-1], place + self._table.order, salt)
        self._end = place + len(tokens)

    def close(self) -> None:
        self._end = 0

    def _guess(self, tail: IntArray, salt: int, wanted: int) -> list[int]:
        order = self._table.order
        if len(tail) < order:
            return []
        place = self._table.find(tail.tolist(), salt)
        if place is None or not (self._tokens[place - order : place] == tail).all():
            return []
        follow = slice(place - order, place + wanted)
        own = self._sequences[follow] == self._sequences[place]
        if not own[:order].all() or self._salts[place] != salt:
            return []  # partly overwritten, or of another root
        length = len(own) if own.all() else int(own.argmin())
        return list(map(int, self._tokens[place : place - order + length]))


def _salt(root: bytes) -> int:
    return int.from_bytes(root[:8], "little") >> 1  # 63 bits
