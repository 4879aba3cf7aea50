"""Tokens and log-probabilities of rows whose logits are on the host's path, the same for every device."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from vllm_model.sampler import adjusts, sample, token_logprobs
from vllm_traits.batch import Batch, BatchOutput, TokenLogprobs
from vllm_traits.sampling_params import SamplingParams

Indices = npt.NDArray[np.int64]


def params_of(batch: Batch, row: int) -> SamplingParams:
    """A row's parameters."""
    params = batch.state.params[int(batch.slots[row])]
    assert params is not None
    return params


def scores_prompt(batch: Batch, row: int) -> bool:
    """Whether a row's prompt tokens are to be scored by this step."""
    started = int(batch.num_computed[row]) < int(batch.state.num_prompt_tokens[batch.slots[row]])
    return params_of(batch, row).prompt_logprobs is not None and started


def may_need_host(params: SamplingParams) -> bool:
    """Whether :func:`needs_host` can ever be true for a request."""
    return (
        params.logprobs is not None
        or params.prompt_logprobs is not None
        or params.has_penalties
        or params.logit_bias is not None
        or params.allowed_token_ids is not None
        or params.min_tokens > 0
    )


def needs_host(batch: Batch, row: int) -> bool:
    """Whether a row's logits must be adjusted or reported on, beyond temperature and filters."""
    params, slot = params_of(batch, row), int(batch.slots[row])
    length = int(batch.num_computed[row] + batch.query_start[row + 1] - batch.query_start[row])
    sampled = bool(batch.sample[row]) and (params.logprobs is not None or adjusts(params, batch.state, slot, length))
    return sampled or scores_prompt(batch, row)


def wanted_tokens(batch: Batch) -> tuple[Indices, Indices]:
    """Which of the step's tokens need logits, and where each row's begin among them."""
    wanted: list[int] = []
    first: list[int] = []
    for row in range(batch.num_rows):
        start, end = int(batch.query_start[row]), int(batch.query_start[row + 1])
        first.append(len(wanted))
        if scores_prompt(batch, row):
            wanted.extend(range(start, end))
        elif batch.sample[row]:
            wanted.append(end - 1)
    return np.array(wanted, np.int64), np.array(first, np.int64)


def sample_on_host(batch: Batch, logits: torch.Tensor, first: Indices, pending: Mapping[int, int] | None = None) -> BatchOutput:
    """All that a step gives.

    Args:
        batch: The step.
        logits: float32 ``[len(wanted), vocab_size]``, of :func:`wanted_tokens`.
        first: Of :func:`wanted_tokens`.
        pending: By row, the token that ``LAST_SAMPLED`` stands for.
    """
    prompt_logprobs = {
        row: _prompt_logprobs(batch, row, logits[first[row] :]) for row in range(batch.num_rows) if scores_prompt(batch, row)
    }
    rows = np.flatnonzero(batch.sample)
    tokens = np.full((batch.num_rows, 1), -1, np.int32)
    logprobs: dict[int, list[TokenLogprobs]] = {}
    if len(rows):
        last = (np.append(first[1:], len(logits)) - 1)[rows]  # a row's own logits are its last wanted ones
        own = logits if len(last) == len(logits) else logits[torch.from_numpy(last).to(logits.device)]
        reported = [i for i, row in enumerate(rows.tolist()) if params_of(batch, row).logprobs is not None]
        raw = {i: own[i].clone() for i in reported}
        tokens[rows, 0] = sample(own, batch, rows, pending or {}).cpu().numpy()
        for i, values in raw.items():
            row = int(rows[i])
            logprobs[row] = token_logprobs(values[None], [int(tokens[row, 0])], params_of(batch, row).logprobs or 0)
    return BatchOutput(token_ids=tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs)


def _prompt_logprobs(batch: Batch, row: int, logits: torch.Tensor) -> list[TokenLogprobs]:
    """Of the prompt tokens that this row's chunk predicts; ``logits`` starts with the row's."""
    slot, start = int(batch.slots[row]), int(batch.num_computed[row])
    end = min(start + int(batch.query_lens[row]), int(batch.state.num_prompt_tokens[slot]) - 1)
    following = batch.state.token_ids[slot, start + 1 : end + 1].tolist()
    return token_logprobs(logits[: len(following)], following, params_of(batch, row).prompt_logprobs or 0)
