"""What runs in the next step.

Every step moves ``num_computed`` of running sequences toward the tokens they have, under one token budget. There is no prefill
and no decode: a sequence with one token to run is a row of one token. Rows of one token come first, so a long prompt never
stalls them; what is left of the budget goes to prompts in order, then to sequences that wait.

A slot's lengths, with one sampled token on its way (``pending`` 1)::

    0 ........ committed | ..... num_computed | num_tokens + pending ........ limit
    KV written by steps  | KV written by steps | to be run                    | ends here
    that are done        | under way           |
"""

from bisect import insort
from collections import deque
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import cast

import msgspec
import numpy as np

from vllm_core.block_pool import BlockPool
from vllm_core.engine_config import EngineConfig
from vllm_core.prefix_cache import PrefixCacheStats, extend_keys
from vllm_core.sequence import Sequence, Status
from vllm_traits.batch import LAST_SAMPLED, Batch, BatchOutput, BatchState, BoolArray, IntArray, LongArray, TokenLogprobs
from vllm_traits.ids import BlockId, SlotId, StepId

ALONE_AFTER = 2
"""Failed steps after which a sequence runs alone, to find out whether it is the cause."""


STEPS_TO_ONE_MORE = 64
"""Steps that must succeed after the device was out of memory before one more sequence may run."""


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """A batch, and what is needed to take its result in.

    Attributes:
        lens: int32 ``[num_rows]``, tokens that each row runs.
        epochs: int64 ``[num_rows]``: a row whose slot has another epoch by now is void.
    """

    batch: Batch
    lens: IntArray
    epochs: LongArray


@dataclass(frozen=True, slots=True)
class Committed:
    """What a step brought.

    Attributes:
        sequences: Those that have a token more; the ended ones are taken out already.
        slots: int32 ``[len(sequences)]``, where they ran.
        is_first: bool ``[len(sequences)]``: the token is the sequence's first.
    """

    sequences: list[Sequence]
    slots: IntArray
    is_first: BoolArray


