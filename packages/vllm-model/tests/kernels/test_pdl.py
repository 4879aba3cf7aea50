"""Programmatic dependent launch: no kernel reads what the one ahead of it has yet to write."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from vllm_model.kernels.cluster_linear import ClusterConfig, has_clusters
from vllm_model.kernels.decode_plan import DecodeConfig, DecodePlan
from vllm_model.kernels.gemv import thin_linear
from vllm_model.kernels.linear import LinearConfig, LinearWorkspace, Scaled, linear, linear_residual
from vllm_model.kernels.logits import Guessed, LogitsState, process_logits
from vllm_model.kernels.logprobs import token_logprobs
from vllm_model.kernels.paged_decode import paged_decode
from vllm_model.kernels.qk_norm_rope import qk_norm_rope, rope_table
from vllm_model.kernels.rms_norm import rms_norm
from vllm_model.kernels.sampling import SamplerWorkspace, sample
from vllm_model.kernels.shared_prefix import PrefixWorkspace, attend_prefix, join_prefix
from vllm_model.kernels.silu_mul import silu_mul
from vllm_model.kernels.warp_decode import Rotary, has_warps, rotary_decode, suits_warps

DEVICE = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
HOPPER = DEVICE.type == "cuda" and has_warps(DEVICE) and has_clusters(DEVICE)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU and torch for CUDA")]
LATE = 20_000_000
"""Nanoseconds, in which the host launches the next kernel and the device starts it."""
ATTEMPTS = 5


@triton.jit
def _late_kernel(to_ptr, from_ptr, words, NANOSECONDS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Lets the next kernel start, waits, and then writes what that one is to read."""
    tl.extra.cuda.gdc_launch_dependents()
    start = tl.extra.cuda.globaltimer()
    now = start
    while now - start < NANOSECONDS:
        now = tl.extra.cuda.globaltimer()
    for at in range(0, words, 1024):
        word = at + tl.arange(0, 1024)
        tl.store(to_ptr + word, tl.load(from_ptr + word, mask=word < words), mask=word < words)


@triton.jit
def _hasty_kernel(x_ptr, out_ptr):  # type: ignore[no-untyped-def]
    """What no kernel of ours may be: it does not wait."""
    tl.store(out_ptr, tl.load(x_ptr))


@dataclass
class Case:
    """One kernel.

    Attributes:
        late: What the kernel ahead writes.
        run: Launches it, with or without dependent launch, and returns what it wrote.
        state: What it changes.
    """

    late: torch.Tensor
    run: Callable[[bool], Sequence[torch.Tensor]]
    state: Sequence[torch.Tensor] = ()


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


def rms(which: str, _: Any) -> Case:
    x, residual, weight = randn(40, 1024), randn(40, 1024), randn(1024)
    if which == "alone":
        return Case(x, lambda pdl: [rms_norm(x, weight, 1e-6, pdl=pdl)])
    late = x if which == "x" else residual
    return Case(late, lambda pdl: [rms_norm(x, weight, 1e-6, residual, pdl=pdl), residual], [residual])


def qk_norm(_: str, make: Any) -> Case:
    paged, qkv, weight = make([40, 300], 2, 128, torch.bfloat16), randn(2, 8 * 128), randn(128)
    cos_sin, positions = rope_table(300, 128, 10000.0, "cuda"), torch.tensor([39, 299], dtype=torch.int32, device="cuda")

    def run(pdl: bool) -> list[torch.Tensor]:
        where = cos_sin, positions, paged.slots, paged.tables, paged.cache
        q = qk_norm_rope(qkv, *where, 4, q_weight=weight, k_weight=weight, pdl=pdl)
        return [q, paged.cache.nan_to_num()]

    return Case(qkv, run, [paged.cache])


def gate(_: str, __: Any) -> Case:
    x = randn(40, 2048)
    return Case(x, lambda pdl: [silu_mul(x, pdl=pdl)])


def thin(which: str, _: Any) -> Case:
    x, weight, residual = randn(2, 1024), randn(512, 1024), randn(2, 512)
    if which == "residual":
        return Case(residual, lambda pdl: [thin_linear(x, weight, residual=residual, pdl=pdl)], [residual])
    return Case(x, lambda pdl: [thin_linear(x, weight, norm_weight=weight[0] if which == "norm" else None, pdl=pdl)])


CONFIGS = {
    "tiles": LinearConfig(64, 32, 64, 4, 3, prefetch=4),
    "tiles, cut": LinearConfig(64, 64, 64, 4, 3, split_k=4),
    "cluster": ClusterConfig(64, 32, 1, 4, 4),
}


