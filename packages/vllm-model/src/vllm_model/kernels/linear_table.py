"""Whose product of a layer is faster, and how ours is launched: measured by ``benchmarks/tune_linear.py`` on an H200."""

import torch

from vllm_model.kernels.cluster_linear import ClusterConfig
from vllm_model.kernels.linear import LinearConfig

Config = LinearConfig | ClusterConfig

SMALL = 16 << 20
"""Up to here weights (values of 16 bits, in bytes) are read in less time than it takes to start kernels: ours overlap."""
SMALL_ROWS = 128
"""Most rows for which all products of small weights are ours; above, the library's larger tiles win where outputs are many."""
LARGE_ROWS = range(17, 65)
"""Rows for which products of larger weights are ours where clusters are to be had."""


def has_table(device: torch.device) -> bool:
    """Whether the table is this card's: of Hopper, whose shared memory its shapes fill."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def choose_linear(rows: int, n: int, k: int, silu: bool, *, clusters: bool = True) -> Config | None:
    """The launch of our own product of ``rows`` rows with ``n`` outputs and ``k`` inputs; None: the library's is faster.

    Without ``clusters``, the fastest in Triton.
    """
    narrow = n < 2048 and not silu
    clusters = clusters and k % 64 == 0 and n % 8 == 0
    if rows > 256 or 2 * n * k * (2 if silu else 1) > SMALL:
        return _large(n, silu) if rows in LARGE_ROWS and clusters else None
    if rows > SMALL_ROWS:
        return LinearConfig(64, 32, 128, 4, 8, 1, 4) if narrow else None
    found = _small_by_clusters(rows, narrow, k, silu) if clusters else None
    return found or _small(rows > 96, narrow, silu)


def _small(wide: bool, narrow: bool, silu: bool) -> LinearConfig:
    if narrow:
        return LinearConfig(64, 32, 128, 4, 4, 2, 4)
    if silu:
        return LinearConfig(64, 64, 64, 4, 4, 1, 4) if wide else LinearConfig(64, 32, 128, 4, 3, 1, 4)
    return LinearConfig(64, 64, 128, 4, 3, 1, 4) if wide else LinearConfig(64, 32, 128, 4, 4, 1, 4)


def _small_by_clusters(rows: int, narrow: bool, k: int, silu: bool) -> ClusterConfig | None:
    """Where many inputs meet few outputs, they are cut; a product of many outputs is as fast without."""
    if not narrow:
        return ClusterConfig(128, 32, 2, 4, 1) if rows > 96 and not silu else None
    if rows > 64:
        return ClusterConfig(64, 32, 4, 3, 2) if k > 2048 else None
    return ClusterConfig(64, 32, 4, 2, 4) if k <= 2048 else ClusterConfig(64, 64, 4, 3, 4)


def _large(n: int, silu: bool) -> ClusterConfig:
    if silu:
        return ClusterConfig(64, 96, 2, 2, 1)
    return ClusterConfig(64, 64 if n > 4096 else 32, 2, 4, 2)