class Scheduler:
    """Owns all sequences, their slots and their blocks.

    Args:
        config: Limits and policy.
        max_model_len: Longest sequence.
        num_blocks: KV blocks.
        eos_token_ids: The model's.
    """

    def __init__(self, config: EngineConfig, *, max_model_len: int, num_blocks: int, eos_token_ids: tuple[int, ...]) -> None:
        self.config = config
        self.pool = BlockPool(num_blocks)
        self.state = BatchState(config.max_num_seqs, max_model_len, config.block_size)
        self.running: list[Sequence] = []  # by key
        self.num_waiting = 0
        self.cache_stats = PrefixCacheStats()
        self.num_preemptions = 0
        self.last_admitted: list[Sequence] = []
        self._waiting: list[Sequence] = []  # a heap by key; aborted ones are dropped when they come up
        self._parked: dict[bytes, list[Sequence]] = {}  # by the prefix key that they wait for
        self._computing: dict[bytes, Sequence] = {}  # prefix keys that a running sequence is going to register
        self._most_running = config.max_num_seqs
        self._steps_at_most = 0
        self._blocked: tuple[Sequence, int] | None = None  # the head of the queue, and the free blocks that were too few
        self._free_slots = [SlotId(slot) for slot in reversed(range(config.max_num_seqs))]
        self._fenced: deque[tuple[StepId, list[BlockId], SlotId]] = deque()
        self._last_step = StepId(0)
        self._completed_step = StepId(0)
        self._changed: list[int] = []
        self._running_slots: IntArray | None = None
        self._eos = np.array(sorted(eos_token_ids), np.int32)
        self._eos_set = frozenset(eos_token_ids)
        num = config.max_num_seqs
        self._by_slot: list[Sequence | None] = [None] * num
        self._computed = np.zeros(num, np.int32)
        self._committed = np.zeros(num, np.int32)
        self._registered = np.zeros(num, np.int32)
        self._pending = np.zeros(num, np.int32)
        self._limits = np.zeros(num, np.int32)
        self._epochs = np.zeros(num, np.int64)
        self._heeds_eos = np.zeros(num, np.bool_)
        self._has_own_stops = np.zeros(num, np.bool_)

    # --- from outside ---

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        if self.config.enable_prefix_caching:
            extend_keys(sequence.keys, sequence.root, sequence.prompt, self.config.block_size)
        sequence.status = Status.WAITING
        self.num_waiting += 1
        heappush(self._waiting, sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is; idempotent. Its blocks and slot are free once no step names them."""
        if sequence.status is Status.RUNNING:
            self._leave(sequence)
        elif sequence.status in (Status.WAITING, Status.PARKED):
            self.num_waiting -= 1
            if self._blocked is not None and self._blocked[0] is sequence:
                self._blocked = None
        sequence.status = Status.FINISHED

    def has_work(self) -> bool:
        """Whether a sequence waits or runs."""
        return bool(self.running) or self.num_waiting > 0

    def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix; False, and nothing is done, while a sequence runs."""
        if self.running or self._fenced:
            return False
        self.pool.reset_cache()
        return True

    # --- a step ---

    def schedule(self) -> ScheduledStep | None:
        """The next step, None if nothing can run now."""
        self.last_admitted = []
        preemptions = self.num_preemptions
        slots, lens = self._plan_running()
        if self.num_waiting and self.num_preemptions == preemptions:
            new_slots, new_lens = self._admit(self.config.max_num_batched_tokens - int(lens.sum()))
            if new_slots:
                slots = np.concatenate([slots, np.array(new_slots, np.int32)])
                lens = np.concatenate([lens, np.array(new_lens, np.int32)])
        if len(slots) == 0:
            return None
        return self._build(slots, lens)

    def commit(self, step: ScheduledStep, output: BatchOutput) -> Committed:
        """Take in what a step gave. Steps are committed in the order in which they were scheduled."""
        batch, state = step.batch, self.state
        self._complete(batch.step_id)
        if self._most_running < self.config.max_num_seqs:
            self._steps_at_most += 1
            if self._steps_at_most == STEPS_TO_ONE_MORE:
                self._most_running, self._steps_at_most = self._most_running + 1, 0
        alive = self._epochs[batch.slots] == step.epochs
        slots = batch.slots[alive]
        self._committed[slots] = (batch.num_computed + step.lens)[alive]
        if output.prompt_logprobs:
            self._take_prompt_logprobs(batch, alive, output)
        rows = np.flatnonzero(alive & batch.sample)
        tokens, at = output.token_ids[rows, 0], batch.slots[rows]
        lengths = state.num_tokens[at]
        state.token_ids[at, lengths] = tokens
        state.num_tokens[at] = lengths + 1
        self._pending[at] -= 1
        by_slot = cast("list[Sequence]", self._by_slot)  # the slots of rows that are alive have one
        advanced = [by_slot[slot] for slot in at.tolist()]
        for sequence, token in zip(advanced, tokens.tolist(), strict=True):
            sequence.completion.token_ids.append(token)
        if output.logprobs:
            for row, sequence in zip(rows.tolist(), advanced, strict=True):
                if row in output.logprobs:
                    _add_logprobs(sequence, output.logprobs[row])
        if self.config.enable_prefix_caching:
            self._register(slots)
        ended = lengths + 1 >= self._limits[at]
        if len(self._eos):
            ended |= (tokens[:, None] == self._eos).any(axis=1) & self._heeds_eos[at]
        ended |= self._has_own_stops[at]
        for row in np.flatnonzero(ended).tolist():
            self._maybe_end(advanced[row], int(tokens[row]))
        return Committed(advanced, at, lengths == state.num_prompt_tokens[at])

    def rewind(self, steps: list[ScheduledStep]) -> list[Sequence]:
        """Undo steps that failed: what they were to compute will run again. They must be all that is under way.

        Returns:
            The sequences that were in the first of them.
        """
        failed: list[Sequence] = []
        for step in reversed(steps):
            batch = step.batch
            for row, slot in enumerate(batch.slots.tolist()):
                sequence = self._by_slot[slot]
                if sequence is None or self._epochs[slot] != step.epochs[row]:
                    continue
                self._computed[slot] = batch.num_computed[row]
                self._pending[slot] -= int(batch.sample[row])
                sequence.failed_at = max(sequence.failed_at, int(batch.num_computed[row] + step.lens[row]))
                if step is steps[0]:
                    failed.append(sequence)
        self._complete(self._last_step)
        return failed

    def got_past_failure(self, sequence: Sequence) -> bool:
        """Whether a sequence has computed what it once failed on."""
        return sequence.slot is not None and int(self._committed[sequence.slot]) >= sequence.failed_at

    def give_way(self) -> None:
        """The device is out of memory: the later half of the running sequences waits, and few are let in for a while."""
        keep = max(1, len(self.running) // 2)
        for sequence in self.running[keep:]:
            self.preempt(sequence)
        self._most_running, self._steps_at_most = keep, 0

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks and slot, and queue it again."""
        self._leave(sequence)
        sequence.status = Status.WAITING
        self.num_waiting += 1
        self.num_preemptions += 1
        sequence.request.output.metrics.num_preemptions += 1
        heappush(self._waiting, sequence)

    # --- planning ---

    def _plan_running(self) -> tuple[IntArray, IntArray]:
        """Slots and how many tokens each runs, with blocks for them."""
        if self._running_slots is None:
            self._running_slots = np.array([sequence.slot for sequence in self.running], np.int32)
        slots = self._running_slots
        known = self.state.num_tokens[slots] + self._pending[slots]
        computed = self._computed[slots]
        lens = known - computed
        lens[known >= self._limits[slots]] = 0  # its last token is on the way
        if (lens > 1).any():
            self._share_budget(lens)
        missing = -(-(computed + lens) // self.config.block_size) - self.state.num_blocks[slots]
        rows = np.flatnonzero((missing > 0) & (lens > 0))
        if len(rows):
            self._take_blocks(rows, missing, lens)
        keep = lens > 0
        return (slots, lens) if keep.all() else (slots[keep], lens[keep])

    def _share_budget(self, lens: IntArray) -> None:
        """Rows of one token first, then the others in order."""
        budget = self.config.max_num_batched_tokens - int(np.count_nonzero(lens == 1))
        most = self.config.long_prefill_token_threshold or budget
        for row in np.flatnonzero(lens > 1).tolist():
            lens[row] = min(int(lens[row]), budget, most)
            budget -= int(lens[row])

    def _take_blocks(self, rows: IntArray | LongArray, missing: IntArray, lens: IntArray) -> None:
        """Blocks for these rows, in order; who comes last gives way."""
        for row in rows.tolist():
            if row >= len(self.running):
                break  # preempted below, as are all after it
            sequence, need = self.running[row], int(missing[row])
            while self.pool.num_free < need and lens[row]:
                if self._fenced:
                    lens[row] = 0  # blocks come back when the steps under way are done: sit this one out
                else:
                    lens[len(self.running) - 1] = 0
                    self.preempt(self.running[-1])
            if lens[row]:
                self._grow(sequence, need)

    def _grow(self, sequence: Sequence, need: int) -> None:
        assert sequence.slot is not None
        for _ in range(need):
            block = self.pool.allocate()
            assert block is not None
            self.state.block_tables[sequence.slot, len(sequence.blocks)] = block
            sequence.blocks.append(block)
        self.state.num_blocks[sequence.slot] = len(sequence.blocks)

    # --- admission ---

    def _admit(self, budget: int) -> tuple[list[int], list[int]]:
        """Take waiting sequences in, in order, while there is budget, a slot, and room for all their known tokens."""
        slots: list[int] = []
        lens: list[int] = []
        while budget > 0 and self._free_slots and self._waiting and len(self.running) < self._most_running:
            sequence = self._waiting[0]
            if sequence.status is not Status.WAITING:
                heappop(self._waiting)
                continue
            if self.running and (sequence.num_failures >= ALONE_AFTER or self.running[0].num_failures >= ALONE_AFTER):
                break
            if self._blocked is not None and self._blocked[0] is sequence and self.pool.num_free <= self._blocked[1]:
                break
            hits, awaited = self._match(sequence)
            if awaited is not None:
                heappop(self._waiting)
                sequence.status = Status.PARKED
                self._parked.setdefault(awaited, []).append(sequence)
                continue
            need = -(-sequence.num_tokens // self.config.block_size) - len(hits)
            if need + sum(map(self.pool.is_free, hits)) > self.pool.num_free:
                self._blocked = (sequence, self.pool.num_free)
                break
            heappop(self._waiting)
            self._enter(sequence, hits, need)
            cached = len(hits) * self.config.block_size
            chunk = min(sequence.num_tokens - cached, budget, self.config.long_prefill_token_threshold or budget)
            assert sequence.slot is not None
            slots.append(sequence.slot)
            lens.append(chunk)
            budget -= chunk
        return slots, lens

    def _match(self, sequence: Sequence) -> tuple[list[BlockId], bytes | None]:
        """The cached blocks of its prefix, and the key of the block after them if another sequence is computing that."""
        if not self.config.enable_prefix_caching or sequence.params.prompt_logprobs is not None:
            return [], None
        hits: list[BlockId] = []
        # At least one token must run, to give logits.
        for key in sequence.keys[: (sequence.num_tokens - 1) // self.config.block_size]:
            block = self.pool.lookup(key)
            if block is None:
                return hits, key if key in self._computing else None
            hits.append(block)
        return hits, None

    def _enter(self, sequence: Sequence, hits: list[BlockId], need: int) -> None:
        """Give a waiting sequence a slot, its cached blocks and ``need`` new ones."""
        slot = sequence.slot = self._free_slots.pop()
        state, params = self.state, sequence.params
        known, cached = sequence.num_tokens, len(hits) * self.config.block_size
        for block in hits:
            self.pool.hold(block)
        sequence.blocks = list(hits)
        state.block_tables[slot, : len(hits)] = hits
        self._grow(sequence, need)
        num_prompt = len(sequence.prompt)
        state.token_ids[slot, :num_prompt] = sequence.prompt
        state.token_ids[slot, num_prompt:known] = sequence.completion.token_ids
        state.num_tokens[slot], state.num_prompt_tokens[slot] = known, num_prompt
        for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
            getattr(state, name)[slot] = getattr(params, name)
        state.top_k[slot] = max(params.top_k, 0)
        state.seed[slot] = sequence.seed
        # The prompt is the same for every choice: the first reports on it.
        first = sequence.completion.index == 0
        state.params[slot] = params if first else msgspec.structs.replace(params, prompt_logprobs=None)
        state.stop_token_ids[slot] = sequence.stop_token_ids
        self._by_slot[slot] = sequence
        self._computed[slot] = self._committed[slot] = cached
        self._pending[slot] = 0
        self._limits[slot] = sequence.limit
        self._registered[slot] = sequence.num_registered = len(hits)
        self._heeds_eos[slot] = not params.ignore_eos
        self._has_own_stops[slot] = bool(params.stop_token_ids)
        self._changed.append(slot)
        self._blocked = None
        if self.config.enable_prefix_caching:
            for key in sequence.keys[len(hits) :]:
                self._computing.setdefault(key, sequence)
        sequence.status = Status.RUNNING
        self.num_waiting -= 1
        insort(self.running, sequence)
        self._running_slots = None
        if not sequence.was_admitted:
            sequence.was_admitted = True
            self.cache_stats.num_queried_tokens += num_prompt
            self.cache_stats.num_hit_tokens += min(cached, num_prompt)
            if first:
                sequence.request.output.num_cached_tokens = cached
                sequence.request.output.metrics.num_cached_tokens = cached
            self.last_admitted.append(sequence)

    # --- leaving ---

    def _leave(self, sequence: Sequence) -> None:
        """Out of the running set. Steps under way may still name the slot and the blocks, so these wait for them."""
        slot = sequence.slot
        assert slot is not None
        self.running.remove(sequence)
        self._running_slots = None
        self._epochs[slot] += 1
        self._by_slot[slot] = None
        self.state.params[slot] = None
        if self.config.enable_prefix_caching:
            for key in sequence.keys[sequence.num_registered :]:
                if self._computing.get(key) is sequence:
                    del self._computing[key]
                    self._wake(key)
        self._fenced.append((self._last_step, sequence.blocks[::-1], slot))
        sequence.blocks, sequence.slot = [], None
        self._release_fenced()

    def _complete(self, step_id: StepId) -> None:
        self._completed_step = step_id
        self._release_fenced()

    def _release_fenced(self) -> None:
        while self._fenced and self._fenced[0][0] <= self._completed_step:
            _, blocks, slot = self._fenced.popleft()
            self.pool.release(blocks)
            self._free_slots.append(slot)

    # --- building and committing ---

    def _build(self, slots: IntArray, lens: IntArray) -> ScheduledStep:
        state = self.state
        computed = self._computed[slots]
        pending = self._pending[slots]
        ends = computed + lens
        sample = ends == state.num_tokens[slots] + pending
        query_start = np.zeros(len(slots) + 1, np.int32)
        np.cumsum(lens, out=query_start[1:])
        token_ids = np.empty(int(query_start[-1]), np.int32)
        # A row of one token; one whose token is still on the device says so.
        token_ids[query_start[:-1]] = np.where(pending > 0, LAST_SAMPLED, state.token_ids[slots, computed])
        for row in np.flatnonzero(lens > 1).tolist():
            chunk = state.token_ids[slots[row], computed[row] : ends[row]]
            token_ids[query_start[row] : query_start[row + 1]] = chunk
        self._last_step = StepId(self._last_step + 1)
        by_slot = cast("list[Sequence]", self._by_slot)
        batch = Batch(
            step_id=self._last_step,
            state=state,
            slots=slots,
            seq_ids=tuple([by_slot[slot].seq_id for slot in slots.tolist()]),
            token_ids=token_ids,
            query_start=query_start,
            num_computed=computed,
            sample=sample,
            num_draft=np.zeros(len(slots), np.int32),
            changed_slots=np.array(self._changed, np.int32),
        )
        self._changed = []
        self._computed[slots] = ends
        self._pending[slots] += sample
        return ScheduledStep(batch, lens, self._epochs[slots])

    def _register(self, slots: IntArray) -> None:
        """Let others find the blocks that are full by now."""
        block_size = self.config.block_size
        full = self._committed[slots] // block_size
        for row in np.flatnonzero(full > self._registered[slots]).tolist():
            slot = int(slots[row])
            sequence = self._by_slot[slot]
            assert sequence is not None
            end = int(full[row])
            extend_keys(sequence.keys, sequence.root, self.state.token_ids[slot, : end * block_size], block_size)
            for i in range(sequence.num_registered, end):
                key = sequence.keys[i]
                self.pool.register(sequence.blocks[i], key)
                if self._computing.get(key) is sequence:
                    del self._computing[key]
                    self._wake(key)
            self._registered[slot] = sequence.num_registered = end

    def _wake(self, key: bytes) -> None:
        for sequence in self._parked.pop(key, ()):
            if sequence.status is Status.PARKED:
                sequence.status = Status.WAITING
                heappush(self._waiting, sequence)

    def _maybe_end(self, sequence: Sequence, token: int) -> None:
        """End a sequence whose last token is ``token``, if it does end with it."""
        completion, params = sequence.completion, sequence.params
        long_enough = len(completion.token_ids) >= params.min_tokens
        if long_enough and token in self._eos_set and not params.ignore_eos:
            completion.finish_reason = "stop"
        elif long_enough and params.stop_token_ids and token in params.stop_token_ids:
            completion.finish_reason, completion.stop_reason = "stop", token
        elif sequence.num_tokens >= sequence.limit:
            completion.finish_reason = "length"
        else:
            return
        self.finish(sequence)

    def _take_prompt_logprobs(self, batch: Batch, alive: BoolArray, output: BatchOutput) -> None:
        for row, entries in output.prompt_logprobs.items():
            sequence = self._by_slot[int(batch.slots[row])]
            if not alive[row] or sequence is None or sequence.request.output.prompt_logprobs is None:
                continue
            first = int(batch.num_computed[row]) + 1
            sequence.request.output.prompt_logprobs[first : first + len(entries)] = entries

    # --- proof ---

    def check_integrity(self) -> None:
        """Prove the invariants that hold between steps.

        Raises:
            AssertionError: One does not hold; the message says which.
        """
        state, block_size = self.state, self.config.block_size
        self.pool.check_integrity([*(s.blocks for s in self.running), *(blocks for _, blocks, _ in self._fenced)])
        assert self.running == sorted(self.running), "the running set is out of order"
        slots = [sequence.slot for sequence in self.running]
        fenced = [slot for _, _, slot in self._fenced]
        every = sorted([*slots, *fenced, *self._free_slots])  # type: ignore[type-var]
        assert every == list(range(self.config.max_num_seqs)), f"a slot is lost or taken twice: {every}"
        waiting = {s.seq_id for s in self._waiting if s.status is Status.WAITING}
        parked = {s.seq_id for group in self._parked.values() for s in group if s.status is Status.PARKED}
        assert len(waiting) + len(parked) == self.num_waiting, "a sequence is in two queues or in none"
        assert not waiting & parked
        assert parked <= {s.seq_id for k, g in self._parked.items() if k in self._computing for s in g}, "nobody wakes one"
        for sequence in self.running:
            slot = sequence.slot
            assert slot is not None
            assert sequence.status is Status.RUNNING
            assert self._by_slot[slot] is sequence
            known = int(state.num_tokens[slot])
            assert known == sequence.num_tokens < sequence.limit
            assert known + self._pending[slot] <= sequence.limit
            assert 0 <= self._committed[slot] <= self._computed[slot] <= known + self._pending[slot]
            assert len(sequence.blocks) * block_size >= self._computed[slot], "computed tokens without a block"
            assert state.block_tables[slot, : len(sequence.blocks)].tolist() == sequence.blocks
            assert state.num_blocks[slot] == len(sequence.blocks)
            assert sequence.num_registered * block_size <= self._committed[slot], "a block is known before it is computed"
            tokens = [*sequence.prompt.tolist(), *sequence.completion.token_ids]
            assert state.token_ids[slot, :known].tolist() == tokens
        if not self.has_work():
            assert not self._computing
            fenced_blocks = {block for _, blocks, _ in self._fenced for block in blocks}
            assert self.pool.num_free + len(fenced_blocks) == self.pool.num_blocks, "an empty engine holds blocks"


def _add_logprobs(sequence: Sequence, entries: list[TokenLogprobs]) -> None:
    completion = sequence.completion
    if completion.logprobs is None:
        return
    completion.logprobs.extend(entries)
    completion.cumulative_logprob = (completion.cumulative_logprob or 0.0) + sum(entry.logprobs[0] for entry in entries)
