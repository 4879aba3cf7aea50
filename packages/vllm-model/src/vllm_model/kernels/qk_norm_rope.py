# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator, misc"
# ruff: noqa: N803, N806  constexprs are upper case in Triton
"""Between the QKV product and attention: head norms, rotary embedding, and the write into the paged cache.

Rotary embedding: Su et al. 2021, in the half-split ("neox") arrangement.
"""

import torch
import triton
import triton.language as tl

from vllm_model.kernels._launch import launch, launch_options, power_of_two, wait_for_previous
from vllm_model.kernels._paged import holds_e4m3

FP8_MAX = 448.0
"""The largest finite e4m3 number."""


@triton.jit
def _store_cache(cache_ptr, offsets, value, inverse_scale, mask, FP8: tl.constexpr):
    if FP8:
        value = tl.minimum(tl.maximum(value * inverse_scale, -448.0), 448.0)
    tl.store(cache_ptr + offsets, value.to(cache_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _qk_norm_rope_kernel(
    qkv_ptr,  # [tokens, (Q_HEADS + 2 KV_HEADS) * HEAD_DIM]
    q_weight_ptr,  # [HEAD_DIM]
    k_weight_ptr,  # [HEAD_DIM]
    cos_sin_ptr,  # float32 [max_len, 2 * ROT_HALF]
    positions_ptr,  # [tokens]
    slots_ptr,  # [tokens]
    tables_ptr,  # [max_slots, max_blocks]
    q_out_ptr,  # [tokens, Q_HEADS, HEAD_DIM]
    cache_ptr,  # [num_blocks, KV_HEADS, 2, BLOCK_SIZE, HEAD_DIM]
    k_scale_ptr,  # float32 [KV_HEADS]
    v_scale_ptr,  # float32 [KV_HEADS]
    qkv_stride,
    tables_stride,
    block_stride,
    eps,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROT_HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    NORM: tl.constexpr,
    FP8: tl.constexpr,
    KEEP_K: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)  # over q, k and v heads
    half = tl.arange(0, HALF_BLOCK)
    REST: tl.constexpr = HEAD_DIM - 2 * ROT_HALF
    wait_for_previous(PDL)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot >= 0:
        position = tl.load(positions_ptr + token).to(tl.int64)
        page = tl.load(tables_ptr + slot * tables_stride + position // BLOCK_SIZE).to(tl.int64)
        is_q = head < Q_HEADS
        is_v = head >= Q_HEADS + KV_HEADS
        is_kv = (head >= Q_HEADS) & (head < Q_HEADS + 2 * KV_HEADS)
        exists = head < Q_HEADS + 2 * KV_HEADS

        half_mask = exists[:, None] & (half < ROT_HALF)[None, :]
        base = token * qkv_stride + head[:, None] * HEAD_DIM
        first = tl.load(qkv_ptr + base + half[None, :], mask=half_mask, other=0.0).to(tl.float32)  # [HEADS, HALF_BLOCK]
        second = tl.load(qkv_ptr + base + ROT_HALF + half[None, :], mask=half_mask, other=0.0).to(tl.float32)
        if REST > 0:
            rest = tl.arange(0, REST_BLOCK)
            rest_mask = exists[:, None] & (rest < REST)[None, :]
            tail = tl.load(qkv_ptr + base + 2 * ROT_HALF + rest[None, :], mask=rest_mask, other=0.0).to(tl.float32)

        if NORM:
            square = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
            if REST > 0:
                square += tl.sum(tail * tail, axis=1)
            scale = tl.where(is_v, 1.0, tl.rsqrt(square / HEAD_DIM + eps))[:, None]
            in_half = half < ROT_HALF
            for part in tl.static_range(3):
                if part < 2:
                    qw = tl.load(q_weight_ptr + part * ROT_HALF + half, mask=in_half, other=0.0).to(tl.float32)
                    kw = tl.load(k_weight_ptr + part * ROT_HALF + half, mask=in_half, other=0.0).to(tl.float32)
                    weight = tl.where(is_q[:, None], qw[None, :], tl.where(is_v[:, None], 1.0, kw[None, :]))
                    if part == 0:
                        first = first * scale * weight
                    else:
                        second = second * scale * weight
                elif REST > 0:
                    qw = tl.load(q_weight_ptr + 2 * ROT_HALF + rest, mask=rest < REST, other=0.0).to(tl.float32)
                    kw = tl.load(k_weight_ptr + 2 * ROT_HALF + rest, mask=rest < REST, other=0.0).to(tl.float32)
                    weight = tl.where(is_q[:, None], qw[None, :], tl.where(is_v[:, None], 1.0, kw[None, :]))
                    tail = tail * scale * weight

        cos = tl.load(cos_sin_ptr + position * (2 * ROT_HALF) + half, mask=half < ROT_HALF, other=0.0)[None, :]
        sin = tl.load(cos_sin_ptr + position * (2 * ROT_HALF) + ROT_HALF + half, mask=half < ROT_HALF, other=0.0)[None, :]
        turned_first = tl.where(is_v[:, None], first, first * cos - second * sin)
        turned_second = tl.where(is_v[:, None], second, second * cos + first * sin)

        q_base = (token * Q_HEADS + head[:, None]) * HEAD_DIM
        q_type = q_out_ptr.dtype.element_ty
        q_mask = half_mask & is_q[:, None]
        tl.store(q_out_ptr + q_base + half[None, :], turned_first.to(q_type), mask=q_mask)
        tl.store(q_out_ptr + q_base + ROT_HALF + half[None, :], turned_second.to(q_type), mask=q_mask)

        if KEEP_K:
            k_mask = half_mask & ((head >= Q_HEADS) & (head < Q_HEADS + KV_HEADS))[:, None]
            tl.store(qkv_ptr + base + half[None, :], turned_first.to(q_type), mask=k_mask)
            tl.store(qkv_ptr + base + ROT_HALF + half[None, :], turned_second.to(q_type), mask=k_mask)
            if REST > 0:
                k_rest = rest_mask & ((head >= Q_HEADS) & (head < Q_HEADS + KV_HEADS))[:, None]
                tl.store(qkv_ptr + base + 2 * ROT_HALF + rest[None, :], tail.to(q_type), mask=k_rest)

        kv_head = (head - Q_HEADS) % KV_HEADS  # masked where it is no K or V head
        which = tl.where(is_v, 1, 0)
        inverse_scale = 1.0
        if FP8:
            k_scale = tl.load(k_scale_ptr + kv_head, mask=is_kv & (which == 0), other=1.0)
            v_scale = tl.load(v_scale_ptr + kv_head, mask=is_kv & (which == 1), other=1.0)
            inverse_scale = (1.0 / (k_scale * v_scale))[:, None]  # one of the two is 1
        kv_base = page * block_stride + ((kv_head * 2 + which) * BLOCK_SIZE + position % BLOCK_SIZE) * HEAD_DIM
        kv_mask = half_mask & is_kv[:, None]
        _store_cache(cache_ptr, kv_base[:, None] + half[None, :], turned_first, inverse_scale, kv_mask, FP8)
        _store_cache(cache_ptr, kv_base[:, None] + ROT_HALF + half[None, :], turned_second, inverse_scale, kv_mask, FP8)
        if REST > 0:
            tl.store(q_out_ptr + q_base + 2 * ROT_HALF + rest[None, :], tail.to(q_type), mask=rest_mask & is_q[:, None])
            kv_rest = kv_base[:, None] + 2 * ROT_HALF + rest[None, :]
            _store_cache(cache_ptr, kv_rest, tail, inverse_scale, rest_mask & is_kv[:, None], FP8)


def qk_norm_rope(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    block_tables: torch.Tensor,
    kv_cache: torch.Tensor,
    num_heads: int,
    *,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    keep_k: bool = False,
    pdl: bool = False,
) -> torch.Tensor:
    """Normalise and rotate Q and K, return Q, write K and V to their places in the cache.

    Args:
        qkv: ``[tokens, (num_heads + 2 * num_kv_heads) * head_dim]`` bf16 or fp16, rows contiguous: q heads, k heads, v heads.
        cos_sin: float32 ``[max_len, rotary_dim]``: ``rotary_dim / 2`` cosines, then as many sines. Dimensions of a head past
            ``rotary_dim`` are not rotated.
        positions: int32 or int64 ``[tokens]``.
        slots: int32 ``[tokens]``; slot -1 is padding: neither its q nor the cache is written.
        block_tables: int32 ``[max_slots, max_blocks]``.
        kv_cache: ``[num_blocks, num_kv_heads, 2, block_size, head_dim]``, each block contiguous; the type of ``qkv`` or e4m3.
        num_heads: Query heads.
        q_weight: ``[head_dim]``, norm of every q head (Qwen3); None with ``k_weight``: no norm.
        k_weight: ``[head_dim]``.
        eps: Added to the mean square.
        k_scale: float32 ``[num_kv_heads]``: an e4m3 cache holds ``k / k_scale``, clipped to +-448.
        v_scale: float32 ``[num_kv_heads]``, likewise.
        out: ``[tokens, num_heads, head_dim]``, contiguous; a new tensor when None.
        keep_k: Leave the finished K in its place in ``qkv`` as well.
        pdl: Programmatic dependent launch.

    Returns:
        Q, ``[tokens, num_heads, head_dim]``. Arithmetic is float32 from the load to the store.

    Raises:
        ValueError: Shapes disagree, or scales are missing for an e4m3 cache.
    """
    tokens, width = qkv.shape
    _, kv_heads, _, block_size, head_dim = kv_cache.shape
    rotary = cos_sin.shape[1]
    fp8 = holds_e4m3(kv_cache, k_scale, v_scale)
    if width != (num_heads + 2 * kv_heads) * head_dim or rotary > head_dim or rotary % 2:
        raise ValueError(f"qkv {tuple(qkv.shape)}, cache {tuple(kv_cache.shape)} and cos_sin {tuple(cos_sin.shape)} disagree")
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight come together")
    if out is None:
        out = qkv.new_empty(tokens, num_heads, head_dim)
    if not tokens:
        return out
    total = num_heads + 2 * kv_heads
    half_block = power_of_two(rotary // 2)
    heads = min(power_of_two(total), max(1, (256 if tokens <= 64 else 1024) // (2 * half_block)))
    launch(
        _qk_norm_rope_kernel,
        (tokens, triton.cdiv(total, heads)),
        qkv,
        q_weight,
        k_weight,
        cos_sin,
        positions,
        slots,
        block_tables,
        out,
        kv_cache,
        k_scale,
        v_scale,
        qkv.stride(0),
        block_tables.stride(0),
        kv_cache.stride(0),
        eps,
        Q_HEADS=num_heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        ROT_HALF=rotary // 2,
        HALF_BLOCK=half_block,
        REST_BLOCK=power_of_two(max(head_dim - rotary, 1)),
        BLOCK_SIZE=block_size,
        HEADS=heads,
        NORM=q_weight is not None,
        FP8=fp8,
        KEEP_K=keep_k,
        PDL=pdl,
        num_warps=1 if tokens <= 64 else 4,
        **launch_options(pdl),
    )
    return out


def rope_table(max_len: int, rotary_dim: int, theta: float, device: torch.device | str = "cpu") -> torch.Tensor:
    """Plain rotary table, float32 ``[max_len, rotary_dim]``: cosines, then sines; angles are computed in float64."""
    frequency = theta ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angle = torch.arange(max_len, dtype=torch.float64)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float().to(device)


def qk_norm_rope_reference(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(q, k, v)``, each ``[tokens, heads, head_dim]``, that :func:`qk_norm_rope` gives, in the type of ``qkv``."""
    total = num_heads + 2 * num_kv_heads
    q, k, v = qkv.view(len(qkv), total, qkv.shape[1] // total).split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if q_weight is not None and k_weight is not None:
        q = q * torch.rsqrt(q.square().mean(-1, keepdim=True) + eps) * q_weight
        k = k * torch.rsqrt(k.square().mean(-1, keepdim=True) + eps) * k_weight
    cos, sin = (part[:, None] for part in cos_sin.to(qkv.dtype)[positions.long()].chunk(2, dim=-1))
    half = cos.shape[-1]

    def turn(x: torch.Tensor) -> torch.Tensor:
        first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)

    return turn(q), turn(k), v


def write_cache_reference(
    k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, tables: torch.Tensor, kv_cache: torch.Tensor
) -> None:
    """Write ``k`` and ``v`` ``[tokens, num_kv_heads, head_dim]`` to their places in ``kv_cache``; slot -1 writes nothing."""
    block_size = kv_cache.shape[3]
    keep = slots >= 0
    position = positions[keep].long()
    page = tables[slots[keep].long(), position // block_size].long()
    kv_cache[page, :, 0, position % block_size] = k[keep].to(kv_cache.dtype)
    kv_cache[page, :, 1, position % block_size] = v[keep].to(kv_cache.dtype)


def gather_cache_reference(kv_cache: torch.Tensor, table: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``(k, v)``, each ``[length, num_kv_heads, head_dim]``, of one sequence with block table ``table``."""
    block_size = kv_cache.shape[3]
    pages = kv_cache[table[: -(-length // block_size)].long()]  # [pages, heads, 2, block_size, head_dim]
    k, v = (pages[:, :, which].transpose(1, 2).flatten(0, 1)[:length] for which in (0, 1))
    return k, v
