import torch

from vllm_model.noise import gumbel_noise, noise_bits


def integers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def plain_bits(seed: int, position: int, token: int) -> int:
    """The documented hash again, in Python's integers."""
    low = 2**32 - 1

    def mix(x: int) -> int:
        x = (x ^ (x >> 16)) * 0x7FEB352D & low
        x = (x ^ (x >> 15)) * 0x846CA68B & low
        return x ^ (x >> 16)

    seed &= 2**64 - 1
    first, second = (mix(mix(mix(a ^ (seed & low)) ^ (seed >> 32)) ^ position) for a in (0x9E3779B9, 0x85EBCA6B))
    x = (token + first) & low
    x = (x ^ (x >> 16)) * 0x7FEB352D & low
    x = (x ^ (x >> 15) ^ second) * 0x846CA68B & low
    return x ^ (x >> 16)


def test_the_hash_is_the_documented_one() -> None:
    cases = [(0, 0, 0), (1, 2, 3), (-1, 5, 151935), (2**63 - 1, 131071, 7), (-(2**63), 0, 99), (2**32, 1, 1)]
    for seed, position, token in cases:
        assert noise_bits(integers(seed), integers(position), integers(token)).item() == plain_bits(seed, position, token)


def test_bits_look_uniform_along_every_axis() -> None:
    near = torch.arange(1 << 14)
    zero = integers(0)
    for bits in (
        noise_bits(zero, zero, near),
        noise_bits(zero, near, zero),
        noise_bits(near, zero, zero),
        noise_bits(near << 32, zero, zero),
    ):
        for shift in (0, 8, 16, 24):
            counts = torch.bincount((bits >> shift) & 255, minlength=256).double()
            chi_square = ((counts - 64) ** 2 / 64).sum()
            assert 130 < chi_square < 400  # 255 degrees of freedom: 6 sigma either way
        uniform = bits.double() / 2**32
        lag = torch.corrcoef(torch.stack([uniform[1:], uniform[:-1]]))[0, 1]
        assert abs(lag) < 0.05


def test_streams_do_not_repeat_each_other() -> None:
    tokens = torch.arange(1 << 13)[None]
    rows = noise_bits(torch.arange(8)[:, None], integers(0)[:, None], tokens).double() / 2**32
    off = torch.corrcoef(rows) - torch.eye(8)
    assert off.abs().max() < 0.07


def test_gumbel_has_its_moments_and_is_finite() -> None:
    noise = gumbel_noise(integers(7)[:, None], integers(1)[:, None], torch.arange(1 << 17)[None]).double()
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.5772) < 0.02
    assert abs(noise.var() - torch.pi**2 / 6) < 0.05
