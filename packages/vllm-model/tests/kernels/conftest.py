"""Where there is no CUDA device, kernels run on Triton's interpreter, which must be chosen before they are imported."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def fresh_seed() -> None:
    torch.manual_seed(torch.seed() % 2**32)


@pytest.fixture
def check() -> Callable[..., None]:
    def check(got: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None) -> None:
        """Relative error of the whole; NaN never passes."""
        assert got.shape == expected.shape
        limit = TOLERANCE[got.dtype] if tolerance is None else tolerance
        error = (got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
        if expected.numel():
            assert error <= limit, f"relative error {error:.2e} > {limit:.0e}"

    return check


@dataclass
class Paged:
    """Sequences in a cache whose other contents are NaN, with block tables in random order."""

    cache: torch.Tensor  # [num_blocks, kv_heads, 2, 16, head_dim]
    exact: torch.Tensor  # float64, what the cache stands for
    tables: torch.Tensor
    slots: torch.Tensor
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None


@pytest.fixture
def make_paged(device: str) -> Callable[..., Paged]:
    def make(
        lengths: list[int],
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        *,
        fp8: bool = False,
        padding: tuple[int, ...] = (),
        poison: bool = True,
    ) -> Paged:
        needed = [-(-length // 16) for length in lengths]
        blocks = sum(needed) + 3
        order = torch.randperm(blocks).int()
        slots = torch.randperm(len(lengths) + 2)[: len(lengths)].int()
        tables = torch.full((len(lengths) + 2, max([*needed, 1]) + 1), 2**30, dtype=torch.int32)  # past the end is undefined
        cache = torch.full((blocks, kv_heads, 2, 16, head_dim), float("nan") if poison else 0.0, dtype=dtype, device=device)
        at = 0
        for row, (length, count) in enumerate(zip(lengths, needed, strict=True)):
            tables[slots[row], :count] = order[at : at + count]
            for page in range(count):
                used = min(16, length - page * 16)
                cache[order[at + page], :, :, :used] = torch.randn(kv_heads, 2, used, head_dim, device=device).to(dtype)
            at += count
        k_scale = v_scale = None
        exact = cache.double()
        if fp8:
            k_scale = torch.rand(kv_heads, device=device) * 0.5 + 0.25
            v_scale = torch.rand(kv_heads, device=device) * 0.5 + 0.25
            scale = torch.stack([k_scale, v_scale], dim=1)[None, :, :, None, None]
            cache = (cache.float() / scale).to(torch.float8_e4m3fn)
            exact = cache.double() * scale.double()
        for row in padding:
            slots[row] = -1
        return Paged(cache, exact, tables.to(device), slots.to(device), k_scale, v_scale)

    return make
