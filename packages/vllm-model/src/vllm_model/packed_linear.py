"""Products with packed weights by torch's int4 kernel for bfloat16 on the CPU.

The kernel computes ``weight[n, k] = (value - 8) * scale + zero`` with values 0 to 15 and bfloat16 scales and zeros for groups
of 32. Rounding those two to bfloat16 moves a weight by at most 0.4 %, as rounding the weight itself would.

A weight of 8 bits is two of 4 bits beside each other, ``16 * high + low``, and the input comes twice: exact, at half the speed.
torch's own int8 kernel has one scale for a whole row, which doubles the error of Q8_0.

How the kernel lays out its bytes depends on the processor, and nothing else is kept of the weight. So the layout is found by
packing a weight that is known. For many rows at once the weight is dequantized, piece by piece: see :data:`FEW_ROWS`.
"""

from dataclasses import dataclass
from functools import cache
from typing import Final

import torch
import torch.nn.functional as F

from vllm_model.linear import Linear
from vllm_model.quantization import GROUP, Bits, QuantizedTensor

FEW_ROWS: Final = {4: 32, 8: 32}
"""Rows of input up to which the packed product is taken; prompts, with more, keep the exact scales of the dequantized weight.

Microseconds of one core with AVX512-BF16, weight 2048 x 2048, packed against dequantized, torch 2.13: 4 bits 2,900 and 8,700
at 32 rows, 6,000 and 9,100 at 64, 11,800 and 9,900 at 128; 8 bits 6,000 and 9,800 at 32, 12,000 and 10,300 at 64.
"""
SLAB: Final = 64
"""Rows of a weight that every layout keeps together."""
CHUNK: Final = 1 << 20
"""Weights to dequantize at once."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the kernel keeps the rows of a weight ``[n, k]``: ``[n / block, k, block / 2]`` bytes.

    Attributes:
        block: 16, 32 or 64 rows.
        order: int64 ``[block]``: the rows, within their block, of the low halves of the bytes, then of the high halves.
    """

    block: int
    order: torch.Tensor


@cache
def int4_layout() -> Layout | None:
    """The layout on this processor; None if this torch has no such kernel, or packs in a way that is not known."""
    ids = torch.arange(SLAB, dtype=torch.int32)[:, None].expand(SLAB, GROUP)
    try:
        ones, sixteens = (_pack(part).flatten().long() for part in (ids & 15, ids >> 4))
    except (AttributeError, RuntimeError):
        return None
    if ones.numel() != SLAB * GROUP // 2:
        return None
    whose = torch.stack([(ones & 15) + 16 * (sixteens & 15), (ones >> 4) + 16 * (sixteens >> 4)])  # [low or high, bytes]
    for block in (64, 32, 16):
        blocks = whose.view(2, -1, GROUP, block // 2) - torch.arange(0, SLAB, block)[:, None, None]
        order = blocks[:, 0, 0].flatten()
        if (blocks == blocks[:, :1, :1]).all() and torch.equal(order.sort().values, torch.arange(block)):
            return Layout(block, order)
    return None


def _pack(values: torch.Tensor) -> torch.Tensor:
    """int32 ``[n, k]`` of 0 to 15 as the kernel wants them."""
    packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.contiguous(), 1)
    return packed


