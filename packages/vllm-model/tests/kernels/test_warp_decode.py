"""Decode attention by warps, from finished queries and from QKV as the product gave it, against the references."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_model.kernels.decode_plan import DecodeConfig, DecodePlan
from vllm_model.kernels.paged_decode import paged_decode, paged_decode_reference
from vllm_model.kernels.qk_norm_rope import qk_norm_rope_reference, rope_table, write_cache_reference
from vllm_model.kernels.warp_decode import Rotary, has_warps, rotary_decode, stages, suits_warps

Check = Callable[..., None]
Make = Callable[..., Any]
HOPPER = torch.cuda.is_available() and has_warps(torch.device("cuda", torch.cuda.current_device()))
SHAPES = [None, DecodeConfig(16, 4), DecodeConfig(32, 1), DecodeConfig(32, 3)]


def check_each(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Each head of each row by itself: of the whole, short rows are nearly all, since long ones average their values away."""
    error = (got.double() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)
    assert error.max() <= 5e-2


def test_a_plan_leaves_the_newest_keys_out(make_paged: Make, device: str) -> None:
    lengths = [1, 40, 0, 17, 16, 5]
    paged = make_paged(lengths, 2, 32, torch.float16, padding=(5,))
    lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    plan = DecodePlan(9, 4, 2, 32, device, max_blocks=paged.tables.shape[1], config=DecodeConfig(16))
    plan.update(lens, paged.slots, paged.tables, leave_newest=True)
    assert plan.starts.diff()[:6].tolist() == [1, 3, 1, 1, 1, 1]
    assert (plan.entries[:8] & 255).tolist() == [0, 16, 16, 7, 0, 16, 15, 0]
    for row, (slot, length) in enumerate(zip(paged.slots.tolist(), lengths, strict=True)):
        there = slot >= 0 and length > 0
        place = int(paged.tables[slot, (length - 1) // 16]) * 16 + (length - 1) % 16 if there else -1
        assert plan.newest[row].tolist() == [place, length - 1 if there else 0]


def test_the_heads_are_checked(make_paged: Make, device: str) -> None:
    paged = make_paged([5], 2, 32, torch.float16)
    plan = DecodePlan(1, 4, 2, 32, device, max_blocks=paged.tables.shape[1])
    heads = torch.zeros(1, 8, 32, dtype=torch.float16, device=device)
    with pytest.raises(ValueError, match="come together"):
        Rotary(rope_table(8, 32, 10000.0, device), q_weight=heads[0, 0])
    plan.update(torch.ones_like(paged.slots), paged.slots, paged.tables, leave_newest=True)
    with pytest.raises(ValueError, match="does not fit the plan"):
        paged_decode(heads[:, :4].contiguous(), paged.cache, plan)
    with pytest.raises(ValueError, match="a kernel for them is not there"):  # of heads of 32
        rotary_decode(heads, paged.cache, plan, Rotary(rope_table(8, 32, 10000.0, device)))


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU and torch for CUDA")
class TestOnTheCard:
    def run(
        self,
        lengths: list[int],
        heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        make_paged: Make,
        check: Check,
        *,
        norm: bool = True,
        pdl: bool = False,
        config: DecodeConfig | None = None,
        padding: tuple[int, ...] = (),
    ) -> None:
        paged, device = make_paged(lengths, kv_heads, head_dim, dtype, padding=padding), "cuda"
        lens = torch.tensor(lengths, dtype=torch.int32, device=device)
        qkv = torch.randn(len(lengths), heads + 2 * kv_heads, head_dim, device=device).to(dtype)
        weights = [torch.rand(head_dim, device=device).to(dtype) + 0.5 for _ in range(2)] if norm else [None, None]
        cos_sin = rope_table(max([*lengths, 1]), head_dim, 10000.0, device)
        there = (paged.slots >= 0) & (lens > 0)
        slots, positions = torch.where(there, paged.slots, -1), (lens - 1).clamp(min=0)
        exact_weights = [None if weight is None else weight.double() for weight in weights]
        q, k, v = qk_norm_rope_reference(qkv.flatten(1).double(), cos_sin.double(), positions, heads, kv_heads, *exact_weights)
        exact, cache = paged.exact.clone(), paged.cache.clone()
        write_cache_reference(k, v, positions, slots, paged.tables, exact)
        page, place = paged.tables[slots[there].long(), positions[there] // 16].long(), positions[there] % 16
        cache[page, :, :, place] = float("nan")  # to be written, and not to be read before
        plan = DecodePlan(
            max(len(lengths), 14) + 3, heads, kv_heads, head_dim, device, max_blocks=paged.tables.shape[1], config=config
        )
        assert suits_warps(plan, cache, dtype, head_dim)
        assert stages(plan) >= 2
        plan.parts.fill_(float("nan"))
        plan.stats.fill_(float("nan"))
        given = qkv.clone()
        for _ in range(2):  # the second run finds the counters as the first left them
            out = torch.full_like(qkv[:, :heads].contiguous(), float("nan"))
            plan.update(lens, paged.slots, paged.tables, leave_newest=True)
            given.copy_(qkv)
            rotary_decode(given, cache, plan, Rotary(cos_sin, *weights), out=out, pdl=pdl)
            written = cache[page, :, :, place].double()
            check(written, exact[page, :, :, place], 4e-3)
            seen = exact.clone()
            seen[page, :, :, place] = written
            expected = paged_decode_reference(q, seen, paged.tables, paged.slots, lens)
            check(out, expected, 1e-2)
            check_each(out, expected)
            assert given.equal(qkv)
            assert not plan.counts.any()
        others = ~torch.isnan(paged.exact)
        others[page, :, :, place] = False
        assert cache.float()[others].equal(paged.cache.float()[others])

    @pytest.mark.parametrize("config", SHAPES)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("head_dim", [64, 128])
    @pytest.mark.parametrize(("heads", "kv_heads"), [(16, 8), (32, 8), (7, 7), (5, 1), (14, 2)])
    def test_from_the_products_heads(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        config: DecodeConfig | None,
        make_paged: Make,
        check: Check,
    ) -> None:
        lengths = [1, 0, 15, 16, 17, 63, 64, 65, 300, 1111, 4000, 3, 900]
        options = {"config": config, "norm": heads != 5, "pdl": head_dim == 128}
        self.run(lengths, heads, kv_heads, head_dim, dtype, make_paged, check, padding=(8,), **options)

    @pytest.mark.parametrize("lengths", [[40000], [1] * 128, [*range(100)], [17] * 20, [131072, 5, 70000]])
    def test_extremes(self, lengths: list[int], make_paged: Make, check: Check) -> None:
        self.run(lengths, 32, 8, 128, torch.bfloat16, make_paged, check)

    @pytest.mark.parametrize("config", SHAPES)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("head_dim", [64, 128])
    @pytest.mark.parametrize(("heads", "kv_heads"), [(16, 8), (32, 4), (3, 3), (21, 3)])
    def test_from_finished_queries(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        config: DecodeConfig | None,
        make_paged: Make,
        check: Check,
    ) -> None:
        """As Triton's kernel, which takes what does not suit."""
        lengths = [1, 0, 15, 16, 17, 63, 64, 65, 300, 1111, 4000, 3, 900, 31]
        paged = make_paged(lengths, kv_heads, head_dim, dtype, padding=(8,))
        q = torch.randn(len(lengths), heads, head_dim, device="cuda").to(dtype)
        lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        plan = DecodePlan(17, heads, kv_heads, head_dim, "cuda", max_blocks=paged.tables.shape[1], config=config)
        plan.update(lens, paged.slots, paged.tables)
        assert suits_warps(plan, paged.cache, dtype)
        expected = paged_decode_reference(q.double(), paged.exact, paged.tables, paged.slots, lens)
        for pdl in (False, True):
            out = torch.full_like(q, float("nan"))
            check(paged_decode(q, paged.cache, plan, out=out, pdl=pdl), expected, 1e-2)
            check_each(out, expected)
            assert not plan.counts.any()
        lse = torch.empty(len(lengths), heads, device="cuda")  # Triton's, with the same plan
        check(paged_decode(q, paged.cache, plan, lse=lse), expected, 1e-2)
