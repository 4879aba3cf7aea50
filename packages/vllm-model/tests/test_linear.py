"""Products with packed weights, on what this processor has and on what older ones have."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vllm_model.linear import Linear, make_linear
from vllm_model.packed_linear import FEW_ROWS, PackedLinear, int4_layout
from vllm_model.quantization import QuantizedTensor, packed, quantize


def quantized(rows: int, width: int, bits: int) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(rows)
    return quantize(torch.randn(rows, width, generator=generator) * 0.05, bits)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "width"), [(192, 576), (100, 96), (1, 32), (4160, 128)])
def test_packed_products_are_as_near_as_bfloat16_comes(bits: int, rows: int, width: int) -> None:
    matrix = quantized(rows, width, bits)
    bias = torch.randn(rows).bfloat16()
    linear = make_linear(matrix, bias, torch.bfloat16)
    assert isinstance(linear, PackedLinear)
    exact = matrix.dequantize(torch.float64)
    for num_tokens in (1, 3, FEW_ROWS[bits], FEW_ROWS[bits] + 1, 100):
        x = torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(1)).bfloat16()
        got = linear(x)
        assert got.dtype == torch.bfloat16
        assert relative_error(got, F.linear(x.double(), exact, bias.double())) < 0.005
    index = torch.tensor([rows - 1, 0, rows // 2])
    assert relative_error(linear.rows(index), exact[index]) < 0.003


def test_a_packed_product_holds_few_bytes() -> None:
    linear = make_linear(quantized(640, 576, 4), None, torch.bfloat16)
    assert isinstance(linear, PackedLinear)
    held = linear.weight.nbytes + linear.scales.nbytes + linear.lines.nbytes
    assert held * 8 / (640 * 576) == 6  # bits a weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_have_a_dequantized_copy(dtype: torch.dtype) -> None:
    matrix = quantized(64, 96, 4)
    linear = make_linear(matrix, None, dtype)
    assert type(linear) is Linear
    assert torch.equal(linear.weight, matrix.dequantize(dtype))
    assert torch.equal(linear.rows(torch.tensor([5, 0])), linear.weight[[5, 0]])


def test_floating_point_weights_are_taken_as_they_are() -> None:
    weight = torch.randn(8, 48)
    linear = make_linear(weight, None, torch.float32)
    assert linear.weight is weight


@pytest.mark.parametrize("pack", [lambda values: packed(values.to(torch.uint8)), lambda values: values.to(torch.uint8)])
def test_without_a_known_layout_weights_are_dequantized(
    monkeypatch: pytest.MonkeyPatch, pack: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    monkeypatch.setattr("vllm_model.packed_linear._pack", pack)
    int4_layout.cache_clear()
    try:
        assert type(make_linear(quantized(64, 96, 4), None, torch.bfloat16)) is Linear
    finally:
        int4_layout.cache_clear()


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_products_on_older_processors(capability: str) -> None:
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "as_near or few_bytes"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stdout[-2000:]
    assert "9 passed" in done.stdout
