"""Rotary position embedding (Su et al., 2021) and its scalings for longer contexts."""

import math

import torch

from vllm_model.model_config import RopeConfig


def rotary_tables(config: RopeConfig, head_dim: int, max_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, float32 ``[max_len, head_dim / 2]``, by position and frequency; scaled attention is folded in."""
    frequencies, scale = _frequencies(config, head_dim)
    angles = torch.arange(max_len, dtype=torch.float32)[:, None] * frequencies.float()  # as in the reference: float32
    return angles.cos() * scale, angles.sin() * scale


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs ``(i, i + head_dim / 2)``.

    Args:
        x: ``[num_tokens, num_heads, head_dim]``.
        cos, sin: float32 ``[num_tokens, 1, head_dim / 2]``.

    Returns:
        As ``x``, in its dtype.
    """
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def _frequencies(config: RopeConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    """float32 ``[head_dim / 2]`` in radians a token, and the factor on cos and sin."""
    plain = 1.0 / config.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if config.type == "linear":
        return plain / config.factor, 1.0
    if config.type == "llama3":
        return _llama3(config, plain), 1.0
    if config.type == "yarn":
        scale = config.attention_factor
        if scale is None:
            scale = 0.1 * math.log(config.factor) + 1.0 if config.factor > 1 else 1.0
        return _yarn(config, plain, head_dim), scale
    return plain, 1.0


def _llama3(config: RopeConfig, plain: torch.Tensor) -> torch.Tensor:
    """Long wavelengths are stretched, short ones kept, those between mixed (Llama 3.1)."""
    assert config.original_max_position is not None
    turns = config.original_max_position * plain / (2 * math.pi)  # within the original context
    mix = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    mix = mix.clamp(0.0, 1.0)
    return (1 - mix) * plain / config.factor + mix * plain


def _yarn(config: RopeConfig, plain: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Peng et al. 2023, section 3.2: a ramp over the dimensions between stretched and kept frequencies."""
    assert config.original_max_position is not None

    def dimension(turns: float) -> float:
        return head_dim * math.log(config.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(config.theta))  # type: ignore[operator]

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # no division by zero
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
    return plain / config.factor * ramp + plain * (1 - ramp)
