"""The engine: schedule, submit, commit."""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256

import msgspec
import numpy as np
from prometheus_client import CollectorRegistry

from vllm_core.engine_config import EngineConfig
from vllm_core.metrics import EngineMetrics
from vllm_core.outputs import CompletionOutput, FinishReason, RequestMetrics, RequestOutput
from vllm_core.prefix_cache import root_key
from vllm_core.proposer import Proposer
from vllm_core.scheduled_step import Committed, ScheduledStep
from vllm_core.scheduler import ALONE_AFTER, Scheduler
from vllm_core.sequence import Request, Status, queue_key
from vllm_core.sequence import Sequence as Seq
from vllm_core.speculation import build_speculator, check_speculation
from vllm_traits.backend import KvCacheBudget, ModelBackend, StepHandle
from vllm_traits.batch import BatchOutput, IntArray
from vllm_traits.errors import (
    BackendError,
    BackendOutOfMemoryError,
    ConfigError,
    ContextLengthError,
    EngineDeadError,
    InvalidRequestError,
    KvCacheTooSmallError,
    QueueFullError,
    RequestTooLargeError,
)
from vllm_traits.ids import SeqId
from vllm_traits.sampling_params import MAX_SEED, SamplingParams

logger = logging.getLogger(__name__)


class Engine:
    """Runs many requests on one model at once. Not thread-safe; see :class:`~vllm_core.AsyncEngine`.

    Args:
        target_model: What runs the steps; the engine initializes it and closes it.
        draft_model: Guesses what the target will say, with a KV cache of its own beside the target's; closed with it.
        max_draft_tokens: Most guesses for a sequence in one step; None: the configuration's.
        proposers: Who guesses besides those that the configuration names; asked after them, before the draft model.
        config: Limits and policies.
        registry: Where the metrics are registered; None: a registry of their own.
        model_name: The metrics' label; None: the model's own.
        clock: Seconds, monotonic.

    Raises:
        ConfigError: The configuration does not fit the model, or the draft does not fit the target.
        KvCacheTooSmallError: One sequence of full length does not fit into the memory for the KV cache.
    """

    def __init__(
        self,
        target_model: ModelBackend,
        draft_model: ModelBackend | None = None,
        *,
        max_draft_tokens: int | None = None,
        proposers: Sequence[Proposer] = (),
        config: EngineConfig | None = None,
        registry: CollectorRegistry | None = None,
        model_name: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        config = config or EngineConfig()
        if max_draft_tokens is not None:
            config = msgspec.structs.replace(config, max_draft_tokens=max_draft_tokens)
        spec = target_model.spec
        if config.max_model_len is not None and config.max_model_len > spec.max_model_len:
            raise ConfigError(f"max_model_len is {config.max_model_len}; {spec.name} allows {spec.max_model_len} at most.")
        self.target_model = target_model
        self.draft_model = draft_model
        self.max_draft_tokens = config.max_draft_tokens
        self.config = config
        self.max_model_len = config.max_model_len or spec.max_model_len
        check_speculation(config, target_model.spec, draft_model, self.max_model_len, has_proposers=bool(proposers))
        self.num_blocks = config.num_blocks or self._size_kv_cache()
        self._clock = clock
        self.scheduler = Scheduler(
            config, max_model_len=self.max_model_len, num_blocks=self.num_blocks, eos_token_ids=spec.eos_token_ids
        )
        target_model.initialize(
            self.scheduler.state, num_blocks=self.num_blocks, max_num_batched_tokens=config.max_num_batched_tokens
        )
        if config.max_draft_tokens:
            self.scheduler.speculator = build_speculator(
                config, spec, self.scheduler.state, proposers, draft_model, num_blocks=self.num_blocks, clock=clock
            )
        self.metrics = EngineMetrics(
            model_name=model_name or spec.name,
            max_model_len=self.max_model_len,
            max_draft_tokens=config.max_draft_tokens,
            gauges=self._gauges,
            info={"block_size": str(config.block_size), "num_gpu_blocks": str(self.num_blocks)},
            registry=registry,
        )
        self._closed = False
        self._requests: dict[str, Request] = {}
        self._in_flight: deque[_InFlight] = deque()
        self._depth = 2 if spec.supports_overlap else 1
        self._num_requests = 0
        self._num_sequences = 0
        self._last_commit_time = 0.0
        self._troubled: set[Seq] = set()
        self._report: list[RequestOutput] = []

    # --- requests ---

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling_params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> RequestOutput:
        """Queue a request.

        Args:
            request_id: Unique among those that have not finished.
            prompt_token_ids: At least one.
            sampling_params: How to continue it.
            priority: Lower runs first, under the ``priority`` policy.
            cache_salt: Requests with different salts share no cached prefix.

        Returns:
            Its output, which ``step`` fills.

        Raises:
            InvalidRequestError: A value is wrong; ``param`` says which.
            ContextLengthError: The prompt leaves no room for a token.
            RequestTooLargeError: It could not fit into the KV cache even alone.
            QueueFullError: Too many wait.
        """
        prompt, limit = self._check(request_id, prompt_token_ids, sampling_params, priority)
        params, spec = sampling_params, self.target_model.spec
        output = RequestOutput(
            request_id=request_id,
            prompt_token_ids=prompt.tolist(),
            outputs=[CompletionOutput(i, logprobs=None if params.logprobs is None else []) for i in range(params.n)],
            metrics=RequestMetrics(arrival_time=self._clock()),
            prompt_logprobs=None if params.prompt_logprobs is None else [None] * len(prompt),
        )
        self._num_requests += 1
        request = Request(request_id, params, priority, self._num_requests, output, num_left=params.n)
        stops = () if params.ignore_eos else spec.eos_token_ids
        seed = params.seed if params.seed is not None else _derive_seed(self.config.seed, self._num_requests)
        for completion in output.outputs:
            self._num_sequences += 1
            sequence = Seq(
                seq_id=SeqId(self._num_sequences),
                request=request,
                completion=completion,
                key=self._key(request, completion.index),
                prompt=prompt,
                limit=limit,
                seed=seed if completion.index == 0 else _derive_seed(seed, completion.index),
                stop_token_ids=(*stops, *(params.stop_token_ids or ())),
                own_stops=frozenset(params.stop_token_ids or ()),
                root=root_key(cache_salt),
                keys=list(request.sequences[0].keys) if request.sequences else [],  # the prompt is the same
            )
            request.sequences.append(sequence)
            self.scheduler.add(sequence)
        self._requests[request_id] = request
        return output

    def abort(self, request_id: str) -> bool:
        """End a request wherever it is; False if it is not known (any more)."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        for sequence in request.sequences:
            self._end(sequence, "abort", None)
        return True

    def abort_choice(self, request_id: str, index: int, *, stop_reason: str | None = None) -> bool:
        """End one choice. With ``stop_reason``, the stop string that was met, it counts as stopped, else as aborted."""
        request = self._requests.get(request_id)
        if request is None or not 0 <= index < len(request.sequences):
            return False
        if request.sequences[index].status is Status.FINISHED:
            return False
        self._end(request.sequences[index], "abort" if stop_reason is None else "stop", stop_reason)
        return True

    def set_priority(self, request_id: str, priority: int) -> bool:
        """Give a request another priority, wherever it is; False if it is not known (any more).

        Raises:
            InvalidRequestError: It is no integer.
        """
        _check_priority(priority)
        request = self._requests.get(request_id)
        if request is None:
            return False
        request.priority = priority
        for sequence in request.sequences:
            if sequence.status is not Status.FINISHED:
                self.scheduler.rekey(sequence, self._key(request, sequence.completion.index))
        return True

    def has_unfinished_requests(self) -> bool:
        """Whether ``step`` has anything to do or to report."""
        return bool(self._requests or self._in_flight or self._report)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False, and nothing is done, while requests run."""
        return not self._in_flight and self.scheduler.reset_prefix_cache()

    # --- steps ---

    def step(self) -> list[RequestOutput]:
        """Run one step.

        With a model that overlaps, the next step is submitted before the tokens of the one before are read, so a call may
        return tokens of the step before, or nothing yet. Guesses need the tokens before them: then steps do not overlap.

        Returns:
            The requests that have a token more or have ended by it; not those that were aborted meanwhile.
        """
        guessing = self.scheduler.wants_guesses()
        if guessing:
            self._drain()
        scheduled = self.scheduler.schedule()
        if scheduled is not None:
            self._submit(scheduled)
        if self._in_flight and (scheduled is None or guessing or len(self._in_flight) == self._depth):
            self._commit()
        outputs, self._report = self._report, []
        return outputs

    def close(self) -> None:
        """Abort everything and close the model; idempotent. Nothing can be added after it."""
        self._closed = True
        for request_id in list(self._requests):
            self.abort(request_id)
        self._drain()
        self._report = []
        self.target_model.close()
        if self.scheduler.speculator is not None:
            self.scheduler.speculator.close()

    def kv_cache_summary(self) -> str:
        """What was made of the memory, in one line."""
        tokens = self.num_blocks * self.config.block_size
        return (
            f"KV cache: {self.num_blocks:,} blocks of {self.config.block_size} tokens = {tokens:,} tokens, "
            f"{tokens / self.max_model_len:.1f} requests of {self.max_model_len:,} tokens"
        )

    def check_integrity(self) -> None:
        """Prove the engine's invariants, between steps.

        Raises:
            AssertionError: One does not hold.
        """
        self.scheduler.check_integrity()
        alive = {s for request in self._requests.values() for s in request.sequences if s.status is not Status.FINISHED}
        assert set(self.scheduler.running) <= alive
        assert len(alive) == len(self.scheduler.running) + self.scheduler.num_waiting
        assert all(any(s in alive for s in request.sequences) for request in self._requests.values())

    # --- inside a step ---

    def _submit(self, scheduled: ScheduledStep) -> None:
        now = self._clock()
        for sequence in self.scheduler.last_admitted:
            metrics = sequence.request.output.metrics
            if metrics.first_scheduled_time is None:
                metrics.first_scheduled_time = now
                self.metrics.request_queue_time.observe(now - metrics.arrival_time)
                self.metrics.prompt_tokens += len(sequence.prompt)
        handle: StepHandle
        try:
            handle = self.target_model.submit(scheduled.batch)
        except Exception as error:  # whatever a backend raises must not end the engine
            handle = _NotStarted(error)
        self._in_flight.append(_InFlight(scheduled, handle, now))
        if isinstance(handle, _NotStarted):
            self._drain()  # in order: what was under way may be good, or fail before this

    def _commit(self) -> None:
        """Take in the oldest step under way."""
        under_way = self._in_flight.popleft()
        step = under_way.step
        try:
            output = under_way.handle.result()
            _check_output(step, output, self.target_model.spec.vocab_size)
        except Exception as error:  # as above
            later = [each.step for each in self._in_flight]
            for each in self._in_flight:
                _settle(each.handle)
            self._in_flight.clear()
            self._recover([step, *later], error)
            return
        now = self._clock()
        committed = self.scheduler.commit(step, output, now)
        self._record(step, committed, now)
        if self.scheduler.speculator is not None:
            batch = step.batch
            if batch.num_tokens - int(batch.num_draft.sum()) == batch.num_rows:  # no prompt was in it
                took = now - max(under_way.submitted, self._last_commit_time)
                self.scheduler.speculator.observe_step(batch.num_tokens, committed.num_new, took)
        self._last_commit_time = now
        if self._troubled:
            for sequence in [each for each in self._troubled if self.scheduler.got_past_failure(each)]:
                sequence.num_failures = sequence.failed_at = 0
                self._troubled.discard(sequence)
                self.scheduler.suspects.discard(sequence)

    def _drain(self) -> None:
        while self._in_flight:
            self._commit()

    def _recover(self, steps: list[ScheduledStep], error: Exception) -> None:
        """After a failed step: undo it, and decide who runs again and how.

        Out of memory, the later half gives way. Otherwise all run once more; after a second failure each runs alone past
        the place, so that a request which breaks the model cannot take others with it, and one that fails alone is given up.
        """
        failed = [sequence for sequence in self.scheduler.rewind(steps) if sequence.status is Status.RUNNING]
        logger.warning("A step of %d sequences failed: %s", len(failed), error)
        if isinstance(error, BackendOutOfMemoryError) and len(self.scheduler.running) > 1:
            self.scheduler.give_way()
            return
        for sequence in failed:
            sequence.num_failures += 1
            self._troubled.add(sequence)
            if sequence.num_failures > ALONE_AFTER:
                self._end(sequence, "abort", "backend_error")
            elif sequence.num_failures == ALONE_AFTER:
                self.scheduler.suspects.add(sequence)

    def _record(self, step: ScheduledStep, committed: Committed, now: float) -> None:
        """Times, counts, and who is reported."""
        metrics, scheduler = self.metrics, self.scheduler
        metrics.iteration_tokens.observe(step.batch.num_tokens)
        metrics.generation_tokens += committed.num_new
        stats = scheduler.prefix_cache.stats
        metrics.prefix_cache_queries, metrics.prefix_cache_hits = stats.num_queried_tokens, stats.num_hit_tokens
        metrics.num_preemptions = scheduler.num_preemptions
        since = committed.since_last
        if committed.is_first.any():
            since = since[~committed.is_first]
            for row in np.flatnonzero(committed.is_first).tolist():
                self._record_first_token(committed.sequences[row].request.output.metrics, now)
        metrics.inter_token_latency.observe(since)
        if step.has_guesses:
            metrics.spec_decode_num_drafts = scheduler.num_drafts
            metrics.spec_decode_num_draft_tokens = scheduler.num_draft_tokens
            metrics.spec_decode_num_accepted_tokens_per_pos[:] = scheduler.num_accepted_per_pos
        for sequence in committed.ended:
            self._ended_choice(sequence, now)
        self._report.extend(committed.outputs)

    def _record_first_token(self, times: RequestMetrics, now: float) -> None:
        if times.first_token_time is None:
            times.first_token_time = now
            self.metrics.time_to_first_token.observe(now - times.arrival_time)
            assert times.first_scheduled_time is not None
            self.metrics.request_prefill_time.observe(now - times.first_scheduled_time)

    def _end(self, sequence: Seq, reason: FinishReason, stop_reason: str | None) -> None:
        if sequence.status is Status.FINISHED:
            return
        self.scheduler.finish(sequence)
        sequence.completion.stop_reason = stop_reason
        sequence.completion.finish_reason = reason
        self._ended_choice(sequence, self._clock())
        if stop_reason == "backend_error":
            self._report.append(sequence.request.output)

    def _ended_choice(self, sequence: Seq, now: float) -> None:
        """Count a choice that is over, and its request with the last of them."""
        request, metrics = sequence.request, self.metrics
        self._troubled.discard(sequence)
        self.scheduler.suspects.discard(sequence)
        reason = sequence.completion.finish_reason
        assert reason is not None
        metrics.request_success[reason] += 1
        metrics.request_generation_tokens.observe(len(sequence.completion.token_ids))
        request.num_left -= 1
        if request.num_left:
            return
        times = request.output.metrics
        times.finished_time = now
        metrics.request_prompt_tokens.observe(len(sequence.prompt))
        metrics.e2e_request_latency.observe(now - times.arrival_time)
        if times.first_token_time is not None:
            metrics.request_decode_time.observe(now - times.first_token_time)
        del self._requests[request.request_id]
        request.output.finished = True

    # --- checks ---

    def _size_kv_cache(self) -> int:
        config = self.config
        models = [self.target_model] if self.draft_model is None else [self.target_model, self.draft_model]
        budgets = [
            model.kv_cache_budget(
                block_size=config.block_size,
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
            )
            for model in models
        ]
        # A block is a block in both; each says what would be left for it alone, on the same device.
        reserved = sum(each.reserved_bytes for each in budgets)
        budget = KvCacheBudget(
            available_bytes=min(each.available_bytes + each.reserved_bytes for each in budgets) - reserved,
            bytes_per_block=sum(each.bytes_per_block for each in budgets),
            reserved_bytes=reserved,
        )
        needed = -(-self.max_model_len // config.block_size)
        if budget.num_blocks < needed:
            fits = max(0, budget.num_blocks * config.block_size)
            gib = needed * budget.bytes_per_block / 2**30
            raise KvCacheTooSmallError(
                f"The memory left for the KV cache holds {fits:,} tokens, less than one request of max_model_len "
                f"{self.max_model_len:,}. Set max_model_len to {fits:,} or less, or give the KV cache {gib:.2f} GiB."
            )
        return budget.num_blocks

    def _key(self, request: Request, index: int) -> tuple[int, int, int]:
        """The place in every queue of one of its choices."""
        if self.config.scheduling_policy != "priority":
            return queue_key(request.arrival, index, 0, 0)
        return queue_key(request.arrival, index, request.priority, self.config.priority_aging)

    def _check(
        self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams, priority: int
    ) -> tuple[IntArray, int]:
        """The prompt as int32 ``[num_prompt_tokens]`` and the length in tokens at which the request ends."""
        spec, block_size = self.target_model.spec, self.config.block_size
        if self._closed:
            raise EngineDeadError("The engine is closed.")
        _check_priority(priority)
        if request_id in self._requests:
            raise InvalidRequestError(f"request_id {request_id!r} is taken by a request that has not finished.", "request_id")
        try:
            prompt = np.array(prompt_token_ids)
        except (OverflowError, TypeError, ValueError) as error:
            raise InvalidRequestError("prompt must be a list of token ids.", "prompt") from error
        if prompt.ndim != 1 or len(prompt) == 0:
            raise InvalidRequestError("prompt must hold at least one token.", "prompt")
        if prompt.dtype.kind not in "iu":
            raise InvalidRequestError("prompt must be a list of token ids.", "prompt")
        if int(prompt.min()) < 0 or int(prompt.max()) >= spec.vocab_size:
            raise InvalidRequestError(f"prompt holds a token id outside 0 to {spec.vocab_size - 1}.", "prompt")
        if len(prompt) >= self.max_model_len:
            raise ContextLengthError(
                f"This model's maximum context length is {self.max_model_len} tokens, but the prompt holds {len(prompt)}; "
                "at least one must be left for the output.",
                "prompt",
            )
        params.check_vocabulary(spec.vocab_size)
        if params.structured_outputs is not None and not spec.supports_structured_outputs:
            raise InvalidRequestError("structured_outputs is not supported by this model's backend.", "structured_outputs")
        limit = min(len(prompt) + (params.max_tokens or self.max_model_len), self.max_model_len)
        blocks = -(-(limit - 1) // block_size)  # the last token is not run
        if blocks > self.num_blocks:
            raise RequestTooLargeError(
                f"prompt and max_tokens need {limit - 1} tokens of KV cache; this engine has {self.num_blocks * block_size}.",
                "max_tokens",
            )
        if params.n > self.config.max_num_waiting:
            raise InvalidRequestError(f"n is {params.n}; this engine lets {self.config.max_num_waiting} wait at most.", "n")
        if self.scheduler.num_waiting + params.n > self.config.max_num_waiting:
            raise QueueFullError(
                f"{self.scheduler.num_waiting} sequences wait; max_num_waiting is {self.config.max_num_waiting}."
            )
        return prompt.astype(np.int32), limit

    def _gauges(self) -> dict[str, float]:
        return {
            "num_requests_running": len(self.scheduler.running),
            "num_requests_waiting": self.scheduler.num_waiting,
            "kv_cache_usage_perc": self.scheduler.pool.usage,
        }


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A step under way, and when it was submitted."""

    step: ScheduledStep
    handle: StepHandle
    submitted: float


@dataclass(frozen=True, slots=True)
class _NotStarted:
    """The handle of a step that could not be submitted."""

    error: Exception

    def done(self) -> bool:
        return True

    def result(self) -> BatchOutput:
        raise self.error


def _check_priority(priority: int) -> None:
    if not isinstance(priority, int):
        raise InvalidRequestError(f"priority is {priority!r}; it must be an integer.", "priority")


def _check_output(step: ScheduledStep, output: BatchOutput, vocab_size: int) -> None:
    """A token that nobody asked for, or outside the vocabulary, would become an index somewhere: not from here.

    Raises:
        BackendError: The output does not fit the batch.
    """
    batch, tokens = step.batch, output.token_ids
    if tokens.ndim != 2 or len(tokens) != batch.num_rows or tokens.shape[1] == 0:
        raise BackendError(f"the model returned tokens of shape {tokens.shape} for {batch.num_rows} rows")
    given = tokens >= 0
    counts = given.sum(axis=1)
    allowed = batch.num_draft + 1 if step.has_guesses else 1
    if (given[:, 0] != batch.sample).any() or (counts > allowed).any():
        raise BackendError("the model returned fewer tokens than one, or more than the guesses and one, for some row")
    if int(tokens.max()) >= vocab_size:
        raise BackendError("the model returned a token outside its vocabulary")
    for reports, allowed_entries in ((output.logprobs, counts), (output.prompt_logprobs, batch.query_lens)):
        for row, entries in reports.items():
            if not 0 <= row < batch.num_rows or len(entries) > allowed_entries[row]:
                raise BackendError(f"the model reported {len(entries)} log-probabilities for row {row}")
            if any(len(each.logprobs) == 0 or len(each.logprobs) != len(each.token_ids) for each in entries):
                raise BackendError(f"the model reported log-probabilities for row {row} that are incomplete")
    for row in np.flatnonzero(counts > 1).tolist():
        count, guesses = int(counts[row]), batch.token_ids[batch.query_start[row + 1] - batch.num_draft[row] :]
        if not given[row, :count].all() or (tokens[row, : count - 1] != guesses[: count - 1]).any():
            raise BackendError(f"the model accepted {tokens[row].tolist()} where {guesses.tolist()} was guessed")


def _settle(handle: StepHandle) -> None:
    """Wait for a step that does not count any more."""
    try:
        handle.result()
    except Exception:
        logger.debug("A step under way failed after one before it", exc_info=True)


def _derive_seed(seed: int, index: int) -> int:
    return int.from_bytes(sha256(f"{seed}:{index}".encode()).digest()[:8], "big") & MAX_SEED
