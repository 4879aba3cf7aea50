# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator, misc"
# ruff: noqa: N803  constexpr arguments are upper case in Triton
"""What changes logits before they are sampled: bias, penalties, bitmask. Parameters live in per-slot arrays."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_model.kernels._launch import launch, launch_options, power_of_two, wait_for_previous

MOST_GUESSES = 8
"""Most guesses of a row whose logits are processed."""


@triton.jit
def _penalise(x, count, in_prompt, repetition, frequency, presence):
    factor = tl.where((count > 0) | in_prompt, repetition, 1.0)
    x = tl.where(x > 0, x / factor, x * factor)
    return x - frequency * count.to(tl.float32) - tl.where(count > 0, presence, 0.0)


@triton.jit
def _process_kernel(
    logits_ptr,  # [rows, vocab]
    out_ptr,  # float32 [rows, vocab]
    slots_ptr,  # [rows]
    mask_rows_ptr,  # [rows]; with the next two, of logits in a step with guesses
    behind_ptr,  # [rows]
    num_guesses_ptr,  # [rows]
    counts_ptr,  # int16 [max_slots, vocab]
    prompt_ptr,  # int32 [max_slots, words]
    repetition_ptr,  # float32 [max_slots]
    frequency_ptr,
    presence_ptr,
    bitmask_ptr,  # int32 [max_slots, words]
    bias_token_ptr,  # int32 [max_slots, max_bias]
    bias_value_ptr,  # float32 [max_slots, max_bias]
    logits_stride,
    out_stride,
    counts_stride,
    prompt_stride,
    bitmask_stride,
    bias_stride,
    vocab,
    max_bias,
    PENALTIES: tl.constexpr,
    BITMASK: tl.constexpr,
    BIAS: tl.constexpr,  # this launch visits the biased tokens alone, after the launch that visits all
    GUESSES: tl.constexpr,  # most of a row; 0: there are none
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait_for_previous(PDL)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot >= 0:
        mask = token < vocab
        bias = 0.0
        if BIAS:
            entry = token
            token = tl.load(bias_token_ptr + slot * bias_stride + entry, mask=entry < max_bias, other=-1)
            bias = tl.load(bias_value_ptr + slot * bias_stride + entry, mask=entry < max_bias, other=0.0)
            mask = (token >= 0) & (token < vocab)
        x = tl.load(logits_ptr + row * logits_stride + token, mask=mask, other=0.0).to(tl.float32) + bias
        if PENALTIES:
            count = tl.load(counts_ptr + slot * counts_stride + token, mask=mask, other=0).to(tl.int32)
            if GUESSES > 0:
                num_guesses = tl.load(num_guesses_ptr + row)
                for i in tl.static_range(GUESSES):
                    count += (token == tl.load(behind_ptr + row - i, mask=i < num_guesses, other=-1)).to(tl.int32)
            word = tl.load(prompt_ptr + slot * prompt_stride + token // 32, mask=mask, other=0)
            in_prompt = ((word >> (token % 32)) & 1) != 0
            repetition = tl.load(repetition_ptr + slot)
            x = _penalise(x, count, in_prompt, repetition, tl.load(frequency_ptr + slot), tl.load(presence_ptr + slot))
        if BITMASK:
            mask_row = slot
            if GUESSES > 0:
                mask_row = tl.load(mask_rows_ptr + row).to(tl.int64)
            word = tl.load(bitmask_ptr + mask_row * bitmask_stride + token // 32, mask=mask, other=0)
            x = tl.where(((word >> (token % 32)) & 1) != 0, x, float("-inf"))
        tl.store(out_ptr + row * out_stride + token, x, mask=mask)


@dataclass(frozen=True)
class LogitsState:
    """Per-slot arrays of what changes logits; leave a group None where no request of the engine uses it.

    Attributes:
        output_counts: int16 ``[max_slots, vocab]``, how often each token was generated.
        prompt_bits: int32 ``[max_slots, ceil(vocab / 32)]``, bit ``token % 32`` of word ``token // 32``: stands in the prompt.
        repetition_penalty, frequency_penalty, presence_penalty: float32 ``[max_slots]``.
        bitmask: int32 ``[max_slots or more, ceil(vocab / 32)]``, bit set: allowed (all ones where nothing is banned).
        bias_tokens: int32 ``[max_slots, max_bias]``, no token twice in a row; -1 and what is past the vocabulary is skipped.
        bias_values: float32 ``[max_slots, max_bias]``, added to the logit; ``-inf`` bans.
    """

    output_counts: torch.Tensor | None = None
    prompt_bits: torch.Tensor | None = None
    repetition_penalty: torch.Tensor | None = None
    frequency_penalty: torch.Tensor | None = None
    presence_penalty: torch.Tensor | None = None
    bitmask: torch.Tensor | None = None
    bias_tokens: torch.Tensor | None = None
    bias_values: torch.Tensor | None = None


class Guessed(NamedTuple):
    """Of the logits of a step with guesses, int32 ``[rows]`` each; those of one sequence stand one after the other.

    Attributes:
        mask_rows: The row of the bitmask that holds.
        behind: The token that they come behind.
        num_guesses: How many of ``behind[i], behind[i - 1], ...`` are guesses, at most ``MOST_GUESSES``: penalties count them.
    """

    mask_rows: torch.Tensor
    behind: torch.Tensor
    num_guesses: torch.Tensor


def process_logits(
    logits: torch.Tensor,
    slots: torch.Tensor,
    state: LogitsState,
    out: torch.Tensor | None = None,
    *,
    guessed: Guessed | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Bias, then repetition, frequency and presence penalty, then the bitmask, in vLLM's order and meaning.

    Args:
        logits: ``[rows, vocab]`` bf16, fp16 or float32, rows contiguous; not changed.
        slots: int32 ``[rows]``; rows with -1 are not written.
        state: What to apply.
        out: float32 ``[rows, vocab]``, another tensor than ``logits``; a new one when None.
        guessed: Of a step with guesses; None: a slot has one row, and its own in the bitmask.
        pdl: Programmatic dependent launch.

    Returns:
        float32 ``[rows, vocab]``.

    Raises:
        ValueError: ``out`` is not float32, or is ``logits``.
    """
    rows, vocab = logits.shape
    if out is None:
        out = torch.empty(rows, vocab, dtype=torch.float32, device=logits.device)
    if out.dtype != torch.float32 or out.data_ptr() == logits.data_ptr() != 0:
        raise ValueError("process_logits writes float32 to another tensor")

    def stride(tensor: torch.Tensor | None) -> int:
        return 0 if tensor is None else tensor.stride(0)

    for bias in (False, True):
        entries = vocab if not bias else 0 if state.bias_tokens is None else state.bias_tokens.shape[1]
        if not rows or not entries:
            continue
        block = min(power_of_two(entries), 2048)
        launch(
            _process_kernel,
            (rows, triton.cdiv(entries, block)),
            logits,
            out,
            slots,
            *(guessed or (None, None, None)),
            state.output_counts,
            state.prompt_bits,
            state.repetition_penalty,
            state.frequency_penalty,
            state.presence_penalty,
            state.bitmask,
            state.bias_tokens,
            state.bias_values,
            logits.stride(0),
            out.stride(0),
            stride(state.output_counts),
            stride(state.prompt_bits),
            stride(state.bitmask),
            stride(state.bias_tokens),
            vocab,
            entries,
            PENALTIES=state.output_counts is not None,
            BITMASK=state.bitmask is not None,
            BIAS=bias,
            GUESSES=MOST_GUESSES if guessed is not None else 0,
            BLOCK=block,
            PDL=pdl,
            **launch_options(pdl),
        )
    return out


