"""Compile the kernels for another card than this machine's, or none: ``compile_for.py CAPABILITY``, 89 for one.

Several processes fill the cache, then each kernel is found there: it prints a kernel and its bytes of shared memory in a line.
Triton compiles without a card; only the launch needs one.
"""

import sys

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from vllm_model.cuda.device import Device
from vllm_model.cuda.logits_rows import LogitsRows
from vllm_model.cuda.rows import DeviceRows
from vllm_model.kernels import _launch, decode_plan
from vllm_model.kernels.accept import accept
from vllm_model.kernels.gemv import thin_linear
from vllm_model.kernels.logits import Guessed
from vllm_model.kernels.logprobs import token_logprobs
from vllm_model.kernels.paged_decode import paged_decode
from vllm_model.kernels.paged_prefill import paged_prefill
from vllm_model.kernels.qk_norm_rope import qk_norm_rope
from vllm_model.kernels.rms_norm import rms_norm
from vllm_model.kernels.sampling import SamplerWorkspace, sample
from vllm_model.kernels.shared_prefix import PrefixWorkspace, attend_prefix, join_prefix
from vllm_model.kernels.silu_mul import silu_mul

HEADS, KV_HEADS, ROWS = 16, 8, 32


class Absent:
    """A driver of a card that is not there."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def attention(head_dim: int, fp8: bool) -> None:
    """All that works on the cache."""
    cache = torch.zeros(4, KV_HEADS, 2, 16, head_dim, dtype=torch.float8_e4m3fn if fp8 else torch.bfloat16)
    scales = {"k_scale": torch.ones(KV_HEADS), "v_scale": torch.ones(KV_HEADS)} if fp8 else {}
    tables, ints = torch.zeros(4, 4, dtype=torch.int32), torch.zeros(ROWS + 1, dtype=torch.int32)
    q = torch.zeros(ROWS, HEADS, head_dim, dtype=torch.bfloat16)
    rows = ints[:ROWS]
    plan = decode_plan.DecodePlan(ROWS, HEADS, KV_HEADS, head_dim, "cpu", max_blocks=4)
    plan.update(rows, rows, tables)
    paged_decode(q, cache, plan, **scales)
    plan.update(rows, rows, tables, leave_newest=True)
    few = decode_plan.DecodePlan(ROWS, HEADS, KV_HEADS, head_dim, "cpu", max_blocks=4, max_queries=9)
    paged_decode(q, cache, few, queries=8, first_positions=ints[:4], **scales)
    paged_prefill(q, cache, tables, rows, ints, rows, **scales)
    workspace = PrefixWorkspace(ROWS, HEADS, head_dim, "cpu")
    attend_prefix(q, cache, tables, ints[:2], workspace, **scales)
    join_prefix(q, rows, workspace)
    qkv = torch.zeros(ROWS, (HEADS + 2 * KV_HEADS) * head_dim, dtype=torch.bfloat16)
    qk_norm_rope(qkv, torch.zeros(64, head_dim), rows, rows, tables, cache, HEADS, **scales)


def others() -> None:
    """The rest of a step."""
    x, weight = torch.zeros(2, 1024, dtype=torch.bfloat16), torch.zeros(2048, 1024, dtype=torch.bfloat16)
    thin_linear(x, weight, norm_weight=weight[0])
    thin_linear(x, weight, silu=True)
    rms_norm(x, weight[0], 1e-6, x)
    silu_mul(x)
    ints = torch.zeros(2, dtype=torch.int32)
    ones, filters = torch.ones(2), {"top_k": ints, "top_p": torch.ones(2), "min_p": torch.ones(2)}
    for options in ({}, filters):
        sample(x, ints, ints, ones, ints.long(), SamplerWorkspace(2, "cpu"), **options)
    token_logprobs(x, ints, SamplerWorkspace(2, "cpu"))
    accept(torch.zeros(2, 5, dtype=torch.int32), torch.zeros(2, 5, dtype=torch.int32), ints, ints, ints, ints)
    device = Device(torch.device("cpu"))
    rows = DeviceRows(device, 2, 4)
    rows.begin(torch.zeros(5, 2, dtype=torch.int32), torch.zeros(4, 2, dtype=torch.int32))
    rows.keep(ints, ints)
    logits_rows = LogitsRows(device, 2, x.shape[1])
    logits_rows.adjusted(x, ints, ints)
    logits_rows.adjusted(x, ints, ints, Guessed(ints, ints, ints))
    logits_rows.count(ints, ints)


def main() -> None:
    """Compile, and print what each kernel takes."""
    capability = int(sys.argv[1])
    driver.set_active(Absent(capability))
    decode_plan.has_large_shared_memory = lambda device: False

    def run() -> None:
        for head_dim in (128, 256):
            attention(head_dim, capability >= 89)
        others()

    _launch.compile_together([run])
    missing: list[str] = []
    knobs.compilation.listener = lambda **kernel: kernel["cache_hit"] or missing.append(kernel["src"].name)
    taken = _launch.TakenDown()
    _launch._TAKING_DOWN.set(taken)
    run()
    if missing:
        sys.exit(f"not compiled together: {missing}")
    for kernel in taken.kernels:
        print(kernel.metadata.name, kernel.metadata.shared)  # noqa: T201


if __name__ == "__main__":
    main()
