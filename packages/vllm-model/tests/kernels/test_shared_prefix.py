from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_model.kernels.decode_plan import DecodeConfig, DecodePlan
from vllm_model.kernels.paged_decode import paged_decode, paged_decode_reference
from vllm_model.kernels.shared_prefix import PrefixWorkspace, attend_prefix, attend_prefix_reference, join_prefix

Check = Callable[..., None]
DOT_TYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16  # the interpreter's tl.dot takes no bf16


def run(
    prefix: int,
    lengths: list[int],
    strangers: set[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    make: Any,
    device: str,
    check: Any,
    *,
    fp8: bool = False,
) -> None:
    """Rows share the first ``prefix`` keys of row 0, but for the strangers."""
    paged = make(lengths, kv_heads, head_dim, DOT_TYPE, fp8=fp8)
    scales = {"k_scale": paged.k_scale, "v_scale": paged.v_scale}
    slots = paged.slots.tolist()
    for row, slot in enumerate(slots):
        if row not in strangers:
            paged.tables[slot, : prefix // 16] = paged.tables[slots[0], : prefix // 16]
    rows = len(lengths)
    q = torch.randn(rows, heads, head_dim, device=device).to(DOT_TYPE)
    lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    skips = torch.tensor([0 if row in strangers else prefix for row in range(rows)], dtype=torch.int32, device=device)
    leader = torch.tensor([slots[0], prefix], dtype=torch.int32, device=device)
    config = None if device == "cuda" else DecodeConfig(tile=32, num_stages=1)
    plan = DecodePlan(rows, heads, kv_heads, head_dim, device, max_blocks=paged.tables.shape[1], fp8=fp8, config=config)
    workspace = PrefixWorkspace(rows, heads, head_dim, device)
    for buffer in (workspace.parts, workspace.stats, workspace.lse, plan.parts, plan.stats):
        buffer.fill_(float("nan"))
    out = torch.full_like(q, float("nan"))
    plan.update(lens, paged.slots, paged.tables, skips=skips)
    attend_prefix(q, paged.cache, paged.tables, leader, workspace, **scales)
    paged_decode(q, paged.cache, plan, lse=workspace.lse, out=out, **scales)
    join_prefix(out, skips, workspace)
    check(out, paged_decode_reference(q.double(), paged.exact, paged.tables, paged.slots, lens), 1e-2)


@pytest.mark.parametrize("fp8", [False, True])
def test_rows_behind_a_prefix_and_strangers(fp8: bool, make_paged: Callable[..., Any], device: str, check: Check) -> None:
    run(64, [65, 130, 40, 80], {2}, 4, 2, 32, make_paged, device, check, fp8=fp8)


def test_the_prefix_alone(make_paged: Callable[..., Any], device: str, check: Check) -> None:
    """Of the workspace: the parts of one row and head add up to attention over the prefix."""
    paged = make_paged([128], 1, 32, DOT_TYPE)
    q = torch.randn(1, 2, 32, device=device).to(DOT_TYPE)
    workspace = PrefixWorkspace(1, 2, 32, device)
    leader = torch.tensor([int(paged.slots[0]), 128], dtype=torch.int32, device=device)
    attend_prefix(q, paged.cache, paged.tables, leader, workspace)
    parts, stats = workspace.parts.view(-1, 1, 2, 32).double(), workspace.stats.view(-1, 1, 2, 2).double()
    weight = (stats[..., 0] - stats[..., 0].amax(0)).exp2()
    total = (stats[..., 1] * weight).sum(0)
    expected, logsum = attend_prefix_reference(q.double(), paged.exact, paged.tables[int(paged.slots[0])], 128)
    check((parts * weight[..., None]).sum(0) / total[..., None], expected, 1e-2)
    check(stats[..., 0].amax(0) * 0.6931471805599453 + total.log(), logsum, 1e-2)


def test_shapes_are_checked(make_paged: Callable[..., Any], device: str) -> None:
    paged = make_paged([64], 2, 32, DOT_TYPE)
    q, leader = torch.zeros(3, 3, 32, dtype=DOT_TYPE, device=device), paged.slots.repeat(2)
    with pytest.raises(ValueError, match="disagree"):
        attend_prefix(q, paged.cache, paged.tables, leader, PrefixWorkspace(3, 3, 32, device))
    with pytest.raises(ValueError, match="3 rows in a workspace for 2"):
        attend_prefix(q[:, :2], paged.cache, paged.tables, leader, PrefixWorkspace(2, 2, 32, device))
    with pytest.raises(ValueError, match="e4m3"):
        attend_prefix(q[:, :2], paged.cache.to(torch.float8_e4m3fn), paged.tables, leader, PrefixWorkspace(3, 2, 32, device))


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(16, 8, 128), (32, 8, 128), (6, 2, 64), (5, 1, 80), (8, 4, 256)])
def test_on_the_card(
    heads: int, kv_heads: int, head_dim: int, fp8: bool, make_paged: Callable[..., Any], device: str, check: Check
) -> None:
    lengths = torch.randint(1100, 1500, (70,)).tolist()
    run(1088, lengths, {3, 40}, heads, kv_heads, head_dim, make_paged, device, check, fp8=fp8)
