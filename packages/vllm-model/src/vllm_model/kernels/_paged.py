"""What the kernels over the paged cache share: checks of their arguments, and attention in plain torch."""

import torch

LOG2_E = 1.4426950408889634
"""Softmax runs in powers of two."""


def softmax_scale(head_dim: int, scale: float | None) -> float:
    """Factor of the products of queries and keys: ``scale``, or ``head_dim ** -0.5``, for powers of two."""
    return (head_dim**-0.5 if scale is None else scale) * LOG2_E


def query_group(q: torch.Tensor, kv_cache: torch.Tensor) -> int:
    """Query heads of a KV head.

    Args:
        q: ``[tokens, num_heads, head_dim]``, heads contiguous.
        kv_cache: ``[num_blocks, num_kv_heads, 2, block_size, head_dim]``.

    Raises:
        ValueError: The two disagree, or heads are wider than 256.
    """
    _, heads, head_dim = q.shape
    kv_heads = kv_cache.shape[1]
    if heads % kv_heads or kv_cache.shape[4] != head_dim or head_dim > 256 or q.stride(1) != head_dim:
        raise ValueError(f"q {tuple(q.shape)} and cache {tuple(kv_cache.shape)} disagree")
    return heads // kv_heads


def holds_e4m3(kv_cache: torch.Tensor, k_scale: torch.Tensor | None, v_scale: torch.Tensor | None) -> bool:
    """Whether a cache holds e4m3.

    Raises:
        ValueError: It does, and its scales are missing.
    """
    fp8 = kv_cache.dtype == torch.float8_e4m3fn
    if fp8 and (k_scale is None or v_scale is None):
        raise ValueError("an e4m3 cache needs k_scale and v_scale")
    return fp8


def attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_computed: int, scale: float | None = None
) -> torch.Tensor:
    """Causal attention of one sequence: ``q`` ``[queries, num_heads, head_dim]`` stands at positions ``num_computed ...``;
    ``k``, ``v`` ``[num_computed + queries, num_kv_heads, head_dim]``. In the type of its arguments.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[2] ** -0.5 if scale is None else scale)
    position = torch.arange(len(k), device=q.device)
    hidden = position[None, :] > num_computed + torch.arange(len(q), device=q.device)[:, None]
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)
