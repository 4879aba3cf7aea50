"""Products of the compiled kernels against float64, for every kind of weight, shape of block and variant."""

from ctypes import CDLL

import pytest
import torch

from vllm_model.native import BF16, PANEL, PackedWeight
from vllm_model.quantization import GROUP, QuantizedTensor, Weight, quantize

ROWS = (*range(1, 10), 15, 16, 17, 31, 33, 130, 300)
"""Each size of a block in registers, and both sides of each bound between the ways to multiply."""
HALF_ULP = {"float32": 2.0**-24, "bfloat16": 2.0**-8}


def weight_of(kind: str, n: int, k: int) -> Weight:
    weight = torch.randn(n, k)
    if kind in ("float32", "bfloat16"):
        return weight.to(getattr(torch, kind))
    return quantize(weight + 0.3, 4 if kind == "int4" else 8)


def exact(weight: Weight) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrix, and the magnitude of what is added up for each of its numbers: float64 ``[n, k]``."""
    if isinstance(weight, torch.Tensor):
        return weight.double(), weight.double().abs()
    scales = weight.scales.double().repeat_interleave(GROUP, 1)
    values = weight.values().double() * scales
    minimums = torch.zeros(()) if weight.minimums is None else weight.minimums.double().repeat_interleave(GROUP, 1)
    return values + minimums, values.abs() + minimums.abs()


def poisoned_product(kernels: CDLL, packed: PackedWeight, x: torch.Tensor, dot: bool) -> torch.Tensor:
    """All that the product leaves unwritten, and what lies behind its inputs, is NaN."""
    rows, n = len(x), packed.struct.n
    out = torch.full((-(-rows // 16) * 16, -(-n // PANEL) * PANEL), torch.nan)
    packed(torch.full((rows + 16, x.shape[1]), torch.nan), dot=dot)
    assert kernels.product(packed.struct, dot, x.data_ptr(), rows, out.data_ptr()) == 0
    return out[:rows, :n]


FLOATS = [(kind, "float32") for kind in ("float32", "bfloat16", "int4", "int8")]
PAIRS = [(kind, "bfloat16") for kind in ("bfloat16", "int4", "int8")]


@pytest.mark.parametrize(("kind", "inputs"), FLOATS + PAIRS)
def test_products(kernels: CDLL, kind: str, inputs: str) -> None:
    dot = inputs == "bfloat16"
    if dot and not kernels.has_dot():
        pytest.skip("this variant multiplies floats only")
    torch.manual_seed(0)
    widths = (2, 30, 48, 96, 576) if kind in ("float32", "bfloat16") else (32, 96, 576)
    for k in widths:
        for n in (1, 16, 33, 75, 200):
            weight, bias = weight_of(kind, n, k), torch.randn(n) if n % 2 else None
            packed = PackedWeight(kernels, weight, bias)
            matrix, magnitude = exact(weight)
            for rows in ROWS:
                x = torch.randn(rows, k)
                ours = poisoned_product(kernels, packed, x, dot).double()
                taken = x.bfloat16().double() if dot else x.double()
                expected = taken @ matrix.T + (0 if bias is None else bias.double())
                # Sums of k products in float32; of many rows, quantized weights are rounded to the inputs' type first.
                bound = (k + 4) * 2.0**-24 * (taken.abs() @ magnitude.T + 1)
                if rows > 5 and packed.struct.type > BF16:
                    bound += HALF_ULP[inputs] * 1.01 * (taken.abs() @ matrix.abs().T)
                assert ((ours - expected).abs() <= bound).all(), (k, n, rows)


def test_few_rows_keep_the_files_precision(kernels: CDLL) -> None:
    """A quantized group is summed in whole numbers first: its weights are not rounded to bfloat16."""
    if not kernels.has_dot():
        pytest.skip("this variant multiplies floats only")
    torch.manual_seed(1)
    x = torch.randn(4, 256).bfloat16().float()
    for bits in (4, 8):
        weight = quantize(torch.randn(64, 256), bits)  # type: ignore[arg-type]
        ours, expected = PackedWeight(kernels, weight)(x, dot=True), x @ weight.dequantize(torch.float32).T
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)


def test_scales_of_all_sizes(kernels: CDLL) -> None:
    """Subnormal halves, zeros and the largest."""
    scales = torch.tensor([0.0, 6e-8, -6e-8, 3e-5, 6.1e-5, 1.0, -2.0, 65504.0]).half()[:, None]
    q = torch.arange(-16, 16, dtype=torch.int8).repeat(8, 1)
    x = torch.ones(3, 32) / 3
    eights = QuantizedTensor(8, q, scales)
    torch.testing.assert_close(
        PackedWeight(kernels, eights)(x, dot=False), x @ eights.dequantize(torch.float32).T, rtol=1e-5, atol=1e-7
    )
    fours = QuantizedTensor(4, torch.full((8, 16), 0xF1, dtype=torch.uint8), scales, scales.flip(0))
    torch.testing.assert_close(
        PackedWeight(kernels, fours)(x, dot=False), x @ fours.dequantize(torch.float32).T, rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize(("kind", "bits"), [("float32", 32), ("bfloat16", 16), ("int4", 5), ("int8", 8.5)])
def test_bytes_of_packed_weights(kernels: CDLL, kind: str, bits: float) -> None:
    """Scales and minimums are the half bit and the bit beyond; rows are filled up to panels, and the whole is aligned."""
    packed = PackedWeight(kernels, weight_of(kind, 100, 96))
    assert packed.nbytes == 112 * 96 * bits / 8 + 64


def test_no_rows(kernels: CDLL) -> None:
    assert PackedWeight(kernels, torch.ones(5, 4))(torch.empty(0, 4), dot=False).shape == (0, 5)
