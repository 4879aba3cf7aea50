"""Slots: what changes in every step of a running sequence, in arrays, and the fence behind those that left.

A slot's lengths, with one sampled token on its way (``pending`` 1)::

    0 ........ committed | ..... computed      | num_tokens + pending ........ limit
    KV written by steps  | KV written by steps | to be run                    | ends here
    that are done        | under way           |

With guesses under way ``computed`` runs ahead of the known tokens, and comes back to what was right when they are committed.
"""

from collections import deque

import msgspec
import numpy as np

from vllm_core.block_pool import BlockPool
from vllm_core.prefix_cache import extend_keys
from vllm_core.sequence import Sequence
from vllm_traits.batch import BatchState, BoolArray, IntArray, LongArray
from vllm_traits.ids import BlockId, SlotId, StepId

COPIED = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
"""Parameters that stand in the state under their own names."""


class SlotTable:
    """The rows of running sequences.

    Args:
        state: What the backend sees of them.
        pool: Where their blocks come from and go to.

    Attributes:
        computed, committed: int32 ``[max_num_seqs]``, tokens in the KV cache, with and without steps under way.
        pending: int32, steps under way that sample for the slot.
        guessed: int32, guesses under way.
        limits: int32, length in tokens at which the sequence ends.
        registered: int32, blocks that the prefix cache knows or knew.
        epochs: int64, changes whenever the slot is left: a result from an older epoch is void.
        waits: bool, its token must be known before it runs again (a grammar).
        heeds_eos, has_own_stops: bool, which tokens can end it.
        last_token_time: float64, on the engine's clock.
    """

    def __init__(self, state: BatchState, pool: BlockPool) -> None:
        num = state.max_num_seqs
        self.state, self.pool = state, pool
        self.sequences: list[Sequence | None] = [None] * num
        self.computed: IntArray = np.zeros(num, np.int32)
        self.committed: IntArray = np.zeros(num, np.int32)
        self.pending: IntArray = np.zeros(num, np.int32)
        self.guessed: IntArray = np.zeros(num, np.int32)
        self.limits: IntArray = np.zeros(num, np.int32)
        self.registered: IntArray = np.zeros(num, np.int32)
        self.epochs: LongArray = np.zeros(num, np.int64)
        self.waits: BoolArray = np.zeros(num, np.bool_)
        self.heeds_eos: BoolArray = np.zeros(num, np.bool_)
        self.has_own_stops: BoolArray = np.zeros(num, np.bool_)
        self.last_token_time = np.zeros(num, np.float64)
        self.free = [SlotId(slot) for slot in reversed(range(num))]
        self.changed: list[int] = []
        self.fenced: deque[tuple[StepId, list[BlockId], SlotId]] = deque()
        self._completed = StepId(0)

    def enter(self, sequence: Sequence, hits: list[BlockId], need: int) -> SlotId:
        """Give a sequence a slot, its cached blocks and ``need`` new ones; both must be there."""
        slot = sequence.slot = self.free.pop()
        state, params = self.state, sequence.params
        num_prompt, known = len(sequence.prompt), sequence.num_tokens
        for block in hits:
            self.pool.hold(block)
        sequence.blocks = list(hits)
        state.block_tables[slot, : len(hits)] = hits
        self.grow(sequence, need)
        state.token_ids[slot, :num_prompt] = sequence.prompt
        state.token_ids[slot, num_prompt:known] = sequence.completion.token_ids
        state.num_tokens[slot], state.num_prompt_tokens[slot] = known, num_prompt
        for name in COPIED:
            getattr(state, name)[slot] = getattr(params, name)
        state.top_k[slot] = max(params.top_k, 0)
        state.seed[slot] = sequence.seed
        # The prompt is the same for every choice: the first reports on it.
        own = params if sequence.completion.index == 0 else msgspec.structs.replace(params, prompt_logprobs=None)
        state.params[slot] = own
        state.stop_token_ids[slot] = sequence.stop_token_ids
        self.sequences[slot] = sequence
        self.computed[slot] = self.committed[slot] = len(hits) * state.block_size
        self.pending[slot] = self.guessed[slot] = 0
        self.limits[slot] = sequence.limit
        self.registered[slot] = sequence.num_registered = len(hits)
        self.last_token_time[slot] = sequence.last_token_time
        self.waits[slot] = params.structured_outputs is not None
        self.heeds_eos[slot] = not params.ignore_eos
        self.has_own_stops[slot] = bool(params.stop_token_ids)
        self.changed.append(slot)
        return slot

    def grow(self, sequence: Sequence, need: int) -> None:
        """``need`` blocks more, which must be free. A table only grows while its sequence runs."""
        slot, blocks = sequence.slot, sequence.blocks
        assert slot is not None
        table = self.state.block_tables[slot]
        for _ in range(need):
            block = self.pool.allocate()
            assert block is not None
            table[len(blocks)] = block
            blocks.append(block)
        self.state.num_blocks[slot] = len(blocks)

    def leave(self, sequence: Sequence, last_step: StepId) -> None:
        """Take a sequence out. Steps up to ``last_step`` may still name its slot and blocks, so these wait for them."""
        slot = sequence.slot
        assert slot is not None
        self.epochs[slot] += 1
        sequence.last_token_time = float(self.last_token_time[slot])
        self.sequences[slot] = None
        self.state.params[slot] = None
        self.fenced.append((last_step, sequence.blocks[::-1], slot))
        sequence.blocks, sequence.slot = [], None
        self._release()

    def complete(self, step_id: StepId) -> None:
        """All steps up to this one are done."""
        self._completed = step_id
        self._release()

    def _release(self) -> None:
        while self.fenced and self.fenced[0][0] <= self._completed:
            _, blocks, slot = self.fenced.popleft()
            self.pool.release(blocks)
            self.free.append(slot)

    def check_integrity(self, running: list[Sequence]) -> None:
        """Prove the invariants of the rows.

        Raises:
            AssertionError: One does not hold; the message says which.
        """
        self.pool.check_integrity([*(s.blocks for s in running), *(blocks for _, blocks, _ in self.fenced)])
        slots = [int(s.slot) for s in running if s.slot is not None]
        every = sorted([*slots, *(slot for _, _, slot in self.fenced), *self.free])
        assert every == list(range(self.state.max_num_seqs)), f"a slot is lost or taken twice: {every}"
        for sequence in running:
            assert sequence.slot is not None
            assert self.sequences[sequence.slot] is sequence
            self._check_lengths(sequence, sequence.slot)
            self._check_blocks(sequence, sequence.slot)

    def _check_lengths(self, sequence: Sequence, slot: SlotId) -> None:
        known, pending = int(self.state.num_tokens[slot]), int(self.pending[slot])
        computed, committed = int(self.computed[slot]), int(self.committed[slot])
        guessed = int(self.guessed[slot])
        assert known == sequence.num_tokens < sequence.limit
        assert 0 <= pending <= 2, f"{pending} steps under way sample for one slot"
        assert known + max(pending, guessed + (guessed > 0)) <= sequence.limit, "more is under way than the sequence may hold"
        assert 0 <= committed <= computed
        if guessed:
            assert (computed, pending) == (known + guessed, 1), "guesses are not all that is under way"
        else:
            assert computed <= known + pending - 1, "computed passes the known tokens"
        assert committed < known, "the last known token cannot have run"
        tokens = [*sequence.prompt.tolist(), *sequence.completion.token_ids]
        assert self.state.token_ids[slot, :known].tolist() == tokens

    def _check_blocks(self, sequence: Sequence, slot: SlotId) -> None:
        size, committed = self.state.block_size, int(self.committed[slot])
        assert len(sequence.blocks) * size >= self.computed[slot], "computed tokens without a block"
        assert self.state.block_tables[slot, : len(sequence.blocks)].tolist() == sequence.blocks
        assert self.state.num_blocks[slot] == len(sequence.blocks)
        assert self.registered[slot] == sequence.num_registered
        assert sequence.num_registered * size <= committed, "a block is known before it is computed"
        keys: list[bytes] = []
        extend_keys(keys, sequence.root, self.state.token_ids[slot, : sequence.num_registered * size], size)
        assert sequence.keys[: sequence.num_registered] == keys, "keys of other tokens or of another salt"
        for i, block in enumerate(sequence.blocks):
            if self.pool.num_holders(block) > 1:
                assert (i + 1) * size <= committed, f"block {block} is shared and still written"
            key = self.pool.key_of(block)
            assert key is None or (i < sequence.num_registered and key == sequence.keys[i]), "a block has another's key"
