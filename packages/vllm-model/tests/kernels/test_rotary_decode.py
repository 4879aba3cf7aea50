"""Decode attention that takes QKV as the product gave it, against the rotary kernel's reference and attention after it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_model.kernels.decode_plan import DecodeConfig, DecodePlan
from vllm_model.kernels.paged_decode import paged_decode, paged_decode_reference
from vllm_model.kernels.qk_norm_rope import qk_norm_rope_reference, rope_table, write_cache_reference
from vllm_model.kernels.rotary_decode import Rotary

Check = Callable[..., None]
Make = Callable[..., Any]
DOT_TYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16  # the interpreter's tl.dot takes no bf16


def run(
    lengths: list[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    make_paged: Make,
    device: str,
    check: Check,
    *,
    fp8: bool = False,
    norm: bool = True,
    rotary_dim: int | None = None,
    config: DecodeConfig | None = None,
    padding: tuple[int, ...] = (),
) -> None:
    paged = make_paged(lengths, kv_heads, head_dim, dtype, fp8=fp8, padding=padding)
    lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    qkv = torch.randn(len(lengths), heads + 2 * kv_heads, head_dim, device=device).to(dtype)
    weights = [torch.rand(head_dim, device=device).to(dtype) + 0.5 for _ in range(2)] if norm else [None, None]
    cos_sin = rope_table(max([*lengths, 1]), rotary_dim or head_dim, 10000.0, device)
    there = (paged.slots >= 0) & (lens > 0)
    slots, positions = torch.where(there, paged.slots, -1), (lens - 1).clamp(min=0)
    exact_weights = [None if weight is None else weight.double() for weight in weights]
    q, k, v = qk_norm_rope_reference(qkv.flatten(1).double(), cos_sin.double(), positions, heads, kv_heads, *exact_weights)
    exact, cache = paged.exact.clone(), paged.cache.clone()
    write_cache_reference(k, v, positions, slots, paged.tables, exact)
    page, place = paged.tables[slots[there].long(), positions[there] // 16].long(), positions[there] % 16
    cache[page, :, :, place] = float("nan")  # to be written, and not to be read before
    scale = torch.stack([paged.k_scale, paged.v_scale], dim=1)[None, :, :, None].double() if fp8 else 1.0
    plan = DecodePlan(len(lengths) + 3, heads, kv_heads, head_dim, device, max_blocks=paged.tables.shape[1], config=config)
    plan.parts.fill_(float("nan"))
    plan.stats.fill_(float("nan"))
    for _ in range(2):  # the second run finds the counters as the first left them
        out = torch.full_like(qkv[:, :heads].contiguous(), float("nan"))
        plan.update(lens, paged.slots, paged.tables, leave_newest=True)
        given, turned = qkv.clone(), Rotary(cos_sin, *weights)
        paged_decode(given, cache, plan, rotary=turned, k_scale=paged.k_scale, v_scale=paged.v_scale, out=out)
        written = cache[page, :, :, place].double() * scale
        rounding = (4e-2 if device == "cuda" else 2**-3) if fp8 else 4e-3  # the interpreter cuts off instead
        check(written, exact[page, :, :, place], rounding)
        seen = exact.clone()
        seen[page, :, :, place] = written
        check(out, paged_decode_reference(q, seen, paged.tables, paged.slots, lens), 1e-2)
        assert given.equal(qkv)
        assert not plan.counts.any()
    others = ~torch.isnan(paged.exact)
    others[page, :, :, place] = False
    assert cache.float()[others].equal(paged.cache.float()[others])


@pytest.mark.parametrize("programs", [1, 3, 40])
def test_rows_of_any_length(programs: int, make_paged: Make, device: str, check: Check) -> None:
    config = DecodeConfig(tile=16, programs_per_sm=programs, num_stages=1)
    run([1, 40, 0, 17, 16, 33], 4, 2, 32, DOT_TYPE, make_paged, device, check, config=config, padding=(4,))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary_dim", "norm"), [(3, 1, 80, 32, True), (2, 2, 64, 64, False), (8, 1, 16, 16, True)]
)
def test_odd_heads(
    heads: int, kv_heads: int, head_dim: int, rotary_dim: int, norm: bool, make_paged: Make, device: str, check: Check
) -> None:
    config = DecodeConfig(tile=32, num_stages=1)
    options = {"config": config, "norm": norm, "rotary_dim": rotary_dim}
    run([5, 70], heads, kv_heads, head_dim, torch.float16, make_paged, device, check, **options)


def test_e4m3(make_paged: Make, device: str, check: Check) -> None:
    run([20, 1, 33], 4, 2, 32, DOT_TYPE, make_paged, device, check, fp8=True, config=DecodeConfig(tile=32, num_stages=1))


def test_heads_are_checked(make_paged: Make, device: str) -> None:
    paged = make_paged([5], 2, 32, torch.float16)
    plan = DecodePlan(1, 4, 2, 32, device, max_blocks=paged.tables.shape[1], max_queries=2)
    rotary = Rotary(rope_table(8, 32, 10000.0, device))
    heads = torch.zeros(1, 8, 32, dtype=torch.float16, device=device)
    with pytest.raises(ValueError, match="does not fit the plan"):  # which has the newest key in its tiles
        paged_decode(heads, paged.cache, plan, rotary=rotary)
    plan.update(torch.ones_like(paged.slots), paged.slots, paged.tables, leave_newest=True)
    with pytest.raises(ValueError, match="come together"):
        Rotary(rotary.cos_sin, q_weight=heads[0, 0])
    q = torch.zeros(1, 4, 32, dtype=torch.float16, device=device)
    with pytest.raises(ValueError, match="does not fit the plan"):
        paged_decode(q, paged.cache, plan, rotary=rotary)
    with pytest.raises(ValueError, match="out"):
        paged_decode(heads, paged.cache, plan, rotary=rotary, out=q[:, :2])


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 8), (32, 2), (7, 7), (5, 1)])
def test_on_the_card(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, fp8: bool, make_paged: Make, device: str, check: Check
) -> None:
    lengths = [1, 0, 15, 16, 17, 63, 64, 65, 300, 1111, 4000, 3, 900]
    run(lengths, heads, kv_heads, head_dim, dtype, make_paged, device, check, fp8=fp8, padding=(8,))


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[40000], [1] * 128, [*range(100)], [17] * 20, [131072, 5, 70000]])
def test_extremes_on_the_card(lengths: list[int], make_paged: Make, device: str, check: Check) -> None:
    run(lengths, 32, 8, 128, torch.bfloat16, make_paged, device, check)
