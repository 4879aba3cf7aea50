# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator, misc"
# ruff: noqa: N803  constexpr arguments are upper case in Triton
"""How decode attention is cut, once a step and for all layers.

The tiles of all (sequence, KV head) pairs stand in one line, as in stream-K (Osama et al. 2023) and lean attention (Sanovar et
al. 2024), and every program takes an equal run of it::

    pair       |----- 0 -----|-- 1 --|-------------- 2 --------------|- 3 -|
    program    |--- 0 ---|--- 1 ---|--- 2 ---|--- 3 ---|--- 4 ---|--- 5 ---|

The cut is made on the device, from lengths that the host does not know.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_model.kernels._launch import (
    has_large_shared_memory,
    launch,
    launch_options,
    num_sms,
    power_of_two,
    wait_for_previous,
)
from vllm_model.kernels.tuned import lookup

FEW_ROWS = 16
"""Up to here decode attention runs in another shape: there is less to read than programs to start."""
PLAN_FIELDS = 16
"""int32 of one program's plan: its run of the line (begin, end), the row, head and tile of its begin, the row and head of its
last tile, tiles of one head, length of the line."""


@triton.jit
def _keys(lens_ptr, slots_ptr, skips_ptr, row, rows, LEAVE_NEWEST: tl.constexpr):
    """Of rows: slot, keys in tiles, and keys left out ahead of them. Padding and what is past the end has none."""
    mask = row < rows
    slot = tl.load(slots_ptr + row, mask=mask, other=-1)
    length = tl.load(lens_ptr + row, mask=mask, other=0)
    skip = row * 0
    if skips_ptr is not None:
        skip = tl.load(skips_ptr + row, mask=mask, other=0)
    return slot, tl.where(slot >= 0, tl.maximum(length - skip - LEAVE_NEWEST, 0), 0), skip


@triton.jit(do_not_specialize=["rows"])
def _plan_kernel(
    lens_ptr,  # [rows]
    slots_ptr,  # [rows]
    tables_ptr,  # [max_slots, max_blocks]
    plan_ptr,  # [PROGRAMS, 16]
    starts_ptr,  # [rows + 1]
    entries_ptr,  # [tiles * (TILE // UNIT)]
    skips_ptr,  # [rows] or None
    newest_ptr,  # [rows, 2]
    tables_stride,
    rows,
    KV_HEADS: tl.constexpr,
    TILE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    ROWS_BLOCK: tl.constexpr,
    ENTRIES_BLOCK: tl.constexpr,
    LEAVE_NEWEST: tl.constexpr,
    PDL: tl.constexpr,
):
    program = tl.program_id(0)
    row = tl.arange(0, ROWS_BLOCK)
    wait_for_previous(PDL)
    _, length, _ = _keys(lens_ptr, slots_ptr, skips_ptr, row, rows, LEAVE_NEWEST)
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
        my_slot, my_length, skip = _keys(lens_ptr, slots_ptr, skips_ptr, mine, rows, LEAVE_NEWEST)
        my_table = tables_ptr + my_slot.to(tl.int64) * tables_stride
        if LEAVE_NEWEST:
            position = tl.load(lens_ptr + mine) - 1
            there = (my_slot >= 0) & (position >= 0)
            page = tl.load(my_table + position // BLOCK_SIZE, mask=there, other=0)
            tl.store(newest_ptr + 2 * mine, tl.where(there, page * BLOCK_SIZE + position % BLOCK_SIZE, -1))
            tl.store(newest_ptr + 2 * mine + 1, tl.where(there, position, 0))
        my_first = tl.sum(tl.where(row < mine, tiles, 0), axis=0) * per_tile
        units = tl.maximum((my_length + TILE - 1) // TILE, 1) * per_tile
        for start in range(0, units, ENTRIES_BLOCK):
            unit = start + tl.arange(0, ENTRIES_BLOCK)
            count = tl.minimum(tl.maximum(my_length - unit * UNIT, 0), UNIT)
            in_row = skip // UNIT + unit
            block = tl.load(my_table + in_row // per_block, mask=count > 0, other=0)
            place = block * per_block + in_row % per_block
            tl.store(entries_ptr + my_first + unit, (place << 8) | count, mask=unit < units)


@dataclass(frozen=True)
class DecodeConfig:
    """Launch shape of the decode kernel; the plan and the kernel must share it.

    Attributes:
        tile: Keys of one step, a power of two from 16.
        programs_per_sm: The grid is this many times the multiprocessors.
        num_warps: Warps of a program of Triton's kernel; ``warp_decode.cu`` has one.
        num_stages: Depth of the load pipeline, likewise; ``warp_decode.cu`` fills the shared memory.
    """

    tile: int = 64
    programs_per_sm: int = 3
    num_warps: int = 4
    num_stages: int = 4


def default_decode_config(
    head_dim: int, max_rows: int, device: torch.device, *, several: bool = False, fp8: bool = False
) -> DecodeConfig:
    """Measured on an H200 for heads of 128; two stages of the pipeline go to the block table.

    ``several``: for rows of several query tokens; ``fp8``: for a cache of e4m3.

    With less shared memory than Hopper's, what lets two programs share a multiprocessor: not measured. ``python -m
    vllm_model.tune`` measures on any card; :class:`DecodePlan` prefers what it found.
    """
    if not has_large_shared_memory(device):
        return DecodeConfig(tile=32 if head_dim <= 128 else 16, programs_per_sm=2)
    if head_dim > 128:
        return DecodeConfig(tile=32, num_stages=4)
    few = max_rows <= FEW_ROWS
    if fp8 and not few:
        return DecodeConfig(tile=128, programs_per_sm=2, num_stages=3)
    if several or fp8:
        return DecodeConfig(tile=64, programs_per_sm=2, num_stages=5 if several else 4)
    return DecodeConfig() if few else DecodeConfig(tile=32, programs_per_sm=6, num_warps=2)


class DecodePlan:
    """Who does what in a step's decode attention: device buffers of fixed size, good for CUDA graphs, shared by all layers.

    ``newest``, int32 ``[max_rows, 2]``, has of each row whose newest key is left out: its place in the cache as block times
    block size and place in the block, -1 if there is none; and its position.

    Args:
        max_rows: Most sequences in one launch.
        num_heads: Query heads.
        num_kv_heads: KV heads; ``num_heads`` is a multiple.
        head_dim: 1 to 256.
        device: Where the cache is.
        max_blocks: Most blocks of a sequence, the width of the block tables.
        block_size: Tokens of a block.
        max_queries: Most query tokens per sequence (speculation), ``max_queries * group <= 128``.
        fp8: Whether the cache is e4m3, for the choice of the launch shape.
        config: Launch shape; when None, what was measured on this card, else :func:`default_decode_config`.
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
        fp8: bool = False,
        config: DecodeConfig | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.max_rows, self.num_heads, self.num_kv_heads, self.head_dim = max_rows, num_heads, num_kv_heads, head_dim
        if num_heads % num_kv_heads or head_dim > 256 or max_queries * (num_heads // num_kv_heads) > 128:
            raise ValueError(f"no decode attention for {num_heads}/{num_kv_heads} heads of {head_dim}, {max_queries} queries")
        self.group = num_heads // num_kv_heads
        self.max_queries = max_queries
        self.leaves_newest = False
        if config is None:
            several = max_queries > 1
            key = (head_dim, self.group, int(max_rows <= FEW_ROWS), int(several), int(fp8))
            measured = lookup("decode", key, self.device)
            default = default_decode_config(head_dim, max_rows, self.device, several=several, fp8=fp8)
            config = DecodeConfig(*measured) if measured else default
        self.config = config
        self.programs = num_sms(self.device) * self.config.programs_per_sm
        rows = max(16, power_of_two(max_queries * self.group))
        self.unit = math.gcd(block_size, self.config.tile)
        self.block_size, self.max_blocks = block_size, max_blocks
        tiles = max(1, -(-max_blocks * block_size // self.config.tile))
        self.entries = torch.zeros(max_rows * tiles * (self.config.tile // self.unit), dtype=torch.int32, device=self.device)
        self.newest = torch.zeros(max_rows, 2, dtype=torch.int32, device=self.device)
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
        leave_newest: bool = False,
        pdl: bool = False,
    ) -> None:
        """Cut the step's work: once a step, before the first layer.

        Args:
            seq_lens: int32 ``[rows]``, keys of each row with this step's own; on the device, read there.
            slots: int32 ``[rows]``; -1: padding, as if its length were 0.
            block_tables: int32 ``[max_slots, max_blocks]``.
            skips: int32 ``[rows]``: leave out that many first keys, a multiple of ``unit``; for one query a row.
            leave_newest: Leave each row's last key to whoever begins its pairs, as :func:`rotary_decode` wants it.
            pdl: Programmatic dependent launch.

        Raises:
            ValueError: More rows than the plan has room for.
        """
        rows = len(seq_lens)
        if rows > self.max_rows:
            raise ValueError(f"{rows} rows in a plan for {self.max_rows}")
        self.leaves_newest = leave_newest
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
            self.newest,
            block_tables.stride(0),
            rows,
            KV_HEADS=self.num_kv_heads,
            TILE=self.config.tile,
            UNIT=self.unit,
            BLOCK_SIZE=self.block_size,
            PROGRAMS=self.programs,
            ROWS_BLOCK=power_of_two(self.max_rows),
            ENTRIES_BLOCK=256,
            LEAVE_NEWEST=leave_newest,
            PDL=pdl,
            num_warps=1 if self.max_rows <= 64 else 4,
            **launch_options(pdl),
        )
