# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"
"""What changes the logits of a slot stands on the device too: penalties and what they count, bias, allowed and banned tokens.

What a grammar allows is sent with each step: to the row of its slot in the bitmask or, of rows with guesses, for each of their
tokens to a row behind those.

A row whose last token the host knows has its history sent anew; one that runs the token sampled last (``LAST_SAMPLED``) has it
counted on the device since. So whatever was guessed and thrown away in between, the counts are those of the sequence.
"""

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from vllm_model.cuda.device import Device
from vllm_model.host_sampling import is_special
from vllm_model.kernels._launch import launch, power_of_two
from vllm_model.kernels.logits import Guessed, LogitsState, process_logits
from vllm_model.structured import HeldRows, token_bits
from vllm_model.verifier import SampledEntries, sampled_entries
from vllm_traits.batch import Batch, BatchState, IntArray
from vllm_traits.sampling_params import MAX_LIST_LENGTH, SamplingParams

MOST_BANS = 64
"""Stop tokens that ``min_tokens`` can hold back on the device."""


@triton.jit(do_not_specialize=["rows"])
def _count_kernel(tokens, slots, counts, stride, rows, B: tl.constexpr):  # noqa: N803
    """``counts[slots, tokens] += 1``, but for slot -1; no slot comes twice."""
    i = tl.arange(0, B)
    slot = tl.load(slots + i, mask=i < rows, other=-1)
    token = tl.load(tokens + i, mask=i < rows, other=-1)
    mask = (slot >= 0) & (token >= 0)
    at = counts + slot.to(tl.int64) * stride + token
    tl.store(at, tl.load(at, mask=mask, other=0) + 1, mask=mask)


