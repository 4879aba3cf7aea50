"""Whose product of a layer is faster, and how ours is launched: measured by ``benchmarks/tune_linear.py`` on an H200."""

from vllm_model.kernels.linear import LinearConfig

SMALL_WEIGHTS = 16 << 20
"""Weights of a product (bytes of 16-bit types) that take less time than starting the library's kernel: ours overlap."""
SMALL_ROWS = 128
"""Most rows for such products: above, the library's larger tiles win."""


def choose_linear(rows: int, n: int, k: int, silu: bool) -> LinearConfig | None:
    """The launch of our own product of ``rows`` rows with ``n`` outputs and ``k`` inputs; None: the library's is faster.

    All take up to 96 KiB of shared memory, so that they find room beside decode attention.
    """
    if rows > SMALL_ROWS or 2 * n * k * (2 if silu else 1) > SMALL_WEIGHTS:
        return None
    wide = rows > SMALL_ROWS - 32
    if silu:
        return LinearConfig(64, 64, 64, 4, 4, 1, 4) if wide else LinearConfig(64, 32, 128, 4, 3, 1, 4)
    if n < 2048:
        return LinearConfig(64, 32, 128, 4, 4, 2, 4)
    return LinearConfig(64, 64, 128, 4, 3, 1, 4) if wide else LinearConfig(64, 32, 128, 4, 4, 1, 4)
