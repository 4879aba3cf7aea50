# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator, misc"
# ruff: noqa: N803  constexpr arguments are upper case in Triton
"""Decode attention over a paged KV cache: one or a few query tokens per sequence, any lengths, one fixed grid.

:mod:`decode_plan` says which tiles of which (sequence, KV head) pairs a program takes. A pair within one program is written at
once. Of a pair cut between programs each part leaves (sum, maximum, weighted values) in the workspace, and the program that
comes last adds the parts up in their order, so the result does not depend on who was last.
"""

import torch
import triton
import triton.language as tl

from vllm_model.kernels._launch import launch, launch_options, power_of_two, wait_for_previous, with_room
from vllm_model.kernels._paged import attention_reference, holds_e4m3, query_group, softmax_scale
from vllm_model.kernels.decode_plan import DecodePlan
from vllm_model.kernels.qk_norm_rope import gather_cache_reference
from vllm_model.kernels.warp_decode import launch_warps, suits_warps

FULL_STAGE_ROWS = 32
"""Most rows of the products, query tokens by heads, for which all stages of the pipeline are there."""


@triton.jit
def _start_pair(
    q_ptr,
    first_ptr,
    starts_ptr,
    io,
    io_mask,
    row,
    head,
    tile,
    room,
    q_stride,
    GROUP: tl.constexpr,
    queries,
    MANY: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D_BLOCK: tl.constexpr,
    M: tl.constexpr,
    FP8: tl.constexpr,
):
    """A pair from its tile ``tile`` on: the tiles of it that this program takes, at most ``room``; whether that is all of it;
    its queries, the last key of each; and of the softmax: maximum, sum, weighted values.
    """
    tiles = tl.load(starts_ptr + row + 1) - tl.load(starts_ptr + row)
    left = tl.minimum(tiles - tile, room)
    q = tl.load(q_ptr + row.to(tl.int64) * (queries * q_stride) + head * (GROUP * HEAD_DIM) + io, mask=io_mask, other=0.0)
    if FP8:
        q = q.to(tl.float16)
    bound = tl.zeros([M], tl.int32)
    if MANY:
        bound = tl.load(first_ptr + row) + tl.arange(0, M) // GROUP
    highest = tl.full([M], -1.0e30, tl.float32)  # finite, so that a row that saw nothing yet subtracts to 0, not NaN
    denominator = tl.zeros([M], tl.float32)
    return left, (tile == 0) & (left == tiles), q, bound, highest, denominator, tl.zeros([M, D_BLOCK], tl.float32)


@triton.jit
def _write_pair(
    out_ptr,
    lse_ptr,
    v_scale_ptr,
    io,
    io_mask,
    row,
    head,
    highest,
    denominator,
    acc,
    q_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    queries,
    HEAD_DIM: tl.constexpr,
    M: tl.constexpr,
    FP8: tl.constexpr,
):
    result = acc / tl.where(denominator > 0.0, denominator, 1.0)[:, None]
    if FP8:
        result *= tl.load(v_scale_ptr + head)
    base = row.to(tl.int64) * (queries * q_stride) + head * (GROUP * HEAD_DIM)
    tl.store(out_ptr + base + io, result.to(out_ptr.dtype.element_ty), mask=io_mask)
    if lse_ptr is not None:
        m = tl.arange(0, M)
        its = (row * queries + m // GROUP) * (KV_HEADS * GROUP) + head * GROUP + m % GROUP
        tl.store(lse_ptr + its, highest + tl.log2(denominator), mask=m < queries * GROUP)


@triton.jit
def _add_up(
    row,
    head,
    first,
    last,
    out_ptr,
    part_ptr,
    stats_ptr,
    lse_ptr,
    v_scale_ptr,
    io,
    io_mask,
    q_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    queries,
    HEAD_DIM: tl.constexpr,
    D_BLOCK: tl.constexpr,
    M: tl.constexpr,
    FP8: tl.constexpr,
):
    """Write a pair whose parts the programs ``first`` to ``last`` have left."""
    m = tl.arange(0, M)
    m_mask = m < queries * GROUP
    part_io = m[:, None] * D_BLOCK + tl.arange(0, D_BLOCK)[None, :]
    highest = tl.full([M], -1.0e30, tl.float32)
    denominator = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D_BLOCK], tl.float32)
    for other in range(first, last + 1):
        index = other * 2 + tl.where(other == first, 1, 0)
        # Past the first-level cache: another multiprocessor wrote this during this launch.
        its_highest = tl.load(stats_ptr + index * (2 * M) + m, cache_modifier=".cg")
        its_sum = tl.load(stats_ptr + index * (2 * M) + M + m, cache_modifier=".cg")
        values = tl.load(part_ptr + index * (M * D_BLOCK) + part_io, mask=m_mask[:, None], other=0.0, cache_modifier=".cg")
        new_highest = tl.maximum(highest, its_highest)
        shrink = tl.exp2(highest - new_highest)
        its_shrink = tl.exp2(its_highest - new_highest)
        denominator = denominator * shrink + its_sum * its_shrink
        acc = acc * shrink[:, None] + values * its_shrink[:, None]
        highest = new_highest
    _write_pair(
        out_ptr,
        lse_ptr,
        v_scale_ptr,
        io,
        io_mask,
        row,
        head,
        highest,
        denominator,
        acc,
        q_stride,
        KV_HEADS,
        GROUP,
        queries,
        HEAD_DIM,
        M,
        FP8,
    )


