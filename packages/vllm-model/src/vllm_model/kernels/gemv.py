# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator, misc"
# ruff: noqa: N803  constexpr arguments are upper case in Triton
"""Linear layers for 1 or 2 rows, where the time is that of reading the weights once.

A program owns whole weight rows and multiplies on the scalar units; first weights are on their way before it waits for the
kernel ahead of it. It can normalise its input (the factor of a row is applied to the result, so the input is read once), add a
residual, or close a gated MLP.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_model.kernels._launch import launch, launch_options, power_of_two, wait_for_previous
from vllm_model.kernels.tuned import lookup

MAX_ROWS = 2
"""With more, a matrix product is faster."""


@triton.jit
def _gemv_kernel(
    x_ptr,  # [rows, K]
    w_ptr,  # [N or 2 N, K]
    norm_ptr,  # [K]
    residual_ptr,  # [rows, N]
    out_ptr,  # [rows, N]
    x_stride,
    residual_stride,
    out_stride,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SILU: tl.constexpr,
    PDL: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < N
    k = tl.arange(0, BLOCK_K)
    i = tl.arange(0, ROWS)
    w_rows = w_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
    w = tl.load(w_rows, mask=n_mask[:, None] & (k < K)[None, :], other=0.0)  # [BLOCK_N, BLOCK_K]
    if SILU:
        w_up = tl.load(w_rows + N * K, mask=n_mask[:, None] & (k < K)[None, :], other=0.0)
    wait_for_previous(PDL)
    acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
    acc_up = tl.zeros([ROWS, BLOCK_N], tl.float32)
    square = tl.zeros([ROWS], tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        k_mask = start + k < K
        if start > 0:
            mask = n_mask[:, None] & k_mask[None, :]
            w = tl.load(w_rows + start, mask=mask, other=0.0)
            if SILU:
                w_up = tl.load(w_rows + start + N * K, mask=mask, other=0.0)
        if NORM:
            norm = tl.load(norm_ptr + start + k, mask=k_mask, other=0.0).to(tl.float32)
        for row in tl.static_range(ROWS):
            x = tl.load(x_ptr + row * x_stride + start + k, mask=k_mask, other=0.0).to(tl.float32)
            mine = i == row
            if NORM:
                square += tl.where(mine, tl.sum(x * x, axis=0), 0.0)
                x *= norm
            y = tl.sum(w.to(tl.float32) * x[None, :], axis=1)
            acc += tl.where(mine[:, None], y[None, :], 0.0)
            if SILU:
                y_up = tl.sum(w_up.to(tl.float32) * x[None, :], axis=1)
                acc_up += tl.where(mine[:, None], y_up[None, :], 0.0)
    if NORM:
        factor = tl.rsqrt(square / K + eps)[:, None]
        acc *= factor
        acc_up *= factor
    mask = (i < ROWS)[:, None] & n_mask[None, :]
    if SILU:
        acc = acc / (1.0 + tl.exp(-acc)) * acc_up
    if RESIDUAL:
        acc += tl.load(residual_ptr + i[:, None] * residual_stride + n[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + i[:, None] * out_stride + n[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class GemvConfig:
    """How one layer is launched.

    Attributes:
        block_n: Weight rows of a program (of each half, for a gated MLP).
        block_k: Of a step along K.
        num_warps: Warps of a program.
    """

    block_n: int
    block_k: int
    num_warps: int


HOPPER: dict[tuple[int, int, bool], tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    (4096, 1024, False): ((2, 512, 1), (4, 1024, 1)),
    (1024, 2048, False): ((8, 2048, 8), (4, 2048, 4)),
    (3072, 1024, True): ((2, 512, 1), (2, 512, 1)),
    (1024, 3072, False): ((2, 2048, 1), (2, 2048, 1)),
    (151936, 1024, False): ((4, 512, 1), (4, 512, 1)),
    (6144, 4096, False): ((2, 4096, 4), (2, 1024, 1)),
    (4096, 4096, False): ((2, 1024, 1), (2, 1024, 1)),
    (12288, 4096, True): ((1, 4096, 4), (1, 1024, 1)),
    (4096, 12288, False): ((1, 2048, 2), (1, 4096, 1)),
    (151936, 4096, False): ((4, 4096, 4), (2, 4096, 2)),
}
"""By (n, k, gated): block_n, block_k and warps for one row and for two, measured on an H200;
``python -m vllm_model.tune`` measures another card."""


def default_gemv_config(rows: int, n: int, k: int, *, silu: bool = False) -> GemvConfig:
    """A launch shape from the sizes alone: one warp with two weight rows is within a tenth of the best almost everywhere."""
    shapes = HOPPER.get((n, k, silu))
    return GemvConfig(*(shapes[rows - 1] if shapes else (2, min(power_of_two(k), 512 if silu else 1024), 1)))


def thin_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
    silu: bool = False,
    out: torch.Tensor | None = None,
    config: GemvConfig | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """``y = norm(x) @ weight.T``, then ``silu(y[:, :n]) * y[:, n:]`` if ``silu``, then ``+ residual``.

    Args:
        x: ``[rows, k]`` bf16 or fp16, at most 2 rows (none is allowed and does nothing), rows contiguous.
        weight: ``[n, k]``, or ``[2 * n, k]`` with ``silu``: gate, then up; contiguous, the type of ``x``.
        norm_weight: ``[k]``: ``x`` is replaced by its RMS norm.
        eps: Of the norm.
        residual: ``[rows, n]``, rows contiguous; may be ``out``.
        silu: Close a gated MLP.
        out: ``[rows, n]``, rows contiguous; a new tensor when None.
        config: Launch shape; when None, what was measured on this card, else :func:`default_gemv_config`.
        pdl: Programmatic dependent launch; the first weights are then read while the kernel before still runs.

    Returns:
        ``[rows, n]`` in the type of ``x``. Sums are float32.

    Raises:
        ValueError: More than 2 rows, or shapes that disagree.
    """
    rows, k = x.shape
    n = weight.shape[0] // (2 if silu else 1)
    if rows > MAX_ROWS or weight.shape[1] != k or x.stride(1) != 1 or not weight.is_contiguous():
        raise ValueError(f"no thin product of {tuple(x.shape)} with {tuple(weight.shape)}")
    if out is None:
        out = x.new_empty(rows, n)
    if not rows:
        return out
    if config is None:
        measured = lookup("thin", (n, k, int(silu), rows), x.device)
        config = GemvConfig(*measured) if measured else default_gemv_config(rows, n, k, silu=silu)
    launch(
        _gemv_kernel,
        (triton.cdiv(n, config.block_n),),
        x,
        weight,
        norm_weight,
        residual,
        out,
        x.stride(0),
        residual.stride(0) if residual is not None else 0,
        out.stride(0),
        eps,
        N=n,
        K=k,
        ROWS=rows,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        NORM=norm_weight is not None,
        RESIDUAL=residual is not None,
        SILU=silu,
        PDL=pdl,
        num_warps=config.num_warps,
        **launch_options(pdl),
    )
    return out


def thin_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
    silu: bool = False,
) -> torch.Tensor:
    """What :func:`thin_linear` computes, in the type of its arguments."""
    if norm_weight is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm_weight
    y = x @ weight.T
    if silu:
        gate, up = y.chunk(2, dim=-1)
        y = torch.nn.functional.silu(gate) * up
    return y if residual is None else residual + y
