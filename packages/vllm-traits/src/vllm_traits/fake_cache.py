"""The fake backend's KV cache: it says for every position who wrote it, when, and after which prefix."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from vllm_traits.batch import Batch, LongArray
from vllm_traits.fake_model import EMPTY_TAG, mix, mix_array

Intp = npt.NDArray[np.intp]

NOBODY = -1
"""The writer of what was never written."""

SPOILT = -2
"""The tag of what a failed step wrote."""


class FakeKvCache:
    """Tagged entries.

    Args:
        num_blocks, block_size: Its shape.
        may_read: Called with ``(reader, writer, step)`` when a sequence reads what another wrote in that step; False makes it a
            violation. For what a backend cannot know: cache salts, resets.

    Attributes:
        tags, tokens, writers, positions, steps: int64 ``[num_blocks * block_size]``: the tag of the prefix that ends here, the
            token, the sequence that wrote it, at which position, in which step.
    """

    def __init__(self, num_blocks: int, block_size: int, may_read: Callable[[int, int, int], bool] | None = None) -> None:
        self.block_size = block_size
        self.may_read = may_read
        self.tags, self.tokens, self.writers, self.positions, self.steps = (
            np.full(num_blocks * block_size, NOBODY, np.int64) for _ in range(5)
        )

    def places(self, batch: Batch) -> tuple[Intp, Intp]:
        """Where the rows of a batch keep all their tokens, those of this step included.

        Returns:
            ``[total]``, the rows one after the other, each from position 0 to its end; and ``[num_rows + 1]``, where they
            start.
        """
        ends = (batch.num_computed + batch.query_lens).astype(np.intp)
        starts = np.concatenate([np.zeros(1, np.intp), np.cumsum(ends)])
        rows = np.repeat(np.arange(batch.num_rows), ends)
        positions = np.arange(starts[-1]) - starts[rows]
        blocks = batch.state.block_tables[batch.slots[rows], positions // self.block_size].astype(np.intp)
        return blocks * self.block_size + positions % self.block_size, starts

    def write(self, batch: Batch, tokens: list[list[int]], places: Intp, starts: Intp) -> None:
        """Write the tokens of every row (``LAST_SAMPLED`` replaced by now)."""
        # A row may follow on what another writes in this step: that one starts earlier, so it goes first.
        for row in np.argsort(batch.num_computed, kind="stable").tolist():
            first = int(batch.num_computed[row])
            mine = places[starts[row] : starts[row + 1]]
            tag = int(self.tags[mine[first - 1]]) if first else EMPTY_TAG
            tags = []
            for token in tokens[row]:
                tag = mix(tag, token)
                tags.append(tag)
            at = mine[first:]
            self.tags[at], self.tokens[at] = tags, tokens[row]
            self.writers[at], self.steps[at] = batch.seq_ids[row], batch.step_id
            self.positions[at] = np.arange(first, first + len(at))

    def spoil(self, places: Intp) -> None:
        """Make what is there unreadable: the step that wrote it has failed."""
        self.tags[places] = SPOILT

    def complaints(self, batch: Batch, places: Intp, starts: Intp) -> list[str]:
        """What is wrong with what the rows read: each position must hold the sequence's token, after all those before it."""
        tags, tokens, found = self.tags[places], self.tokens[places], list[str]()
        before = np.empty_like(tags)
        before[1:] = tags[:-1]
        before[starts[:-1]] = EMPTY_TAG
        rows = np.repeat(np.arange(batch.num_rows), np.diff(starts))
        positions, slots = np.arange(len(places)) - starts[rows], batch.slots[rows]
        known = positions < batch.state.num_tokens[slots]
        strange = known & (tokens != batch.state.token_ids[slots, positions])
        wrong = np.flatnonzero((mix_array(before, tokens) != tags) | strange)
        seen: set[int] = set()
        for index in wrong.tolist():
            row = int(rows[index])
            if row not in seen:  # all after the first is wrong by consequence
                seen.add(row)
                found.append(self._complaint(batch, row, index - int(starts[row]), int(places[index])))
        if self.may_read is not None:
            found += self._foreign(batch, rows, self.writers[places], self.steps[places])
        return found

    def _complaint(self, batch: Batch, row: int, position: int, place: int) -> str:
        block, writer = place // self.block_size, int(self.writers[place])
        where = (
            f"step {batch.step_id}, sequence {batch.seq_ids[row]}: block {block} holds another prefix at position {position}"
        )
        if writer == NOBODY:
            return f"{where}: nobody wrote it"
        failed = ", which failed" if self.tags[place] == SPOILT else ""
        return (
            f"{where}: sequence {writer} wrote token {self.tokens[place]} of its position {self.positions[place]} "
            f"in step {self.steps[place]}{failed}"
        )

    def _foreign(self, batch: Batch, rows: Intp, writers: LongArray, steps: LongArray) -> list[str]:
        assert self.may_read is not None
        readers = np.array(batch.seq_ids, np.int64)[rows]
        others = np.flatnonzero(readers != writers)
        triples = set(zip(readers[others].tolist(), writers[others].tolist(), steps[others].tolist(), strict=True))
        return [
            f"step {batch.step_id}: sequence {reader} reads what sequence {writer} wrote in step {step}, which it may not"
            for reader, writer, step in sorted(triples)
            if not self.may_read(reader, writer, step)
        ]
