# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator, misc"
# ruff: noqa: N803  constexpr arguments are upper case in Triton
"""Causal attention of prompt chunks over a paged KV cache that holds their prefix and themselves.

The rows of a tile are (token, head of the group) pairs, so all heads that share a KV head read its keys once, and a short
chunk still fills the matrix unit. Keys that every row of a tile sees run without a mask. Online softmax as in FlashAttention-2
(Dao 2023), in powers of two.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_model.kernels._launch import launch, power_of_two
from vllm_model.kernels._paged import attention_reference, holds_e4m3, query_group, softmax_scale
from vllm_model.kernels.qk_norm_rope import gather_cache_reference
from vllm_model.kernels.tuned import lookup


@triton.jit
def _attend(
    q,  # [BLOCK_M, D_BLOCK]
    acc,
    highest,
    denominator,
    position,  # [BLOCK_M]
    head_ptr,
    table_ptr,
    block_stride,
    scale,
    begin,
    end,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    FP8: tl.constexpr,
    STAGES: tl.constexpr,
):
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, D_BLOCK)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        key = start + n
        if MASKED:
            page = tl.load(table_ptr + key // BLOCK_SIZE, mask=key < end, other=0).to(tl.int64)
        else:
            page = tl.load(table_ptr + key // BLOCK_SIZE).to(tl.int64)
        kv_ptr = head_ptr + (page * block_stride + (key % BLOCK_SIZE) * HEAD_DIM)[:, None] + d[None, :]
        if MASKED:
            mask = (key < end)[:, None] & (d < HEAD_DIM)[None, :]
            k = tl.load(kv_ptr, mask=mask, other=0.0)  # [BLOCK_N, D_BLOCK]
            v = tl.load(kv_ptr + BLOCK_SIZE * HEAD_DIM, mask=mask, other=0.0)
        elif HEAD_DIM == D_BLOCK:
            k = tl.load(kv_ptr)
            v = tl.load(kv_ptr + BLOCK_SIZE * HEAD_DIM)
        else:
            k = tl.load(kv_ptr, mask=(d < HEAD_DIM)[None, :], other=0.0)
            v = tl.load(kv_ptr + BLOCK_SIZE * HEAD_DIM, mask=(d < HEAD_DIM)[None, :], other=0.0)
        if FP8:
            k = k.to(tl.float16)  # exact, and one instruction for two of them
            v = v.to(tl.float16)
        scores = tl.dot(q, tl.trans(k))  # [BLOCK_M, BLOCK_N]
        if MASKED:
            scores = tl.where(key[None, :] <= position[:, None], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1) * scale)
        weight = tl.exp2(scores * scale - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        denominator = denominator * shrink + tl.sum(weight, axis=1)
        acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None])
        highest = new_highest
    return acc, highest, denominator


@triton.jit(do_not_specialize=["rows"])
def _prefill_kernel(
    q_ptr,  # [tokens, KV_HEADS * GROUP, HEAD_DIM]
    out_ptr,  # [tokens, KV_HEADS * GROUP, HEAD_DIM]
    cache_ptr,  # [num_blocks, KV_HEADS, 2, BLOCK_SIZE, HEAD_DIM]
    tables_ptr,  # [max_slots, max_blocks]
    slots_ptr,  # [rows]
    query_start_ptr,  # [rows + 1]
    num_computed_ptr,  # [rows]
    k_scale_ptr,  # float32 [KV_HEADS]
    v_scale_ptr,
    rows,
    q_stride,
    out_stride,
    tables_stride,
    block_stride,
    softmax_scale,  # times log2(e)
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS_BLOCK: tl.constexpr,
    FP8: tl.constexpr,
    STAGES: tl.constexpr,
):
    TOKENS: tl.constexpr = BLOCK_M // GROUP  # noqa: N806
    head = tl.program_id(0) % KV_HEADS
    # The last tiles of a causal chunk are the longest: they go first.
    block = tl.num_programs(0) // KV_HEADS - 1 - tl.program_id(0) // KV_HEADS
    r = tl.arange(0, ROWS_BLOCK)
    starts = tl.load(query_start_ptr + r, mask=r < rows, other=0)
    ends = tl.load(query_start_ptr + r + 1, mask=r < rows, other=0)
    blocks = (ends - starts + TOKENS - 1) // TOKENS
    row = tl.sum((tl.cumsum(blocks, axis=0) <= block).to(tl.int32), axis=0)
    if row < rows:
        slot = tl.load(slots_ptr + row).to(tl.int64)
        begin = tl.load(query_start_ptr + row)
        length = tl.load(query_start_ptr + row + 1) - begin
        num_computed = tl.load(num_computed_ptr + row)
        first = (block - tl.sum(tl.where(r < row, blocks, 0), axis=0)) * TOKENS
        m = tl.arange(0, BLOCK_M)
        d = tl.arange(0, D_BLOCK)
        token = first + m // GROUP
        valid = (token < length) & (m < TOKENS * GROUP)
        position = num_computed + token
        query_head = head * GROUP + m % GROUP
        io_mask = valid[:, None] & (d < HEAD_DIM)[None, :]
        where = (begin + token).to(tl.int64)
        q = tl.load(q_ptr + where[:, None] * q_stride + query_head[:, None] * HEAD_DIM + d[None, :], mask=io_mask, other=0.0)
        acc = tl.zeros([BLOCK_M, D_BLOCK], tl.float32)
        highest = tl.full([BLOCK_M], -1.0e30, tl.float32)
        denominator = tl.zeros([BLOCK_M], tl.float32)
        scale = softmax_scale
        if FP8:
            scale *= tl.load(k_scale_ptr + head)
            q = q.to(tl.float16)
        if slot >= 0:
            table_ptr = tables_ptr + slot * tables_stride
            head_ptr = cache_ptr + head * (2 * BLOCK_SIZE * HEAD_DIM)
            end = num_computed + tl.minimum(first + TOKENS, length)
            seen_by_all = (num_computed + first + 1) // BLOCK_N * BLOCK_N
            acc, highest, denominator = _attend(
                q,
                acc,
                highest,
                denominator,
                position,
                head_ptr,
                table_ptr,
                block_stride,
                scale,
                0,
                seen_by_all,
                BLOCK_SIZE,
                HEAD_DIM,
                D_BLOCK,
                BLOCK_N,
                False,
                FP8,
                STAGES,
            )
            acc, highest, denominator = _attend(
                q,
                acc,
                highest,
                denominator,
                position,
                head_ptr,
                table_ptr,
                block_stride,
                scale,
                seen_by_all,
                end,
                BLOCK_SIZE,
                HEAD_DIM,
                D_BLOCK,
                BLOCK_N,
                True,
                FP8,
                STAGES,
            )
        result = acc / tl.where(denominator > 0.0, denominator, 1.0)[:, None]
        if FP8:
            result *= tl.load(v_scale_ptr + head)
        tl.store(
            out_ptr + where[:, None] * out_stride + query_head[:, None] * HEAD_DIM + d[None, :],
            result.to(out_ptr.dtype.element_ty),
            mask=io_mask,
        )


@dataclass(frozen=True)
class PrefillConfig:
    """Launch shape: rows and keys of a tile (powers of two; ``block_m`` at least the group), warps, load pipeline depth."""

    block_m: int = 64
    block_n: int = 32
    num_warps: int = 4
    num_stages: int = 2


def default_prefill_config(group: int) -> PrefillConfig:
    """What was fastest on Hopper, of tiles that fit its registers and shared memory."""
    return PrefillConfig(block_m=max(PrefillConfig.block_m, power_of_two(group)))


def paged_prefill(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    slots: torch.Tensor,
    query_start: torch.Tensor,
    num_computed: torch.Tensor,
    *,
    scale: float | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    config: PrefillConfig | None = None,
) -> torch.Tensor:
    """Attention of chunks of tokens, each over its sequence's cache up to itself.

    Args:
        q: ``[tokens, num_heads, head_dim]`` bf16 or fp16, contiguous heads.
        kv_cache: ``[num_blocks, num_kv_heads, 2, block_size, head_dim]``, each block contiguous, the type of ``q`` or e4m3;
            holds the chunks' own keys and values already.
        block_tables: int32 ``[max_slots, max_blocks]``.
        slots: int32 ``[rows]``; the tokens of a row with slot -1 get zeros.
        query_start: int32 ``[rows + 1]``: row ``i`` is ``q[query_start[i]:query_start[i + 1]]``; it may be empty. Tokens after
            the last row are not written.
        num_computed: int32 ``[rows]``, position of each row's first token.
        scale: Of the products; ``head_dim ** -0.5`` when None.
        k_scale: float32 ``[num_kv_heads]``, for an e4m3 cache.
        v_scale: float32 ``[num_kv_heads]``, likewise.
        out: ``[tokens, num_heads, head_dim]``, contiguous heads; a new tensor when None.
        config: Launch shape; when None, what was measured on this card, else :func:`default_prefill_config`.

    Returns:
        ``[tokens, num_heads, head_dim]``.

    Raises:
        ValueError: Shapes disagree, or scales are missing for an e4m3 cache.
    """
    tokens, _, head_dim = q.shape
    _, kv_heads, _, block_size, _ = kv_cache.shape
    rows = len(slots)
    fp8 = holds_e4m3(kv_cache, k_scale, v_scale)
    group = query_group(q, kv_cache)
    if len(query_start) != rows + 1 or len(num_computed) != rows:
        raise ValueError(f"{rows} rows, {len(query_start)} starts and {len(num_computed)} first positions disagree")
    if out is None:
        out = torch.empty_like(q)
    if not tokens or not rows:
        return out
    if config is None:
        measured = lookup("prefill", (head_dim, group), q.device)
        config = PrefillConfig(*measured) if measured else default_prefill_config(group)
    block_tokens = config.block_m // group
    # The host knows only the sums, so the grid is their bound; programs past the last tile leave at once.
    blocks = triton.cdiv(tokens, block_tokens) + rows
    launch(
        _prefill_kernel,
        (blocks * kv_heads,),
        q,
        out,
        kv_cache,
        block_tables,
        slots,
        query_start,
        num_computed,
        k_scale,
        v_scale,
        rows,
        q.stride(0),
        out.stride(0),
        block_tables.stride(0),
        kv_cache.stride(0),
        softmax_scale(head_dim, scale),
        KV_HEADS=kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        D_BLOCK=power_of_two(head_dim),
        BLOCK_SIZE=block_size,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        ROWS_BLOCK=max(256, power_of_two(rows)),  # one size, compiled once
        FP8=fp8,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def paged_prefill_reference(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    slots: torch.Tensor,
    query_start: torch.Tensor,
    num_computed: torch.Tensor,
) -> torch.Tensor:
    """What :func:`paged_prefill` computes (no scales), in the type of ``q``, row by row."""
    out = torch.zeros_like(q)
    starts = query_start.tolist()
    for row, (slot, computed) in enumerate(zip(slots.tolist(), num_computed.tolist(), strict=True)):
        mine = slice(starts[row], starts[row + 1])
        if slot >= 0 and starts[row + 1] > starts[row]:
            k, v = gather_cache_reference(kv_cache, block_tables[slot], computed + starts[row + 1] - starts[row])
            out[mine] = attention_reference(q[mine], k.to(q.dtype), v.to(q.dtype), computed)
    return out
