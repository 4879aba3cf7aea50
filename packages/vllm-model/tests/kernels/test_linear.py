from collections.abc import Callable

import pytest
import torch

from vllm_model.kernels.linear import (
    LinearConfig,
    LinearWorkspace,
    Scaled,
    fits,
    linear,
    linear_reference,
    linear_residual,
)

Check = Callable[..., None]
EPS = 1e-6


def kind(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float16  # the interpreter's tl.dot takes no bf16


def run(
    rows: int,
    n: int,
    k: int,
    config: LinearConfig,
    device: str,
    check: Check,
    dtype: torch.dtype | None = None,
    *,
    silu: bool = False,
    parts: int = 0,
    pdl: bool = False,
) -> None:
    """``parts``: the input is scaled, with its sums of squares in that many parts."""
    dtype = dtype or kind(device)
    x = torch.randn(rows, k + 8, device=device).to(dtype)[:, :k]
    weight = (torch.randn(n * (2 if silu else 1), k, device=device) * k**-0.5).to(dtype)
    assert fits(x, weight)
    workspace = LinearWorkspace(1 << 23, device)
    norm_weight = torch.randn(k, device=device).to(dtype) if parts else None
    given: torch.Tensor | Scaled = x
    if norm_weight is not None:
        squares = torch.stack([each.float().square().sum(1) for each in x.tensor_split(parts, dim=1)], 1)
        given = Scaled((x.float() * norm_weight.float()).to(dtype), squares.contiguous())
    expected = linear_reference(x.double(), weight.double(), None if norm_weight is None else norm_weight.double(), EPS, silu)
    for _ in range(2):  # the second run finds the counters as the first left them
        out = torch.full((rows, n), float("nan"), dtype=dtype, device=device)
        assert linear(given, weight, config, silu=silu, eps=EPS, out=out, workspace=workspace, pdl=pdl) is out
        check(out, expected, 1e-2)
        assert not workspace.counts.any()


def run_residual(
    rows: int,
    n: int,
    k: int,
    config: LinearConfig,
    device: str,
    check: Check,
    dtype: torch.dtype | None = None,
    pdl: bool = False,
) -> None:
    dtype = dtype or kind(device)
    x = torch.randn(rows, k, device=device).to(dtype)
    weight = (torch.randn(n, k, device=device) * k**-0.5).to(dtype)
    residual, norm_weight = torch.randn(rows, n, device=device).to(dtype), torch.randn(n, device=device).to(dtype)
    total = residual.double() + linear_reference(x.double(), weight.double())
    workspace = LinearWorkspace(1 << 23, device)
    scaled = linear_residual(x, weight, residual, norm_weight, config, workspace=workspace, pdl=pdl)
    check(residual, total)
    check(scaled.x, residual.double() * norm_weight.double())
    check(scaled.squares.sum(1), residual.double().square().sum(1), 1e-5)
    assert not workspace.counts.any()


SMALL = LinearConfig(16, 16, 32, num_stages=2)
WIDE = LinearConfig(32, 64, 64, num_stages=3)
CUT = LinearConfig(16, 32, 16, num_stages=2, split_k=3)


@pytest.mark.parametrize("config", [SMALL, WIDE, CUT])
@pytest.mark.parametrize(("rows", "n", "k"), [(16, 32, 64), (1, 21, 80), (37, 72, 264), (0, 16, 16)])
@pytest.mark.parametrize(("silu", "parts"), [(False, 0), (True, 0), (False, 4), (True, 3)])
def test_product(config: LinearConfig, rows: int, n: int, k: int, silu: bool, parts: int, device: str, check: Check) -> None:
    run(rows, n, k, config, device, check, silu=silu, parts=parts)


@pytest.mark.parametrize("config", [SMALL, WIDE, CUT])
@pytest.mark.parametrize(("rows", "n", "k"), [(16, 32, 64), (1, 24, 80), (37, 72, 264), (0, 16, 16)])
def test_residual(config: LinearConfig, rows: int, n: int, k: int, device: str, check: Check) -> None:
    run_residual(rows, n, k, config, device, check)


def test_two_products_make_a_norm_between_them(device: str, check: Check) -> None:
    """What :func:`linear_residual` leaves is what :func:`linear` takes."""
    dtype = kind(device)
    x, residual = (torch.randn(19, 48, device=device).to(dtype) for _ in range(2))
    first, second = ((torch.randn(n, 48, device=device) / 7).to(dtype) for n in (48, 40))
    norm_weight = torch.randn(48, device=device).to(dtype)
    total = residual.double() + x.double() @ first.double().T
    got = linear(linear_residual(x, first, residual, norm_weight, SMALL), second, WIDE, eps=EPS)
    check(got, linear_reference(total, second.double(), norm_weight.double(), EPS), 1e-2)


def test_refusals(device: str) -> None:
    x, w = torch.zeros(4, 64, dtype=torch.float16, device=device), torch.zeros(32, 64, dtype=torch.float16, device=device)
    with pytest.raises(ValueError, match="no product"):
        linear(x, w[:, :32], SMALL)
    with pytest.raises(ValueError, match="needs a workspace"):
        linear(x, w, CUT)
    with pytest.raises(ValueError, match="needs a workspace"):
        linear(x, w, CUT, workspace=LinearWorkspace(16, device))
    assert fits(x, w)
    assert not fits(x.float(), w)
    assert not fits(x, w.to(torch.int8))
    assert not fits(x[:, 1:], w)
    assert not fits(x[:, :60], torch.zeros(32, 60, dtype=torch.float16, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [3, 64, 129, 256])
@pytest.mark.parametrize(
    "config",
    [
        LinearConfig(64, 32, 128, 4, 4, 1, 4),
        LinearConfig(64, 64, 64, 4, 4, 4, 2),
        LinearConfig(128, 64, 64, 8, 3),
        LinearConfig(128, 128, 64, 8, 3, 2),
    ],
)
def test_on_the_card(config: LinearConfig, rows: int, dtype: torch.dtype, device: str, check: Check) -> None:
    for pdl in (False, True):
        run(rows, 4096, 1024, config, device, check, dtype, parts=32, pdl=pdl)
        run(rows, 1001, 584, config, device, check, dtype, pdl=pdl)
        run(rows, 1536, 1024, config, device, check, dtype, silu=True, parts=16, pdl=pdl)
        run_residual(rows, 1024, 2048, config, device, check, dtype, pdl)
        run_residual(rows, 576, 1544, config, device, check, dtype, pdl)
