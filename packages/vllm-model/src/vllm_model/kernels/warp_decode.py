"""Decode attention by single warps on Hopper (``warp_decode.cu``): keys and values by the copy engine.

Reading the cache takes the time that it takes; what this saves is the work beside it, and with it the card's power: whole pages
instead of 16 bytes by each thread, heads as the eight columns of the matrix unit instead of its sixteen rows, and warps that
wait for nobody. It also takes QKV as the product gave it, one launch a layer less: whoever begins a (sequence, KV head) pair
normalises and rotates its queries; whoever has the pair's first tile finishes the newest key too, writes it and the value to
the cache, and starts the softmax with them, since no tile holds them.

:mod:`~vllm_model.kernels.paged_decode` is for any card and shape, and hands on what suits this.
"""

import ctypes
import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from vllm_model.kernels._cuda import compiled, launch_cuda, pointer, tensor_map, text_of
from vllm_model.kernels._launch import take_down, with_room
from vllm_model.kernels._paged import query_group, softmax_scale
from vllm_model.kernels.decode_plan import DecodePlan

logger = logging.getLogger(__name__)

NAME = "warp_decode"
SOURCE = Path(__file__).with_name("warp_decode.cu")
PAGE, COLUMNS = 16, 8
"""Keys of a block, and most query heads of a KV head."""
TILES = (16, 32)
"""Keys of a step: with few rows, whose plans have longer ones, Triton's four warps a program are faster."""
STAGE_BYTES = 192 << 10
"""Of a multiprocessor's shared memory, for the tiles that its programs have under way."""


@dataclass(frozen=True)
class Rotary:
    """What turns the product's QKV into queries and keys.

    Attributes:
        cos_sin: float32 ``[max_len, rotary_dim]``, as in :func:`qk_norm_rope`.
        q_weight: ``[head_dim]``, norm of every q head; None with ``k_weight``: no norm.
        k_weight: ``[head_dim]``.
        eps: Added to the mean square.
    """

    cos_sin: torch.Tensor
    q_weight: torch.Tensor | None = None
    k_weight: torch.Tensor | None = None
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if (self.q_weight is None) != (self.k_weight is None):
            raise ValueError("q_weight and k_weight come together")


def stages(plan: DecodePlan) -> int:
    """Tiles that one program has under way."""
    return min(STAGE_BYTES // (plan.config.programs_per_sm * 4 * plan.config.tile * plan.head_dim), 8)


@lru_cache(maxsize=64)
def source(
    dtype: torch.dtype, head_dim: int, group: int, kv_heads: int, tile: int, stages: int, programs: int, raw: bool
) -> str:
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
def has_warps(device: torch.device) -> bool:
    """Whether a device, its driver and the compiler know all that the program uses."""
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    try:
        x = torch.empty(64, 64, dtype=torch.bfloat16, device=device)
        tensor_map(x.dtype, x.data_ptr(), (64, 64), (64,), (64, 32))
        return bool(compiled(NAME, source(x.dtype, 128, 4, 8, 32, 2, 792, raw=True)))
    except Exception as error:  # not installed, without its library, or of another age: Triton's attention does as well
        logger.info("decode attention is left to Triton: %s", error)
        return False


def suits_warps(plan: DecodePlan, kv_cache: torch.Tensor, dtype: torch.dtype, rotary_dim: int | None = None) -> bool:
    """Whether warps do it for one query a row, of a type; with ``rotary_dim`` from QKV as the product gave it."""
    group, head_dim, tile = plan.group, plan.head_dim, plan.config.tile
    shape = head_dim in (64, 128) and plan.block_size == PAGE and tile in TILES and stages(plan) >= 2
    heads = group <= COLUMNS if rotary_dim is None else group < COLUMNS and rotary_dim == head_dim  # the key is one more
    types = dtype == kv_cache.dtype and dtype in (torch.bfloat16, torch.float16)
    aligned = kv_cache.data_ptr() % 16 == 0 and kv_cache.stride(0) % 8 == 0
    return shape and heads and types and aligned and has_warps(kv_cache.device)


def launch_warps(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    plan: DecodePlan,
    out: torch.Tensor,
    scale: float,
    *,
    rotary: Rotary | None = None,
    pdl: bool,
) -> None:
    """What :func:`~vllm_model.kernels.paged_decode.paged_decode` or with ``rotary`` :func:`rotary_decode` does.

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


def rotary_decode(
    heads: torch.Tensor,
    kv_cache: torch.Tensor,
    plan: DecodePlan,
    rotary: Rotary,
    *,
    scale: float | None = None,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Attention of each row's newest token over its whole sequence, from QKV as the product gave it.

    Args:
        heads: ``[rows, num_heads + 2 * num_kv_heads, head_dim]`` bf16 or fp16, contiguous heads: of queries, keys and values.
        kv_cache: ``[num_blocks, num_kv_heads, 2, block_size, head_dim]``, each block contiguous, of the type of ``heads``; this
            step's keys and values are written.
        plan: The cut of this step, which leaves the newest keys out, of a shape that :func:`suits_warps`.
        rotary: What finishes queries and keys.
        scale: Of the products; ``head_dim ** -0.5`` when None.
        out: ``[rows, num_heads, head_dim]``, contiguous heads; a new tensor when None.
        pdl: Programmatic dependent launch; the plan and what the cache holds must then be at least two launches old.

    Returns:
        ``[rows, num_heads, head_dim]``. Rows of length 0 or slot -1 are zeros.

    Raises:
        ValueError: Shapes or types disagree, or warps cannot do it.
    """
    rows, num_heads, head_dim = heads.shape
    weights = [each for each in (rotary.q_weight, rotary.k_weight) if each is not None]
    if (
        rotary.cos_sin.dtype != torch.float32
        or not rotary.cos_sin.is_contiguous()
        or any(each.dtype != heads.dtype or each.shape != (head_dim,) or not each.is_contiguous() for each in weights)
    ):
        raise ValueError(f"cos_sin must be float32 and the norms' weights {heads.dtype}, all contiguous")
    if (
        rows > plan.max_rows
        or not plan.leaves_newest
        or (num_heads, head_dim) != (plan.num_heads + 2 * plan.num_kv_heads, plan.head_dim)
        or query_group(heads[:, : plan.num_heads], kv_cache) != plan.group
        or kv_cache.shape[3] != plan.block_size
        or not suits_warps(plan, kv_cache, heads.dtype, rotary.cos_sin.shape[1])
    ):
        raise ValueError(f"heads {tuple(heads.shape)} do not fit the plan, or a kernel for them is not there")
    if out is None:
        out = with_room(heads, rows, plan.num_heads, head_dim)
    if out.shape != (rows, plan.num_heads, head_dim) or out.stride()[1:] != (head_dim, 1):
        raise ValueError(f"out {tuple(out.shape)} with strides {out.stride()} does not fit heads {tuple(heads.shape)}")
    if rows:
        launch_warps(heads, kv_cache, plan, out, softmax_scale(head_dim, scale), rotary=rotary, pdl=pdl)
    return out
