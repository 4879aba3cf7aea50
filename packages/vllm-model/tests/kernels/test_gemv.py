from collections.abc import Callable

import pytest
import torch

from vllm_model.kernels.gemv import GemvConfig, GemvWorkspace, thin_linear, thin_linear_reference

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
    dtype: torch.dtype | None = None,
) -> None:
    # The interpreter's tl.dot takes no bf16.
    dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float16)
    x = torch.randn(rows, k + 8, device=device).to(dtype)[:, :k]
    weight = (torch.randn(n * (2 if silu else 1), k, device=device) * k**-0.5).to(dtype)
    norm_weight = torch.randn(k, device=device).to(dtype) if norm else None
    stream = torch.randn(rows, n, device=device).to(dtype) if residual else None
    wide = [None if t is None else t.double() for t in (norm_weight, stream)]
    expected = thin_linear_reference(x.double(), weight.double(), wide[0], 1e-6, wide[1], silu)
    workspace = GemvWorkspace(n, device)
    for _ in range(2):  # the second run finds the counters as the first left them
        out = torch.full((rows, n), float("nan"), dtype=dtype, device=device)
        thin_linear(x, weight, norm_weight=norm_weight, residual=stream, silu=silu, out=out, workspace=workspace, config=config)
        check(out, expected, 1e-2)
        assert not workspace.counts.any()
    if stream is not None:  # in place
        thin_linear(
            x, weight, norm_weight=norm_weight, residual=stream, silu=silu, out=stream, workspace=workspace, config=config
        )
        check(stream, expected, 1e-2)


FMA = GemvConfig("fma", 4, 32)
DOT = GemvConfig("dot", 16, 32, num_stages=2)
CUT = GemvConfig("dot", 16, 32, num_stages=2, split_k=3)


@pytest.mark.parametrize(("rows", "config"), [(1, FMA), (3, FMA), (4, FMA), (1, DOT), (16, DOT), (5, CUT), (1, CUT), (0, DOT)])
@pytest.mark.parametrize(("n", "k"), [(32, 64), (21, 80)])
@pytest.mark.parametrize("epilogue", ["", "norm", "residual", "silu", "norm silu", "norm residual"])
def test_product(rows: int, config: GemvConfig, n: int, k: int, epilogue: str, device: str, check: Check) -> None:
    norm, residual, silu = ("norm" in epilogue), ("residual" in epilogue), ("silu" in epilogue)
    if norm and config is CUT:
        pytest.skip("a cut of K takes no norm")
    run(rows, n, k, device, check, norm=norm, residual=residual, silu=silu, config=config)


def test_refusals(device: str) -> None:
    w = torch.zeros(32, 64, dtype=torch.bfloat16, device=device)
    with pytest.raises(ValueError, match="no thin product"):
        thin_linear(torch.zeros(17, 64, dtype=torch.bfloat16, device=device), w)
    with pytest.raises(ValueError, match="4 rows at most"):
        thin_linear(torch.zeros(5, 64, dtype=torch.bfloat16, device=device), w, config=FMA)
    with pytest.raises(ValueError, match="workspace"):
        thin_linear(torch.zeros(5, 64, dtype=torch.bfloat16, device=device), w, config=CUT)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 13, 16])
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