def product(which: str, _: Any) -> Case:
    name, late = which.split(": ")
    config, workspace = CONFIGS[name], LinearWorkspace(1 << 22, "cuda")
    x, weight, residual, norm = randn(40, 1024), randn(1024, 1024), randn(40, 1024), randn(1024)
    squares = torch.rand(40, 8, device="cuda") + 100
    if late in ("x", "squares"):
        given = Scaled(x, squares)
        tensor = {"x": x, "squares": squares}[late]
        return Case(tensor, lambda pdl: [linear(given, weight, config, workspace=workspace, pdl=pdl)])
    if late == "gated":
        return Case(x, lambda pdl: [linear(x, weight, config, silu=True, workspace=workspace, pdl=pdl)])

    def run(pdl: bool) -> list[torch.Tensor]:
        scaled = linear_residual(x, weight, residual, norm, config, workspace=workspace, pdl=pdl)
        return [residual, scaled.x, scaled.squares]

    return Case(residual if late == "residual" else x, run, [residual])


def planned(make: Any, lengths: list[int], **options: Any) -> tuple[Any, torch.Tensor, DecodePlan]:
    """A paged cache of rows so long, their lengths, and a plan for them."""
    paged, lens = make(lengths, 2, 128, torch.bfloat16), torch.tensor(lengths, dtype=torch.int32, device="cuda")
    return paged, lens, DecodePlan(len(lengths), 8, 2, 128, "cuda", max_blocks=paged.tables.shape[1], **options)


WARPS = DecodeConfig(32, 6, 2, 4)


def attention(which: str, make: Any) -> Case:
    shape, late = which.split(": ")
    paged, lens, plan = planned(make, [5, 700, 64, 33], config=DecodeConfig() if shape == "triton" else WARPS)
    q = randn(4, 8, 128)
    plan.update(lens, paged.slots, paged.tables)
    assert suits_warps(plan, paged.cache, q.dtype) == (shape == "warps")
    paged.cache.nan_to_num_(nan=1e6)
    return Case(q if late == "q" else paged.cache, lambda pdl: [paged_decode(q, paged.cache, plan, pdl=pdl)])


def several(which: str, make: Any) -> Case:
    paged, lens, plan = planned(make, [5, 700], max_queries=3)
    q, first = randn(6, 8, 128), lens - 3
    plan.update(lens, paged.slots, paged.tables)
    late = q if which == "q" else first
    return Case(late, lambda pdl: [paged_decode(q, paged.cache, plan, queries=3, first_positions=first, pdl=pdl)])


def raw_heads(_: str, make: Any) -> Case:
    paged, lens, plan = planned(make, [5, 700, 64, 33], config=WARPS)
    heads, weight = randn(4, 12, 128), randn(128)
    plan.update(lens, paged.slots, paged.tables, leave_newest=True)
    rotary = Rotary(rope_table(700, 128, 10000.0, "cuda"), weight, weight)

    def run(pdl: bool) -> list[torch.Tensor]:
        return [rotary_decode(heads, paged.cache, plan, rotary, pdl=pdl), paged.cache.nan_to_num()]

    return Case(heads, run, [paged.cache])


def plan_of_rows(_: str, make: Any) -> Case:
    paged, lens, plan = planned(make, [5, 700, 64, 33])

    def run(pdl: bool) -> list[torch.Tensor]:
        plan.update(lens, paged.slots, paged.tables, pdl=pdl)
        return [plan.plan, plan.starts]

    return Case(lens, run, [plan.plan, plan.starts])


def prefix(which: str, make: Any) -> Case:
    paged, q, workspace = make([1100], 2, 128, torch.bfloat16), randn(1, 8, 128), PrefixWorkspace(1, 8, 128, "cuda")
    leader = torch.tensor([int(paged.slots[0]), 1024], dtype=torch.int32, device="cuda")
    if which == "attend":

        def run(pdl: bool) -> list[torch.Tensor]:
            attend_prefix(q, paged.cache, paged.tables, leader, workspace, pdl=pdl)
            return [workspace.parts, workspace.stats]

        workspace.parts.zero_()
        workspace.stats.zero_()
        return Case(q, run)
    attend_prefix(q, paged.cache, paged.tables, leader, workspace)
    workspace.lse.copy_(torch.randn_like(workspace.lse))
    skips = torch.tensor([1024], dtype=torch.int32, device="cuda")

    def join(pdl: bool) -> list[torch.Tensor]:
        join_prefix(q, skips, workspace, pdl=pdl)
        return [q]

    return Case(workspace.parts if which == "parts" else q, join, [q])


