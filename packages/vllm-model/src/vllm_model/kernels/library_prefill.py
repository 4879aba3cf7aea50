"""Causal attention of a whole prompt by cuDNN, which on Hopper is faster than what Triton compiles.

It takes contiguous tokens alone (no cached prefix), and plans anew for each length: lengths are rounded up, and what is past
the end of a prompt is hidden from it by the causal mask. Then only a few plans are ever made.
"""

import torch

from vllm_model.kernels._paged import attention_reference

LEAST = 1024
"""Shorter prompts run in one kernel with others instead."""
STEP = 256
"""Lengths are rounded up to multiples of this: a plan takes the library some 50 ms."""


def can_use_library(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether this attention is there for a device and a shape of heads."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
        return False
    fits = dtype in (torch.bfloat16, torch.float16) and head_dim in (64, 128)
    return fits and torch.cuda.get_device_capability(device)[0] == 9


def padded(length: int) -> int:
    """Rows that ``q``, ``k`` and ``v`` of :func:`library_prefill` must have for a prompt of this length."""
    return -(-length // STEP) * STEP


def library_prefill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: int) -> torch.Tensor:
    """Attention of one prompt's tokens over themselves.

    Args:
        q: ``[padded(length), num_heads, head_dim]``; from ``length`` on anything finite.
        k, v: ``[padded(length), num_kv_heads, head_dim]``, likewise; heads contiguous, any stride between tokens.
        length: Tokens of the prompt.

    Returns:
        ``[length, num_heads, head_dim]``.
    """
    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))  # [1, heads, tokens, head_dim]
    out: torch.Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False, 0.0, True, False)[0]
    return out[0].transpose(0, 1)[:length]


def library_prefill_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: int) -> torch.Tensor:
    """What :func:`library_prefill` computes, in the type of its arguments."""
    return attention_reference(q[:length], k[:length], v[:length], 0)
