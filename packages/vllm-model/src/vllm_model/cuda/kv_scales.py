# mypy: disable-error-code="no-untyped-call"
"""The scales of an e4m3 cache.

A number of e4m3 has three bits behind its leading one whatever its size, from 448 down to 2**-6. So a scale need not fit
closely: it only keeps what a head holds within that range.
"""

import numpy as np
import torch
import torch.nn.functional as F

from vllm_model.cuda.device import Device
from vllm_model.cuda.forward import Forward
from vllm_model.kernels.qk_norm_rope import FP8_MAX

TOKENS = 256
"""Of the made-up prompt that is measured."""
HEADROOM = 8.0
"""What is so many times larger than all that was measured still fits; a 1,792nd of that is still exact to three bits."""


def measure_scales(device: Device, forward: Forward) -> None:
    """Set the scales of the cache to powers of two, from the largest key and value of each head in one prompt.

    Nobody else may use the cache yet: what is written to its first block is of no meaning.
    """
    cache, config = forward.cache, forward.config
    assert cache.scales is not None, "only an e4m3 cache has scales"
    count = min(TOKENS, cache.block_size * forward.tables.shape[1])
    random = np.random.default_rng(0)
    tokens = device.send(random.integers(0, config.vocab_size, count), np.int32)
    positions = device.send(np.arange(count), np.int32)
    largest = torch.zeros_like(cache.scales)

    def attend(layer: int, q: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
        heads = qkv.view(count, -1, config.head_dim)
        _, k, v = heads.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        largest[layer, 0], largest[layer, 1] = (part.abs().amax(dim=(0, 2)).float() for part in (k, v))
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1).contiguous()

    forward.layers(tokens, positions, torch.zeros_like(positions), attend, room=count)  # so that QKV holds the finished keys
    exponent = (largest.clamp(min=1e-10) * (HEADROOM / FP8_MAX)).log2().ceil()
    cache.scales.copy_(torch.where(largest > 0, exponent.exp2(), 1.0))