class LogitsRows:
    """Parameters of all slots, on the device and, as far as they choose the way of a step, on the host.

    Args:
        device: Where.
        max_num_seqs: Slots.
        vocab_size: Tokens.
        held: Rows that are held to a grammar; None: none can be.
        most_guessed: Most tokens sampled in a step in rows with guesses; more need the host.
    """

    def __init__(
        self, device: Device, max_num_seqs: int, vocab_size: int, held: HeldRows | None = None, most_guessed: int = 0
    ) -> None:
        where, words = device.device, -(-vocab_size // 32)
        masks = max_num_seqs + (most_guessed if held is not None else 0)
        self.held, self._most_guessed = held, most_guessed
        self._device, self._vocab_size, self._words = device, vocab_size, words
        self._floats = torch.zeros(3, max_num_seqs, dtype=torch.float32, device=where)
        self._floats[0] = 1.0
        self._state = LogitsState(
            output_counts=torch.zeros(max_num_seqs, vocab_size, dtype=torch.int16, device=where),
            prompt_bits=torch.zeros(max_num_seqs, words, dtype=torch.int32, device=where),
            repetition_penalty=self._floats[0],
            frequency_penalty=self._floats[1],
            presence_penalty=self._floats[2],
            bitmask=torch.full((masks, words), -1, dtype=torch.int32, device=where),
            bias_tokens=torch.full((max_num_seqs, MAX_LIST_LENGTH), -1, dtype=torch.int32, device=where),
            bias_values=torch.zeros(max_num_seqs, MAX_LIST_LENGTH, dtype=torch.float32, device=where),
        )
        self._ban_tokens = torch.full((max_num_seqs, MOST_BANS), -1, dtype=torch.int32, device=where)
        self._ban_until = torch.zeros(max_num_seqs, dtype=torch.int32, device=where)
        self._special: npt.NDArray[np.bool_] = np.zeros(max_num_seqs, np.bool_)
        self._adjusted: npt.NDArray[np.bool_] = np.zeros(max_num_seqs, np.bool_)
        self._penalised: npt.NDArray[np.bool_] = np.zeros(max_num_seqs, np.bool_)
        self._scored: npt.NDArray[np.bool_] = np.zeros(max_num_seqs, np.bool_)
        self._constrained: npt.NDArray[np.bool_] = np.zeros(max_num_seqs, np.bool_)
        self._many_bans: npt.NDArray[np.bool_] = np.zeros(max_num_seqs, np.bool_)
        self._until: npt.NDArray[np.int64] = np.zeros(max_num_seqs, np.int64)
        self.num_logprobs: npt.NDArray[np.int32] = np.full(max_num_seqs, -1, np.int32)
        """Of each slot, on the host; -1: none are wanted."""
        self._rows_block = power_of_two(max_num_seqs)

    def send_changes(self, batch: Batch) -> None:
        """Bring what is new of slots with new sequences to the device."""
        for slot in batch.changed_slots.tolist():
            params = batch.state.params[slot]
            special = params is not None and is_special(params)
            if special or self._special[slot]:  # what a sequence before left there must go
                self._send(batch.state, slot, params or SamplingParams())
            self._special[slot] = special

    def send_histories(self, batch: Batch) -> None:
        """Count anew what penalised rows have said, where the host knows all of it."""
        known = batch.token_ids[batch.query_start[1:] - 1] >= 0
        rows = np.flatnonzero(self._penalised[batch.slots] & batch.sample & known)
        if not len(rows):
            return
        state, counts = batch.state, self._state.output_counts
        assert counts is not None
        places, values = [], []
        for row in rows.tolist():
            slot, end = int(batch.slots[row]), int(batch.query_start[row + 1] - batch.query_start[row])
            end += int(batch.num_computed[row]) - int(batch.num_draft[row])
            said, times = np.unique(state.token_ids[slot, state.num_prompt_tokens[slot] : end], return_counts=True)
            places.append(said + np.int64(slot) * self._vocab_size)
            values.append(times)
        counts[self._device.send(batch.slots[rows], np.int64)] = 0
        counts.view(-1)[self._device.send(np.concatenate(places), np.int64)] = self._device.send(
            np.concatenate(values), np.int16
        )

    def send_masks(self, batch: Batch) -> None:
        """Find what grammars allow in this step and bring it to the device, while that runs what it has been given.

        Raises:
            BackendError: Something is no grammar.
        """
        if self.held is None or not self.hold(batch):
            return
        entries, rooms = sampled_entries(batch), list[torch.Tensor]()

        def make(rows: int, words: int) -> IntArray:
            rooms.append(self._device.pinned_rows(rows, words))
            array: IntArray = rooms[0].numpy()
            return array

        masks, bitmask = self.held.masks(batch, entries, make), self._state.bitmask
        assert masks is not None
        assert bitmask is not None
        places = self._mask_rows(batch, entries)[masks.entries]
        bitmask[self._device.send(places, np.int64)] = rooms[0].to(bitmask.device, non_blocking=True)

    def guessed(self, batch: Batch) -> tuple[IntArray, IntArray, IntArray]:
        """Of each token that the step samples, int32 ``[num_entries]`` each, what :class:`Guessed` holds."""
        entries = sampled_entries(batch)
        return self._mask_rows(batch, entries), batch.token_ids[entries.tokens], entries.places.astype(np.int32)

    def _mask_rows(self, batch: Batch, entries: SampledEntries) -> IntArray:
        """Of each entry the row of the bitmask that holds for it: that of its slot, or one of those behind the slots."""
        slots = batch.slots[entries.rows]
        guessed = self._constrained[slots] & (batch.num_draft[entries.rows] > 0)
        return np.where(guessed, len(self._constrained) + np.cumsum(guessed, dtype=np.int32) - 1, slots)

    def need_host(self, batch: Batch) -> bool:
        """Whether some row needs its logits on the host: scored prompts, too many tokens held back, or too many guesses."""
        slots = batch.slots
        if not self._special[slots].any():
            return False
        scored = self._scored[slots] & (batch.num_computed < batch.state.num_prompt_tokens[slots])
        guessed = (batch.num_draft + 1)[self._constrained[slots] & (batch.num_draft > 0)].sum()
        return bool((scored | self._many_bans[slots]).any()) or guessed > self._most_guessed

    def adjust(self, batch: Batch) -> bool:
        """Whether the logits of some row that samples are changed."""
        lengths = batch.num_computed + batch.query_lens - batch.num_draft
        changed = self._adjusted[batch.slots] | (lengths < self._until[batch.slots])
        return bool((changed & batch.sample).any())

    def hold(self, batch: Batch) -> bool:
        """Whether some row that samples is held to a grammar."""
        return bool((self._constrained[batch.slots] & batch.sample).any())

    def adjusted(
        self, logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, guessed: Guessed | None = None
    ) -> torch.Tensor:
        """The logits as parameters want them, float32 ``[rows, vocab_size]``; arguments as :meth:`DeviceSampler.draw`."""
        rows, vocab_size = logits.shape
        room = logits.new_empty(rows, (vocab_size // 4 + 1) * 4, dtype=torch.float32)
        out = process_logits(logits, slots, self._state, room[:, :vocab_size], guessed=guessed, pdl=self._device.pdl)
        slot = slots.clamp(min=0).long()
        banned = self._ban_tokens[slot]  # [rows, MOST_BANS]
        banned = torch.where((banned >= 0) & (positions < self._ban_until[slot])[:, None], banned, vocab_size)
        room.scatter_(1, banned.long(), float("-inf"))
        return out

    def count(self, tokens: torch.Tensor, slots: torch.Tensor) -> None:
        """Each slot has said one token more, or as many as ``[slots, width]`` says before -1; slot -1 is none."""
        counts = self._state.output_counts
        assert counts is not None
        for column in tokens.view(len(slots), -1).T.contiguous():
            launch(_count_kernel, (1,), column, slots, counts, counts.stride(0), len(slots), B=self._rows_block)

    def _send(self, state: BatchState, slot: int, params: SamplingParams) -> None:
        on_device, send, prompt = self._state, self._device.send, int(state.num_prompt_tokens[slot])
        stops = state.stop_token_ids[slot] if params.min_tokens else ()
        bias = params.logit_bias or {}
        self._penalised[slot] = params.has_penalties
        self._constrained[slot] = params.structured_outputs is not None
        self._adjusted[slot] = (
            params.has_penalties or bool(bias) or params.allowed_token_ids is not None or bool(self._constrained[slot])
        )
        self._scored[slot] = params.prompt_logprobs is not None
        self._many_bans[slot] = len(stops) > MOST_BANS
        self._until[slot] = prompt + params.min_tokens if stops else 0
        self.num_logprobs[slot] = -1 if params.logprobs is None else params.logprobs
        penalties = params.repetition_penalty, params.frequency_penalty, params.presence_penalty
        self._floats[:, slot] = send(np.array(penalties), np.float32)
        said = state.token_ids[slot, :prompt] if params.has_penalties else np.zeros(0, np.int32)
        allowed = params.allowed_token_ids
        tokens = np.full(MAX_LIST_LENGTH, -1)
        values = np.zeros(MAX_LIST_LENGTH)
        tokens[: len(bias)], values[: len(bias)] = list(bias), list(bias.values())
        bans = np.full(MOST_BANS, -1)
        bans[: len(stops[:MOST_BANS])] = stops[:MOST_BANS]
        for target, row in (
            (on_device.prompt_bits, token_bits(said, self._words)),
            (on_device.bitmask, np.full(self._words, -1) if allowed is None else token_bits(allowed, self._words)),
            (on_device.bias_tokens, tokens),
            (self._ban_tokens, bans),
        ):
            assert target is not None
            target[slot] = send(row, np.int32)
        assert on_device.bias_values is not None
        on_device.bias_values[slot] = send(values, np.float32)
        self._ban_until[slot] = int(self._until[slot])
