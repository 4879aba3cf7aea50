# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator, misc"
# ruff: noqa: N803  constexpr arguments are upper case in Triton
"""The beginning of decode attention that takes QKV as the product gave it: one launch a layer less.

Whoever begins a (sequence, KV head) pair normalises and rotates its queries; whoever has the pair's first tile finishes the
newest key and value too, writes them to the cache, and starts the softmax with them, since no tile holds them.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_model.kernels._launch import wait_for_previous
from vllm_model.kernels.qk_norm_rope import store_cache


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


@triton.jit
def _partner(d, ROT_HALF: tl.constexpr):
    """The dimension that each one is rotated with, less itself."""
    return tl.where(d < ROT_HALF, ROT_HALF, tl.where(d < 2 * ROT_HALF, -ROT_HALF, 0))


@triton.jit
def _weighted(cos, sin, weight_ptr, HEAD_DIM: tl.constexpr, D_BLOCK: tl.constexpr, ROT_HALF: tl.constexpr):
    if weight_ptr is not None:
        d = tl.arange(0, D_BLOCK)
        cos *= tl.load(weight_ptr + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
        sin *= tl.load(weight_ptr + d + _partner(d, ROT_HALF), mask=d < HEAD_DIM, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def _turning(
    cos_sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    position,
    HEAD_DIM: tl.constexpr,
    D_BLOCK: tl.constexpr,
    ROT_HALF: tl.constexpr,
):
    """Norm weights and rotation at a position in one: factors of each dimension of a query head and of its partner, and the
    same of a key head, all float32 ``[D_BLOCK]``.
    """
    d = tl.arange(0, D_BLOCK)
    at = cos_sin_ptr + position.to(tl.int64) * (2 * ROT_HALF) + d % ROT_HALF
    cos = tl.load(at, mask=d < 2 * ROT_HALF, other=1.0)
    sin = tl.load(at + ROT_HALF, mask=d < 2 * ROT_HALF, other=0.0)
    sin = tl.where(d < ROT_HALF, -sin, sin)
    q_cos, q_sin = _weighted(cos, sin, q_weight_ptr, HEAD_DIM, D_BLOCK, ROT_HALF)
    k_cos, k_sin = _weighted(cos, sin, k_weight_ptr, HEAD_DIM, D_BLOCK, ROT_HALF)
    return q_cos, q_sin, k_cos, k_sin


@triton.jit
def _turned_queries(
    heads_ptr,
    io,
    io_mask,
    cos,
    sin,
    eps,
    HEAD_DIM: tl.constexpr,
    D_BLOCK: tl.constexpr,
    ROT_HALF: tl.constexpr,
    NORM: tl.constexpr,
):
    """Query heads at ``heads_ptr + io``, ``[M, D_BLOCK]``, finished, in their own type."""
    x = tl.load(heads_ptr + io, mask=io_mask, other=0.0).to(tl.float32)
    partner = io + _partner(tl.arange(0, D_BLOCK), ROT_HALF)[None, :]
    y = tl.load(heads_ptr + partner, mask=io_mask, other=0.0).to(tl.float32)
    turned = x * cos[None, :] + y * sin[None, :]
    if NORM:
        turned *= tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)[:, None]
    return turned.to(heads_ptr.dtype.element_ty)


@triton.jit
def _finished_key(
    head_ptr, cos, sin, eps, HEAD_DIM: tl.constexpr, D_BLOCK: tl.constexpr, ROT_HALF: tl.constexpr, NORM: tl.constexpr
):
    """The key head at ``head_ptr``, finished: float32 ``[D_BLOCK]``."""
    d = tl.arange(0, D_BLOCK)
    x = tl.load(head_ptr + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
    y = tl.load(head_ptr + d + _partner(d, ROT_HALF), mask=d < HEAD_DIM, other=0.0).to(tl.float32)
    turned = x * cos + y * sin
    if NORM:
        turned *= tl.rsqrt(tl.sum(x * x, axis=0) / HEAD_DIM + eps)
    return turned


@triton.jit
def start_raw_pair(
    qkv_ptr,
    cache_ptr,
    starts_ptr,
    newest_ptr,
    cos_sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    k_scale_ptr,
    v_scale_ptr,
    io,
    io_mask,
    row,
    head,
    tile,
    room,
    wait,
    block_stride,
    qkv_stride,
    eps,
    softmax_scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROT_HALF: tl.constexpr,
    M: tl.constexpr,
    NORM: tl.constexpr,
    FP8: tl.constexpr,
    PDL: tl.constexpr,
):
    """A pair from its tile ``tile`` on, of heads as the product left them: the tiles of it that this program takes, at most
    ``room``; whether that is all of it; its queries; and of the softmax: maximum, sum, weighted values. With ``wait`` it waits
    for the product.
    """
    tiles = tl.load(starts_ptr + row + 1) - tl.load(starts_ptr + row)
    left = tl.minimum(tiles - tile, room)
    place = tl.load(newest_ptr + 2 * row)
    position = tl.load(newest_ptr + 2 * row + 1)
    q_cos, q_sin, k_cos, k_sin = _turning(cos_sin_ptr, q_weight_ptr, k_weight_ptr, position, HEAD_DIM, D_BLOCK, ROT_HALF)
    if wait:  # until here nothing is younger than the plan
        wait_for_previous(PDL)
    row_ptr = qkv_ptr + row.to(tl.int64) * qkv_stride
    q = _turned_queries(row_ptr + head * (GROUP * HEAD_DIM), io, io_mask, q_cos, q_sin, eps, HEAD_DIM, D_BLOCK, ROT_HALF, NORM)
    if FP8:
        q = q.to(tl.float16)
    highest = tl.full([M], -1.0e30, tl.float32)
    denominator = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D_BLOCK], tl.float32)
    if (tile == 0) & (place >= 0):
        d = tl.arange(0, D_BLOCK)
        key_ptr = row_ptr + (KV_HEADS * GROUP + head) * HEAD_DIM
        offset = (place // BLOCK_SIZE).to(tl.int64) * block_stride
        offset += (head * (2 * BLOCK_SIZE) + place % BLOCK_SIZE) * HEAD_DIM + d
        k_scale = 1.0
        v_scale = 1.0
        if FP8:
            k_scale = tl.load(k_scale_ptr + head)
            v_scale = tl.load(v_scale_ptr + head)
        k = _finished_key(key_ptr, k_cos, k_sin, eps, HEAD_DIM, D_BLOCK, ROT_HALF, NORM)
        v = tl.load(key_ptr + KV_HEADS * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
        k = store_cache(cache_ptr, offset, k, 1.0 / k_scale, d < HEAD_DIM, FP8)
        v = store_cache(cache_ptr, offset + BLOCK_SIZE * HEAD_DIM, v, 1.0 / v_scale, d < HEAD_DIM, FP8)
        highest = tl.sum(q.to(tl.float32) * k[None, :], axis=1) * (softmax_scale * k_scale)
        denominator += 1.0
        acc += v[None, :]
    return left, (tile == 0) & (left == tiles), q, highest, denominator, acc