@triton.jit
def _decode_kernel(
    q_ptr,  # [rows * queries, KV_HEADS * GROUP, HEAD_DIM]
    out_ptr,  # like q
    cache_ptr,  # [num_blocks, KV_HEADS, 2, BLOCK_SIZE, HEAD_DIM]
    first_ptr,  # [rows]: position of the row's first query, for more than one query
    plan_ptr,  # [PROGRAMS, 16]
    starts_ptr,  # [rows + 1]
    entries_ptr,  # [tiles * (TILE // UNIT)]
    part_ptr,  # float32 [PROGRAMS, 2, M, D_BLOCK]
    stats_ptr,  # float32 [PROGRAMS, 2, 2, M]: maximum, sum
    count_ptr,  # int32 [rows * KV_HEADS], zero between launches
    lse_ptr,  # float32 [rows * queries, KV_HEADS * GROUP] or None
    k_scale_ptr,  # float32 [KV_HEADS]
    v_scale_ptr,
    block_stride,
    q_stride,
    softmax_scale,  # times log2(e)
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    queries,
    MANY: tl.constexpr,  # more than one query
    HEAD_DIM: tl.constexpr,
    D_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    M: tl.constexpr,
    TILE: tl.constexpr,
    UNIT: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STAGES: tl.constexpr,
    FP8: tl.constexpr,
    PDL: tl.constexpr,
):
    program = tl.program_id(0)
    begin = tl.load(plan_ptr + program * 16)
    end = tl.load(plan_ptr + program * 16 + 1)
    row = tl.load(plan_ptr + program * 16 + 2)
    head = tl.load(plan_ptr + program * 16 + 3)
    tile = tl.load(plan_ptr + program * 16 + 4)
    last_row = tl.load(plan_ptr + program * 16 + 5)
    last_head = tl.load(plan_ptr + program * 16 + 6)
    each = tl.load(plan_ptr + program * 16 + 7)
    total = tl.load(plan_ptr + program * 16 + 8)
    first_row = row
    first_head = head

    m = tl.arange(0, M)  # (query token, head of the group), padded for the matrix unit
    m_mask = m < queries * GROUP
    d = tl.arange(0, D_BLOCK)
    n = tl.arange(0, TILE)
    io_mask = m_mask[:, None] & (d < HEAD_DIM)[None, :]
    part_io = m[:, None] * D_BLOCK + d[None, :]
    io = (m // GROUP).to(tl.int64)[:, None] * q_stride + ((m % GROUP) * HEAD_DIM)[:, None] + d[None, :]
    per_tile: tl.constexpr = TILE // UNIT
    per_block: tl.constexpr = BLOCK_SIZE // UNIT
    wait_for_previous(PDL)

    if begin < end:
        starts_here = tile == 0
        left, whole, q, bound, highest, denominator, acc = _start_pair(
            q_ptr,
            first_ptr,
            starts_ptr,
            io,
            io_mask,
            row,
            head,
            tile,
            end - begin,
            q_stride,
            GROUP,
            queries,
            MANY,
            HEAD_DIM,
            D_BLOCK,
            M,
            FP8,
        )
        # One loop over tiles of all pairs, so that loads of the next pair are under way while one ends.
        for at in tl.range(begin, end, num_stages=STAGES):
            its_head = at // each
            entry = tl.load(entries_ptr + (at - its_head * each) * per_tile + n // UNIT)
            place = entry >> 8
            seen = (n % UNIT) < (entry & 255)
            offset = (place // per_block).to(tl.int64) * block_stride + its_head * (2 * BLOCK_SIZE * HEAD_DIM)
            offset += (place % per_block * UNIT + n % UNIT) * HEAD_DIM
            kv_ptr = cache_ptr + offset[:, None] + d[None, :]
            if HEAD_DIM == D_BLOCK:  # noqa: SIM108  Triton takes no conditional expression here
                kv_mask = seen[:, None]
            else:
                kv_mask = seen[:, None] & (d < HEAD_DIM)[None, :]
            k = tl.load(kv_ptr, mask=kv_mask, other=0.0)  # [TILE, D_BLOCK]
            v = tl.load(kv_ptr + BLOCK_SIZE * HEAD_DIM, mask=kv_mask, other=0.0)
            if FP8:
                k = k.to(tl.float16)  # exact, and one instruction for two of them
                v = v.to(tl.float16)
            scale = softmax_scale
            if FP8:
                scale *= tl.load(k_scale_ptr + head)
            scores = tl.dot(q, tl.trans(k)) * scale  # [M, TILE]
            if not MANY:
                scores = tl.where(seen[None, :], scores, float("-inf"))
            else:
                scores = tl.where(seen[None, :] & ((tile * TILE + n)[None, :] <= bound[:, None]), scores, float("-inf"))
            new_highest = tl.maximum(highest, tl.max(scores, axis=1))
            weight = tl.exp2(scores - new_highest[:, None])
            shrink = tl.exp2(highest - new_highest)
            denominator = denominator * shrink + tl.sum(weight, axis=1)
            acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None])
            highest = new_highest
            tile += 1
            left -= 1
            if left == 0:
                if whole:
                    _write_pair(
                        out_ptr,
                        lse_ptr,
                        v_scale_ptr,
                        io,
                        io_mask,
                        row,
                        head,
                        highest,
                        denominator,
                        acc,
                        q_stride,
                        KV_HEADS,
                        GROUP,
                        queries,
                        HEAD_DIM,
                        M,
                        FP8,
                    )
                else:
                    # A program holds at most one part without the pair's beginning (0) and one with it, but not its end (1).
                    part = program * 2 + starts_here.to(tl.int32)
                    tl.store(part_ptr + part.to(tl.int64) * (M * D_BLOCK) + part_io, acc, mask=m_mask[:, None])
                    tl.store(stats_ptr + part * (2 * M) + m, highest)
                    tl.store(stats_ptr + part * (2 * M) + M + m, denominator)
                if at + 1 < end:
                    row += 1
                    if (head + 1) * each == at + 1:
                        head += 1
                        row = 0
                    tile = 0
                    starts_here = True
                    left, whole, q, bound, highest, denominator, acc = _start_pair(
                        q_ptr,
                        first_ptr,
                        starts_ptr,
                        io,
                        io_mask,
                        row,
                        head,
                        0,
                        end - at - 1,
                        q_stride,
                        GROUP,
                        queries,
                        MANY,
                        HEAD_DIM,
                        D_BLOCK,
                        M,
                        FP8,
                    )
        # Of what is cut only a program's first pair and its last: who comes last to a pair adds its parts up.
        which = tl.arange(0, 2)
        rows = tl.where(which == 0, first_row, last_row)
        heads = tl.where(which == 0, first_head, last_head)
        start = tl.load(starts_ptr + rows)
        place = heads * each + start
        upto = place + tl.load(starts_ptr + rows + 1) - start
        another = (which == 0) | (rows != first_row) | (heads != first_head)
        cut = ((place < begin) | (upto > end)) & another
        busy = tl.minimum(total, PROGRAMS).to(tl.int64)
        firsts = (((place.to(tl.int64) + 1) * busy - 1) // total).to(tl.int32)
        lasts = ((upto.to(tl.int64) * busy - 1) // total).to(tl.int32)
        tl.debug_barrier()  # every thread's part is written before one thread counts it
        arrived = tl.atomic_add(count_ptr + rows * KV_HEADS + heads, 1, mask=cut, sem="acq_rel", scope="gpu")
        complete = cut & (arrived == lasts - firsts)
        tl.store(count_ptr + rows * KV_HEADS + heads, 0, mask=complete)
        for each_of_both in tl.static_range(2):
            its = which == each_of_both
            if tl.sum((its & complete).to(tl.int32), axis=0) > 0:
                _add_up(
                    first_row if each_of_both == 0 else last_row,
                    first_head if each_of_both == 0 else last_head,
                    tl.sum(tl.where(its, firsts, 0), axis=0),
                    tl.sum(tl.where(its, lasts, 0), axis=0),
                    out_ptr,
                    part_ptr,
                    stats_ptr,
                    lse_ptr,
                    v_scale_ptr,
                    io,
                    io_mask,
                    q_stride,
                    KV_HEADS,
                    GROUP,
                    queries,
                    HEAD_DIM,
                    D_BLOCK,
                    M,
                    FP8,
                )


def paged_decode(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    plan: DecodePlan,
    *,
    queries: int = 1,
    first_positions: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    scale: float | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Attention of each row's newest tokens over its whole sequence. ``plan.update`` must have seen these rows.

    Args:
        q: ``[rows * queries, num_heads, head_dim]`` bf16 or fp16, contiguous heads: ``queries`` tokens of every row.
        kv_cache: ``[num_blocks, num_kv_heads, 2, block_size, head_dim]``, each block contiguous; the type of ``q`` or e4m3.
            Holds this step's keys and values already.
        plan: The cut of this step.
        queries: Query tokens of each row.
        first_positions: int32 ``[rows]``, for more than one query: query ``j`` of a row sees the keys up to position
            ``first + j``, as far as the row has them.
        lse: float32 ``[rows * queries, num_heads]``: the binary logarithm of each softmax's sum, to be written.
        scale: Of the products; ``head_dim ** -0.5`` when None.
        k_scale: float32 ``[num_kv_heads]``, for an e4m3 cache.
        v_scale: float32 ``[num_kv_heads]``, likewise.
        out: Like ``q`` and with its strides; a new tensor when None.
        pdl: Programmatic dependent launch; the plan must then be at least two launches old.

    Returns:
        ``[rows * queries, num_heads, head_dim]``. Rows of length 0 or slot -1 are zeros.

    Raises:
        ValueError: Shapes disagree with the plan, strides with each other, or scales are missing for an e4m3 cache.
    """
    rows = len(q) // queries
    fp8 = holds_e4m3(kv_cache, k_scale, v_scale)
    head_dim = q.shape[2]
    if (
        rows > plan.max_rows
        or len(q) != rows * queries
        or queries > plan.max_queries
        or plan.leaves_newest
        or (queries > 1 and first_positions is None)
        or tuple(q.shape[1:]) != (plan.num_heads, plan.head_dim)
        or query_group(q, kv_cache) != plan.group
        or kv_cache.shape[3] != plan.block_size
    ):
        raise ValueError(f"q {tuple(q.shape)} with {queries} queries a row does not fit the plan")
    if out is None:
        out = with_room(q, *q.shape)
    if not rows:
        return out
    if out.stride() != q.stride():
        raise ValueError(f"q has strides {q.stride()}, out {out.stride()}")
    if queries == 1 and lse is None and suits_warps(plan, kv_cache, q.dtype):
        launch_warps(q, kv_cache, plan, out, softmax_scale(head_dim, scale), pdl=pdl)
        return out
    config, m = plan.config, max(16, power_of_two(queries * plan.group))
    stages = max(config.num_stages - (m > FULL_STAGE_ROWS), 1)  # their scores and sums take the room of one
    launch(
        _decode_kernel,
        (plan.programs,),
        q,
        out,
        kv_cache,
        first_positions,
        plan.plan,
        plan.starts,
        plan.entries,
        plan.parts,
        plan.stats,
        plan.counts,
        lse,
        k_scale,
        v_scale,
        kv_cache.stride(0),
        q.stride(0),
        softmax_scale(head_dim, scale),
        KV_HEADS=plan.num_kv_heads,
        GROUP=plan.group,
        queries=queries,
        MANY=queries > 1,
        HEAD_DIM=head_dim,
        D_BLOCK=power_of_two(head_dim),
        BLOCK_SIZE=plan.block_size,
        M=m,
        TILE=config.tile,
        UNIT=plan.unit,
        PROGRAMS=plan.programs,
        STAGES=stages,
        FP8=fp8,
        PDL=pdl,
        num_warps=max(config.num_warps, m // 16),
        num_stages=stages,
        **launch_options(pdl),
    )
    return out


def paged_decode_reference(
    q: torch.Tensor, kv_cache: torch.Tensor, block_tables: torch.Tensor, slots: torch.Tensor, seq_lens: torch.Tensor
) -> torch.Tensor:
    """What :func:`paged_decode` computes (no scales), in the type of ``q``, row by row."""
    out = torch.zeros_like(q)
    queries = len(q) // max(len(seq_lens), 1)
    for row, (slot, length) in enumerate(zip(slots.tolist(), seq_lens.tolist(), strict=True)):
        if slot >= 0 and length > 0:
            k, v = gather_cache_reference(kv_cache, block_tables[slot], length)
            mine = slice(row * queries, (row + 1) * queries)
            out[mine] = attention_reference(q[mine], k.to(q.dtype), v.to(q.dtype), length - queries)
    return out
