"""From logits to tokens, for all entries of a step at once.

Noise is a pure function of (seed, position, token id), so a request's tokens do not depend on what runs beside it. The token is
the argmax of scaled logits plus Gumbel noise, an exact sample of their softmax (Gumbel, 1954; Maddison et al., 2014).
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from vllm_model.native import draw_tokens, load_kernels
from vllm_model.noise import gumbel_noise
from vllm_model.structured import StepMasks
from vllm_model.verifier import SampledEntries
from vllm_traits.batch import Batch, BatchState, TokenLogprobs
from vllm_traits.sampling_params import SamplingParams

NOISE_AT_ONCE = 1 << 16
"""Tokens whose noise is computed at once on the CPU, so that it stays in the cache."""


def sample(
    logits: torch.Tensor,
    batch: Batch,
    entries: SampledEntries,
    pending: Mapping[int, int] | None = None,
    masks: StepMasks | None = None,
) -> torch.Tensor:
    """The tokens of some places of some rows, each with the noise of its own position.

    Args:
        logits: float32 ``[len(entries), vocab_size]``; changed in place where parameters say so.
        batch: The step, whose state is still as it was.
        entries: What is to be sampled.
        pending: By row, the token before, where the state does not have it yet.
        masks: What may be sampled, of entries that are held to a grammar.

    Returns:
        int64 ``[len(entries)]``.
    """
    state, slots = batch.state, batch.slots[entries.rows]
    _adjust_all(logits, batch, entries, pending or {})
    if masks is not None:
        entry = torch.from_numpy(masks.entries).to(logits.device)
        banned = torch.from_numpy(~masks.allowed(logits.shape[1])).to(logits.device)
        logits[entry] = logits[entry].masked_fill_(banned, -torch.inf)
    kernels = load_kernels() if logits.device.type == "cpu" else None
    if kernels is not None:
        return draw_tokens(
            kernels,
            logits,
            state.temperature[slots],
            state.seed[slots],
            entries.positions,
            min_p=state.min_p[slots],
            top_p=state.top_p[slots],
            top_k=state.top_k[slots],
        )
    temperature = state.temperature[slots]
    hot = np.flatnonzero(temperature > 0)
    tokens = logits.argmax(dim=-1)
    if len(hot) == 0:
        return tokens
    index = torch.from_numpy(hot).to(logits.device)
    scaled = logits if len(hot) == len(entries) else logits[index]
    scaled = scaled / torch.from_numpy(temperature[hot]).to(logits.device)[:, None]
    filtered = _filter(scaled, state, slots[hot])
    seeds = torch.from_numpy(state.seed[slots[hot]]).to(logits.device)
    _add_noise(scaled, filtered, seeds, torch.from_numpy(entries.positions[hot]).to(logits.device))
    tokens[index] = scaled.argmax(dim=-1)
    return tokens


def _add_noise(scaled: torch.Tensor, filtered: npt.NDArray[np.bool_], seeds: torch.Tensor, positions: torch.Tensor) -> None:
    """Gumbel noise on ``[num, vocab_size]``, in place: where filters left little, on what they left."""
    device = scaled.device
    few, all_ = np.flatnonzero(filtered), np.flatnonzero(~filtered)
    if len(few):
        index = torch.from_numpy(few).to(device)
        row, token = torch.nonzero(scaled[index] > -torch.inf, as_tuple=True)
        row = index[row]
        scaled[row, token] += gumbel_noise(seeds[row], positions[row], token)
    vocabulary = torch.arange(scaled.shape[-1], device=device)[None]
    at_once = len(all_) if device.type != "cpu" else max(1, NOISE_AT_ONCE // scaled.shape[-1])
    for start in range(0, len(all_), max(1, at_once)):
        index = torch.from_numpy(all_[start : start + at_once]).to(device)
        scaled[index] += gumbel_noise(seeds[index, None], positions[index, None], vocabulary)


def token_logprobs(logits: torch.Tensor, chosen: list[int], num: int) -> list[TokenLogprobs]:
    """Log-probabilities of the chosen tokens and the ``num`` most likely ones.

    Args:
        logits: float32 ``[num_positions, vocab_size]``, before any adjustment.
    """
    logprobs = logits.log_softmax(dim=-1)
    picked = logprobs.gather(1, torch.tensor(chosen, device=logits.device)[:, None])  # [num_positions, 1]
    ranks = (logprobs > picked).sum(dim=-1).tolist()
    top = logprobs.topk(num, dim=-1)
    return [
        TokenLogprobs([token, *tokens], [own, *values], rank + 1)
        for token, tokens, own, values, rank in zip(
            chosen, top.indices.tolist(), picked[:, 0].tolist(), top.values.tolist(), ranks, strict=True
        )
    ]


def adjusts(params: SamplingParams, state: BatchState, slot: int, length: int) -> bool:
    """Whether logits of a sequence of ``length`` tokens are changed beyond temperature and filters."""
    return (
        params.has_penalties
        or params.logit_bias is not None
        or params.allowed_token_ids is not None
        or length - int(state.num_prompt_tokens[slot]) < params.min_tokens
    )


def _adjust_all(logits: torch.Tensor, batch: Batch, entries: SampledEntries, pending: Mapping[int, int]) -> None:
    """All that forbids or shifts tokens of an entry because of what its request wants and what stands before it, in place.

    The history of an entry is the row's first ``position`` tokens: guesses stand in the state behind the known ones, so an
    entry behind a guess sees it, and one behind a wrong guess is thrown away.
    """
    state = batch.state
    for i, (row, position) in enumerate(zip(entries.rows.tolist(), entries.positions.tolist(), strict=True)):
        slot = int(batch.slots[row])
        params = state.params[slot]
        assert params is not None
        if adjusts(params, state, slot, position):
            history = state.token_ids[slot, :position].astype(np.int64)
            if row in pending:
                history[-1] = pending[row]
            _adjust(logits[i], params, state, slot, history)


def _adjust(row: torch.Tensor, params: SamplingParams, state: BatchState, slot: int, history: npt.NDArray[np.int64]) -> None:
    """Allowed tokens, bias, minimum length and penalties of one row ``[vocab_size]`` after ``history``, in place."""
    length = len(history)
    prompt = int(state.num_prompt_tokens[slot])
    if params.allowed_token_ids is not None:
        allowed = torch.tensor(params.allowed_token_ids, device=row.device)
        kept = row[allowed]
        row.fill_(-torch.inf)
        row[allowed] = kept
    if params.logit_bias:
        index = torch.tensor(list(params.logit_bias), device=row.device)
        row[index] += torch.tensor(list(params.logit_bias.values()), dtype=row.dtype, device=row.device)
    if length - prompt < params.min_tokens and state.stop_token_ids[slot]:
        row[torch.tensor(state.stop_token_ids[slot], device=row.device)] = -torch.inf
    if params.has_penalties:
        tokens = torch.from_numpy(history).to(row.device)
        if params.repetition_penalty != 1.0:
            seen = torch.unique(tokens)
            values = row[seen]
            row[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
        said, counts = torch.unique(tokens[prompt:], return_counts=True)
        row[said] -= params.frequency_penalty * counts + params.presence_penalty


def _filter(scaled: torch.Tensor, state: BatchState, slots: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """min-p, top-k of what is left and top-p of what is left, as in vLLM, in place; equal logits stay or go together.

    Args:
        scaled: float32 ``[len(slots), vocab_size]``.

    Returns:
        bool ``[len(slots)]``, which rows have a filter.
    """
    device = scaled.device
    min_p, top_k, top_p = state.min_p[slots], state.top_k[slots], state.top_p[slots]
    if (min_p > 0).any():
        # p >= min_p * p_max, in logits. A log of zero keeps everything.
        bound = scaled.max(dim=-1, keepdim=True).values + torch.from_numpy(min_p).to(device).log()[:, None]
        scaled.masked_fill_(scaled < bound, -torch.inf)
    cut = (top_k > 0) | (top_p < 1)
    rows = np.flatnonzero(cut)
    if len(rows):
        index = torch.from_numpy(rows).to(device)
        chosen = scaled[index]
        least = _least_kept(chosen, torch.from_numpy(top_k[rows]).to(device), torch.from_numpy(top_p[rows]).to(device))
        scaled[index] = chosen.masked_fill_(chosen < least, -torch.inf)
    return cut | (min_p > 0)


def _least_kept(scaled: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The least logit of each row ``[num, vocab_size]`` that top-k and top-p leave, ``[num, 1]``."""
    vocab_size = scaled.shape[-1]
    on_host = scaled.device.type == "cpu"  # where numpy sorts 20 times as fast
    ordered = torch.from_numpy(np.sort(scaled.numpy(), axis=-1)) if on_host else scaled.sort(dim=-1).values
    kept = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size).long()
    least = ordered.gather(1, (vocab_size - kept)[:, None])
    probabilities = ordered.masked_fill(ordered < least, -torch.inf).softmax(dim=-1)
    above = 1 - probabilities.cumsum(dim=-1)  # mass of the more likely tokens
    wanted = torch.where(top_p < 1, top_p, torch.inf)[:, None]
    reached = ordered.masked_fill(above >= wanted, torch.inf).amin(dim=-1, keepdim=True)
    return torch.maximum(least, torch.minimum(reached, ordered[:, -1:]))  # the most likely token stays, whatever was rounded
