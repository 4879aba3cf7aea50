from collections.abc import Callable

import pytest
import torch

from vllm_model.kernels.gemv import GemvConfig, thin_linear, thin_linear_reference

Check = Callable[..., None]


def run(
    rows: int,
    n: int,
    k: int,
    device: str,
    check: Check,
    *,
    norm: bool = False,
    residual: bool = False,
    silu: bool = False,
    config: GemvConfig | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    x = torch.randn(rows, k + 8, device=device).to(dtype)[:, :k]
    weight = (torch.randn(n * (2 if silu else 1), k, device=device) * k**-0.5).to(dtype)
    norm_weight = torch.randn(k, device=device).to(dtype) if norm else None
    stream = torch.randn(rows, n, device=device).to(dtype) if residual else None
    wide = [None if t is None else t.double() for t in (norm_weight, stream)]
    expected = thin_linear_reference(x.double(), weight.double(), wide[0], 1e-6, wide[1], silu)
    out = torch.full((rows, n), float("nan"), dtype=dtype, device=device)
    thin_linear(x, weight, norm_weight=norm_weight, residual=stream, silu=silu, out=out, config=config)
    check(out, expected, 1e-2)
    if stream is not None:  # in place
        thin_linear(x, weight, norm_weight=norm_weight, residual=stream, silu=silu, out=stream, config=config)
        check(stream, expected, 1e-2)


@pytest.mark.parametrize(("rows", "block_n", "block_k"), [(0, 4, 32), (1, 4, 32), (1, 8, 32), (2, 2, 128), (2, 4, 32)])
@pytest.mark.parametrize(("n", "k"), [(32, 64), (21, 80)])
@pytest.mark.parametrize("epilogue", ["", "norm", "residual", "silu", "norm silu", "norm residual"])
def test_product(rows: int, block_n: int, block_k: int, n: int, k: int, epilogue: str, device: str, check: Check) -> None:
    norm, residual, silu = ("norm" in epilogue), ("residual" in epilogue), ("silu" in epilogue)
    config = GemvConfig(block_n, block_k, 4)
    run(rows, n, k, device, check, norm=norm, residual=residual, silu=silu, config=config)


def test_refusals(device: str) -> None:
    w = torch.zeros(32, 64, dtype=torch.bfloat16, device=device)
    for rows, k in ((3, 64), (2, 32)):
        with pytest.raises(ValueError, match="no thin product"):
            thin_linear(torch.zeros(rows, k, dtype=torch.bfloat16, device=device), w)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    ("n", "k", "norm", "residual", "silu"),
    [
        (4096, 1024, True, False, False),
        (1024, 2048, False, True, False),
        (3072, 1024, True, False, True),
        (1024, 3072, False, True, False),
        (6144, 4096, True, False, False),
        (4096, 12288, False, True, False),
        (12288, 4096, True, False, True),
        (1001, 576, True, True, False),
        (151936, 1024, True, False, False),
    ],
)
def test_on_the_card(rows: int, n: int, k: int, norm: bool, residual: bool, silu: bool, device: str, check: Check) -> None:
    run(rows, n, k, device, check, norm=norm, residual=residual, silu=silu)
    run(rows, n, k, device, check, norm=norm, residual=residual, silu=silu, dtype=torch.float16)
