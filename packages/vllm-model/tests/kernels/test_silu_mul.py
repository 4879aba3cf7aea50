from collections.abc import Callable

import pytest
import torch

from vllm_model.kernels.silu_mul import silu_mul, silu_mul_reference

Check = Callable[..., None]
SMALL = [(3, 64), (1, 100), (0, 8), (2, 1), (2, 1500)]
FULL = [(tokens, width) for tokens in (1, 7, 513) for width in (64, 1536, 3072, 12288, 14336)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("tokens", "width"), [*SMALL, *(pytest.param(*size, marks=pytest.mark.gpu) for size in FULL)])
def test_gate(tokens: int, width: int, dtype: torch.dtype, device: str, check: Check) -> None:
    x = (torch.randn(tokens, 2 * width, device=device) * 4).to(dtype)
    out = torch.full((tokens, width), float("nan"), dtype=dtype, device=device)
    assert silu_mul(x, out) is out
    check(out, silu_mul_reference(x.double()))


def test_odd_width(device: str) -> None:
    with pytest.raises(ValueError, match="gate and up"):
        silu_mul(torch.zeros(2, 7, device=device))
