"""Speculation as the configuration wants it."""

from collections.abc import Callable, Sequence

from vllm_core.draft_model_proposer import DraftModelProposer
from vllm_core.engine_config import EngineConfig
from vllm_core.ngram_proposer import NgramProposer
from vllm_core.proposer import Proposer
from vllm_core.speculator import Speculator
from vllm_core.suffix_proposer import SuffixProposer
from vllm_traits.backend import ModelBackend, ModelSpec
from vllm_traits.batch import BatchState
from vllm_traits.errors import ConfigError


def check_speculation(
    config: EngineConfig, spec: ModelSpec, draft: ModelBackend | None, max_model_len: int, *, has_proposers: bool
) -> None:
    """Whether configuration, target (``spec``) and draft fit each other.

    Raises:
        ConfigError: They do not.
    """
    guesses = bool(has_proposers or config.proposers or draft is not None)
    if guesses != (config.max_draft_tokens > 0):
        need = "at least 1 where something guesses" if guesses else "0 without a draft model or proposers"
        raise ConfigError(f"max_draft_tokens is {config.max_draft_tokens}; it must be {need}.")
    if config.max_draft_tokens > spec.max_draft_tokens:
        raise ConfigError(
            f"max_draft_tokens is {config.max_draft_tokens}; {spec.name} verifies {spec.max_draft_tokens} at most."
        )
    if draft is None:
        return
    if draft.spec.vocab_size != spec.vocab_size:
        raise ConfigError(
            f"draft_model {draft.spec.name} has {draft.spec.vocab_size} tokens, {spec.name} has {spec.vocab_size}: "
            "a draft must have the target's vocabulary."
        )
    if draft.spec.max_model_len < max_model_len:
        raise ConfigError(
            f"draft_model {draft.spec.name} allows {draft.spec.max_model_len} tokens, less than max_model_len {max_model_len}."
        )


def build_speculator(
    config: EngineConfig,
    spec: ModelSpec,
    state: BatchState,
    proposers: Sequence[Proposer],
    draft: ModelBackend | None,
    *,
    num_blocks: int,
    clock: Callable[[], float],
) -> Speculator:
    """Those that the configuration names, then ``proposers``, then the draft, which is initialized here.

    Raises:
        BackendOutOfMemoryError: The draft's KV cache does not fit.
    """
    chosen: list[Proposer] = []
    for name in config.proposers:
        if name == "ngram":
            chosen.append(NgramProposer(config.max_num_seqs, config.prompt_lookup_min, config.prompt_lookup_max))
        else:
            chosen.append(SuffixProposer())
    chosen.extend(proposers)
    if draft is not None:
        most = config.max_num_batched_tokens
        chosen.append(DraftModelProposer(draft, state, num_blocks=num_blocks, max_num_batched_tokens=most))
    return Speculator(
        chosen,
        max_num_seqs=config.max_num_seqs,
        max_draft_tokens=config.max_draft_tokens,
        vocab_size=spec.vocab_size,
        overlaps=spec.supports_overlap,
        clock=clock,
    )
