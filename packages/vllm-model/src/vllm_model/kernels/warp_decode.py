"""Decode attention by single warps on Hopper (``warp_decode.cu``): keys and values by the copy engine.

Reading the cache takes as long as it takes; what this saves is the work beside it, and with it the card's power: copies of
whole pages instead of 16 bytes by each thread, heads as the eight columns of the matrix unit instead of its sixteen rows, and
warps that wait for nobody. :mod:`~vllm_model.kernels.paged_decode` is the same for any card and shape.
"""

import ctypes
import logging
from functools import lru_cache
from pathlib import Path

import torch

from vllm_model.kernels._cuda import compiled, launch_cuda, pointer, tensor_map, text_of
from vllm_model.kernels._launch import take_down
from vllm_model.kernels.decode_plan import DecodePlan
from vllm_model.kernels.rotary_decode import Rotary

logger = logging.getLogger(__name__)

NAME = "warp_decode"
SOURCE = Path(__file__).with_name("warp_decode.cu")
PAGE, COLUMNS = 16, 8
"""Keys of a block, and most query heads of a KV head."""
STAGE_BYTES = 192 << 10
"""Of a multiprocessor's shared memory, for the tiles that its programs have under way."""


def stages(plan: DecodePlan) -> int:
    """Tiles that one program has under way."""
    return min(STAGE_BYTES // (plan.config.programs_per_sm * 4 * plan.config.tile * plan.head_dim), 8)


@lru_cache(maxsize=64)
def source(dtype: torch.dtype, head_dim: int, group: int, kv_heads: int, tile: int, stages: int, programs: int, raw: bool) -> str:
    """The program's text."""
    lines: dict[str, int | str] = {
        "ELEMENT_IS_BF16": int(dtype == torch.bfloat16),
        "HEAD_DIM": head_dim,
        "GROUP": group,
        "KV_HEADS": kv_heads,
        "TILE": tile,
        "STAGES": stages,
        "PROGRAMS": programs,
        "RAW": int(raw),
    }
    return text_of(SOURCE, lines)


@lru_cache(maxsize=16)
def has_warp_decode(device: torch.device) -> bool:
    """Whether a device, its driver and the compiler know all that the program uses."""
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    try:
        x = torch.empty(64, 64, dtype=torch.bfloat16, device=device)
        tensor_map(x.dtype, x.data_ptr(), (64, 64), (64,), (64, 32))
        return bool(compiled(NAME, source(x.dtype, 128, 2, 8, 32, 3, 528, raw=False)))
    except Exception as error:  # not installed, without its library, or of another age: Triton's attention does as well
        logger.info("decode attention is left to Triton: %s", error)
        return False


def suits(q: torch.Tensor, kv_cache: torch.Tensor, plan: DecodePlan, rotary: Rotary | None) -> bool:
    """Whether :func:`launch_warp_decode` can do it, for one query a row."""
    config = plan.config
    shape = q.dtype == kv_cache.dtype and plan.block_size == PAGE and plan.head_dim in (64, 128) and plan.group <= COLUMNS
    turned = rotary is None or (rotary.cos_sin.shape[1] == plan.head_dim and plan.group < COLUMNS)
    tiles = config.tile in (16, 32, 64) and stages(plan) >= 2
    return shape and turned and tiles and q.dtype in (torch.bfloat16, torch.float16) and has_warp_decode(q.device)


def launch_warp_decode(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    plan: DecodePlan,
    rotary: Rotary | None,
    out: torch.Tensor,
    scale: float,
    *,
    pdl: bool,
) -> None:
    """What :func:`~vllm_model.kernels.paged_decode.paged_decode` does for what :func:`suits`.

    Args:
        scale: Of the products, times the binary logarithm of e.
    """
    head_dim, kv_heads, tile, count = plan.head_dim, plan.num_kv_heads, plan.config.tile, stages(plan)
    text = source(q.dtype, head_dim, plan.group, kv_heads, tile, count, plan.programs, rotary is not None)
    if take_down(text, lambda: compiled(NAME, text)):
        return
    sizes, strides = (64, PAGE * head_dim // 32, kv_heads, len(kv_cache)), (64, 2 * PAGE * head_dim, kv_cache.stride(0))
    cache_map = tensor_map(q.dtype, kv_cache.data_ptr(), sizes, strides, (*sizes[:2], 1, 1), promotion=128)
    buffers = (q, out, kv_cache, plan.plan, plan.starts, plan.entries, plan.parts, plan.stats, plan.counts, plan.newest)
    turning = (rotary.cos_sin, rotary.q_weight, rotary.k_weight) if rotary else (None, None, None)
    values = [
        *(pointer(each) for each in (*buffers, *turning)),
        *(ctypes.c_longlong(each.stride(0)) for each in (kv_cache, q, out)),
        *(ctypes.c_int(each.stride(1)) for each in (plan.parts, plan.stats)),
        *(ctypes.c_float(each) for each in (rotary.eps if rotary else 0.0, scale)),
    ]
    shared = count * 4 * tile * head_dim + 12 * count + 1024
    launch_cuda(NAME, text, [cache_map], values, q.device, grid=(plan.programs, 1), threads=32, shared=shared, pdl=pdl)
