"""Sampling noise that is a pure function of (seed, position, token): the same alone, in a crowd and after a replay.

The hash, all in 32-bit unsigned arithmetic (``mix`` is Wellons' "lowbias32")::

    mix(x)   x ^= x >> 16; x *= 0x7FEB352D; x ^= x >> 15; x *= 0x846CA68B; x ^= x >> 16
    key(a)   mix(mix(mix(a ^ seed_low) ^ seed_high) ^ position)          seed as two 32-bit words of its two's complement
    k0, k1   key(0x9E3779B9), key(0x85EBCA6B)                            once per (seed, position)
    bits     x = token + k0; x ^= x >> 16; x *= 0x7FEB352D; x ^= (x >> 15) ^ k1; x *= 0x846CA68B; x ^= x >> 16

``v = (bits + 0.5) / 2**32`` is uniform, ``e = -log(1 - v)`` exponential, ``-log(e)`` Gumbel: the token that maximises
``logit / temperature + gumbel`` is a draw from the softmax (Gumbel-max). The tail that decides, small ``v``, is the one where
floats are dense; below 1/64 ``e`` is its series. ``sampling.py`` holds the same function in Triton.
"""

import torch

FIRST_KEY = 0x9E3779B9
SECOND_KEY = 0x85EBCA6B
FIRST_FACTOR = 0x7FEB352D
SECOND_FACTOR = 0x846CA68B
_LOW = 0xFFFFFFFF


def _mix(x: torch.Tensor) -> torch.Tensor:
    # int64 in 0 .. 2**32 - 1; a product wraps modulo 2**64, which leaves its low 32 bits right.
    x = ((x ^ (x >> 16)) * FIRST_FACTOR) & _LOW
    x = ((x ^ (x >> 15)) * SECOND_FACTOR) & _LOW
    return x ^ (x >> 16)


def noise_keys(seed: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(k0, k1)``, int64 in ``0 .. 2**32 - 1``, of int64 seeds and of the positions of the tokens to be sampled."""
    low, high = seed & _LOW, (seed >> 32) & _LOW
    place = position.to(torch.int64) & _LOW
    first, second = (_mix(_mix(_mix(low ^ start) ^ high) ^ place) for start in (FIRST_KEY, SECOND_KEY))
    return first, second


def noise_bits(seed: torch.Tensor, position: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """The hash, int64 in ``0 .. 2**32 - 1``; the arguments (int64 seed, integers) broadcast."""
    first, second = noise_keys(seed, position)
    x = (token.to(torch.int64) + first) & _LOW
    x = ((x ^ (x >> 16)) * FIRST_FACTOR) & _LOW
    x = ((x ^ (x >> 15) ^ second) * SECOND_FACTOR) & _LOW
    return x ^ (x >> 16)


def gumbel_noise(seed: torch.Tensor, position: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float32 in -2.9 .. 23; the arguments (int64 seed, integers) broadcast.

    For a batch: ``gumbel_noise(seed[:, None], position[:, None], torch.arange(vocab)[None])``.
    """
    # The sum is formed in float32, as on the device: rounded once there and here.
    v = noise_bits(seed, position, token).to(torch.float32) * 2.0**-32 + 2.0**-33
    v = v.clamp(max=1.0 - 2.0**-24)
    series = v * (1.0 + v * (0.5 + v * (1.0 / 3.0 + v * 0.25)))
    return -torch.log(torch.where(v < 1.0 / 64.0, series, -torch.log(1.0 - v)))
