"""A backend without a model, exact enough to prove an engine with.

Its KV cache holds ``(tag, token)`` for every position, where the tag hashes the whole prefix. The next token is a hash of what
is read back *from the cache*, block by block, so a stale block, an aliased slot or a lost token changes the output, and
:func:`expected_tokens` says what the output must be.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_traits.backend import KvCacheBudget, ModelSpec, StepHandle
from vllm_traits.batch import LAST_SAMPLED, Batch, BatchOutput, BatchState, IntArray, LongArray, TokenLogprobs
from vllm_traits.errors import BackendError

_MASK = (1 << 63) - 1
_EMPTY_TAG = 0x9E3779B97F4A7C15 & _MASK


def _mix(tag: int, token: int) -> int:
    """A 63-bit hash of a prefix's tag and one token more (a splitmix64 step)."""
    x = (tag ^ (token + 0x632BE59BD9B4E019)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ (x >> 29)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return (x ^ (x >> 32)) & _MASK


def _next_token(tag: int, vocab_size: int, temperature: float, seed: int) -> int:
    return (_mix(tag, seed) if temperature > 0 else tag) % vocab_size


def expected_tokens(
    prompt: Sequence[int], num_tokens: int, vocab_size: int, *, temperature: float = 0.0, seed: int = 0
) -> list[int]:
    """What a :class:`FakeBackend` says to ``prompt``, whatever runs beside it."""
    tag = _EMPTY_TAG
    for token in prompt:
        tag = _mix(tag, token)
    output = []
    for _ in range(num_tokens):
        output.append(_next_token(tag, vocab_size, temperature, seed))
        tag = _mix(tag, output[-1])
    return output


def fast_tokens(seeds: LongArray, positions: LongArray, vocab_size: int) -> IntArray:
    """The tokens of a backend that keeps no KV (``keep_kv=False``): a hash of seed and position, int32 in their common shape."""
    x = seeds.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + positions.astype(np.uint64) * np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(29)
    x *= np.uint64(0x94D049BB133111EB)
    return ((x >> np.uint64(32)) % np.uint64(vocab_size)).astype(np.int32)


@dataclass(slots=True)
class _Handle:
    """A step whose tokens may be held back until somebody asks (or a test releases them)."""

    output: BatchOutput | None
    error: Exception | None = None

    def done(self) -> bool:
        return True

    def result(self) -> BatchOutput:
        if self.error is not None:
            raise self.error
        assert self.output is not None
        return self.output


@dataclass
class FakeBackend:
    """Satisfies :class:`~vllm_traits.ModelBackend` with arithmetic on the tokens themselves.

    Args:
        vocab_size, max_model_len, eos_token_ids, supports_overlap: As in :class:`~vllm_traits.ModelSpec`.
        num_blocks: What ``kv_cache_budget`` reports.
        on_submit: Called with each batch before it runs; raise a ``BackendError`` from it to fail ``submit``.
        fail_result: Called with each batch; an exception that it returns is raised by ``result``.
        keep_kv: False: no cache and no checks, a step is a few array operations and its tokens are :func:`fast_tokens`, so that
            what is measured around it is the engine.
        max_draft_tokens: As in :class:`~vllm_traits.ModelSpec`; guesses need ``keep_kv=False`` for now.
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
    num_steps: int = field(default=0, init=False)
    closed: bool = field(default=False, init=False)

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(
            name="fake",
            vocab_size=self.vocab_size,
            max_model_len=self.max_model_len,
            eos_token_ids=self.eos_token_ids,
            supports_overlap=self.supports_overlap,
            max_draft_tokens=self.max_draft_tokens,
        )

    def kv_cache_budget(self, *, block_size: int, max_num_seqs: int, max_num_batched_tokens: int) -> KvCacheBudget:
        return KvCacheBudget(available_bytes=self.num_blocks * block_size * 16, bytes_per_block=block_size * 16)

    def initialize(self, state: BatchState, *, num_blocks: int, max_num_batched_tokens: int) -> None:
        if not self.keep_kv:
            return
        self._tags = np.full((num_blocks, state.block_size), -1, np.int64)
        self._tokens = np.full((num_blocks, state.block_size), -1, np.int64)
        self._last_sampled = np.full(state.max_num_seqs, -1, np.int64)

    def submit(self, batch: Batch) -> StepHandle:
        if self.on_submit is not None:
            self.on_submit(batch)
        self.num_steps += 1
        output = self._run(batch) if self.keep_kv else self._run_fast(batch)
        error = self.fail_result(batch) if self.fail_result is not None else None
        return _Handle(output, error)

    def close(self) -> None:
        self.closed = True

    def _run(self, batch: Batch) -> BatchOutput:
        state, width = batch.state, batch.state.block_size
        sampled = np.full((batch.num_rows, 1), -1, np.int32)
        logprobs: dict[int, list[TokenLogprobs]] = {}
        prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        for row, slot in enumerate(batch.slots.tolist()):
            table = state.block_tables[slot]
            params = state.params[slot]
            assert params is not None
            start = int(batch.num_computed[row])
            tag = self._read_prefix(table, start, width)
            predictions = []
            for offset, token in enumerate(batch.token_ids[batch.query_start[row] : batch.query_start[row + 1]].tolist()):
                if token == LAST_SAMPLED:
                    token = int(self._last_sampled[slot])
                if not 0 <= token < self.vocab_size:
                    raise BackendError(f"row {row} runs token {token}, which is not in the vocabulary")
                tag = _mix(tag, token)
                block, place = divmod(start + offset, width)
                self._tags[table[block], place], self._tokens[table[block], place] = tag, token
                predictions.append(tag)
            if params.prompt_logprobs is not None:
                known = range(start + 1, min(start + len(predictions) + 1, int(state.num_prompt_tokens[slot])))
                prompt_logprobs[row] = [
                    self._logprobs(predictions[p - start - 1], int(state.token_ids[slot, p]), params.prompt_logprobs)
                    for p in known
                ]
            if batch.sample[row]:
                choice = _next_token(tag, self.vocab_size, float(state.temperature[slot]), int(state.seed[slot]))
                sampled[row, 0] = self._last_sampled[slot] = choice
                if params.logprobs is not None:
                    logprobs[row] = [self._logprobs(tag, choice, params.logprobs)]
        return BatchOutput(token_ids=sampled, logprobs=logprobs, prompt_logprobs=prompt_logprobs)

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

    def _read_prefix(self, table: np.typing.NDArray[np.int32], length: int, width: int) -> int:
        """Fold the cached tokens again, checking the tag at each position."""
        tag = _EMPTY_TAG
        for position in range(length):
            block, place = divmod(position, width)
            tag = _mix(tag, int(self._tokens[table[block], place]))
            if tag != self._tags[table[block], place]:
                raise BackendError(f"block {table[block]} holds another prefix at position {position}")
        return tag

    def _logprobs(self, tag: int, chosen: int, num: int) -> TokenLogprobs:
        """A made-up distribution: the greedy choice has half of the mass, its successors half of the rest each."""
        top = [(tag + i) % self.vocab_size for i in range(num)]
        rank = (chosen - tag) % self.vocab_size + 1
        return TokenLogprobs([chosen, *top], [-0.6931 * rank, *(-0.6931 * (i + 1) for i in range(num))], rank)
