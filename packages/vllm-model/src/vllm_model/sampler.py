"""From logits to tokens, for all entries of a step at once.

Noise is a pure function of (seed, position, token id), so a request's tokens do not depend on what runs beside it. The token is
the argmax of scaled logits plus Gumbel noise, an exact sample of their softmax (Gumbel, 1954; Maddison et al., 2014).
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from vllm_model.noise import gumbel_noise
from vllm_model.verifier import SampledEntries
from vllm_traits.batch import Batch, BatchState, TokenLogprobs
from vllm_traits.sampling_params import SamplingParams


def sample(
    logits: torch.Tensor, batch: Batch, entries: SampledEntries, pending: Mapping[int, int] | None = None
) -> torch.Tensor:
    """The tokens of some places of some rows, each with the noise of its own position.

    Args:
        logits: float32 ``[len(entries), vocab_size]``; changed in place where parameters say so.
        batch: The step, whose state is still as it was.
        entries: What is to be sampled.
        pending: By row, the token before, where the state does not have it yet.

    Returns:
        int64 ``[len(entries)]``.
    """
    state, slots = batch.state, batch.slots[entries.rows]
    _adjust_all(logits, batch, entries, pending or {})
    temperature = state.temperature[slots]
    hot = np.flatnonzero(temperature > 0)
    tokens = logits.argmax(dim=-1)
    if len(hot) == 0:
        return tokens
    index = torch.from_numpy(hot).to(logits.device)
    scaled = logits if len(hot) == len(entries) else logits[index]
    scaled = scaled / torch.from_numpy(temperature[hot]).to(logits.device)[:, None]
    _filter(scaled, state, slots[hot])
    seeds = torch.from_numpy(state.seed[slots[hot]].astype(np.int64)).to(logits.device)
    places = torch.from_numpy(entries.positions[hot]).to(logits.device)
    vocabulary = torch.arange(logits.shape[-1], device=logits.device)
    scaled += gumbel_noise(seeds[:, None], places[:, None], vocabulary[None])
    tokens[index] = scaled.argmax(dim=-1)
    return tokens


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


def _filter(scaled: torch.Tensor, state: BatchState, slots: npt.NDArray[np.int32]) -> None:
    """min-p, top-k and top-p, in vLLM's order, in place; ``scaled`` is ``[len(slots), vocab_size]``."""
    device = scaled.device
    min_p, top_k, top_p = state.min_p[slots], state.top_k[slots], state.top_p[slots]
    if (min_p > 0).any():
        # p >= min_p * p_max, in logits. A log of zero keeps everything.
        bound = scaled.max(dim=-1, keepdim=True).values + torch.from_numpy(min_p).to(device).log()[:, None]
        scaled.masked_fill_(scaled < bound, -torch.inf)
    rows = np.flatnonzero((top_k > 0) | (top_p < 1))
    if len(rows) == 0:
        return
    index = torch.from_numpy(rows).to(device)
    ordered, order = scaled[index].sort(dim=-1, descending=True, stable=True)
    limits = torch.from_numpy(np.where(top_k[rows] > 0, top_k[rows], scaled.shape[-1])).to(device)
    ordered.masked_fill_(torch.arange(scaled.shape[-1], device=device) >= limits[:, None], -torch.inf)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # mass of the more likely tokens: the first is always kept
    wanted = torch.from_numpy(top_p[rows]).to(device)[:, None]
    ordered.masked_fill_((before >= wanted) & (wanted < 1), -torch.inf)
    scaled[index] = torch.empty_like(ordered).scatter_(1, order, ordered)