def process_logits_reference(
    logits: torch.Tensor, slots: torch.Tensor, state: LogitsState, guessed: Guessed | None = None
) -> torch.Tensor:
    """What :func:`process_logits` computes for rows with a slot, in the type of ``logits``."""
    slot = slots.clamp(min=0).long()
    vocab = logits.shape[1]
    out = logits.clone()
    token = torch.arange(vocab, device=logits.device)

    def bits(words: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return ((words[rows][:, token // 32] >> (token % 32)) & 1).bool()

    if state.bias_tokens is not None and state.bias_values is not None:
        for row, s in enumerate(slot.tolist()):
            named = state.bias_tokens[s]
            valid = (named >= 0) & (named < vocab)
            out[row, named[valid].long()] += state.bias_values[s][valid].to(out.dtype)
    if state.output_counts is not None:
        assert state.prompt_bits is not None
        assert state.repetition_penalty is not None
        assert state.frequency_penalty is not None
        assert state.presence_penalty is not None
        count = state.output_counts[slot].to(out.dtype)
        if guessed is not None:
            for row, number in enumerate(guessed.num_guesses.tolist()):
                for said in guessed.behind[row - number + 1 : row + 1].tolist():
                    count[row, said] += 1
        factor = torch.where(
            (count > 0) | bits(state.prompt_bits, slot), state.repetition_penalty[slot][:, None].to(out.dtype), 1.0
        )
        out = torch.where(out > 0, out / factor, out * factor)
        out = out - state.frequency_penalty[slot][:, None] * count - state.presence_penalty[slot][:, None] * (count > 0)
    if state.bitmask is not None:
        mask = slot if guessed is None else guessed.mask_rows.clamp(min=0).long()
        out = out.masked_fill(~bits(state.bitmask, mask), float("-inf"))
    return out
