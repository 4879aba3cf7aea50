"""What an engine is set up with."""

from typing import Literal, get_args

import msgspec

from vllm_traits.errors import ConfigError

SchedulingPolicy = Literal["fcfs", "priority", "lpm"]
ProposerName = Literal["ngram", "suffix"]
MAX_LOOKUP = 16


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Limits and policies of one engine; the names are vLLM's.

    Raises:
        ConfigError: A value that cannot work, alone or against the others.
    """

    max_num_seqs: int = 256
    """Sequences that run at once; each holds a row of the backend's state."""
    max_num_batched_tokens: int = 4096
    """Tokens that one step runs, over all sequences."""
    block_size: int = 16
    """Tokens per KV block."""
    max_model_len: int | None = None
    """Longest sequence in tokens; None: the model's own."""
    num_blocks: int | None = None
    """KV blocks; None: as many as the backend has memory for."""
    enable_prefix_caching: bool = True
    max_num_waiting: int = 10_000
    """Sequences that may wait; beyond it requests are refused."""
    scheduling_policy: SchedulingPolicy = "fcfs"
    """``fcfs``: first come, first served. ``priority``: lower numbers first; a waiting one takes the place of a running one
    with a higher number. ``lpm`` (longest prefix match): of the first that wait, the one whose prompt is cached furthest."""
    priority_aging: int = 1024
    """A level of priority lets at most this many later requests overtake; 0: any number, a request may wait for ever."""
    long_prefill_token_threshold: int = 0
    """Most prompt tokens of one sequence in one step; 0: what the budget allows."""
    max_draft_tokens: int = 0
    """Most tokens guessed for a sequence in one step; 0: no speculation. Fewer where they do not pay."""
    proposers: tuple[ProposerName, ...] = ()
    """Who guesses, besides a draft model: ``ngram`` looks in the sequence itself, ``suffix`` in those that ended before. Asked
    in this order, then the draft model, for what has no guess yet."""
    prompt_lookup_min: int = 2
    """Fewest last tokens that ``ngram`` looks for."""
    prompt_lookup_max: int = 4
    """Most last tokens that ``ngram`` looks for."""
    seed: int = 0
    """Seeds of requests that bring none derive from it."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size", "max_num_waiting"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("max_model_len", "num_blocks"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("long_prefill_token_threshold", "max_draft_tokens", "priority_aging"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 0.")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs ({self.max_num_seqs}), "
                "or some sequences could never run together."
            )
        if self.scheduling_policy not in get_args(SchedulingPolicy):
            raise ConfigError(f"scheduling_policy is {self.scheduling_policy!r}; it must be fcfs, priority or lpm.")
        if not 1 <= self.prompt_lookup_min <= self.prompt_lookup_max <= MAX_LOOKUP:
            raise ConfigError(
                f"prompt_lookup_min ({self.prompt_lookup_min}) and prompt_lookup_max ({self.prompt_lookup_max}) must be 1 to "
                f"{MAX_LOOKUP}, the first at most the second."
            )
        for proposer in self.proposers:
            if proposer not in get_args(ProposerName):
                raise ConfigError(f"proposers holds {proposer!r}; it may hold ngram and suffix.")
