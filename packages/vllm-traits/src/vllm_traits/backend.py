"""The protocol that a model backend satisfies."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from vllm_traits.batch import Batch, BatchOutput, BatchState


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """What the engine must know of a model.

    Attributes:
        name: For logs and metrics.
        vocab_size: Token ids are ``0 <= id < vocab_size``.
        max_model_len: Longest sequence, prompt and output together, in tokens.
        eos_token_ids: Tokens that end a sequence unless ``ignore_eos``.
        supports_overlap: ``submit`` returns before the step is done, and the next batch may hold ``LAST_SAMPLED``.
            Without it the engine waits for each step.
        max_draft_tokens: Most guesses that a row may hold, 0: no speculation.
        supports_structured_outputs: Whether rows can be held to a grammar. Such a row never holds ``LAST_SAMPLED``: its next
            step is submitted when its token is known.
    """

    name: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...] = ()
    supports_overlap: bool = False
    max_draft_tokens: int = 0
    supports_structured_outputs: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCacheBudget:
    """Memory for the KV cache, in bytes.

    Attributes:
        available_bytes: What is there; below 0 where even the steps do not fit.
        bytes_per_block: What one block takes over all layers.
        reserved_bytes: What the backend keeps for its steps, already taken off ``available_bytes``: two backends on one device
            must leave each other's.
    """

    available_bytes: int
    bytes_per_block: int
    reserved_bytes: int = 0

    @property
    def num_blocks(self) -> int:
        """Blocks that fit."""
        return max(0, self.available_bytes // self.bytes_per_block)


class StepHandle(Protocol):
    """A step on its way."""

    def done(self) -> bool:
        """Whether ``result`` would return at once."""

    def result(self) -> BatchOutput:
        """Wait for the step and return what it gave.

        Raises:
            BackendError: The step failed; nothing that it wrote may be relied on.
        """


@dataclass(frozen=True, slots=True)
class CompletedStep:
    """The handle of a step that was over when ``submit`` returned, for backends that run in lock-step."""

    output: BatchOutput

    def done(self) -> bool:
        return True

    def result(self) -> BatchOutput:
        return self.output


@runtime_checkable
class ModelBackend(Protocol):
    """Runs forward passes and samples. All methods are called from one thread.

    Every layer of a step writes the keys and values of all its tokens before any row attends, so a row may read what
    another row of the same step wrote. A token sampled at position ``p`` with ``seed`` depends only on
    ``(tokens before p, sampling parameters, seed, p)``, not on what else ran.
    """

    @property
    def spec(self) -> ModelSpec:
        """What the engine must know of the model; constant."""

    def kv_cache_budget(self, *, block_size: int, max_num_seqs: int, max_num_batched_tokens: int) -> KvCacheBudget:
        """Memory left for the KV cache once the largest step has what it needs."""

    def initialize(self, state: BatchState, *, num_blocks: int, max_num_batched_tokens: int) -> None:
        """Allocate the KV cache (``num_blocks`` of ``state.block_size`` tokens) and all per-slot state; called once.

        Raises:
            BackendOutOfMemoryError: It does not fit.
        """

    def submit(self, batch: Batch) -> StepHandle:
        """Start the forward pass and the sampling of a step.

        Raises:
            BackendError: The step could not be started.
        """

    def close(self) -> None:
        """Give back memory and threads; idempotent."""
