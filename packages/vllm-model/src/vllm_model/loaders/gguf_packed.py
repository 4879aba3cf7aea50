"""Quantized tensors of a GGUF file as they are packed here, without becoming floating point where that can be.

===================== ==== ======================================================================================
stored as             bits how
===================== ==== ======================================================================================
Q4_0, Q4_1            4    exactly: a block is a group; Q4_0's minimum is -8 scales
Q8_0                  8    exactly
Q4_K                  4    its scales and minimums, products of float16 and 6 bits, are rounded to float16
Q2_K, Q3_K, Q5_*, Q6_K 8   dequantized and quantized again: the error added is about a tenth of that of Q6_K
===================== ==== ======================================================================================
"""

import mmap
from typing import Final

import torch
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type

from vllm_model.loaders.gguf_file import GgufTensor
from vllm_model.quantization import GROUP, Bits, QuantizedTensor, quantize

CHUNK_BYTES: Final = 1 << 19
"""Of a tensor to work on at once, few enough to stay in a core's cache."""
EXACT: Final = (Type.Q4_0, Type.Q4_1, Type.Q8_0)
"""Types that lose nothing."""


def read_packed(data: mmap.mmap, tensor: GgufTensor) -> QuantizedTensor:
    """One quantized matrix of the file, in memory of its own."""
    rows, width = tensor.shape
    bits: Bits = 4 if tensor.type in (Type.Q4_0, Type.Q4_1, Type.Q4_K) else 8
    q = torch.empty(rows, width * bits // 8, dtype=torch.uint8 if bits == 4 else torch.int8)
    scales = torch.empty(rows, width // GROUP, dtype=torch.float16)
    minimums = torch.empty_like(scales) if bits == 4 else None
    raw = torch.frombuffer(data, dtype=torch.uint8, count=tensor.num_bytes, offset=tensor.start).view(rows, -1)
    step = max(1, CHUNK_BYTES // raw.shape[1])
    for start in range(0, rows, step):
        at = slice(start, start + step)
        part = _chunk(raw[at], tensor.type, width)
        q[at], scales[at] = part.q, part.scales
        if minimums is not None and part.minimums is not None:
            minimums[at] = part.minimums
    return QuantizedTensor(bits, q, scales, minimums)


def _chunk(raw: torch.Tensor, kind: Type, width: int) -> QuantizedTensor:
    """Some rows, from their bytes ``[rows, row_bytes]``."""
    rows, size = len(raw), GGML_QUANT_SIZES[kind][1]
    if kind in EXACT:
        blocks = raw.clone().view(-1, size)  # aligned, whatever the file's alignment is
        at = 4 if kind == Type.Q4_1 else 2  # bytes of scale and minimum
        lines = blocks[:, :at].contiguous().view(torch.float16).view(rows, -1, at // 2)
        if kind == Type.Q8_0:
            return QuantizedTensor(8, blocks[:, at:].contiguous().view(torch.int8).view(rows, width), lines[..., 0])
        q = _neighbours(blocks[:, at:].contiguous()).view(rows, -1)
        return QuantizedTensor(4, q, lines[..., 0], lines[..., 1] if kind == Type.Q4_1 else -8 * lines[..., 0])
    if kind == Type.Q4_K:
        blocks = raw.clone().view(-1, size)
        factors = blocks[:, :4].contiguous().view(torch.float16).float()  # [blocks, scale and minimum]
        # Eight scales and eight minimums of 6 bits: four of each in the low bits of 8 bytes, the rest in 4 bytes' halves and
        # in the high bits of the 8.
        low, high = blocks[:, 4:12], blocks[:, 12:16]
        top = low >> 6 << 4
        scales = torch.cat([low[:, :4] & 63, high & 15 | top[:, :4]], dim=1)
        minimums = torch.cat([low[:, 4:] & 63, high >> 4 | top[:, 4:]], dim=1)
        q = _neighbours(blocks[:, 16:].reshape(-1, GROUP)).view(rows, -1)
        return QuantizedTensor(
            4, q, (factors[:, :1] * scales).half().view(rows, -1), (-factors[:, 1:] * minimums).half().view(rows, -1)
        )
    from gguf.quants import dequantize  # here, for it takes a while to import

    return quantize(torch.from_numpy(dequantize(raw.numpy(), kind)), 8)


def _neighbours(halves: torch.Tensor) -> torch.Tensor:
    """Bytes that hold values ``i`` and ``i + size`` (``[n, size]``) as bytes that hold ``2 i`` and ``2 i + 1``."""
    pairs = halves.view(torch.int16)
    out = torch.empty_like(halves)
    low, high = out.chunk(2, dim=1)
    for part, shifted in ((low, pairs & 0x0F0F), (high, pairs >> 4 & 0x0F0F)):
        part.copy_(shifted | shifted >> 4)
    return out
