"""Prompt lookup: what followed the last tokens when they stood in this sequence before.

Saxena, "Prompt Lookup Decoding", 2023; what vLLM calls ``ngram``.
"""

import numpy as np

from vllm_core.gram_table import GramTable
from vllm_core.proposer import DraftRows
from vllm_traits.batch import BatchState, IntArray, LongArray
from vllm_traits.ids import SlotId


class NgramProposer:
    """Looks for the longest of ``prompt_lookup_max`` to ``prompt_lookup_min`` last tokens.

    Args:
        max_num_seqs: Slots.
        prompt_lookup_min, prompt_lookup_max: Tokens that must agree.
        bits: The tables have ``2**bits`` places each, for all sequences together.
    """

    name = "ngram"

    def __init__(self, max_num_seqs: int, prompt_lookup_min: int, prompt_lookup_max: int, bits: int = 18) -> None:
        self._tables = [GramTable(order, bits) for order in range(prompt_lookup_max, prompt_lookup_min - 1, -1)]
        self._indexed: LongArray = np.zeros(max_num_seqs, np.int64)  # by slot, tokens whose windows are noted

    def propose(self, rows: DraftRows) -> list[list[int]]:
        state = rows.state
        guesses = []
        for slot, seq_id, wanted in zip(rows.slots.tolist(), rows.seq_ids, rows.num_wanted.tolist(), strict=True):
            tokens = state.token_ids[slot, : state.num_tokens[slot]]
            self._index(slot, tokens, seq_id)
            guesses.append(self._guess(tokens, seq_id, wanted))
        return guesses

    def forget(self, state: BatchState, slot: SlotId, root: bytes) -> None:
        self._indexed[slot] = 0

    def close(self) -> None:
        self._tables.clear()

    def _index(self, slot: int, tokens: IntArray, salt: int) -> None:
        """Note the windows that another token follows, all but the last."""
        done, known = int(self._indexed[slot]), len(tokens)
        for table in self._tables:
            start = max(0, done - table.order)  # the window before the last noted token ended there
            table.insert(tokens[start : known - 1], start + table.order, salt)
        self._indexed[slot] = known

    def _guess(self, tokens: IntArray, salt: int, wanted: int) -> list[int]:
        known = len(tokens)
        for table in self._tables:
            if known <= table.order:
                continue
            tail = tokens[known - table.order :]
            place = table.find(tail.tolist(), salt)
            if place is not None and table.order <= place < known and (tokens[place - table.order : place] == tail).all():
                # What comes after the end is taken to repeat what came since.
                return list(map(int, tokens[place + np.arange(wanted) % (known - place)]))
        return []
