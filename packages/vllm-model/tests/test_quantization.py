from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_model.quantization import GROUP, QuantizedTensor, as_asked, concatenated, quantizable, quantize


def random_weight(rows: int = 24, width: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.05


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def test_a_weight_is_scale_times_value_plus_minimum() -> None:
    four = quantize(random_weight(), 4)
    assert four.minimums is not None
    assert (four.q.dtype, four.q.shape, four.shape) == (torch.uint8, (24, 64), (24, 128))
    n, k = 5, 77
    value = int(four.q[n, k // 2]) >> 4  # an odd k lies in the high half
    assert int(four.values()[n, k]) == value
    want = float(four.scales[n, k // GROUP]) * value + float(four.minimums[n, k // GROUP])
    assert float(four.dequantize(torch.float32)[n, k]) == pytest.approx(want, rel=1e-6)
    eight = quantize(random_weight(), 8)
    assert (eight.q.dtype, eight.q.shape, eight.minimums) == (torch.int8, (24, 128), None)
    want = float(eight.scales[n, k // GROUP]) * int(eight.q[n, k])
    assert float(eight.dequantize(torch.float32)[n, k]) == pytest.approx(want, rel=1e-6)


def test_how_near_the_weights_stay() -> None:
    weight = random_weight(512, 512)
    assert relative_error(quantize(weight, 8).dequantize(torch.float32), weight) < 0.006
    assert relative_error(quantize(weight, 4).dequantize(torch.float32), weight) < 0.075  # without the second fits 0.078


@given(bits=st.sampled_from([4, 8]), seed=st.integers(0, 999), size=st.sampled_from([0.1, 1.0, 300.0]), shift=st.floats(-3, 3))
def test_no_weight_is_farther_off_than_a_step(bits: int, seed: int, size: float, shift: float) -> None:
    weight = (random_weight(3, 64, seed) + shift) * size
    got = quantize(weight, bits)
    step = got.scales.float().repeat_interleave(GROUP, 1)
    rounding = weight.abs().max() * 2**-10  # of scales and minimums to float16
    assert ((got.dequantize(torch.float32) - weight).abs() <= 1.5 * step + rounding).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_equal_weights_stay_as_they_are(bits: int) -> None:
    for value in (0.0, 0.5, -2.0):
        weight = torch.full((2, 64), value)
        torch.testing.assert_close(quantize(weight, bits).dequantize(torch.float32), weight, rtol=1e-3, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_quantized_again_stays_the_same(bits: int) -> None:
    once = quantize(random_weight(), bits).dequantize(torch.float32)
    again = quantize(once, bits).dequantize(torch.float32)
    torch.testing.assert_close(again, once, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_are_chosen_and_joined(bits: int) -> None:
    whole = quantize(random_weight(), bits)
    plain = whole.dequantize(torch.float32)
    order = torch.tensor([3, 1, 1, 20])
    assert torch.equal(whole.rows(order).dequantize(torch.float32), plain[order])
    assert torch.equal(whole.rows(slice(2, 9)).dequantize(torch.float32), plain[2:9])
    joined = concatenated([whole.rows(slice(0, 10)), whole.rows(slice(10, None))], torch.float32)
    assert isinstance(joined, QuantizedTensor)
    assert torch.equal(joined.dequantize(torch.float32), plain)
    assert joined.nbytes == whole.nbytes == 24 * 128 * bits // 8 + 24 * 4 * (4 if bits == 4 else 2)


def test_more_rows_than_are_worked_on_at_once() -> None:
    weight = random_weight(3000, 256)
    got = quantize(weight, 4)
    assert torch.equal(got.rows(slice(2900, 3000)).q, quantize(weight[2900:], 4).q)
    assert torch.equal(got.dequantize(torch.bfloat16), got.dequantize(torch.float32).bfloat16())


def test_what_can_be_quantized() -> None:
    assert quantizable((8, 64))
    assert not quantizable((8, 48))
    assert not quantizable((64,))
    assert isinstance(quantize(torch.zeros(1, 32, dtype=torch.bfloat16), 4), QuantizedTensor)


def test_kinds_that_differ_become_the_widest() -> None:
    four, eight, plain = quantize(random_weight(), 4), quantize(random_weight(), 8), random_weight().bfloat16()
    joined = concatenated([four, eight], torch.bfloat16)
    assert isinstance(joined, QuantizedTensor)
    assert joined.bits == 8
    assert torch.equal(joined.q[24:], eight.q)
    assert relative_error(joined.rows(slice(0, 24)).dequantize(torch.float32), four.dequantize(torch.float32)) < 0.006
    joined = concatenated([four, plain], torch.bfloat16)
    assert isinstance(joined, torch.Tensor)
    assert torch.equal(joined, torch.cat([four.dequantize(torch.bfloat16), plain]))


LAYER, HEAD = "model.layers.0.mlp.up_proj.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("name", "stored", "asked", "bits"),
    [
        (LAYER, 4, None, 4),
        (LAYER, 4, "int8", 4),
        (LAYER, 8, "int4", 4),
        (LAYER, None, None, None),
        (LAYER, None, "int8", 8),
        (LAYER, None, "int4", 4),
        (HEAD, None, "int4", 8),
        (HEAD, 4, "int4", 4),
        (LAYER, 4, "none", None),
        (LAYER, None, "none", None),
    ],
)
def test_what_is_asked_of_what_is_stored(name: str, stored: Any, asked: Any, bits: int | None) -> None:
    plain = random_weight()
    got = as_asked(name, plain if stored is None else quantize(plain, stored), asked, torch.bfloat16)
    assert (got.bits if isinstance(got, QuantizedTensor) else None) == bits
    if bits is None:
        assert isinstance(got, torch.Tensor)
        assert got.dtype == torch.bfloat16


def test_norms_and_odd_widths_stay_floating_point() -> None:
    for weight in (torch.ones(64), torch.ones(4, 48)):
        got = as_asked(LAYER, weight, "int4", torch.float16)
        assert isinstance(got, torch.Tensor)
        assert got.dtype == torch.float16
