"""Which rows of a step have a prefix in common whose keys are better read once for all of them."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_model.kernels.shared_prefix import PREFIX_TILE
from vllm_traits.batch import Batch

SHARED_ROWS = 17
"""Least rows with a common prefix for which its keys are read apart."""
SHARED_TOKENS = 512
"""Least length of such a prefix."""


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """The shared prefix of a step's rows: a slot that has it, its tokens, and bool ``[rows]``, who has it."""

    leader: int
    length: int
    members: npt.NDArray[np.bool_]


class SharedPrefixes:
    """Finds it, and remembers it while the same rows run."""

    def __init__(self) -> None:
        self._key = b""
        self._found: SharedPrefix | None = None

    def forget(self) -> None:
        """A slot has another sequence."""
        self._key = b""

    def of(self, batch: Batch) -> SharedPrefix | None:
        """What most rows of a step of single tokens have in common, if it pays to read that apart."""
        slots, state = batch.slots, batch.state
        if len(slots) < SHARED_ROWS:
            return None
        key = slots.tobytes()
        if key != self._key:
            self._key, self._found = key, None
            blocks, counts = np.unique(state.block_tables[slots, 0], return_counts=True)
            if counts.max() >= max(SHARED_ROWS, len(slots) // 2):
                members = state.block_tables[slots, 0] == blocks[counts.argmax()]
                tables = state.block_tables[slots[members], : int((batch.num_computed[members] // state.block_size).min())]
                same = np.append((tables == tables[0]).all(axis=0), False)
                length = int(same.argmin()) * state.block_size // PREFIX_TILE * PREFIX_TILE
                if length >= SHARED_TOKENS:
                    self._found = SharedPrefix(int(slots[members][0]), length, members)
        return self._found
