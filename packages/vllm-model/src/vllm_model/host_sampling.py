"""Tokens and log-probabilities of rows whose logits are on the host's path, the same for every device."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch

from vllm_model.sampler import sample, token_logprobs
from vllm_model.structured import HeldRows
from vllm_model.verifier import Indices, accept_guesses, guess_table, sampled_entries
from vllm_traits.batch import Batch, BatchOutput, TokenLogprobs
from vllm_traits.sampling_params import SamplingParams

PIECE = 256
"""Tokens whose logits are handled at once: a step with many guesses, or with a prompt to score, has thousands."""


def params_of(batch: Batch, row: int) -> SamplingParams:
    """A row's parameters."""
    params = batch.state.params[int(batch.slots[row])]
    assert params is not None
    return params


def scores_prompt(batch: Batch, row: int) -> bool:
    """Whether a row's prompt tokens are to be scored by this step."""
    started = int(batch.num_computed[row]) < int(batch.state.num_prompt_tokens[batch.slots[row]])
    return params_of(batch, row).prompt_logprobs is not None and started


def is_special(params: SamplingParams) -> bool:
    """Whether a request asks for more than temperature and filters: its logits changed, or reported on."""
    return (
        params.logprobs is not None
        or params.prompt_logprobs is not None
        or params.has_penalties
        or params.logit_bias is not None
        or params.allowed_token_ids is not None
        or params.min_tokens > 0
        or params.structured_outputs is not None
    )


def wanted_tokens(batch: Batch) -> tuple[Indices, Indices]:
    """Which of the step's tokens need logits, and where each row's begin among them: int64 ``[num_wanted]``, ``[num_rows]``."""
    wanted = sampled_entries(batch).tokens
    scored = _scored_rows(batch)
    if scored:
        needed = np.zeros(batch.num_tokens, np.bool_)
        needed[wanted] = True
        for row in scored:
            needed[batch.query_start[row] : batch.query_start[row + 1]] = True
        wanted = np.flatnonzero(needed)
    return wanted, np.searchsorted(wanted, batch.query_start[:-1])


def sample_on_host(batch: Batch, logits: torch.Tensor, first: Indices, pending: Mapping[int, int] | None = None) -> BatchOutput:
    """All that a step gives.

    Args:
        batch: The step.
        logits: float32 ``[len(wanted), vocab_size]``, of :func:`wanted_tokens`.
        first: Of :func:`wanted_tokens`.
        pending: By row, the token that ``LAST_SAMPLED`` stands for.
    """

    def logits_of(places: Indices) -> torch.Tensor:
        return logits if len(places) == len(logits) else logits[torch.from_numpy(places).to(logits.device)]

    return sample_in_pieces(batch, logits_of, len(logits), first, pending)


def sample_in_pieces(
    batch: Batch,
    logits_of: Callable[[Indices], torch.Tensor],
    num_wanted: int,
    first: Indices,
    pending: Mapping[int, int] | None = None,
    held: HeldRows | None = None,
) -> BatchOutput:
    """All that a step gives, with the logits of at most ``PIECE`` tokens in memory at once.

    Args:
        batch: The step.
        logits_of: From places among the wanted tokens, int64 ``[n]``, to their logits, float32 ``[n, vocab_size]``, a tensor
            that may be changed.
        num_wanted: How many :func:`wanted_tokens` there are.
        first: Of :func:`wanted_tokens`.
        pending: By row, the token that ``LAST_SAMPLED`` stands for.
        held: Rows that are held to a grammar.
    """
    prompt_logprobs = {row: _prompt_logprobs(batch, row, logits_of, int(first[row])) for row in _scored_rows(batch)}
    entries = sampled_entries(batch)
    masks = None if held is None else held.masks(batch, entries)
    ends = np.append(first[1:], num_wanted)[entries.rows]
    at = ends - 1 - batch.num_draft[entries.rows] + entries.places  # a row's own logits are its last wanted ones
    sampled = np.full((batch.num_rows, entries.width), -1, np.int64)
    logprobs: dict[int, list[TokenLogprobs]] = {}
    for piece in _pieces(len(entries)):
        part = entries.part(piece)
        own = logits_of(at[piece])
        reported = [i for i, row in enumerate(part.rows.tolist()) if params_of(batch, row).logprobs is not None]
        raw = own[torch.tensor(reported, device=own.device)] if reported else own
        tokens = sample(own, batch, part, pending, masks and masks.part(piece)).cpu().numpy()
        sampled[part.rows, part.places] = tokens
        for place, i in enumerate(reported):
            row = int(part.rows[i])
            entry = token_logprobs(raw[place : place + 1], [int(tokens[i])], params_of(batch, row).logprobs or 0)
            logprobs.setdefault(row, []).extend(entry)
    token_ids = accept_guesses(torch.from_numpy(sampled), torch.from_numpy(guess_table(batch, entries.width))).numpy()
    for row, reports in logprobs.items():
        del reports[np.count_nonzero(token_ids[row] >= 0) :]
    return BatchOutput(token_ids=token_ids, logprobs=logprobs, prompt_logprobs=prompt_logprobs)


def _scored_rows(batch: Batch) -> list[int]:
    in_prompt = np.flatnonzero(batch.num_computed < batch.state.num_prompt_tokens[batch.slots])
    return [row for row in in_prompt.tolist() if scores_prompt(batch, row)]


def _prompt_logprobs(batch: Batch, row: int, logits_of: Callable[[Indices], torch.Tensor], first: int) -> list[TokenLogprobs]:
    """Of the prompt tokens that this row's chunk predicts; ``first`` is the row's first place among the wanted tokens."""
    slot, start = int(batch.slots[row]), int(batch.num_computed[row])
    end = min(start + int(batch.query_lens[row]), int(batch.state.num_prompt_tokens[slot]) - 1)
    following = batch.state.token_ids[slot, start + 1 : end + 1].tolist()
    num = params_of(batch, row).prompt_logprobs or 0
    entries: list[TokenLogprobs] = []
    for piece in _pieces(len(following)):
        chosen = following[piece]
        places = np.arange(len(chosen), dtype=np.int64) + first + piece.start
        entries += token_logprobs(logits_of(places), chosen, num)
    return entries


def _pieces(length: int) -> Iterator[slice]:
    return (slice(start, min(start + PIECE, length)) for start in range(0, length, PIECE))
