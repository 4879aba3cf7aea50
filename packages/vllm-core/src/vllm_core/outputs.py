"""What the engine says about a request."""

from dataclasses import dataclass, field
from typing import Literal

from vllm_traits.batch import TokenLogprobs

FinishReason = Literal["stop", "length", "abort"]


@dataclass(slots=True)
class RequestMetrics:
    """One request's time line, in seconds of the engine's clock (``time.monotonic``); None: not yet."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    num_draft_tokens: int = 0
    """Guesses that steps held, over all choices."""
    num_accepted_tokens: int = 0
    """Those that were right."""


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's ``n`` choices.

    Attributes:
        text: Filled by the layer that has a tokenizer.
        token_ids: All tokens so far, a stop token included.
        logprobs: One entry a token, if asked for.
        finish_reason: ``stop`` (a stop token, or a stop string), ``length`` or ``abort``.
        stop_reason: The stop token id or stop string; None for the model's own end of sequence; ``"backend_error"`` when
            the model failed on this request again and again.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """A request's state, all of it, not what is new.

    The engine makes one such object a request and goes on filling it: lists only grow, and ``finished`` is set last. Whoever
    wants to keep a moment of it copies.
    """

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """One entry a prompt token, the first None, if asked for."""
    num_cached_tokens: int = 0
    """Prompt tokens that were not computed for this request (its first choice) because their KV was there."""
    finished: bool = False
