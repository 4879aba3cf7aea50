from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_model.kernels.paged_prefill import PrefillConfig, paged_prefill, paged_prefill_reference

Check = Callable[..., None]
Make = Callable[..., Any]
DOT_TYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16  # the interpreter's tl.dot takes no bf16


def run(
    rows: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    make_paged: Make,
    device: str,
    check: Check,
    *,
    fp8: bool = False,
    config: PrefillConfig | None = None,
    padding: tuple[int, ...] = (),
) -> None:
    """``rows``: (tokens in the cache, tokens to run)."""
    paged = make_paged([sum(row) for row in rows], kv_heads, head_dim, dtype, fp8=fp8, padding=padding)
    start = torch.tensor([0, *(row[1] for row in rows)]).cumsum(0).int()
    computed = torch.tensor([row[0] for row in rows], dtype=torch.int32, device=device)
    tokens = int(start[-1])
    q = torch.randn(tokens + 2, heads, head_dim, device=device).to(dtype)
    start = start.to(device)
    out = torch.full_like(q, float("nan"))
    expected = paged_prefill_reference(q.double(), paged.exact, paged.tables, paged.slots, start, computed)
    paged_prefill(
        q,
        paged.cache,
        paged.tables,
        paged.slots,
        start,
        computed,
        k_scale=paged.k_scale,
        v_scale=paged.v_scale,
        out=out,
        config=config,
    )
    check(out[:tokens], expected[:tokens], 1e-2)
    assert out[tokens:].isnan().all()


SMALL = PrefillConfig(block_m=16, block_n=16, num_warps=4, num_stages=1)


def test_chunks_and_prefixes(make_paged: Make, device: str, check: Check) -> None:
    run([(0, 20), (33, 1), (16, 0), (5, 9), (0, 3)], 4, 2, 32, DOT_TYPE, make_paged, device, check, config=SMALL, padding=(4,))


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(3, 1, 80), (2, 2, 64)])
def test_odd_heads(heads: int, kv_heads: int, head_dim: int, make_paged: Make, device: str, check: Check) -> None:
    run([(0, 17), (18, 5)], heads, kv_heads, head_dim, torch.float16, make_paged, device, check, config=SMALL)


def test_e4m3(make_paged: Make, device: str, check: Check) -> None:
    run([(3, 18)], 4, 2, 32, DOT_TYPE, make_paged, device, check, fp8=True, config=SMALL)


def test_shapes_are_checked(device: str) -> None:
    none = torch.zeros(1, dtype=torch.int32, device=device)
    cache = torch.zeros(1, 2, 2, 16, 32, device=device)
    with pytest.raises(ValueError, match="disagree"):
        paged_prefill(torch.zeros(1, 3, 32, device=device), cache, none[None], none, none.repeat(2), none)


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 8), (32, 2), (7, 7), (5, 1)])
def test_on_the_card(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, fp8: bool, make_paged: Make, device: str, check: Check
) -> None:
    rows = [(0, 500), (1000, 64), (77, 1), (16, 0), (0, 1), (31, 333), (5, 9)]
    run(rows, heads, kv_heads, head_dim, dtype, make_paged, device, check, fp8=fp8, padding=(5,))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [[(0, 4096)], [(3000, 1000)] * 2, [(64, 64)] * 64, [(0, 1)] * 200, [(130000, 130)]])
def test_extremes_on_the_card(rows: list[tuple[int, int]], make_paged: Make, device: str, check: Check) -> None:
    run(rows, 4, 2, 128, torch.bfloat16, make_paged, device, check)
