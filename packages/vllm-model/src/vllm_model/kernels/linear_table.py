"""Whose product of a layer is faster, and how ours is launched: measured by ``benchmarks/tune_linear.py`` on an H200."""

import torch

from vllm_model.kernels.linear import LinearConfig

SMALL = 16 << 20
"""Up to here weights (values of 16 bits, in bytes) are read in less time than it takes to start kernels: ours overlap."""
SMALL_ROWS = 128
"""Most rows for which all products of small weights are ours; above, the library's larger tiles win where outputs are many."""
LARGE = {(6144, 4096): LinearConfig(64, 64, 128, 4, 7, 1, 1), (4096, 12288): LinearConfig(64, 32, 128, 4, 8, 1, 4)}
"""Of 33 to 96 rows, by outputs and inputs."""


def has_table(device: torch.device) -> bool:
    """Whether the table is this card's: of Hopper, whose shared memory its shapes fill."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def choose_linear(rows: int, n: int, k: int, silu: bool) -> LinearConfig | None:
    """The launch of our own product of ``rows`` rows with ``n`` outputs and ``k`` inputs; None: the library's is faster."""
    if rows > 256 or 2 * n * k * (2 if silu else 1) > SMALL:
        return LARGE.get((n, k)) if 32 < rows <= 96 else None
    narrow = n < 2048 and not silu
    if rows > SMALL_ROWS:
        return LinearConfig(64, 32, 128, 4, 8, 1, 4) if narrow else None
    if narrow:
        return LinearConfig(64, 32, 128, 4, 4, 2, 4)
    wide = rows > SMALL_ROWS - 32
    if silu:
        return LinearConfig(64, 64, 64, 4, 4, 1, 4) if wide else LinearConfig(64, 32, 128, 4, 3, 1, 4)
    return LinearConfig(64, 64, 128, 4, 3, 1, 4) if wide else LinearConfig(64, 32, 128, 4, 4, 1, 4)
