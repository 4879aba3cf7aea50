# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator, misc"
# ruff: noqa: N803  constexpr arguments are upper case in Triton
"""Decode attention over a paged KV cache: one to eight query tokens per sequence, any lengths, one fixed grid.

The work of a step is cut as in stream-K (Osama et al. 2023) and lean attention (Sanovar et al. 2024): the tiles of all
(sequence, KV head) pairs stand in one line, and every program takes an equal run of it::

    pair       |----- 0 -----|-- 1 --|-------------- 2 --------------|- 3 -|
    program    |--- 0 ---|--- 1 ---|--- 2 ---|--- 3 ---|--- 4 ---|--- 5 ---|

A pair within one program is written at once. Of a pair cut between programs each part leaves (sum, maximum, weighted values) in
the workspace, and the program that comes last adds the parts up in their order, so the result does not depend on who was last.
The plan of a step is made once on the device, from lengths that the host does not know, and serves all layers.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_model.kernels._launch import launch, launch_options, num_sms, power_of_two, wait_for_previous
from vllm_model.kernels.qk_norm_rope import gather_cache_reference

PLAN_FIELDS = 16
"""int32 of one program's plan: its run of the line (begin, end), the row, head and tile of its begin, the row and head of its
last tile, tiles of one head, length of the line."""


@triton.jit(do_not_specialize=["rows"])
def _plan_kernel(
    lens_ptr,  # [rows]
    slots_ptr,  # [rows]
    tables_ptr,  # [max_slots, max_blocks]
    plan_ptr,  # [PROGRAMS, 16]
    starts_ptr,  # [rows + 1]
    entries_ptr,  # [tiles * (TILE // UNIT)]
    skips_ptr,  # [rows] or None
    tables_stride,
    rows,
    KV_HEADS: tl.constexpr,
    TILE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    ROWS_BLOCK: tl.constexpr,
    ENTRIES_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    program = tl.program_id(0)
    row = tl.arange(0, ROWS_BLOCK)
    wait_for_previous(PDL)
    slot = tl.load(slots_ptr + row, mask=row < rows, other=-1)
    length = tl.load(lens_ptr + row, mask=row < rows, other=0)
    if skips_ptr is not None:
        length -= tl.load(skips_ptr + row, mask=row < rows, other=0)
    length = tl.where(slot >= 0, length, 0)
    # An empty row has one tile with nothing in it, which writes its zeros.
    tiles = tl.where(row < rows, tl.maximum((length + TILE - 1) // TILE, 1), 0)
    upto = tl.cumsum(tiles, axis=0)
    each = tl.sum(tiles, axis=0)  # tiles of one head
    total = each.to(tl.int64) * KV_HEADS
    # No program between two parts of a pair may be empty: of more programs than tiles, the last ones rest.
    busy = tl.minimum(total, PROGRAMS)
    begin = (tl.minimum(program, busy) * total // busy).to(tl.int32)
    end = (tl.minimum(program + 1, busy) * total // busy).to(tl.int32)
    first = begin % each
    first_row = tl.sum((upto <= first).to(tl.int32), axis=0)
    last = tl.maximum(end - 1, 0)
    field = tl.arange(0, 16)
    value = tl.where(field == 0, begin, tl.where(field == 1, end, first_row))
    value = tl.where(field == 3, begin // each, value)
    value = tl.where(field == 4, first - tl.sum(tl.where(row < first_row, tiles, 0), axis=0), value)
    value = tl.where(field == 5, tl.sum((upto <= last % each).to(tl.int32), axis=0), value)
    value = tl.where(field == 6, last // each, value)
    value = tl.where(field == 7, each, value)
    value = tl.where(field == 8, total.to(tl.int32), value)
    tl.store(plan_ptr + program * 16 + field, value)
    if program == 0:
        tl.store(starts_ptr, 0)
        tl.store(starts_ptr + 1 + row, upto, mask=row < rows)
    per_tile: tl.constexpr = TILE // UNIT
    per_block: tl.constexpr = BLOCK_SIZE // UNIT
    for mine in range(program, rows, PROGRAMS):
        my_slot = tl.load(slots_ptr + mine).to(tl.int64)
        my_length = tl.where(my_slot >= 0, tl.load(lens_ptr + mine), 0)
        skipped = 0
        if skips_ptr is not None:
            skip = tl.load(skips_ptr + mine)
            skipped = skip // UNIT
            my_length = tl.maximum(my_length - skip, 0)
        my_first = tl.sum(tl.where(row < mine, tiles, 0), axis=0) * per_tile
        units = tl.maximum((my_length + TILE - 1) // TILE, 1) * per_tile
        for start in range(0, units, ENTRIES_BLOCK):
            unit = start + tl.arange(0, ENTRIES_BLOCK)
            count = tl.minimum(tl.maximum(my_length - unit * UNIT, 0), UNIT)
            block = tl.load(tables_ptr + my_slot * tables_stride + (skipped + unit) // per_block, mask=count > 0, other=0)
            place = block * per_block + (skipped + unit) % per_block
            tl.store(entries_ptr + my_first + unit, (place << 8) | count, mask=unit < units)


@triton.jit
def _merge(
    row,
    head,
    begin,
    end,
    program,
    starts_ptr,
    out_ptr,
    part_ptr,
    stats_ptr,
    count_ptr,
    lse_ptr,
    v_scale_ptr,
    total,
    each,
    q_stride,
    queries,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D_BLOCK: tl.constexpr,
    M: tl.constexpr,
    PROGRAMS: tl.constexpr,
    FP8: tl.constexpr,
):
    """If a pair is cut between programs: count this program's part, and who comes last adds the parts up."""
    start = tl.load(starts_ptr + row)
    tiles = tl.load(starts_ptr + row + 1) - start
    place = head * each + start
    if (place < begin) | (place + tiles > end):
        m = tl.arange(0, M)
        d = tl.arange(0, D_BLOCK)
        busy = tl.minimum(total, PROGRAMS).to(tl.int64)
        first = (((place.to(tl.int64) + 1) * busy - 1) // total).to(tl.int32)
        last = (((place.to(tl.int64) + tiles) * busy - 1) // total).to(tl.int32)
        tl.debug_barrier()  # every thread's part is written before one thread counts it
        arrived = tl.atomic_add(count_ptr + row * KV_HEADS + head, 1, sem="acq_rel", scope="gpu")
        if arrived == last - first:
            tl.store(count_ptr + row * KV_HEADS + head, 0)
            m_mask = m < queries * GROUP
            part_io = m[:, None] * D_BLOCK + d[None, :]
            highest = tl.full([M], -1.0e30, tl.float32)
            denominator = tl.zeros([M], tl.float32)
            acc = tl.zeros([M, D_BLOCK], tl.float32)
            for other in range(first, last + 1):
                index = other * 2 + tl.where(other == first, 1, 0)
                # Past the first-level cache: another multiprocessor wrote this during this launch.
                its_highest = tl.load(stats_ptr + index * (2 * M) + m, cache_modifier=".cg")
                its_sum = tl.load(stats_ptr + index * (2 * M) + M + m, cache_modifier=".cg")
                values = tl.load(
                    part_ptr + index * (M * D_BLOCK) + part_io, mask=m_mask[:, None], other=0.0, cache_modifier=".cg"
                )
                new_highest = tl.maximum(highest, its_highest)
                shrink = tl.exp2(highest - new_highest)
                its_shrink = tl.exp2(its_highest - new_highest)
                denominator = denominator * shrink + its_sum * its_shrink
                acc = acc * shrink[:, None] + values * its_shrink[:, None]
                highest = new_highest
            result = acc / tl.where(denominator > 0.0, denominator, 1.0)[:, None]
            if FP8:
                result *= tl.load(v_scale_ptr + head)
            where = (row * queries + m // GROUP).to(tl.int64)[:, None] * q_stride + d[None, :]
            where += ((head * GROUP + m % GROUP) * HEAD_DIM)[:, None]
            if lse_ptr is not None:
                its = (row * queries + m // GROUP) * (KV_HEADS * GROUP) + head * GROUP + m % GROUP
                tl.store(lse_ptr + its, highest + tl.log2(denominator), mask=m_mask)
            tl.store(out_ptr + where, result.to(out_ptr.dtype.element_ty), mask=m_mask[:, None] & (d < HEAD_DIM)[None, :])


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
    queries,  # of each row
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
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
        tiles = tl.load(starts_ptr + row + 1) - tl.load(starts_ptr + row)
        left = tl.minimum(tiles - tile, end - begin)
        whole = (tile == 0) & (left == tiles)
        starts_here = tile == 0
        base = row.to(tl.int64) * (queries * q_stride) + head * (GROUP * HEAD_DIM)
        q = tl.load(q_ptr + base + io, mask=io_mask, other=0.0)
        bound = tl.zeros([M], tl.int32)
        if MANY:
            bound = tl.load(first_ptr + row) + m // GROUP  # the last key of each query
        highest = tl.full([M], -1.0e30, tl.float32)  # finite, so that a row that saw nothing yet subtracts to 0, not NaN
        denominator = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, D_BLOCK], tl.float32)
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
                k = k.to(q_ptr.dtype.element_ty)
                v = v.to(q_ptr.dtype.element_ty)
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
            acc = tl.dot(weight.to(q_ptr.dtype.element_ty), v, acc * shrink[:, None])
            highest = new_highest
            tile += 1
            left -= 1
            if left == 0:
                if whole:
                    result = acc / tl.where(denominator > 0.0, denominator, 1.0)[:, None]
                    if FP8:
                        result *= tl.load(v_scale_ptr + head)
                    tl.store(out_ptr + base + io, result.to(out_ptr.dtype.element_ty), mask=io_mask)
                    if lse_ptr is not None:
                        its = (row * queries + m // GROUP) * (KV_HEADS * GROUP) + head * GROUP + m % GROUP
                        tl.store(lse_ptr + its, highest + tl.log2(denominator), mask=m_mask)
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
                    tiles = tl.load(starts_ptr + row + 1) - tl.load(starts_ptr + row)
                    left = tl.minimum(tiles, end - at - 1)
                    whole = left == tiles
                    starts_here = True
                    base = row.to(tl.int64) * (queries * q_stride) + head * (GROUP * HEAD_DIM)
                    q = tl.load(q_ptr + base + io, mask=io_mask, other=0.0)
                    if MANY:
                        bound = tl.load(first_ptr + row) + m // GROUP
                    highest = tl.full([M], -1.0e30, tl.float32)
                    denominator = tl.zeros([M], tl.float32)
                    acc = tl.zeros([M, D_BLOCK], tl.float32)
        for which in tl.static_range(2):
            its_row = first_row if which == 0 else last_row
            its_head = first_head if which == 0 else last_head
            if (which == 0) | (first_row != last_row) | (first_head != last_head):
                _merge(
                    its_row,
                    its_head,
                    begin,
                    end,
                    program,
                    starts_ptr,
                    out_ptr,
                    part_ptr,
                    stats_ptr,
                    count_ptr,
                    lse_ptr,
                    v_scale_ptr,
                    total,
                    each,
                    q_stride,
                    queries,
                    KV_HEADS,
                    GROUP,
                    HEAD_DIM,
                    D_BLOCK,
                    M,
                    PROGRAMS,
                    FP8,
                )


@dataclass(frozen=True)
class DecodeConfig:
    """Launch shape of the decode kernel; the plan and the kernel must share it.

    Attributes:
        tile: Keys of one step, a power of two from 16.
        programs_per_sm: The grid is this many times the multiprocessors.
        num_warps: Warps of a program.
        num_stages: Depth of the load pipeline.
    """

    tile: int = 64
    programs_per_sm: int = 3
    num_warps: int = 4
    num_stages: int = 4


def default_decode_config(head_dim: int, max_rows: int) -> DecodeConfig:
    """Measured on an H200 for heads of 128; two stages of the pipeline go to the block table."""
    if head_dim > 128:
        return DecodeConfig(tile=32, num_stages=4)
    return DecodeConfig(tile=32, programs_per_sm=4, num_warps=2, num_stages=5) if max_rows > 16 else DecodeConfig()


class DecodePlan:
    """Who does what in a step's decode attention: device buffers of fixed size, good for CUDA graphs, shared by all layers.

    Args:
        max_rows: Most sequences in one launch.
        num_heads: Query heads.
        num_kv_heads: KV heads; ``num_heads`` is a multiple.
        head_dim: 1 to 256.
        device: Where the cache is.
        max_blocks: Most blocks of a sequence, the width of the block tables.
        block_size: Tokens of a block.
        max_queries: Most query tokens per sequence (speculation), ``max_queries * group <= 128``.
        config: Launch shape; chosen from the head size when None.
    """

    def __init__(
        self,
        max_rows: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device | str,
        *,
        max_blocks: int,
        block_size: int = 16,
        max_queries: int = 1,
        config: DecodeConfig | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.max_rows, self.num_heads, self.num_kv_heads, self.head_dim = max_rows, num_heads, num_kv_heads, head_dim
        if num_heads % num_kv_heads or head_dim > 256 or max_queries * (num_heads // num_kv_heads) > 128:
            raise ValueError(f"no decode attention for {num_heads}/{num_kv_heads} heads of {head_dim}, {max_queries} queries")
        self.group = num_heads // num_kv_heads
        self.max_queries = max_queries
        self.config = config or default_decode_config(head_dim, max_rows)
        self.programs = num_sms(self.device) * self.config.programs_per_sm
        rows = max(16, power_of_two(max_queries * self.group))
        self.unit = math.gcd(block_size, self.config.tile)
        self.block_size, self.max_blocks = block_size, max_blocks
        tiles = max(1, -(-max_blocks * block_size // self.config.tile))
        self.entries = torch.zeros(max_rows * tiles * (self.config.tile // self.unit), dtype=torch.int32, device=self.device)
        self.starts = torch.zeros(max_rows + 1, dtype=torch.int32, device=self.device)
        self.plan = torch.zeros(self.programs, PLAN_FIELDS, dtype=torch.int32, device=self.device)
        self.parts = torch.empty(self.programs, 2, rows, power_of_two(head_dim), dtype=torch.float32, device=self.device)
        self.stats = torch.empty(self.programs, 2, 2, rows, dtype=torch.float32, device=self.device)
        self.counts = torch.zeros(max_rows * num_kv_heads, dtype=torch.int32, device=self.device)

    def update(
        self,
        seq_lens: torch.Tensor,
        slots: torch.Tensor,
        block_tables: torch.Tensor,
        *,
        skips: torch.Tensor | None = None,
        pdl: bool = False,
    ) -> None:
        """Cut the step's work: once a step, before the first layer.

        Args:
            seq_lens: int32 ``[rows]``, keys of each row with this step's own; on the device, read there.
            slots: int32 ``[rows]``; -1: padding, as if its length were 0.
            block_tables: int32 ``[max_slots, max_blocks]``.
            skips: int32 ``[rows]``: leave out that many first keys, whole tiles; for one query a row.
            pdl: Programmatic dependent launch.

        Raises:
            ValueError: More rows than the plan has room for.
        """
        rows = len(seq_lens)
        if rows > self.max_rows:
            raise ValueError(f"{rows} rows in a plan for {self.max_rows}")
        launch(
            _plan_kernel,
            (self.programs,),
            seq_lens,
            slots,
            block_tables,
            self.plan,
            self.starts,
            self.entries,
            skips,
            block_tables.stride(0),
            rows,
            KV_HEADS=self.num_kv_heads,
            TILE=self.config.tile,
            UNIT=self.unit,
            BLOCK_SIZE=self.block_size,
            PROGRAMS=self.programs,
            ROWS_BLOCK=power_of_two(self.max_rows),
            ENTRIES_BLOCK=256,
            PDL=pdl,
            num_warps=1 if self.max_rows <= 64 else 4,
            **launch_options(pdl),
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
        ValueError: Shapes disagree with the plan, or scales are missing for an e4m3 cache.
    """
    rows = len(q) // queries
    fp8 = kv_cache.dtype == torch.float8_e4m3fn
    head_dim = q.shape[2]
    if (
        rows > plan.max_rows
        or len(q) != rows * queries
        or queries > plan.max_queries
        or (queries > 1 and first_positions is None)
        or tuple(q.shape[1:]) != (plan.num_heads, plan.head_dim)
        or (kv_cache.shape[1], kv_cache.shape[3]) != (plan.num_kv_heads, plan.block_size)
        or q.stride(1) != head_dim
    ):
        raise ValueError(f"q {tuple(q.shape)} with {queries} queries a row does not fit the plan")
    if fp8 and (k_scale is None or v_scale is None):
        raise ValueError("an e4m3 cache needs k_scale and v_scale")
    if out is None:
        out = torch.empty_like(q)
    if not rows:
        return out
    config, m = plan.config, max(16, power_of_two(queries * plan.group))
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
        (head_dim**-0.5 if scale is None else scale) * 1.4426950408889634,
        queries,
        KV_HEADS=plan.num_kv_heads,
        GROUP=plan.group,
        MANY=queries > 1,
        HEAD_DIM=head_dim,
        D_BLOCK=power_of_two(head_dim),
        BLOCK_SIZE=plan.block_size,
        M=m,
        TILE=config.tile,
        UNIT=plan.unit,
        PROGRAMS=plan.programs,
        STAGES=config.num_stages,
        FP8=fp8,
        PDL=pdl,
        num_warps=max(config.num_warps, m // 16),
        num_stages=config.num_stages,
        **launch_options(pdl),
    )
    return out


def attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_computed: int, scale: float | None = None
) -> torch.Tensor:
    """Causal attention of one sequence: ``q`` ``[queries, num_heads, head_dim]`` stands at positions ``num_computed ...``;
    ``k``, ``v`` ``[num_computed + queries, num_kv_heads, head_dim]``. In the type of its arguments.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[2] ** -0.5 if scale is None else scale)
    position = torch.arange(len(k), device=q.device)
    hidden = position[None, :] > num_computed + torch.arange(len(q), device=q.device)[:, None]
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


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
