"""A smaller model that says what it would say next.

It has a KV cache of its own under the target's block tables: block 7 holds the same tokens in both. A sequence is three lengths
here too; what the draft has computed follows behind the target and catches up when guesses are wanted::

    draft KV   0 ........ computed | ......... known | g1 ... gk
               kept from last time | runs now        | each runs to give the next

The draft samples with the request's own parameters and noise, so it guesses what the target would draw and not only what is
likely (Daliri, Musco, Suresh 2024).
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from vllm_core.proposer import DraftRows
from vllm_traits.backend import ModelBackend
from vllm_traits.batch import Batch, BatchState, BoolArray, IntArray, LongArray
from vllm_traits.errors import BackendError
from vllm_traits.ids import BlockId, SlotId, StepId


@dataclass(slots=True)
class _Drafted:
    """What the draft's cache holds of a sequence: ``computed`` known tokens, then those that it ``ran`` as guesses."""

    computed: int = 0
    num_recorded: int = 0
    ran: list[int] = field(default_factory=list)


class DraftModelProposer:
    """Runs a draft model behind the sequences.

    Args:
        model: The draft; it is initialized here and closed with the proposer.
        state: The engine's rows.
        num_blocks: Of the KV cache, as the target's.
        max_num_batched_tokens: Tokens of one of its steps; a call catches up by at most as many.
    """

    name = "draft_model"

    def __init__(self, model: ModelBackend, state: BatchState, *, num_blocks: int, max_num_batched_tokens: int) -> None:
        self.model = model
        # The same arrays, but parameters that ask for no log-probabilities, and guesses are known tokens here.
        self._state = copy.copy(state)
        self._state.params = [None] * state.max_num_seqs
        self._state.num_tokens = state.num_tokens.copy()
        self._max_num_batched_tokens = max_num_batched_tokens
        self._changes: dict[str, None] = {"logprobs": None, "prompt_logprobs": None}
        if not model.spec.supports_structured_outputs:
            self._changes["structured_outputs"] = None  # then it guesses freely
        self._drafted: dict[int, _Drafted] = {}
        self._holds: dict[BlockId, bytes] = {}  # prefix keys of blocks that are full and right in the draft's cache
        self._num_steps = 0
        model.initialize(self._state, num_blocks=num_blocks, max_num_batched_tokens=max_num_batched_tokens)

    def propose(self, rows: DraftRows) -> list[list[int]]:
        try:
            return self._propose(rows)
        except Exception:
            # Nothing that the step wrote may be relied on, and others count on its blocks.
            self._drafted.clear()
            self._holds.clear()
            raise

    def forget(self, state: BatchState, slot: SlotId, root: bytes) -> None:
        self._drafted.pop(slot, None)
        self._state.params[slot] = None

    def close(self) -> None:
        self.model.close()

    def _propose(self, rows: DraftRows) -> list[list[int]]:
        state, slots = self._state, rows.slots
        changed = [slot for slot in slots.tolist() if slot not in self._drafted]
        for slot in changed:
            params = rows.state.params[slot]
            assert params is not None
            state.params[slot] = msgspec.structs.replace(params, **self._changes)
        known = state.num_tokens[slots] = rows.state.num_tokens[slots]
        drafted = [self._roll_back(rows, row) for row in range(len(slots))]
        computed = np.array([each.computed for each in drafted], np.int32)
        behind = known - computed
        lens = np.clip(self._max_num_batched_tokens - (np.cumsum(behind) - behind), 0, behind)
        self._let_one_write(rows, computed, lens)
        ready = lens == behind  # who has caught up is sampled
        running = np.flatnonzero(lens > 0)
        for row in running.tolist():
            end = -(-int(known[row] + rows.num_wanted[row]) // state.block_size)
            for block in state.block_tables[slots[row], drafted[row].num_recorded : end].tolist():
                self._holds.pop(block, None)  # it had another life
        tokens = self._run(rows, running, computed, lens, ready, changed)
        for row in running.tolist():
            drafted[row].computed += int(lens[row])
            self._record(drafted[row], int(slots[row]), rows.keys[row])
        guesses: list[list[int]] = [[] for _ in drafted]
        rows_left = np.flatnonzero(ready)
        tokens = tokens[ready[running]]
        while len(rows_left):
            for row, token in zip(rows_left.tolist(), tokens.tolist(), strict=True):
                # The guess runs from here, and penalties find it here.
                state.token_ids[slots[row], known[row] + len(guesses[row])] = token
                state.num_tokens[slots[row]] += 1
                guesses[row].append(token)
            rows_left = np.array([row for row in rows_left.tolist() if len(guesses[row]) < rows.num_wanted[row]], np.int64)
            if len(rows_left):
                for row in rows_left.tolist():
                    drafted[row].ran.append(guesses[row][-1])
                places = known + np.array([len(guess) - 1 for guess in guesses], np.int32)
                one = np.ones(len(slots), np.int32)
                tokens = self._run(rows, rows_left, places, one, one.astype(np.bool_), [])
        return guesses

    def _roll_back(self, rows: DraftRows, row: int) -> _Drafted:
        """What is right in the draft's cache, short of the last known token, which must run to say what comes next."""
        state, keys = self._state, rows.keys[row]
        slot, size = int(rows.slots[row]), state.block_size
        known, table = int(state.num_tokens[slot]), state.block_tables[slot]
        drafted = self._drafted.setdefault(slot, _Drafted())
        for token in drafted.ran:
            if drafted.computed >= known or state.token_ids[slot, drafted.computed] != token:
                break
            drafted.computed += 1
        drafted.ran = []
        self._record(drafted, slot, keys)
        block = drafted.num_recorded
        while block < min(len(keys), known // size):  # the rest of a block that it has begun, too
            if self._holds.get(BlockId(int(table[block]))) != keys[block]:  # not what another sequence computed there
                break
            block += 1
            drafted.computed, drafted.num_recorded = block * size, block
        drafted.computed = min(drafted.computed, known - 1)
        return drafted

    def _record(self, drafted: _Drafted, slot: int, keys: Sequence[bytes]) -> None:
        """Let sequences that share its blocks know which are full and right here."""
        table = self._state.block_tables[slot]
        full = min(drafted.computed // self._state.block_size, len(keys))
        for i in range(drafted.num_recorded, full):
            self._holds[BlockId(int(table[i]))] = keys[i]
        drafted.num_recorded = max(drafted.num_recorded, full)

    def _let_one_write(self, rows: DraftRows, computed: IntArray, lens: IntArray) -> None:
        """Of sequences that share a block which none of them has computed here, the first does; the others wait, ``lens`` 0."""
        size, taken = self._state.block_size, set[int]()
        for row, (start, count) in enumerate(zip(computed.tolist(), lens.tolist(), strict=True)):
            blocks = self._state.block_tables[rows.slots[row], start // size : -(-(start + count) // size)].tolist()
            if taken.isdisjoint(blocks):
                taken.update(blocks)
            else:
                lens[row] = 0

    def _run(
        self,
        rows: DraftRows,
        which: LongArray,
        computed: IntArray,
        lens: IntArray,
        sample: BoolArray,
        changed: Sequence[int],
    ) -> IntArray:
        """One step of the draft: for each of the rows ``which`` the ``lens`` tokens from ``computed`` on.

        Returns:
            int32 ``[len(which)]``, what was sampled, -1 where nothing was to be.

        Raises:
            BackendError: The output does not fit the batch.
        """
        state, slots = self._state, rows.slots[which]
        starts, counts = computed[which], lens[which]
        self._num_steps += 1
        batch = Batch(
            step_id=StepId(self._num_steps),
            state=state,
            slots=slots,
            seq_ids=tuple([rows.seq_ids[row] for row in which.tolist()]),
            token_ids=np.concatenate(
                [
                    state.token_ids[slot, start : start + count]
                    for slot, start, count in zip(slots.tolist(), starts.tolist(), counts.tolist(), strict=True)
                ]
            ),
            query_start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
            num_computed=starts,
            sample=sample[which],
            num_draft=np.zeros(len(which), np.int32),
            changed_slots=np.array(changed, np.int32),
        )
        tokens = self.model.submit(batch).result().token_ids
        if tokens.ndim != 2 or len(tokens) != len(which):
            raise BackendError(f"the draft returned tokens of shape {tokens.shape} for {len(which)} rows")
        sampled = tokens[batch.sample, 0]
        if len(sampled) and not (int(sampled.min()) >= 0 and int(sampled.max()) < self.model.spec.vocab_size):
            raise BackendError("the draft returned a token outside its vocabulary")  # it would run it in its next step
        return tokens[:, 0]
