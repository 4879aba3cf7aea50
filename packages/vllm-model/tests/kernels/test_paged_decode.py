from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_model.kernels.decode_plan import DecodeConfig, DecodePlan
from vllm_model.kernels.paged_decode import paged_decode, paged_decode_reference

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
    queries: int = 1,
    config: DecodeConfig | None = None,
    padding: tuple[int, ...] = (),
    room: int = 3,
) -> None:
    """``room``: rows of the plan behind those that are there."""
    paged = make_paged(lengths, kv_heads, head_dim, dtype, fp8=fp8, padding=padding)
    q = torch.randn(len(lengths) * queries, heads, head_dim, device=device).to(dtype)
    lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    plan = DecodePlan(
        len(lengths) + room,
        heads,
        kv_heads,
        head_dim,
        device,
        max_blocks=paged.tables.shape[1],
        max_queries=queries,
        fp8=fp8,
        config=config,
    )
    plan.parts.fill_(float("nan"))
    plan.stats.fill_(float("nan"))
    expected = paged_decode_reference(q.double(), paged.exact, paged.tables, paged.slots, lens)
    for _ in range(2):  # the second run finds the counters as the first left them
        out = torch.full_like(q, float("nan"))
        plan.update(lens, paged.slots, paged.tables)
        paged_decode(
            q,
            paged.cache,
            plan,
            queries=queries,
            first_positions=lens - queries,
            k_scale=paged.k_scale,
            v_scale=paged.v_scale,
            out=out,
        )
        check(out, expected, 1e-2)
        assert not plan.counts.any()


@pytest.mark.parametrize("programs", [1, 3, 40])
def test_rows_of_any_length(programs: int, make_paged: Make, device: str, check: Check) -> None:
    config = DecodeConfig(tile=16, programs_per_sm=programs, num_stages=1)
    run([1, 40, 0, 17, 16, 33], 4, 2, 32, DOT_TYPE, make_paged, device, check, config=config, padding=(4,))


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(3, 1, 80), (2, 2, 64)])
def test_odd_heads(heads: int, kv_heads: int, head_dim: int, make_paged: Make, device: str, check: Check) -> None:
    run(
        [5, 70], heads, kv_heads, head_dim, torch.float16, make_paged, device, check, config=DecodeConfig(tile=32, num_stages=1)
    )


def test_e4m3(make_paged: Make, device: str, check: Check) -> None:
    run([20, 3], 4, 2, 32, DOT_TYPE, make_paged, device, check, fp8=True, config=DecodeConfig(tile=32, num_stages=1))


def test_several_queries(make_paged: Make, device: str, check: Check) -> None:
    run([20, 3, 50], 4, 2, 32, DOT_TYPE, make_paged, device, check, queries=3, config=DecodeConfig(tile=16, num_stages=1))


def test_no_rows(device: str) -> None:
    plan = DecodePlan(2, 2, 1, 32, device, max_blocks=1)
    q = torch.empty(0, 2, 32, dtype=torch.bfloat16, device=device)
    cache = torch.empty(1, 1, 2, 16, 32, dtype=torch.bfloat16, device=device)
    assert paged_decode(q, cache, plan).shape == q.shape


def test_the_plan_is_checked(device: str) -> None:
    with pytest.raises(ValueError, match="no decode attention"):
        DecodePlan(1, 3, 2, 64, device, max_blocks=1)
    lens = torch.ones(2, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="2 rows in a plan for 1"):
        DecodePlan(1, 2, 1, 64, device, max_blocks=1).update(lens, lens, lens[None])


@pytest.mark.gpu
@pytest.mark.parametrize("room", [3, 20])  # few rows and many have shapes of their own
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 8), (32, 2), (7, 7), (5, 1)])
def test_on_the_card(
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    fp8: bool,
    room: int,
    make_paged: Make,
    device: str,
    check: Check,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vllm_model.kernels.paged_decode.suits_warps", lambda *_: False)  # they have tests of their own
    lengths = [1, 0, 15, 16, 17, 63, 64, 65, 300, 1111, 4000, 3, 900]
    run(lengths, heads, kv_heads, head_dim, dtype, make_paged, device, check, fp8=fp8, padding=(8,), room=room)


@pytest.mark.gpu
@pytest.mark.parametrize("room", [3, 20])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("queries", [2, 5, 9])
@pytest.mark.parametrize(("heads", "head_dim"), [(16, 64), (16, 128), (16, 256), (32, 128), (64, 128)])
def test_several_queries_on_the_card(
    heads: int, head_dim: int, queries: int, fp8: bool, room: int, make_paged: Make, device: str, check: Check
) -> None:
    options = {"queries": queries, "fp8": fp8, "room": room}
    run([9, 100, 2000, 17], heads, 8, head_dim, torch.bfloat16, make_paged, device, check, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[131072], [1] * 256, list(range(256)), [131072, 5, 70000]])
def test_extremes_on_the_card(lengths: list[int], make_paged: Make, device: str, check: Check) -> None:
    run(lengths, 4, 2, 128, torch.bfloat16, make_paged, device, check)


@pytest.mark.gpu
def test_a_graph_follows_the_lengths(make_paged: Make, device: str, check: Check) -> None:
    lengths = [700, 20, 3000]
    paged = make_paged(lengths, 8, 128, torch.bfloat16)
    q = torch.randn(3, 16, 128, device=device).bfloat16()
    lens = torch.ones(3, dtype=torch.int32, device=device)
    plan = DecodePlan(3, 16, 8, 128, device, max_blocks=paged.tables.shape[1])
    out = torch.empty_like(q)

    def step() -> None:
        plan.update(lens, paged.slots, paged.tables)
        paged_decode(q, paged.cache, plan, out=out)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for now in ([1, 1, 1], lengths, [0, 20, 1234]):
        lens.copy_(torch.tensor(now, dtype=torch.int32))
        out.fill_(float("nan"))
        graph.replay()
        check(out, paged_decode_reference(q.double(), paged.exact, paged.tables, paged.slots, lens))
