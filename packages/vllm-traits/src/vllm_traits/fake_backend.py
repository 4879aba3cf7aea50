"""A backend without a model, exact enough to prove an engine with.

Its KV cache holds for every position who wrote it, when, and a hash of the whole prefix. The next token is a function of what
is read back *from the cache*, block by block, so a stale block, an aliased slot or a lost token changes the output, and
:func:`expected_tokens` says what the output must be. Every batch is held against the contract
(:mod:`vllm_traits.fake_rules`).
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from vllm_traits.backend import KvCacheBudget, ModelSpec, StepHandle
from vllm_traits.batch import LAST_SAMPLED, Batch, BatchOutput, BatchState, TokenLogprobs
from vllm_traits.errors import BackendError, BackendOutOfMemoryError
from vllm_traits.fake_cache import FakeKvCache, Intp
from vllm_traits.fake_device import Fault, VirtualDevice
from vllm_traits.fake_model import Choice, expected_tokens, fast_tokens, made_up_logprobs, mix
from vllm_traits.fake_rules import BatchRules, NamedThings

__all__ = ["FakeBackend", "Fault", "VirtualDevice", "expected_tokens", "fast_tokens"]


@dataclass(slots=True, eq=False)
class _Handle:
    """A step that is over when its time has come, and known to be when somebody has asked."""

    backend: "FakeBackend"
    output: BatchOutput
    error: Exception | None
    ready_at: float
    named: NamedThings | None
    is_read: bool = False
    """Whether somebody has its tokens."""
    ruined: bool = False
    """What it writes is worth nothing, and so is what steps submitted before that was known make of it."""

    def done(self) -> bool:
        device = self.backend.device
        if device is not None and device.now < self.ready_at:
            return False
        self.backend._known_to_be_over(self)
        return True

    def result(self) -> BatchOutput:
        self.is_read = True
        if self.backend.device is not None:
            self.backend.device.advance(self.ready_at)
        self.backend._known_to_be_over(self)
        if self.error is not None:
            raise self.error
        return self.output


@dataclass
class FakeBackend:
    """Satisfies :class:`~vllm_traits.ModelBackend` with arithmetic on the tokens themselves.

    Args:
        vocab_size, max_model_len, eos_token_ids, supports_overlap, max_draft_tokens, supports_structured_outputs: As in
            :class:`~vllm_traits.ModelSpec`. The one grammar allows even tokens.
        num_blocks: What ``kv_cache_budget`` reports.
        on_submit: Called with each batch before it runs; raise a ``BackendError`` from it to fail ``submit``.
        fail_result: Called with each batch; an exception that it returns is raised by ``result``.
        fault: Called with each batch; what it returns befalls the step.
        device: The clock on which steps take time; None: they take none.
        may_read: Called with ``(reader, writer, step)`` when a sequence reads what another wrote in that step; False makes it a
            violation. For what a backend cannot know: cache salts, resets.
        is_draft: It drafts for another. What the target found in its cache is not always in a draft's, so a row may write again
            what others have in their tables; it must still be the same.
        keep_kv: False: no cache and no checks, a step is a few array operations and its tokens are :func:`fast_tokens`, so that
            what is measured around it is the engine.

    Attributes:
        violations: All that was wrong with batches. Each was raised as a ``BackendError`` too, but an engine survives those.
        num_steps: Steps submitted.
        closed: Whether ``close`` was called.
        is_dead: Every step fails, since :attr:`Fault.DIE` befell one.
    """

    vocab_size: int = 256
    max_model_len: int = 4096
    eos_token_ids: tuple[int, ...] = ()
    supports_overlap: bool = False
    num_blocks: int = 1024
    on_submit: Callable[[Batch], None] | None = None
    fail_result: Callable[[Batch], Exception | None] | None = None
    keep_kv: bool = True
    max_draft_tokens: int = 0
    supports_structured_outputs: bool = False
    fault: Callable[[Batch], Fault | None] | None = None
    device: VirtualDevice | None = None
    may_read: Callable[[int, int, int], bool] | None = None
    is_draft: bool = False
    violations: list[str] = field(default_factory=list, init=False)
    num_steps: int = field(default=0, init=False)
    closed: bool = field(default=False, init=False)
    is_dead: bool = field(default=False, init=False)

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(
            name="fake",
            vocab_size=self.vocab_size,
            max_model_len=self.max_model_len,
            eos_token_ids=self.eos_token_ids,
            supports_overlap=self.supports_overlap,
            max_draft_tokens=self.max_draft_tokens,
            supports_structured_outputs=self.supports_structured_outputs,
        )

    def kv_cache_budget(self, *, block_size: int, max_num_seqs: int, max_num_batched_tokens: int) -> KvCacheBudget:
        return KvCacheBudget(available_bytes=self.num_blocks * block_size * 16, bytes_per_block=block_size * 16)

    def initialize(self, state: BatchState, *, num_blocks: int, max_num_batched_tokens: int) -> None:
        self._under_way: deque[_Handle] = deque()
        self._unread: list[_Handle] = []
        if self.keep_kv:
            self._cache = FakeKvCache(num_blocks, state.block_size, self.may_read)
            self._rules = BatchRules(
                self.spec, num_blocks=num_blocks, max_num_batched_tokens=max_num_batched_tokens, is_draft=self.is_draft
            )
            self._choices: dict[int, Choice] = {}
            self._last_sampled: dict[int, tuple[int, int, int]] = {}  # slot: sequence, position, token

    def submit(self, batch: Batch) -> StepHandle:
        if self.on_submit is not None:
            self.on_submit(batch)
        fault = self.fault(batch) if self.fault is not None else None
        if fault is Fault.SUBMIT:
            raise BackendError("the step could not be started")
        self.is_dead = self.is_dead or fault is Fault.DIE
        if self.is_dead:
            raise BackendError("the device is gone")
        self.num_steps += 1
        if not self.keep_kv:
            output, ruined = self._run_fast(batch), False
        else:
            self._unread = [step for step in self._unread if not step.is_read]
            under_way, unread = ([step.named for step in steps if step.named] for steps in (self._under_way, self._unread))
            self._complain(self._rules.complaints(batch, under_way, unread))
            ruined = any(step.ruined for step in self._unread)
            output = self._rubbish(batch) if ruined else self._run(batch)
        error = self.fail_result(batch) if self.fail_result is not None else None
        if fault in (Fault.RESULT, Fault.OUT_OF_MEMORY):
            error = BackendError("the step failed") if fault is Fault.RESULT else BackendOutOfMemoryError("out of memory")
        if error is not None and not ruined and self.keep_kv:
            ruined = True
            self._spoil(batch)
        return self._started(batch, _distort(output, batch, fault, self.vocab_size), error, ruined, fault)

    def close(self) -> None:
        self.closed = True

    # --- a step's life ---

    def _started(
        self, batch: Batch, output: BatchOutput, error: Exception | None, ruined: bool, fault: Fault | None
    ) -> _Handle:
        ready_at = 0.0
        if self.device is not None:
            ready_at = self.device.start(batch.num_tokens, slowness=1000.0 if fault is Fault.LATE else 1.0)
        fenced = self.keep_kv and self.supports_overlap
        handle = _Handle(self, output, error, ready_at, NamedThings.of(batch) if fenced else None, ruined=ruined)
        if fenced:
            self._under_way.append(handle)
            self._unread.append(handle)
        return handle

    def _known_to_be_over(self, handle: _Handle) -> None:
        """Steps run in order: with this one, all before it are over."""
        if handle in self._under_way:
            while self._under_way.popleft() is not handle:
                pass

    def _complain(self, complaints: list[str]) -> None:
        if complaints:
            self.violations += complaints
            raise BackendError("; ".join(complaints))

    # --- what a step computes ---

    def _run(self, batch: Batch) -> BatchOutput:
        for slot in batch.changed_slots.tolist():
            self._choices.pop(slot, None)
            self._last_sampled.pop(slot, None)
        places, starts = self._cache.places(batch)
        self._cache.write(batch, self._tokens_to_run(batch), places, starts)
        self._complain(self._cache.complaints(batch, places, starts))
        tokens = np.full((batch.num_rows, int(batch.num_draft.max()) + 1), -1, np.int32)
        logprobs: dict[int, list[TokenLogprobs]] = {}
        prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        for row, slot in enumerate(batch.slots.tolist()):
            mine, params = places[starts[row] : starts[row + 1]], batch.state.params[slot]
            assert params is not None
            if slot not in self._choices:
                self._choices[slot] = Choice.of_slot(batch.state, slot, self.vocab_size)
            if params.prompt_logprobs is not None:
                prompt_logprobs[row] = self._prompt_logprobs(batch, row, mine, params.prompt_logprobs)
            if batch.sample[row]:
                chosen, tags = self._sample(batch, row, mine)
                tokens[row, : len(chosen)] = chosen
                if params.logprobs is not None:
                    num, vocab_size = params.logprobs, self.vocab_size
                    logprobs[row] = [
                        made_up_logprobs(tag, token, num, vocab_size) for tag, token in zip(tags, chosen, strict=True)
                    ]
        return BatchOutput(token_ids=tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs)

    def _tokens_to_run(self, batch: Batch) -> list[list[int]]:
        """By row, with ``LAST_SAMPLED`` replaced."""
        rows, complaints = [], []
        for row, slot in enumerate(batch.slots.tolist()):
            tokens = batch.token_ids[batch.query_start[row] : batch.query_start[row + 1]].tolist()
            if tokens[0] == LAST_SAMPLED:
                wanted = int(batch.seq_ids[row]), int(batch.num_computed[row])
                *of, tokens[0] = self._last_sampled.get(slot, (-1, -1, 0))
                if tuple(of) != wanted:
                    complaints.append(
                        f"step {batch.step_id}: slot {slot} sampled last for (sequence, position) {of}, not {wanted}"
                    )
            if not all(0 <= token < self.vocab_size for token in tokens):
                complaints.append(f"step {batch.step_id}: row {row} runs {tokens}, not all of them in the vocabulary")
            rows.append(tokens)
        self._complain(complaints)
        return rows

    def _sample(self, batch: Batch, row: int, mine: Intp) -> tuple[list[int], list[int]]:
        """A row's accepted and sampled tokens, one at a time as if nothing had been guessed, and the tags they follow on."""
        slot, num_draft = int(batch.slots[row]), int(batch.num_draft[row])
        held = self._cache.tokens[mine].tolist()
        num_prompt, first = int(batch.state.num_prompt_tokens[slot]), len(held) - num_draft
        chosen, tags = list[int](), list[int]()
        for position in range(first, len(held) + 1):
            tags.append(int(self._cache.tags[mine[position - 1]]))
            chosen.append(self._choices[slot].next_token(tags[-1], held[num_prompt:position]))
            if position < len(held) and held[position] != chosen[-1]:
                break
        self._last_sampled[slot] = int(batch.seq_ids[row]), first + len(chosen) - 1, chosen[-1]
        return chosen, tags

    def _prompt_logprobs(self, batch: Batch, row: int, mine: Intp, num: int) -> list[TokenLogprobs]:
        slot, first = int(batch.slots[row]), int(batch.num_computed[row]) + 1
        end = min(len(mine) + 1, int(batch.state.num_prompt_tokens[slot]))
        return [
            made_up_logprobs(int(self._cache.tags[mine[p - 1]]), int(batch.state.token_ids[slot, p]), num, self.vocab_size)
            for p in range(first, end)
        ]

    def _rubbish(self, batch: Batch) -> BatchOutput:
        """What comes of a step that follows on one that failed."""
        self._spoil(batch)
        tokens = [mix(batch.step_id, row) % self.vocab_size if batch.sample[row] else -1 for row in range(batch.num_rows)]
        return BatchOutput(token_ids=np.array(tokens, np.int32)[:, None])

    def _spoil(self, batch: Batch) -> None:
        places, starts = self._cache.places(batch)
        for row, first in enumerate(batch.num_computed.tolist()):
            self._cache.spoil(places[starts[row] + first : starts[row + 1]])
        for slot in (*batch.slots.tolist(), *batch.changed_slots.tolist()):
            self._last_sampled.pop(slot, None)
        for slot in batch.changed_slots.tolist():
            self._choices.pop(slot, None)

    def _run_fast(self, batch: Batch) -> BatchOutput:
        """Tokens of seed and position alone, guesses verified against them."""
        ends = batch.query_start[1:]
        first = batch.num_computed + batch.query_lens - batch.num_draft  # the position of the first token sampled
        width = int(batch.num_draft.max()) + 1
        ahead = np.arange(width)
        tokens = fast_tokens(batch.state.seed[batch.slots][:, None], first[:, None] + ahead, self.vocab_size)
        if width > 1:
            at = np.minimum((ends - batch.num_draft)[:, None] + ahead[:-1], ends[:, None] - 1)
            right = (batch.token_ids[at] == tokens[:, :-1]) & (ahead[:-1] < batch.num_draft[:, None])
            accepted = np.cumprod(right, axis=1).sum(axis=1)
            tokens[ahead > accepted[:, None]] = -1
        tokens[~batch.sample] = -1
        return BatchOutput(token_ids=tokens)


def _distort(output: BatchOutput, batch: Batch, fault: Fault | None, vocab_size: int) -> BatchOutput:
    """The output with something wrong with it, if the fault is of that kind and a row is there to show it."""
    tokens, sampled = output.token_ids, np.flatnonzero(batch.sample)
    if fault is Fault.FEW_ROWS:
        return BatchOutput(token_ids=tokens[1:])
    if fault is Fault.FLAT:
        return BatchOutput(token_ids=tokens[:, 0])
    if not len(sampled) or fault not in (Fault.SURPLUS, Fault.MISSING, Fault.OUTSIDE):
        return output
    row = int(sampled[-1])
    if fault is Fault.SURPLUS:
        tokens = np.pad(tokens, ((0, 0), (0, int(batch.num_draft.max()) + 2 - tokens.shape[1])), constant_values=-1)
        tokens[row] = np.where(np.arange(tokens.shape[1]) < batch.num_draft[row] + 2, np.maximum(tokens[row], 0), -1)
    else:
        tokens[row, 0] = -1 if fault is Fault.MISSING else vocab_size
    return BatchOutput(token_ids=tokens)
