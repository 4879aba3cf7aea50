from collections.abc import Callable

import pytest
import torch

from vllm_model.kernels.qk_norm_rope import (
    qk_norm_rope,
    qk_norm_rope_reference,
    rope_table,
    write_cache_reference,
)

Check = Callable[..., None]


def run(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotary: int,
    norm: bool,
    dtype: torch.dtype,
    fp8: bool,
    device: str,
    check: Check,
) -> None:
    max_slots, max_blocks = 5, 6
    slots = torch.randint(-1, max_slots, (tokens,), dtype=torch.int32)
    places = torch.randperm(max_blocks * 16)[:tokens].repeat(-(-tokens // (max_blocks * 16)))[:tokens].int()
    if tokens > max_blocks * 16:
        slots = torch.arange(tokens, dtype=torch.int32) // (max_blocks * 16)
        max_slots = int(slots.max()) + 1
        places = (torch.arange(tokens) % (max_blocks * 16)).int()
    tables = torch.randperm(max_slots * max_blocks).int().view(max_slots, max_blocks).to(device)
    slots, positions = slots.to(device), places.to(device)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, device=device).to(dtype)
    q_weight, k_weight = (torch.randn(head_dim, device=device).to(dtype) if norm else None for _ in range(2))
    table = rope_table(max_blocks * 16, rotary, 1e4, device)
    cache = torch.full((max_slots * max_blocks, kv_heads, 2, 16, head_dim), float("nan"), device=device).to(dtype)
    k_scale = v_scale = None
    if fp8:
        cache = cache.to(torch.float8_e4m3fn)
        k_scale, v_scale = (torch.rand(kv_heads, device=device) + 0.1 for _ in range(2))
    out = torch.full((tokens, heads, head_dim), float("nan"), dtype=dtype, device=device)
    qk_norm_rope(
        qkv,
        table,
        positions,
        slots,
        tables,
        cache,
        heads,
        q_weight=q_weight,
        k_weight=k_weight,
        k_scale=k_scale,
        v_scale=v_scale,
        out=out,
    )
    wide = [None if w is None else w.double() for w in (q_weight, k_weight)]
    q, k, v = qk_norm_rope_reference(qkv.double(), table, positions, heads, kv_heads, *wide)
    live = slots >= 0
    check(out[live], q[live])
    assert out[~live].isnan().all()
    expected = torch.full(cache.shape, float("nan"), dtype=torch.float64, device=device)
    if k_scale is not None and v_scale is not None:
        k, v = k / k_scale[None, :, None], v / v_scale[None, :, None]
    write_cache_reference(k, v, positions, slots, tables, expected)
    got = cache.double()
    assert torch.equal(got.isnan(), expected.isnan())
    # e4m3 has three bits after the point. The device rounds to the nearest, the interpreter cuts off: up to 2**-3 of a number
    # that was rounded before, to a little less than a step of e4m3.
    tolerance = (4e-2 if device == "cuda" else 2**-3 + 2**-6) if fp8 else 1e-2
    check(got.nan_to_num(), expected.nan_to_num().clamp(-448, 448), tolerance)


SMALL = [
    (5, 4, 2, 64, 64, True, torch.bfloat16, False),
    (1, 3, 1, 80, 80, False, torch.float16, False),
    (3, 2, 1, 32, 16, True, torch.bfloat16, False),
    (4, 2, 2, 64, 64, True, torch.bfloat16, True),
    (0, 2, 1, 64, 64, True, torch.bfloat16, False),
]
FULL = [
    (tokens, heads, kv_heads, head_dim, rotary, norm, dtype, fp8)
    for tokens in (1, 33, 700)
    for heads, kv_heads in ((16, 8), (7, 1), (32, 2))
    for head_dim, rotary in ((64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (128, 64), (256, 64))
    for norm, dtype, fp8 in ((True, torch.bfloat16, False), (False, torch.float16, False), (True, torch.bfloat16, True))
]


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim", "rotary", "norm", "dtype", "fp8"),
    [*SMALL, *(pytest.param(*case, marks=pytest.mark.gpu) for case in FULL)],
)
def test_q_and_cache(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotary: int,
    norm: bool,
    dtype: torch.dtype,
    fp8: bool,
    device: str,
    check: Check,
) -> None:
    run(tokens, heads, kv_heads, head_dim, rotary, norm, dtype, fp8, device, check)


@pytest.mark.parametrize("rotary", [64, 32])
def test_keep_k_leaves_the_finished_keys_in_their_place(rotary: int, device: str, check: Check) -> None:
    """Next to queries and values, which stay as they came; padding stays whole."""
    tokens, heads, kv_heads, head_dim = 5, 4, 2, 64
    came = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, device=device).bfloat16()
    qkv, weights = came.clone(), [torch.randn(head_dim, device=device).bfloat16() for _ in range(2)]
    integers = torch.arange(tokens, dtype=torch.int32, device=device)
    slots = torch.where(integers == 3, -1, 0).int()
    table = rope_table(16, rotary, 1e4, device)
    cache = torch.zeros(1, kv_heads, 2, 16, head_dim, dtype=torch.bfloat16, device=device)
    norms = {"q_weight": weights[0], "k_weight": weights[1]}
    qk_norm_rope(qkv, table, integers, slots, integers[None, :1], cache, heads, keep_k=True, **norms)
    wide = [weight.double() for weight in weights]
    _, k, _ = qk_norm_rope_reference(came.double(), table, integers, heads, kv_heads, *wide)
    live, keys = slots >= 0, slice(heads * head_dim, (heads + kv_heads) * head_dim)
    check(qkv[live, keys], k.flatten(1)[live])
    assert torch.equal(qkv[~live], came[~live])
    qkv[:, keys] = came[:, keys]
    assert torch.equal(qkv, came)


def test_e4m3_needs_scales(device: str) -> None:
    cache = torch.zeros(1, 1, 2, 16, 16, device=device).to(torch.float8_e4m3fn)
    integers = torch.zeros(1, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="e4m3"):
        qk_norm_rope(
            torch.zeros(1, 48, device=device), torch.zeros(4, 16, device=device), integers, integers, integers[None], cache, 1
        )
