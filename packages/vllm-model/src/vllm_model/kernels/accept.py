# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"
"""Which guesses of a step stand, on the device: ``verifier.accept_guesses`` is the reference."""

import torch
import triton
import triton.language as tl

from vllm_model.kernels._launch import launch, power_of_two


@triton.jit(do_not_specialize=["rows", "width"])
def _accept_kernel(
    sampled_ptr,  # int32 [rows, width]
    tokens_ptr,  # int32 [rows, width]
    slots_ptr,  # int32 [rows]
    first_ptr,  # int32 [rows]
    count_ptr,  # int32 [rows]
    last_token_ptr,  # int32 [slots]
    out_ptr,  # int32 [rows, width]
    rows,
    width,
    ROWS_BLOCK: tl.constexpr,  # noqa: N803
):
    row = tl.arange(0, ROWS_BLOCK)
    mask = row < rows
    slot = tl.load(slots_ptr + row, mask=mask, other=-1)
    first = tl.load(first_ptr + row, mask=mask, other=0)
    count = tl.load(count_ptr + row, mask=mask, other=0)
    stands = mask & (slot >= 0) & (count > 0)
    samples = stands
    last = tl.full([ROWS_BLOCK], -1, tl.int32)
    for j in range(width):
        here = stands & (j < count)
        token = tl.load(sampled_ptr + row * width + first + j, mask=here, other=-1)
        tl.store(out_ptr + row * width + j, token, mask=mask)
        last = tl.where(here, token, last)
        guessed = here & (j + 1 < count)
        stands = guessed & (tl.load(tokens_ptr + row * width + first + j + 1, mask=guessed, other=-1) == token)
    tl.store(last_token_ptr + slot, last, mask=samples)


def accept(
    sampled: torch.Tensor,
    tokens: torch.Tensor,
    slots: torch.Tensor,
    first: torch.Tensor,
    counts: torch.Tensor,
    last_token: torch.Tensor,
) -> torch.Tensor:
    """The tokens that a step gives, and each slot's last token kept.

    Args:
        sampled: int32 ``[rows, width]``: what was sampled after each token of a row.
        tokens: int32 ``[rows, width]``: the tokens that the rows ran, the guesses last.
        slots: int32 ``[rows]``; -1: padding.
        first: int32 ``[rows]``: place in its row of the first token after which something was sampled.
        counts: int32 ``[rows]``: how many were, one more than the row has guesses; 0: the row does not sample.
        last_token: int32 ``[slots]``, to be written for rows that sample.

    Returns:
        int32 ``[rows, width]``: of each row the guesses that stand and the token after them, -1 after that.
    """
    rows, width = sampled.shape
    out = torch.empty_like(sampled)
    block = power_of_two(rows)
    launch(_accept_kernel, (1,), sampled, tokens, slots, first, counts, last_token, out, rows, width, ROWS_BLOCK=block)
    return out
