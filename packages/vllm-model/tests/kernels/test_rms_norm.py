from collections.abc import Callable

import pytest
import torch

from vllm_model.kernels.rms_norm import rms_norm, rms_norm_reference

Check = Callable[..., None]


def run(tokens: int, width: int, dtype: torch.dtype, fused: bool, device: str, check: Check) -> None:
    x = torch.randn(tokens, width + 8, device=device).to(dtype)[:, :width]
    weight = torch.randn(width, device=device).to(dtype)
    residual = torch.randn(tokens, width, device=device).to(dtype) if fused else None
    rounded = None if residual is None else (x.double() + residual.double()).to(dtype)
    normed, _ = rms_norm_reference(x.double() if rounded is None else rounded.double(), weight.double(), 1e-6)
    out = torch.full((tokens, width), float("nan"), dtype=dtype, device=device)
    assert rms_norm(x, weight, 1e-6, residual, out) is out
    check(out, normed)
    if residual is not None:
        check(residual, x.double() + rounded.double() - x.double())  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("tokens", "width"), [(3, 64), (1, 100), (0, 8), (2, 1)])
def test_norm(tokens: int, width: int, fused: bool, dtype: torch.dtype, device: str, check: Check) -> None:
    run(tokens, width, dtype, fused, device, check)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 513])
@pytest.mark.parametrize("width", [128, 576, 1024, 4096, 5120, 16384, 65536])
def test_norm_on_the_card(tokens: int, width: int, fused: bool, dtype: torch.dtype, device: str, check: Check) -> None:
    run(tokens, width, dtype, fused, device, check)


def test_too_wide_or_strided(device: str) -> None:
    with pytest.raises(ValueError, match="contiguous rows"):
        rms_norm(torch.zeros(2, 8, device=device).T, torch.zeros(2, device=device), 1e-6)
