"""Weights of 4 or 8 bits in groups of 32: what GGUF files store, and what float weights are made into when asked.

A group is 32 neighbours along a row, those that one product adds up: ``weight[n, k] = scales[n, k // 32] * q[n, k]``, with 4
bits ``+ minimums[n, k // 32]``. GGUF's Q4_0, Q4_1 and Q8_0 are exactly that. A weight whose rows are no whole number of groups
stays in floating point: a group across two rows would have one scale for both, and rows could no longer be taken apart.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch

GROUP: Final = 32
"""Weights that share a scale."""
CHUNK: Final = 1 << 18
"""Weights to work on at once, few enough that float32 copies of them stay in a core's cache."""
REFITS: Final = 4
"""Times that a group's line is fitted again to the 4 bit values it led to."""

Bits = Literal[4, 8]
Quantization = Literal["none", "int8", "int4"]
"""What to make of weights: dequantize them, or at most so many bits; None in its place: leave them as they are stored."""


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedTensor:
    """A matrix ``[n, k]`` in groups of 32 along ``k``.

    Attributes:
        bits: 4 or 8.
        q: 4 bits: uint8 ``[n, k / 2]``, the values 0 to 15 two a byte, even ``k`` in the low half. 8 bits: int8 ``[n, k]``.
        scales: float16 ``[n, k / 32]``.
        minimums: 4 bits: float16 ``[n, k / 32]``, the value of ``q = 0``. 8 bits: None.
    """

    bits: Bits
    q: torch.Tensor
    scales: torch.Tensor
    minimums: torch.Tensor | None = None

    def __post_init__(self) -> None:
        rows, groups = self.scales.shape
        assert self.bits in get_args(Bits)
        assert self.q.dtype == (torch.uint8 if self.bits == 4 else torch.int8)
        assert self.q.shape == (rows, groups * GROUP * self.bits // 8)
        assert self.scales.dtype == torch.float16
        assert (self.minimums is not None) == (self.bits == 4)
        assert self.minimums is None or (self.minimums.shape == (rows, groups) and self.minimums.dtype == torch.float16)

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, k)``, of the matrix and not of its bytes."""
        return len(self.scales), self.scales.shape[1] * GROUP

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return self.q.nbytes + self.scales.nbytes + (0 if self.minimums is None else self.minimums.nbytes)

    def rows(self, index: torch.Tensor | slice) -> "QuantizedTensor":
        """The rows that ``index`` (int64 ``[rows]``, or a slice) names, in its order."""
        return self._each(lambda part: part[index])

    def values(self) -> torch.Tensor:
        """One value a byte, ``[n, k]``: uint8 of 0 to 15, or int8."""
        if self.bits == 8:
            return self.q
        return torch.stack([self.q & 15, self.q >> 4], -1).view(self.shape)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix in ``dtype``, computed in float32 and rounded once: ``[n, k]``."""
        out = torch.empty(self.shape, dtype=dtype)
        step = max(1, CHUNK // self.shape[1])
        for start in range(0, len(out), step):
            part = self.rows(slice(start, start + step))
            wide = part.values().view(*part.scales.shape, GROUP) * part.scales.float()[:, :, None]
            if part.minimums is not None:
                wide += part.minimums.float()[:, :, None]
            out[start : start + step] = wide.view(part.shape)
        return out

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "QuantizedTensor":
        minimums = None if self.minimums is None else change(self.minimums)
        return QuantizedTensor(self.bits, change(self.q), change(self.scales), minimums)


Weight = torch.Tensor | QuantizedTensor


def concatenated(parts: Sequence[Weight], dtype: torch.dtype) -> Weight:
    """The rows of several matrices of the same ``k``, one after the other.

    Kinds that differ become the widest among them: 8 bits, or ``dtype`` if one is floating point.
    """
    if len(parts) == 1:
        return parts[0]
    quantized = [part for part in parts if isinstance(part, QuantizedTensor)]
    if len(quantized) < len(parts):
        return torch.cat([part.dequantize(dtype) if isinstance(part, QuantizedTensor) else part for part in parts])
    bits = max(part.bits for part in quantized)
    quantized = [part if part.bits == bits else quantize(part.dequantize(torch.float32), bits) for part in quantized]
    minimums = [part.minimums for part in quantized if part.minimums is not None]
    return QuantizedTensor(
        bits,
        torch.cat([part.q for part in quantized]),
        torch.cat([part.scales for part in quantized]),
        torch.cat(minimums) if minimums else None,
    )


def quantizable(shape: Sequence[int]) -> bool:
    """Whether a weight of this shape has groups: a matrix whose rows are a multiple of 32."""
    return len(shape) == 2 and shape[1] % GROUP == 0


def as_asked(name: str, weight: Weight, quantization: Quantization | None, dtype: torch.dtype) -> Weight:
    """A stored weight as ``quantization`` wants it; what stays floating point in ``dtype``.

    What is stored in no more bits than asked stays as it is: more would not bring back what is lost. With ``int4`` the
    embedding and the head get 8 bits: errors of the one are in all that follows, those of the other in the logits themselves.
    """
    bits = _bits(name, quantization)
    if isinstance(weight, QuantizedTensor):
        if quantization == "none":
            return weight.dequantize(dtype)
        if bits is None or weight.bits <= bits:
            return weight
        weight = weight.dequantize(torch.float32)
    if bits is not None and quantizable(weight.shape):
        return quantize(weight, bits)
    return weight.to(dtype)


def _bits(name: str, quantization: Quantization | None) -> Bits | None:
    if quantization == "int4":
        return 8 if name in ("model.embed_tokens.weight", "lm_head.weight") else 4
    return 8 if quantization == "int8" else None


def quantize(weight: torch.Tensor, bits: Bits) -> QuantizedTensor:
    """A float matrix ``[n, k]`` in 4 or 8 bits; ``k`` must be a multiple of 32.

    8 bits: the largest magnitude of a group becomes 127. 4 bits: smallest to largest become 0 to 15, then the line through them
    is fitted to them by least squares and they are rounded again, four times: 7 % less error (root mean square).
    """
    rows, width = weight.shape
    q = torch.empty(rows, width * bits // 8, dtype=torch.uint8 if bits == 4 else torch.int8)
    scales = torch.empty(rows, width // GROUP, dtype=torch.float16)
    minimums = torch.empty_like(scales) if bits == 4 else None
    step = max(1, CHUNK // width)
    for start in range(0, rows, step):
        at = slice(start, start + step)
        groups = weight[at].float().view(-1, width // GROUP, GROUP)
        if minimums is None:
            scales[at] = groups.abs().amax(-1) / 127
            q[at] = _rounded(groups, scales[at].float(), -127, 127).view(-1, width)
        else:
            values, scales[at], minimums[at] = _four_bits(groups)
            q[at] = packed(values.to(torch.uint8).view(-1, width))
    return QuantizedTensor(bits, q, scales, minimums)


def packed(values: torch.Tensor) -> torch.Tensor:
    """uint8 ``[n, k]`` of 0 to 15, two a byte: ``[n, k / 2]``."""
    return values[:, ::2] | values[:, 1::2] << 4


def _four_bits(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values 0 to 15 ``[n, groups, 32]``, scales and minimums ``[n, groups]``, of float32 groups; all float32."""
    minimum, high = groups.aminmax(dim=-1)
    scale = (high - minimum) / 15
    for refit in range(REFITS + 1):
        scale, minimum = scale.half().float(), minimum.half().float()
        values = _rounded(groups - minimum[..., None], scale, 0, 15)
        if refit < REFITS:
            mean, centre = values.mean(-1), groups.mean(-1)
            spread = values.square().mean(-1) - mean.square()
            together = (values * groups).mean(-1) - mean * centre
            # Values that are all the same leave the line without a slope.
            scale = torch.where(spread > 1e-6, together / spread, 0.0)
            minimum = centre - scale * mean
    return values, scale, minimum


def _rounded(groups: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """``groups / scale`` as whole numbers; 0 where the scale is 0."""
    return (groups * torch.where(scale == 0, 0.0, 1 / scale)[..., None]).round_().clamp_(low, high)
