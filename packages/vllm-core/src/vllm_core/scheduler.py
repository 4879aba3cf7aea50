"""What runs in the next step.

Every step moves ``computed`` of running sequences toward the tokens they have, under one token budget. There is no prefill and
no decode: a sequence with one token to run is a row of one token. Rows of one token come first, so a long prompt never stalls
them; what is left of the budget goes to prompts in order, then to sequences that wait, then to guesses.
"""

from bisect import insort
from collections import Counter
from typing import cast

import numpy as np

from vllm_core.block_pool import BlockPool
from vllm_core.engine_config import EngineConfig
from vllm_core.outputs import FinishReason, RequestOutput
from vllm_core.prefix_cache import PrefixCache
from vllm_core.proposer import DraftRows
from vllm_core.scheduled_step import Committed, RunningSet, ScheduledStep
from vllm_core.sequence import Sequence, Status
from vllm_core.slot_table import SlotTable
from vllm_core.speculator import Speculator
from vllm_core.waiting_queue import WaitingQueue
from vllm_traits.batch import LAST_SAMPLED, Batch, BatchOutput, BatchState, BoolArray, IntArray, LongArray, TokenLogprobs
from vllm_traits.ids import BlockId, StepId

ALONE_AFTER = 2
"""Failed steps after which a sequence runs alone past the place of the failure, to find out whether it is the cause."""
STEPS_TO_ONE_MORE = 64
"""Steps that must succeed after the device was out of memory before one more sequence may run."""


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
        self.speculator: Speculator | None = None
        self.num_preemptions = 0
        self.num_accepted_per_pos: LongArray = np.zeros(config.max_draft_tokens, np.int64)
        self.num_drafts = self.num_draft_tokens = 0
        self.last_admitted: list[Sequence] = []
        self.suspects: set[Sequence] = set()
        """Sequences whose steps failed again: each runs alone until it has got past the failure."""
        self.prefix_cache = PrefixCache(
            self.pool, config.block_size, enabled=config.enable_prefix_caching, wake=lambda key: self._waiting.wake(key)
        )
        self._table = SlotTable(self.state, self.pool)
        self._waiting = WaitingQueue(self.prefix_cache.count_hits if config.scheduling_policy == "lpm" else None)
        self._most_running = config.max_num_seqs
        self._steps_at_most = 0
        self._blocked: tuple[Sequence, int] | None = None  # the head of the queue, and the free blocks that were too few
        self._last_step = StepId(0)
        self._running: RunningSet | None = None
        self._eos = np.array(sorted(eos_token_ids), np.int32)
        self._eos_set = frozenset(eos_token_ids)
        self._no_guesses: IntArray = np.zeros(config.max_num_seqs, np.int32)
        self._no_guesses.setflags(write=False)

    # --- from outside ---

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a slot."""
        return self._waiting.num_waiting

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.prefix_cache.prepare(sequence)
        self._waiting.add(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is; idempotent. Its blocks and slot are free once no step names them."""
        if sequence.status is Status.RUNNING:
            self._leave(sequence)
        elif sequence.status is not Status.FINISHED:
            self._waiting.remove(sequence)
            if self._blocked is not None and self._blocked[0] is sequence:
                self._blocked = None
        sequence.status = Status.FINISHED

    def rekey(self, sequence: Sequence, key: tuple[int, int, int]) -> None:
        """Give a sequence another place in the order."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            sequence.key = key
            insort(self.running, sequence)
            self._running = None
        else:
            self._waiting.rekey(sequence, key)
        self._blocked = None

    def has_work(self) -> bool:
        """Whether a sequence waits or runs."""
        return bool(self.running) or self.num_waiting > 0

    def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix; False, and nothing is done, while a sequence runs."""
        if self.running or self._table.fenced:
            return False
        self.pool.reset_cache()
        return True

    # --- a step ---

    def wants_guesses(self) -> bool:
        """Whether guesses are to be made for a running sequence, so that its token must be known before it runs again."""
        if self.speculator is None or not self.running:
            return False
        slots = self._running_now().slots
        known = self.state.num_tokens[slots]
        decoding = (self._table.computed[slots] + 1 >= known) & (known + 1 < self._table.limits[slots])
        return bool((self.speculator.num_wanted(slots, known) * decoding).any())

    def schedule(self) -> ScheduledStep | None:
        """The next step, None if nothing can run now."""
        self.last_admitted = []
        if self.suspects:
            slots, lens, others_may_run = self._plan_suspect()
            if not others_may_run:
                return self._build(slots, lens, self._no_guesses[: len(slots)]) if len(slots) else None
        if self.config.scheduling_policy == "priority":
            self._make_room()
        preemptions = self.num_preemptions
        slots, lens = self._plan_running()
        if self.num_waiting and self.num_preemptions == preemptions:
            new_slots, new_lens = self._admit(self.config.max_num_batched_tokens - int(lens.sum()))
            if new_slots:
                slots = np.concatenate([slots, np.array(new_slots, np.int64)])
                lens = np.concatenate([lens, np.array(new_lens, np.int32)])
        if len(slots) == 0:
            return None
        num_draft = self._no_guesses[: len(slots)] if self.speculator is None else self._guess(self.speculator, slots, lens)
        return self._build(slots, lens, num_draft)

    def commit(self, step: ScheduledStep, output: BatchOutput, now: float = 0.0) -> Committed:
        """Take in what a step gave, at ``now``. Steps are committed in the order in which they were scheduled."""
        batch, state, table = step.batch, self.state, self._table
        table.complete(batch.step_id)
        self._allow_one_more()
        alive = table.epochs[step.slots] == step.epochs
        slots, ends = step.slots, step.ends
        if not alive.all():
            slots, ends = slots[alive], ends[alive]
        table.committed[slots] = ends
        if output.prompt_logprobs:
            self._take_prompt_logprobs(batch, alive, output)
        rows = np.flatnonzero(alive & batch.sample)
        steady = step.running if len(rows) == batch.num_rows else None
        by_slot = cast("list[Sequence]", table.sequences)  # the slots of rows that are alive have one
        at = step.slots if steady else step.slots[rows]
        sequences = steady.sequences if steady else [by_slot[slot] for slot in at.tolist()]
        tokens = output.token_ids[:, 0] if steady else output.token_ids[rows, 0]
        lengths = state.num_tokens[at]
        is_first = lengths == state.num_prompt_tokens[at]
        since_last = now - table.last_token_time[at]
        table.last_token_time[at] = now
        state.token_ids[at, lengths] = tokens
        state.num_tokens[at] = lengths + 1
        table.pending[at] -= 1
        for sequence, token in zip(sequences, tokens.tolist(), strict=True):
            sequence.completion.token_ids.append(token)
        num_new = len(rows)
        if step.has_guesses:
            tokens = tokens.copy()
            num_new += self._take_guesses(step, output, rows, lengths, tokens)
        if output.logprobs:
            for row, sequence, before in zip(rows.tolist(), sequences, lengths.tolist(), strict=True):
                if row in output.logprobs:
                    _add_logprobs(sequence, output.logprobs[row][: sequence.num_tokens - before])
        if self.prefix_cache.enabled:
            self._register(slots, ends if not step.has_guesses else table.committed[slots])
        outputs = steady.outputs if steady else _outputs(sequences)
        return Committed(sequences, outputs, num_new, is_first, since_last, self._end_some(sequences, at, tokens))

    def rewind(self, steps: list[ScheduledStep]) -> list[Sequence]:
        """Undo steps that failed: what they were to compute will run again. They must be all that is under way.

        Returns:
            The sequences that were in the first of them.
        """
        failed: list[Sequence] = []
        table = self._table
        for step in reversed(steps):
            batch = step.batch
            table.changed.extend(batch.changed_slots.tolist())  # the backend may not have heard of them
            for row, slot in enumerate(batch.slots.tolist()):
                sequence = table.sequences[slot]
                if sequence is None or table.epochs[slot] != step.epochs[row]:
                    continue
                table.computed[slot] = batch.num_computed[row]
                table.pending[slot] -= int(batch.sample[row])
                table.guessed[slot] = 0
                sequence.failed_at = max(sequence.failed_at, int(step.ends[row] - batch.num_draft[row]))
                if step is steps[0]:
                    failed.append(sequence)
        table.complete(self._last_step)
        return failed

    def got_past_failure(self, sequence: Sequence) -> bool:
        """Whether a sequence has computed what it once failed on."""
        return sequence.slot is not None and int(self._table.committed[sequence.slot]) >= sequence.failed_at

    def give_way(self) -> None:
        """The device is out of memory: the later half of the running sequences waits, and few are let in for a while."""
        keep = max(1, len(self.running) // 2)
        for sequence in self.running[keep:]:
            self.preempt(sequence)
        self._most_running, self._steps_at_most = keep, 0

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks and slot, and queue it again."""
        self._leave(sequence)
        self.num_preemptions += 1
        sequence.request.output.metrics.num_preemptions += 1
        self._waiting.add(sequence)

    # --- planning ---

    def _running_now(self) -> RunningSet:
        if self._running is None:
            slots = np.array([sequence.slot for sequence in self.running], np.int64)
            self._running = RunningSet(
                slots,
                slots.astype(np.int32),
                list(self.running),
                tuple([sequence.seq_id for sequence in self.running]),
                _outputs(self.running),
            )
        return self._running

    def _plan_suspect(self) -> tuple[LongArray, IntArray, bool]:
        """A step for the first suspect alone, and whether it is the others' turn: no suspect runs or can be let in now."""
        running = [sequence for sequence in self.suspects if sequence.status is Status.RUNNING]
        if running:
            return *self._plan_running(alone=min(running)), False
        if self._waiting.head() in self.suspects:
            slots, lens = self._admit(self.config.max_num_batched_tokens, most=1)
            if slots:
                return np.array(slots, np.int64), np.array(lens, np.int32), False
        return np.zeros(0, np.int64), np.zeros(0, np.int32), True

    def _plan_running(self, alone: Sequence | None = None) -> tuple[LongArray, IntArray]:
        """Slots and how many tokens each runs, with blocks for them; ``alone``: of this one only."""
        table, slots = self._table, self._running_now().slots
        pending, computed = table.pending[slots], table.computed[slots]
        known = self.state.num_tokens[slots] + pending
        lens = known - computed
        lens[(known >= table.limits[slots]) | (table.waits[slots] & (pending > 0))] = 0  # its token is on the way
        if alone is not None:
            lens[slots != alone.slot] = 0
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

    def _take_blocks(self, rows: LongArray, missing: IntArray, lens: IntArray) -> None:
        """Blocks for these rows, in order; who comes last gives way."""
        for row in rows.tolist():
            if row >= len(self.running):
                break  # preempted below, as are all after it
            sequence, need = self.running[row], int(missing[row])
            while self.pool.num_free < need and lens[row]:
                if self._table.fenced:
                    lens[row] = 0  # blocks come back when the steps under way are done: sit this one out
                else:
                    lens[len(self.running) - 1] = 0
                    self.preempt(self.running[-1])
            if lens[row]:
                self._table.grow(sequence, need)

    def _guess(self, speculator: Speculator, slots: LongArray, lens: IntArray) -> IntArray:
        """Guesses for rows that decode, in what is left of the budget and of the free blocks; adds to ``lens``.

        Returns:
            int32 ``[len(slots)]``, how many each row has. They stand in the state behind its known tokens.
        """
        state, table = self.state, self._table
        known = state.num_tokens[slots]
        rows = np.flatnonzero((lens == 1) & (table.pending[slots] == 0) & (table.computed[slots] + 1 == known))
        if len(rows) == 0:
            return self._no_guesses[: len(slots)]
        known, at = known[rows], slots[rows]
        wanted = speculator.num_wanted(at, known)
        most = np.minimum(wanted.max(axis=0), table.limits[at] - known - 1)
        left = self.config.max_num_batched_tokens - int(lens.sum())
        most = np.clip(left - (np.cumsum(most) - most), 0, most)
        by_slot = cast("list[Sequence]", table.sequences)
        for i in np.flatnonzero(most).tolist():
            most[i] = self._make_place(by_slot[at[i]], int(known[i]), int(most[i]))
        some = np.flatnonzero(most)
        if len(some) == 0:
            return self._no_guesses[: len(slots)]
        sequences = [by_slot[slot] for slot in at[some].tolist()]
        asked = DraftRows(
            state=state,
            slots=at[some].astype(np.int32),
            seq_ids=tuple([sequence.seq_id for sequence in sequences]),
            num_wanted=most[some],
            roots=[sequence.root for sequence in sequences],
            keys=[sequence.keys for sequence in sequences],
        )
        num_draft = np.zeros(len(slots), np.int32)
        for i, guess in zip(some.tolist(), speculator.propose(asked, wanted[:, some]), strict=True):
            state.token_ids[at[i], known[i] : known[i] + len(guess)] = guess
            num_draft[rows[i]] = len(guess)
        lens += num_draft
        return num_draft

    def _make_place(self, sequence: Sequence, known: int, most: int) -> int:
        """Blocks for ``most`` guesses, or fewer: nobody gives way for them."""
        size = self.config.block_size
        need = -(-(known + most) // size) - len(sequence.blocks)
        if need > 0:
            self._table.grow(sequence, min(need, self.pool.num_free))
        return min(most, len(sequence.blocks) * size - known)

    # --- admission ---

    def _make_room(self) -> None:
        """A waiting sequence of a better priority takes the place of the last that runs."""
        head = self._waiting.head()
        if head is None or not self.running or self._table.fenced or self._most_running <= 1:
            return
        worse = [s for s in self.running if head < s and head.request.priority < s.request.priority]
        if not worse:
            return
        hits, awaited = self.prefix_cache.match(head)
        held = Counter(block for sequence in worse for block in sequence.blocks)
        given = sum(self.pool.num_holders(block) == count for block, count in held.items())
        if awaited is not None or self._num_missing(head, hits) > self.pool.num_free + given:
            return  # what they have would not be enough
        full = len(self.running) >= self._most_running
        while worse and (full or not (self._table.free and self._fits(head, hits))):
            self.preempt(worse.pop())
            full = False

    def _admit(self, budget: int, most: int | None = None) -> tuple[list[int], list[int]]:
        """Take waiting sequences in, in order, while there is budget, a slot, and room for all their known tokens.

        Args:
            budget: Tokens.
            most: Sequences; None: any number, but no suspect, which is let in alone.
        """
        slots: list[int] = []
        lens: list[int] = []
        while budget > 0 and self._table.free and len(self.running) < self._most_running and len(slots) != most:
            sequence = self._waiting.head()
            if sequence is None or (most is None and sequence in self.suspects):
                break
            if self._blocked is not None and self._blocked[0] is sequence and self.pool.num_free <= self._blocked[1]:
                break
            hits, awaited = self.prefix_cache.match(sequence)
            if awaited is not None:
                self._waiting.park(sequence, awaited)
                continue
            if not self._fits(sequence, hits):
                self._blocked = (sequence, self.pool.num_free)
                break
            self._waiting.take(sequence)
            self._enter(sequence, hits)
            cached = len(hits) * self.config.block_size
            chunk = min(sequence.num_tokens - cached, budget, self.config.long_prefill_token_threshold or budget)
            assert sequence.slot is not None
            slots.append(sequence.slot)
            lens.append(chunk)
            budget -= chunk
        return slots, lens

    def _num_missing(self, sequence: Sequence, hits: list[BlockId]) -> int:
        return -(-sequence.num_tokens // self.config.block_size) - len(hits)

    def _fits(self, sequence: Sequence, hits: list[BlockId]) -> bool:
        return self._num_missing(sequence, hits) + sum(map(self.pool.is_free, hits)) <= self.pool.num_free

    def _enter(self, sequence: Sequence, hits: list[BlockId]) -> None:
        """Let a sequence that fits run."""
        self._table.enter(sequence, hits, self._num_missing(sequence, hits))
        self._blocked = None
        self.prefix_cache.admit(sequence, len(hits))
        sequence.status = Status.RUNNING
        insort(self.running, sequence)
        self._running = None
        if not sequence.was_admitted:
            sequence.was_admitted = True
            if sequence.completion.index == 0:
                cached = len(hits) * self.config.block_size
                sequence.request.output.num_cached_tokens = cached
                sequence.request.output.metrics.num_cached_tokens = cached
            self.last_admitted.append(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Out of the running set."""
        assert sequence.slot is not None
        self.running.remove(sequence)
        self._running = None
        if self.speculator is not None:
            self.speculator.forget(self.state, sequence.slot, sequence.root)
        self.prefix_cache.leave(sequence)
        self._table.leave(sequence, self._last_step)

    # --- building and committing ---

    def _build(self, slots: LongArray, lens: IntArray, num_draft: IntArray) -> ScheduledStep:
        state, table = self.state, self._table
        computed, pending = table.computed[slots], table.pending[slots]
        ends = computed + lens
        sample = ends - num_draft == state.num_tokens[slots] + pending
        query_start = np.zeros(len(slots) + 1, np.int32)
        np.cumsum(lens, out=query_start[1:])
        token_ids = np.empty(int(query_start[-1]), np.int32)
        # A row of one token; one whose token is still on the device says so.
        token_ids[query_start[:-1]] = np.where(pending > 0, LAST_SAMPLED, state.token_ids[slots, computed])
        if len(token_ids) > len(slots):
            for row in np.flatnonzero(lens > 1).tolist():
                chunk = state.token_ids[slots[row], computed[row] : ends[row]]
                token_ids[query_start[row] : query_start[row + 1]] = chunk
        self._last_step = StepId(self._last_step + 1)
        running = self._running_now()
        steady = running if slots is running.slots else None
        by_slot = cast("list[Sequence]", table.sequences)
        batch = Batch(
            step_id=self._last_step,
            state=state,
            slots=steady.batch_slots if steady else slots.astype(np.int32),
            seq_ids=steady.seq_ids if steady else tuple([by_slot[slot].seq_id for slot in slots.tolist()]),
            token_ids=token_ids,
            query_start=query_start,
            num_computed=computed,
            sample=sample,
            num_draft=num_draft,
            changed_slots=np.array([s for s in dict.fromkeys(table.changed) if table.sequences[s] is not None], np.int32),
        )
        table.changed = []
        table.computed[slots] = ends
        table.pending[slots] += sample
        has_guesses = self.speculator is not None and bool(num_draft.any())
        if has_guesses:
            table.guessed[slots] = num_draft
        return ScheduledStep(batch, slots, ends, table.epochs[slots], steady, has_guesses)

    def _take_guesses(
        self, step: ScheduledStep, output: BatchOutput, rows: LongArray, lengths: IntArray, tokens: IntArray
    ) -> int:
        """Take in the tokens after the first of rows whose guesses were right, and bring ``computed`` back to what was.

        Args:
            rows: Of the batch, those that go on.
            lengths: int32 ``[len(rows)]``, tokens that each had before.
            tokens: int32 ``[len(rows)]``, the first token of each; becomes the last that was taken.

        Returns:
            Tokens taken.
        """
        batch, state, table, taken = step.batch, self.state, self._table, 0
        guessed = np.flatnonzero(batch.num_draft[rows])
        num_right = (output.token_ids[rows[guessed]] >= 0).sum(axis=1).astype(np.int32) - 1
        for i, right in zip(guessed.tolist(), num_right.tolist(), strict=True):
            slot, before = int(step.slots[rows[i]]), int(lengths[i])
            sequence = table.sequences[slot]
            assert sequence is not None
            more = output.token_ids[rows[i], 1 : right + 1].tolist()
            own = sequence.completion.token_ids
            last = own[-1]
            for token in more:
                if self._end_reason(sequence, last) is not None:
                    break  # the model went on behind the end
                own.append(last := token)
            num = sequence.num_tokens - before
            state.token_ids[slot, before : before + num] = own[-num:]
            state.num_tokens[slot] = before + num
            table.computed[slot] = table.committed[slot] = before + num - 1
            table.guessed[slot] = 0
            tokens[i] = last
            taken += num - 1
            metrics = sequence.request.output.metrics
            metrics.num_draft_tokens += int(batch.num_draft[rows[i]])
            metrics.num_accepted_tokens += right
            self.num_accepted_per_pos[:right] += 1
        if len(guessed):
            at, num_draft = step.slots[rows[guessed]], batch.num_draft[rows[guessed]]
            self.num_drafts += len(guessed)
            self.num_draft_tokens += int(num_draft.sum())
            assert self.speculator is not None
            self.speculator.observe(at, num_draft, num_right, state.num_tokens[at])
        return taken

    def _register(self, slots: LongArray, committed: IntArray) -> None:
        """Let others find the blocks that are full by now."""
        block_size, table, state = self.config.block_size, self._table, self.state
        full = committed // block_size
        rows = np.flatnonzero(full > table.registered[slots])
        if len(rows) == 0:
            return
        by_slot = cast("list[Sequence]", table.sequences)
        for slot, end in zip(slots[rows].tolist(), full[rows].tolist(), strict=True):
            self.prefix_cache.register(by_slot[slot], state.token_ids[slot], end)
        table.registered[slots[rows]] = full[rows]

    def _end_some(self, sequences: list[Sequence], at: LongArray, tokens: IntArray) -> list[Sequence]:
        """End those of the sequences whose last tokens say so."""
        table = self._table
        maybe = self.state.num_tokens[at] >= table.limits[at]
        if len(self._eos):
            maybe |= (tokens[:, None] == self._eos).any(axis=1) & table.heeds_eos[at]
        maybe |= table.has_own_stops[at]
        ended = []
        for row in np.flatnonzero(maybe).tolist():
            sequence, token = sequences[row], int(tokens[row])
            reason = self._end_reason(sequence, token)
            if reason is not None:
                sequence.completion.stop_reason = reason[1]  # before the reason, which others look at to see the end
                sequence.completion.finish_reason = reason[0]
                self.finish(sequence)
                ended.append(sequence)
        return ended

    def _end_reason(self, sequence: Sequence, token: int) -> tuple[FinishReason, int | None] | None:
        """Why a sequence whose last token is ``token`` ends with it, and with which stop token; None: it goes on."""
        params = sequence.params
        if len(sequence.completion.token_ids) >= params.min_tokens:
            if token in self._eos_set and not params.ignore_eos:
                return "stop", None
            if token in sequence.own_stops:
                return "stop", token
        return ("length", None) if sequence.num_tokens >= sequence.limit else None

    def _allow_one_more(self) -> None:
        """A step succeeded: after enough of them the device's memory may be tried again."""
        if self._most_running < self.config.max_num_seqs:
            self._steps_at_most += 1
            if self._steps_at_most == STEPS_TO_ONE_MORE:
                self._most_running, self._steps_at_most = self._most_running + 1, 0

    def _take_prompt_logprobs(self, batch: Batch, alive: BoolArray, output: BatchOutput) -> None:
        for row, entries in output.prompt_logprobs.items():
            sequence = self._table.sequences[int(batch.slots[row])]
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
        assert self.running == sorted(self.running), "the running set is out of order"
        assert all(sequence.status is Status.RUNNING for sequence in self.running)
        assert len(self.running) <= self.config.max_num_seqs
        self._table.check_integrity(self.running)
        self.prefix_cache.check_integrity(self.running)
        self._waiting.check_integrity(self.prefix_cache.is_computing)
        if self._running is not None:
            assert self._running.sequences == self.running
        if not self.has_work():
            fenced = {block for _, blocks, _ in self._table.fenced for block in blocks}
            assert self.pool.num_free + len(fenced) == self.pool.num_blocks, "an empty engine holds blocks"


def _outputs(sequences: list[Sequence]) -> list[RequestOutput]:
    """Of their requests, each once: choices of one request are reported together."""
    return list({id(sequence.request): sequence.request.output for sequence in sequences}.values())


def _add_logprobs(sequence: Sequence, entries: list[TokenLogprobs]) -> None:
    completion = sequence.completion
    if completion.logprobs is None:
        return
    completion.logprobs.extend(entries)
    completion.cumulative_logprob = (completion.cumulative_logprob or 0.0) + sum(entry.logprobs[0] for entry in entries)
