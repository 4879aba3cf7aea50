"""What a caller may ask of one request. Field names and meanings are vLLM's."""

import math
from typing import Any

import msgspec

from vllm_traits.errors import InvalidRequestError

MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_LIST_LENGTH = 1024
MAX_SEED = 2**63 - 1


class StructuredOutputsParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """At most one of these constrains the output. A backend that cannot is refused when the request is added."""

    json: Any = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool = False


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the tokens of one request are chosen, and when it ends.

    Raises:
        InvalidRequestError: A value is out of its range; ``param`` names the field.
    """

    n: int = 1
    """Choices for one prompt, ``1..128``; they share the prompt's KV blocks."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probabilities reach this, in ``(0, 1]``."""
    top_k: int = 0
    """Keep this many of the most likely tokens; 0 or -1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this likely relative to the most likely one, in ``[0, 1]``."""
    seed: int | None = None
    """Fixes the noise: token ``i`` of a sequence depends on ``(seed, i)`` alone. None: drawn by the engine."""
    max_tokens: int | None = 16
    """Most tokens to generate; None: the rest of the context."""
    min_tokens: int = 0
    """No stop token is sampled before this many tokens."""
    stop: str | list[str] | None = None
    """Strings that end the output (needs text, so it is applied where tokens become text)."""
    stop_token_ids: list[int] | None = None
    """Tokens that end the output, besides the model's end-of-sequence tokens."""
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    detokenize: bool = True
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token generated before, ``[-2, 2]``."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for every time it was generated before, ``[-2, 2]``."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen in prompt or output, ``(0, inf)``."""
    logit_bias: dict[int, float] | None = None
    """Added to the logits of these tokens, ``[-100, 100]`` each."""
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    logprobs: int | None = None
    """Log-probabilities of this many most likely tokens (0..20) and of the sampled one, per position."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens; such a request computes its whole prompt."""
    structured_outputs: StructuredOutputsParams | None = None

    @property
    def stop_strings(self) -> list[str]:
        """``stop`` as a list."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def has_penalties(self) -> bool:
        """Whether a logit depends on the tokens before it."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    def __post_init__(self) -> None:
        _in_range("n", self.n, 1, MAX_CHOICES)
        _in_range("temperature", self.temperature, 0.0, 100.0)
        _in_range("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _in_range("top_k", self.top_k, -1, 2**31 - 1)
        _in_range("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _in_range("seed", self.seed, -MAX_SEED - 1, MAX_SEED)
        if self.max_tokens is not None:
            _in_range("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _in_range("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens ({self.min_tokens}) must be at most max_tokens ({self.max_tokens}).", "min_tokens"
            )
        _in_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _in_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _in_range("repetition_penalty", self.repetition_penalty, 0.0, 1e6, open_low=True)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _in_range(name, getattr(self, name), 0, MAX_LOGPROBS)
        self._check_lists()

    def _check_lists(self) -> None:
        stops = self.stop_strings
        if len(stops) > MAX_STOP_STRINGS:
            raise InvalidRequestError(f"stop holds {len(stops)} strings; at most {MAX_STOP_STRINGS}.", "stop")
        if not all(stops):
            raise InvalidRequestError("stop must not contain an empty string.", "stop")
        for name in ("stop_token_ids", "logit_bias", "bad_words"):
            value = getattr(self, name)
            if value is not None and len(value) > MAX_LIST_LENGTH:
                raise InvalidRequestError(f"{name} holds {len(value)} entries; at most {MAX_LIST_LENGTH}.", name)
        for token, bias in (self.logit_bias or {}).items():
            _in_range(f"logit_bias[{token}]", bias, -100.0, 100.0)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidRequestError("allowed_token_ids must not be empty.", "allowed_token_ids")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse token ids outside the model's vocabulary.

        Raises:
            InvalidRequestError: ``param`` names the field that holds one.
        """
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            for token in getattr(self, name) or ():
                if not 0 <= token < vocab_size:
                    raise InvalidRequestError(
                        f"{name} holds token id {token}; the vocabulary has ids 0 to {vocab_size - 1}.", name
                    )


def _in_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    if math.isfinite(value) and low <= value <= high and not (open_low and value == low):
        return
    bracket = "(" if open_low else "["
    raise InvalidRequestError(f"{name} is {value}; it must be in {bracket}{low:g}, {high:g}].", name.partition("[")[0])