@dataclass(slots=True, kw_only=True)
class PackedLinear(Linear):
    """``x @ weight.T + bias`` in bfloat16.

    Attributes:
        weight: uint8 ``[n, k / 2]``, the kernel's bytes, ``n`` rounded up to whole slabs; of 8 bits uint8 ``[n, k]``, the high
            halves of a row before the low ones.
        scales: bfloat16 ``[groups, n, 2]``, the kernel's scale and zero.
        lines: float16 ``[k / 32, n, 2]``, scale and minimum as they were stored.
        bits: Of the weight.
        num_rows: ``n`` without what fills up the last slab.
        layout: Of ``weight``.
    """

    scales: torch.Tensor
    lines: torch.Tensor
    bits: Bits
    num_rows: int
    layout: Layout

    @classmethod
    def pack(cls, matrix: QuantizedTensor, bias: torch.Tensor | None, layout: Layout) -> "PackedLinear":
        """From a quantized matrix ``[n, k]``, which is not kept."""
        rows, width = matrix.shape
        padded = -(-rows // SLAB) * SLAB
        wide = width * matrix.bits // 4
        weight = torch.zeros(padded, wide // 2, dtype=torch.uint8)
        scales = torch.zeros(wide // GROUP, padded, 2, dtype=torch.bfloat16)
        step = max(1, CHUNK // wide // SLAB) * SLAB
        for start in range(0, rows, step):
            part = matrix.rows(slice(start, start + step))
            values = part.values().int()  # [n, k]
            if matrix.bits == 8:
                values = torch.cat([(values >> 4) + 8, values & 15], dim=1)
            values = F.pad(values, (0, 0, 0, -len(values) % SLAB))
            weight[start : start + step] = _pack(values)
        scale = matrix.scales.t().float()  # [k / 32, n]
        if matrix.minimums is None:
            minimum = -128 * scale  # of the two halves as a value from 0 to 255
            halves = [(16 * scale.bfloat16(), torch.zeros_like(scale)), (scale.bfloat16(), 8 * scale.bfloat16())]
        else:
            minimum = matrix.minimums.t().float()
            halves = [(scale, minimum + 8 * scale)]
        scales[:, :rows] = torch.cat([torch.stack(half, -1) for half in halves])
        lines = F.pad(torch.stack([scale, minimum], -1), (0, 0, 0, padded - rows)).half()
        return cls(weight=weight, bias=bias, scales=scales, lines=lines, bits=matrix.bits, num_rows=rows, layout=layout)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        few = len(x) <= FEW_ROWS[self.bits]
        out = (self._packed_product(x) if few else self._wide_product(x))[:, : self.num_rows]
        return out if self.bias is None else out + self.bias

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        half = self.layout.block // 2
        place = self.layout.order.argsort()[index % self.layout.block]  # of a row within its block
        taken = self._blocks()[index // self.layout.block, :, place % half]  # [rows, k in halves]
        halves = taken >> (4 * (place >= half)).to(torch.uint8)[:, None] & 15
        scale, minimum = self.lines[:, index].float().unbind(-1)  # [groups, rows]
        groups = self._values(halves).view(len(index), -1, GROUP) * scale.t()[..., None] + minimum.t()[..., None]
        return groups.flatten(1).bfloat16()

    def _packed_product(self, x: torch.Tensor) -> torch.Tensor:
        if self.bits == 8:
            x = torch.cat([x, x], dim=1)
        out: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), self.weight, GROUP, self.scales)
        return out

    def _wide_product(self, x: torch.Tensor) -> torch.Tensor:
        """By dequantizing a few blocks of rows after the other; their order within a block is put right in the output."""
        block, order = self.layout.block, self.layout.order
        width = x.shape[1]
        out = x.new_empty(len(x), len(self.weight))
        blocks = self._blocks()
        step = max(1, CHUNK // width // block)
        for start in range(0, len(blocks), step):
            part = blocks[start : start + step].transpose(0, 1)  # [k in halves, blocks, block / 2]
            wide = torch.empty(width, len(part[0]), 2, block // 2)
            wide[:, :, 0] = self._values(part & 15, dim=0)
            wide[:, :, 1] = self._values(part >> 4, dim=0)
            index = (torch.arange(start, start + len(part[0]))[:, None] * block + order).flatten()
            scale, minimum = self.lines[:, index].float().unbind(-1)  # [groups, n]
            wide.view(-1, GROUP, len(index)).mul_(scale[:, None]).add_(minimum[:, None])
            out[:, index] = x @ wide.view(width, -1).bfloat16()
        return out

    def _blocks(self) -> torch.Tensor:
        """The bytes as ``[n / block, k in halves, block / 2]``."""
        return self.weight.view(len(self.weight) // self.layout.block, -1, self.layout.block // 2)

    def _values(self, halves: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Of uint8 0 to 15 with ``k in halves`` at ``dim``: the values, of 8 bits 0 to 255."""
        if self.bits == 4:
            return halves
        high, low = halves.chunk(2, dim=dim)
        return high << 4 | low
