# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator, misc"
# ruff: noqa: N803  constexpr arguments are upper case in Triton
"""Decode attention of rows that share a long cached prefix: its keys are read once for all of them.

As in Hydragen (Juravsky et al. 2024) and cascade inference (Ye et al. 2024): the queries of all rows meet the shared keys as
one matrix, each row's own keys go through :mod:`paged_decode` with the prefix skipped, and the two softmaxes are joined by
their sums. The prefix is cut among programs; each leaves (maximum, sum, weighted values), which are added up in order.
"""

import torch
import triton
import triton.language as tl

from vllm_model.kernels._launch import launch, launch_options, power_of_two, wait_for_previous
from vllm_model.kernels._paged import holds_e4m3, query_group, softmax_scale
from vllm_model.kernels.qk_norm_rope import gather_cache_reference

SPLITS = 16
"""Programs that share the prefix of one KV head."""
PREFIX_TILE = 64
"""A shared prefix is a multiple of this many tokens."""


@triton.jit(do_not_specialize=["rows"])
def _prefix_kernel(
    q_ptr,  # [rows, KV_HEADS * GROUP, HEAD_DIM]
    cache_ptr,  # [num_blocks, KV_HEADS, 2, BLOCK_SIZE, HEAD_DIM]
    tables_ptr,  # [max_slots, max_blocks]
    leader_ptr,  # int32 [2]: a slot with the prefix, and its length
    part_ptr,  # float32 [SPLITS, rows, heads, D_BLOCK]
    stats_ptr,  # float32 [SPLITS, rows, heads, 2]: maximum, sum
    k_scale_ptr,  # float32 [KV_HEADS]
    v_scale_ptr,
    rows,
    tables_stride,
    block_stride,
    q_stride,
    softmax_scale,  # times log2(e)
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    M: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    FP8: tl.constexpr,
    PDL: tl.constexpr,
):
    head = tl.program_id(0) % KV_HEADS
    split = tl.program_id(1)
    m = tl.arange(0, M)
    d = tl.arange(0, D_BLOCK)
    n = tl.arange(0, TILE)
    row = tl.program_id(0) // KV_HEADS * (M // GROUP) + m // GROUP
    valid = (row < rows) & (m < M // GROUP * GROUP)
    query_head = head * GROUP + m % GROUP
    wait_for_previous(PDL)
    slot = tl.load(leader_ptr)
    length = tl.load(leader_ptr + 1)
    table_ptr = tables_ptr + tl.maximum(slot, 0).to(tl.int64) * tables_stride
    share = (length // TILE + SPLITS - 1) // SPLITS * TILE
    io = row.to(tl.int64)[:, None] * q_stride + query_head[:, None] * HEAD_DIM + d[None, :]
    q = tl.load(q_ptr + io, mask=valid[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    highest = tl.full([M], -1.0e30, tl.float32)
    denominator = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D_BLOCK], tl.float32)
    head_ptr = cache_ptr + head * (2 * BLOCK_SIZE * HEAD_DIM)
    scale = softmax_scale
    if FP8:
        scale *= tl.load(k_scale_ptr + head)
        q = q.to(tl.float16)
    for start in tl.range(split * share, tl.minimum(split * share + share, length), TILE, num_stages=STAGES):
        key = start + n
        page = tl.load(table_ptr + key // BLOCK_SIZE).to(tl.int64)
        kv_ptr = head_ptr + (page * block_stride + key % BLOCK_SIZE * HEAD_DIM)[:, None] + d[None, :]
        if HEAD_DIM == D_BLOCK:
            k = tl.load(kv_ptr)  # [TILE, D_BLOCK]
            v = tl.load(kv_ptr + BLOCK_SIZE * HEAD_DIM)
        else:
            k = tl.load(kv_ptr, mask=(d < HEAD_DIM)[None, :], other=0.0)
            v = tl.load(kv_ptr + BLOCK_SIZE * HEAD_DIM, mask=(d < HEAD_DIM)[None, :], other=0.0)
        if FP8:
            k = k.to(tl.float16)  # exact, and one instruction for two of them
            v = v.to(tl.float16)
        scores = tl.dot(q, tl.trans(k)) * scale  # [M, TILE]
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        weight = tl.exp2(scores - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        denominator = denominator * shrink + tl.sum(weight, axis=1)
        acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None])
        highest = new_highest
    if FP8:
        acc *= tl.load(v_scale_ptr + head)
    place = (split * rows + row).to(tl.int64) * (KV_HEADS * GROUP) + query_head
    tl.store(part_ptr + place[:, None] * D_BLOCK + d[None, :], acc, mask=valid[:, None])
    tl.store(stats_ptr + place * 2, highest, mask=valid)
    tl.store(stats_ptr + place * 2 + 1, denominator, mask=valid)


@triton.jit(do_not_specialize=["rows"])
def _join_kernel(
    out_ptr,  # [rows, heads, HEAD_DIM], what each row's own keys gave; updated
    lse_ptr,  # float32 [rows, heads]: the binary logarithm of the sum behind it
    skips_ptr,  # int32 [rows], 0: the row has no part in the prefix
    part_ptr,  # float32 [SPLITS, rows, heads, D_BLOCK]
    stats_ptr,  # float32 [SPLITS, rows, heads, 2]
    rows,
    out_stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    head = tl.program_id(1)
    d = tl.arange(0, D_BLOCK)
    s = tl.arange(0, SPLITS)
    wait_for_previous(PDL)
    if tl.load(skips_ptr + row) > 0:
        place = (s * rows + row).to(tl.int64) * HEADS + head
        maxima = tl.load(stats_ptr + place * 2)
        sums = tl.load(stats_ptr + place * 2 + 1)
        lse = tl.load(lse_ptr + row * HEADS + head)
        highest = tl.maximum(tl.max(maxima, axis=0), lse)
        factor = tl.exp2(maxima - highest)
        own = tl.exp2(lse - highest)
        parts = tl.load(part_ptr + place[:, None] * D_BLOCK + d[None, :])  # [SPLITS, D_BLOCK]
        io = out_ptr + row.to(tl.int64) * out_stride + head * HEAD_DIM + d
        mine = tl.load(io, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
        total = tl.sum(sums * factor, axis=0) + own
        result = (tl.sum(parts * factor[:, None], axis=0) + mine * own) / total
        tl.store(io, result.to(out_ptr.dtype.element_ty), mask=d < HEAD_DIM)


class PrefixWorkspace:
    """Buffers of the shared part, good for CUDA graphs, shared by all layers of one stream.

    Args:
        max_rows: Most sequences in one launch.
        num_heads: Query heads.
        head_dim: Of a head.
        device: Where the cache is.
    """

    def __init__(self, max_rows: int, num_heads: int, head_dim: int, device: torch.device | str) -> None:
        self.max_rows = max_rows
        heads = SPLITS * max_rows * num_heads
        self.parts = torch.empty(heads * power_of_two(head_dim), dtype=torch.float32, device=device)
        self.stats = torch.empty(heads * 2, dtype=torch.float32, device=device)
        self.lse = torch.empty(max_rows * num_heads, dtype=torch.float32, device=device)


def attend_prefix(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    leader: torch.Tensor,
    workspace: PrefixWorkspace,
    *,
    scale: float | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    pdl: bool = False,
) -> None:
    """Attention of all rows over one shared prefix, into the workspace.

    Args:
        q: ``[rows, num_heads, head_dim]`` bf16 or fp16, contiguous heads.
        kv_cache: ``[num_blocks, num_kv_heads, 2, block_size, head_dim]``, the type of ``q`` or e4m3.
        block_tables: int32 ``[max_slots, max_blocks]``.
        leader: int32 ``[2]``: a slot whose first tokens are the prefix, and how many, a multiple of ``PREFIX_TILE``.
        workspace: Buffers.
        scale: Of the products; ``head_dim ** -0.5`` when None.
        k_scale: float32 ``[num_kv_heads]``, for an e4m3 cache.
        v_scale: float32 ``[num_kv_heads]``, likewise.
        pdl: Programmatic dependent launch.

    Raises:
        ValueError: Shapes disagree, more rows than the workspace has room for, or scales are missing for an e4m3 cache.
    """
    rows, _, head_dim = q.shape
    _, kv_heads, _, block_size, _ = kv_cache.shape
    fp8 = holds_e4m3(kv_cache, k_scale, v_scale)
    group = query_group(q, kv_cache)
    if rows > workspace.max_rows:
        raise ValueError(f"{rows} rows in a workspace for {workspace.max_rows}")
    # Wide heads: what fits into the 99 KB that a program has on small cards.
    block_m, tile, stages = (128, PREFIX_TILE, 4) if head_dim <= 128 else (64, PREFIX_TILE // 2, 2)
    block_m = max(block_m, power_of_two(group))
    launch(
        _prefix_kernel,
        (kv_heads * triton.cdiv(rows, block_m // group), SPLITS),
        q,
        kv_cache,
        block_tables,
        leader,
        workspace.parts,
        workspace.stats,
        k_scale,
        v_scale,
        rows,
        block_tables.stride(0),
        kv_cache.stride(0),
        q.stride(0),
        softmax_scale(head_dim, scale),
        KV_HEADS=kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        D_BLOCK=power_of_two(head_dim),
        BLOCK_SIZE=block_size,
        M=block_m,
        TILE=tile,
        SPLITS=SPLITS,
        STAGES=stages,
        FP8=fp8,
        PDL=pdl,
        num_warps=8,
        num_stages=stages,
        **launch_options(pdl),
    )


def join_prefix(out: torch.Tensor, skips: torch.Tensor, workspace: PrefixWorkspace, *, pdl: bool = False) -> None:
    """Join the shared part to what :func:`paged_decode` gave for each row's own keys, in place.

    Args:
        out: ``[rows, num_heads, head_dim]``, of ``paged_decode(..., lse=workspace.lse)``; rows that skip nothing stay.
        skips: int32 ``[rows]``, of ``plan.update``.
        workspace: Of :func:`attend_prefix`.
        pdl: Programmatic dependent launch.
    """
    rows, heads, head_dim = out.shape
    launch(
        _join_kernel,
        (rows, heads),
        out,
        workspace.lse,
        skips,
        workspace.parts,
        workspace.stats,
        rows,
        out.stride(0),
        HEADS=heads,
        HEAD_DIM=head_dim,
        D_BLOCK=power_of_two(head_dim),
        SPLITS=SPLITS,
        PDL=pdl,
        num_warps=2,
        **launch_options(pdl),
    )


def attend_prefix_reference(
    q: torch.Tensor, kv_cache: torch.Tensor, table: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the prefix alone, ``[rows, num_heads, head_dim]``, and the logarithm of its sum ``[rows, num_heads]``."""
    k, v = gather_cache_reference(kv_cache, table, length)
    group = q.shape[1] // k.shape[1]
    k, v = (part.to(q.dtype).repeat_interleave(group, dim=1) for part in (k, v))
    scores = torch.einsum("rhd,khd->rhk", q, k) * q.shape[2] ** -0.5
    return torch.einsum("rhk,khd->rhd", scores.softmax(-1), v), scores.logsumexp(-1)
