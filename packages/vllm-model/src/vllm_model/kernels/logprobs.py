# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator, misc"
# ruff: noqa: N803  constexpr arguments are upper case in Triton
"""Log-probability and rank of one token per row."""

import torch
import triton
import triton.language as tl

from vllm_model.kernels._launch import launch, launch_options, power_of_two, wait_for_previous
from vllm_model.kernels.sampling import SamplerWorkspace

LOGPROB_SPLITS = 16
"""Programs of a row in ``token_logprobs``: fixed, so that a row's sum does not depend on the batch."""


@triton.jit
def _logprob_kernel(
    logits_ptr,  # [rows, vocab]
    tokens_ptr,  # [rows]
    part_ptr,  # float32 [rows, SPLITS, 2]: maximum, sum of exponentials
    above_ptr,  # int32 [rows, SPLITS]
    count_ptr,  # int32 [rows], zero between launches
    logprob_ptr,  # float32 [rows]
    rank_ptr,  # int32 [rows]
    logits_stride,
    vocab,
    share,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    wait_for_previous(PDL)
    chosen = tl.load(tokens_ptr + row).to(tl.int64)
    if chosen < 0:
        if split == 0:
            tl.store(logprob_ptr + row, 0.0)
            tl.store(rank_ptr + row, 0)
    else:
        logits_ptr += row * logits_stride
        logit = tl.load(logits_ptr + chosen).to(tl.float32)
        offset = tl.arange(0, BLOCK)
        highest = tl.full([BLOCK], -1.0e30, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        above = tl.zeros([BLOCK], tl.int32)
        for start in range(split * share, tl.minimum(split * share + share, vocab), BLOCK):
            token = start + offset
            x = tl.load(logits_ptr + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
            above += (x > logit).to(tl.int32)
            new_highest = tl.maximum(highest, x)
            total = total * tl.exp(highest - new_highest) + tl.exp(x - new_highest)
            highest = new_highest
        greatest = tl.max(highest, axis=0)
        tl.store(part_ptr + (row * SPLITS + split) * 2, greatest)
        tl.store(part_ptr + (row * SPLITS + split) * 2 + 1, tl.sum(total * tl.exp(highest - greatest), axis=0))
        tl.store(above_ptr + row * SPLITS + split, tl.sum(above, axis=0))
        tl.debug_barrier()
        arrived = tl.atomic_add(count_ptr + row, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLITS - 1:
            tl.store(count_ptr + row, 0)
            s = tl.arange(0, SPLITS)
            maxima = tl.load(part_ptr + (row * SPLITS + s) * 2, cache_modifier=".cg")
            sums = tl.load(part_ptr + (row * SPLITS + s) * 2 + 1, cache_modifier=".cg")
            greatest = tl.max(maxima, axis=0)
            normaliser = greatest + tl.log(tl.sum(sums * tl.exp(maxima - greatest), axis=0))
            tl.store(logprob_ptr + row, logit - normaliser)
            tl.store(rank_ptr + row, 1 + tl.sum(tl.load(above_ptr + row * SPLITS + s, cache_modifier=".cg"), axis=0))


def token_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, workspace: SamplerWorkspace, *, pdl: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and rank of one token per row under the raw logits.

    Args:
        logits: ``[rows, vocab]`` bf16, fp16 or float32, rows contiguous.
        tokens: int32 or int64 ``[rows]``; -1: padding, log-probability 0 and rank 0.
        workspace: Buffers.
        pdl: Programmatic dependent launch.

    Returns:
        float32 ``[rows]`` and int32 ``[rows]``; rank 1 is the most likely, equal logits share a rank.

    Raises:
        ValueError: More rows than the workspace has room for.
    """
    rows, vocab = logits.shape
    if rows > workspace.max_rows:
        raise ValueError(f"{rows} rows in a workspace for {workspace.max_rows}")
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    ranks = torch.empty(rows, dtype=torch.int32, device=logits.device)
    if rows:
        block = min(power_of_two(triton.cdiv(vocab, LOGPROB_SPLITS)), 1024)
        share = triton.cdiv(triton.cdiv(vocab, LOGPROB_SPLITS), block) * block
        launch(
            _logprob_kernel,
            (rows, LOGPROB_SPLITS),
            logits,
            tokens,
            workspace.values,
            workspace.tokens,
            workspace.counts,
            logprobs,
            ranks,
            logits.stride(0),
            vocab,
            share,
            SPLITS=LOGPROB_SPLITS,
            BLOCK=block,
            PDL=pdl,
            num_warps=4,
            **launch_options(pdl),
        )
    return logprobs, ranks


def token_logprobs_reference(logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What :func:`token_logprobs` computes, in the type of ``logits``."""
    chosen = logits.gather(1, tokens.long()[:, None])
    return (chosen - logits.logsumexp(-1, keepdim=True))[:, 0], 1 + (logits > chosen).sum(-1)
