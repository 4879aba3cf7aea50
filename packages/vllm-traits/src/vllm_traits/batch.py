"""What crosses the seam in one step: arrays over persistent slots.

A running sequence owns a slot, a row of :class:`BatchState`. The scheduler changes the rows in place; a :class:`Batch` is
index arrays into them. A backend may read the state only until ``submit`` returns.

One row of a step, for a sequence with ``c = num_computed`` tokens in the KV cache and ``q`` tokens to run::

    positions        0 ........ c-1 | c ................ c+q-1 | c+q
                     in the cache   | token_ids of this row    | sampled, if ``sample[row]``
                                    | last num_draft are guesses

Guesses are verified by sampling as if there were none: after each of the row's last ``num_draft + 1`` tokens a token is
sampled with the noise of its position, and the row's output ends with the first one that differs from the guess in its place
(or with the one after the last guess). So the tokens are those that steps of one token would have given, at any temperature;
guesses only decide how many come at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_traits.ids import SeqId, StepId
from vllm_traits.sampling_params import SamplingParams

IntArray = npt.NDArray[np.int32]
LongArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

LAST_SAMPLED = -1
"""A token id in ``Batch.token_ids`` that means: the token sampled last for this slot, wherever it is now."""


class BatchState:
    """The rows of all running sequences, owned by the scheduler. Row ``s`` belongs to slot ``s``.

    Attributes:
        token_ids: int32 ``[max_num_seqs, max_model_len]``, prompt and output known on the host; while a step with guesses is
            submitted, the guesses of a row stand after its known tokens; what follows is undefined.
        num_tokens: int32 ``[max_num_seqs]``, how many of them are known.
        num_prompt_tokens: int32 ``[max_num_seqs]``.
        block_tables: int32 ``[max_num_seqs, max_blocks_per_seq]``; entries past ``num_blocks`` are undefined. While a sequence
            is in a slot its table only grows, by any number of blocks between two steps.
        num_blocks: int32 ``[max_num_seqs]``.
        temperature, top_p, min_p, presence_penalty, frequency_penalty, repetition_penalty: float32 ``[max_num_seqs]``.
        top_k: int32 ``[max_num_seqs]``, 0 keeps all.
        seed: int64 ``[max_num_seqs]``.
        params: ``[max_num_seqs]``, the whole of a request's parameters, for what is rare (bias, logprobs, bans).
        stop_token_ids: ``[max_num_seqs]``, what ``min_tokens`` holds back: the request's stop tokens and the model's
            end-of-sequence tokens.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.block_size = block_size
        self.max_blocks_per_seq = -(-max_model_len // block_size)
        # np.zeros maps pages on first touch, so a long context costs address space, not memory.
        self.token_ids: IntArray = np.zeros((max_num_seqs, max_model_len), np.int32)
        self.num_tokens: IntArray = np.zeros(max_num_seqs, np.int32)
        self.num_prompt_tokens: IntArray = np.zeros(max_num_seqs, np.int32)
        self.block_tables: IntArray = np.zeros((max_num_seqs, self.max_blocks_per_seq), np.int32)
        self.num_blocks: IntArray = np.zeros(max_num_seqs, np.int32)
        self.temperature: FloatArray = np.zeros(max_num_seqs, np.float32)
        self.top_p: FloatArray = np.ones(max_num_seqs, np.float32)
        self.top_k: IntArray = np.zeros(max_num_seqs, np.int32)
        self.min_p: FloatArray = np.zeros(max_num_seqs, np.float32)
        self.presence_penalty: FloatArray = np.zeros(max_num_seqs, np.float32)
        self.frequency_penalty: FloatArray = np.zeros(max_num_seqs, np.float32)
        self.repetition_penalty: FloatArray = np.ones(max_num_seqs, np.float32)
        self.seed: LongArray = np.zeros(max_num_seqs, np.int64)
        self.params: list[SamplingParams | None] = [None] * max_num_seqs
        self.stop_token_ids: list[tuple[int, ...]] = [()] * max_num_seqs


@dataclass(frozen=True, slots=True)
class Batch:
    """One step. No two rows share a slot; the arrays are the batch's own and never change.

    Attributes:
        step_id: Counts up by one with every batch.
        state: The persistent rows, to be read only until ``submit`` returns.
        slots: int32 ``[num_rows]``.
        seq_ids: ``[num_rows]``, for logs and tests.
        token_ids: int32 ``[num_tokens]``, the rows' tokens one after the other; ``LAST_SAMPLED`` (-1) stands for the token
            that the backend sampled last for that slot.
        query_start: int32 ``[num_rows + 1]``: row ``i`` runs ``token_ids[query_start[i]:query_start[i + 1]]``, at least one.
        num_computed: int32 ``[num_rows]``: tokens of the row that are in the KV cache already, so also the position of the
            row's first token.
        sample: bool ``[num_rows]``: whether a token is to be sampled after the row's last one.
        num_draft: int32 ``[num_rows]``: how many of the row's last tokens are guesses to verify (0 without speculation), fewer
            than the tokens that the row runs. Such a row samples, and none of its tokens is ``LAST_SAMPLED``.
        changed_slots: int32 ``[k]``: slots whose sequence or parameters are new since the batch before.
    """

    step_id: StepId
    state: BatchState
    slots: IntArray
    seq_ids: tuple[SeqId, ...]
    token_ids: IntArray
    query_start: IntArray
    num_computed: IntArray
    sample: BoolArray
    num_draft: IntArray
    changed_slots: IntArray

    @property
    def num_rows(self) -> int:
        """Sequences in this step."""
        return len(self.slots)

    @property
    def num_tokens(self) -> int:
        """Tokens in this step."""
        return len(self.token_ids)

    @property
    def query_lens(self) -> IntArray:
        """int32 ``[num_rows]``, tokens that each row runs."""
        return np.diff(self.query_start)


class TokenLogprobs(NamedTuple):
    """One position: the chosen token first, then the most likely ones in order (the chosen may come again).

    Log-probabilities are those of the raw logits (before temperature, penalties and filters), as in vLLM.
    """

    token_ids: list[int]
    logprobs: list[float]
    rank: int
    """Rank of the chosen token, 1 is the most likely."""


@dataclass(frozen=True, slots=True)
class BatchOutput:
    """What a step gave.

    Attributes:
        token_ids: int32 ``[num_rows, width]``: the accepted and sampled tokens of a row from the left, -1 after them: 1 to
            ``num_draft + 1``; a row with ``sample`` false is all -1. Width is 1 without guesses, else at most one more than
            the longest of them.
        logprobs: By row, one entry for each of its tokens; only rows that asked for them.
        prompt_logprobs: By row, one entry for each position ``p`` of the row's chunk that predicts a known prompt token
            ``p + 1``; only rows that asked for them.
    """

    token_ids: IntArray
    logprobs: Mapping[int, list[TokenLogprobs]] = field(default_factory=dict)
    prompt_logprobs: Mapping[int, list[TokenLogprobs]] = field(default_factory=dict)