def logits(which: str, _: Any) -> Case:
    rows = 20
    x, slots = randn(rows, 5000), torch.arange(rows, dtype=torch.int32, device="cuda")
    ones, workspace = torch.ones(rows, device="cuda"), SamplerWorkspace(rows, "cuda")
    seed = torch.arange(rows, device="cuda")
    if which == "logprobs":
        return Case(x, lambda pdl: list(token_logprobs(x, slots, workspace, pdl=pdl)))
    if which.startswith("behind"):
        counts, bits = torch.zeros(rows, 5000, dtype=torch.int16, device="cuda"), torch.full_like(slots, -1).expand(157, -1).T
        state = LogitsState(counts, bits.contiguous() * 0, ones, ones * 5, ones, bitmask=bits.contiguous())
        guessed = Guessed(slots.clone(), slots * 7 + 9, slots.clamp(max=3))
        late = guessed.behind if which == "behind: tokens" else guessed.num_guesses
        return Case(late, lambda pdl: [process_logits(x, slots, state, guessed=guessed, pdl=pdl)])
    if which == "process":
        state = LogitsState(bias_tokens=slots[:, None].contiguous(), bias_values=ones[:, None])
        return Case(x, lambda pdl: [process_logits(x, slots, state, pdl=pdl)])
    filters = {"top_k": slots + 5, "top_p": ones * 0.9, "min_p": ones * 0.01} if which == "filtered" else {}

    def run(pdl: bool) -> list[torch.Tensor]:
        return [sample(x, slots, slots, ones, seed, workspace, greedy=which == "greedy", **filters, pdl=pdl)]

    return Case(x, run)


CASES: list[tuple[Callable[[str, Any], Case], str]] = [
    *((rms, which) for which in ("alone", "x", "residual")),
    (qk_norm, "qkv"),
    (gate, "x"),
    *((thin, which) for which in ("x", "norm", "residual")),
    *((product, f"{name}: {late}") for name in CONFIGS for late in ("x", "squares", "gated", "residual", "added x")),
    *((attention, f"{shape}: {late}") for shape in ("triton", "warps") for late in ("q", "cache")),
    *((several, which) for which in ("q", "first positions")),
    (raw_heads, "heads"),
    (plan_of_rows, "lengths"),
    *((prefix, which) for which in ("attend", "parts", "out")),
    *((logits, which) for which in ("draw", "filtered", "greedy", "process", "behind: tokens", "behind: numbers", "logprobs")),
]


def behind_a_late_copy(to: torch.Tensor, launch: Callable[[], Any], restore: Callable[[], None]) -> Any:
    """Poison a tensor, launch the kernel that writes it again, and in time another behind it: what that one returns."""
    flat, truth = to.view(-1).view(torch.int32), to.clone().view(-1).view(torch.int32)
    for _ in range(ATTEMPTS):
        restore()
        to.fill_(float("nan") if to.is_floating_point() else 1)
        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        _late_kernel[(1,)](flat, truth, len(flat), NANOSECONDS=LATE)
        result = launch()
        taken = time.perf_counter_ns() - start
        torch.cuda.synchronize()
        if taken < LATE // 2:
            return result
    pytest.fail("the host is too busy to launch two kernels within 10 ms")


@pytest.mark.parametrize(("make_case", "which"), CASES, ids=lambda part: getattr(part, "__name__", part))
def test_it_waits_for_what_it_reads(make_case: Callable[[str, Any], Case], which: str, make_paged: Any) -> None:
    case = make_case(which, make_paged)
    before = [each.clone() for each in case.state]

    def restore() -> None:
        for tensor, value in zip(case.state, before, strict=True):
            tensor.copy_(value)

    expected = [each.clone() for each in case.run(False)]
    restore()
    case.run(True)  # compiles it
    restore()
    got = behind_a_late_copy(case.late, lambda: case.run(True), restore)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2, equal_nan=False)


def test_a_kernel_that_does_not_wait_would_be_found() -> None:
    x, out = torch.ones(4, dtype=torch.int32, device="cuda") * 7, torch.zeros(1, dtype=torch.int32, device="cuda")
    _hasty_kernel[(1,)](x, out, launch_pdl=True)
    assert out.item() == 7
    behind_a_late_copy(x, lambda: _hasty_kernel[(1,)](x, out, launch_pdl=True), lambda: None)
    assert out.item() == 1
    assert x.tolist() == [7] * 4
