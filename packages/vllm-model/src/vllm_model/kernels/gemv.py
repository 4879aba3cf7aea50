# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator, misc"
# ruff: noqa: N803  constexpr arguments are upper case in Triton
"""Linear layers for 1 to 16 rows, where the time is that of reading the weights once.

Two kernels. ``fma`` (1 to 4 rows): a program owns whole weight rows and multiplies on the scalar units; first weights are on
their way before it waits for the kernel ahead of it. ``dot``: weights go through shared memory into the matrix unit, rows
padded to 16, and narrow layers are cut along K with a last-arriver sum in fixed order. Either can normalise its input (the
factor of a row is applied to the result, so the input is read once), add a residual, or close a gated MLP.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_model.kernels._launch import launch, launch_options, power_of_two, wait_for_previous
from vllm_model.kernels.tuned import lookup

MAX_ROWS = 16


@triton.jit
def _finish(
    y,
    up,
    rows_of,
    n,
    row_mask,
    n_mask,
    out_ptr,
    out_stride,
    residual_ptr,
    residual_stride,
    SILU: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    mask = row_mask[:, None] & n_mask[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y)) * up
    if RESIDUAL:
        y += tl.load(residual_ptr + rows_of[:, None] * residual_stride + n[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows_of[:, None] * out_stride + n[None, :], y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _fma_kernel(
    x_ptr,  # [rows, K]
    w_ptr,  # [N or 2 N, K]
    norm_ptr,  # [K]
    residual_ptr,  # [rows, N]
    out_ptr,  # [rows, N]
    x_stride,
    residual_stride,
    out_stride,
    rows,
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
            x = tl.load(x_ptr + row * x_stride + start + k, mask=k_mask & (k * 0 + row < rows), other=0.0).to(tl.float32)
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
    _finish(acc, acc_up, i, n, i < rows, n_mask, out_ptr, out_stride, residual_ptr, residual_stride, SILU, RESIDUAL)


@triton.jit(do_not_specialize=["rows"])
def _dot_kernel(
    x_ptr,  # [rows, K]
    w_ptr,  # [N or 2 N, K]
    norm_ptr,  # [K]
    residual_ptr,  # [rows, N]
    out_ptr,  # [rows, N]
    part_ptr,  # float32 [SPLIT, 2, 16, N]
    count_ptr,  # int32 [programs], zero between launches
    x_stride,
    residual_stride,
    out_stride,
    rows,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SILU: tl.constexpr,
    PDL: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    n_mask = n < N
    k = tl.arange(0, BLOCK_K)
    i = tl.arange(0, 16)
    row_mask = i < rows
    w_rows = w_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
    x_rows = x_ptr + i[:, None] * x_stride + k[None, :]
    wait_for_previous(PDL)  # ahead of the loop: the load pipeline would hoist what stands in it
    acc = tl.zeros([16, BLOCK_N], tl.float32)
    acc_up = tl.zeros([16, BLOCK_N], tl.float32)
    square = tl.zeros([16], tl.float32)
    steps: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    share: tl.constexpr = (steps + SPLIT - 1) // SPLIT * BLOCK_K
    for start in tl.range(split * share, tl.minimum(split * share + share, K), BLOCK_K, num_stages=STAGES):
        if K % BLOCK_K == 0:
            x_mask = row_mask[:, None]
            w_mask = n_mask[:, None]
        else:
            x_mask = row_mask[:, None] & (start + k < K)[None, :]
            w_mask = n_mask[:, None] & (start + k < K)[None, :]
        x = tl.load(x_rows + start, mask=x_mask, other=0.0)  # [16, BLOCK_K]
        w = tl.load(w_rows + start, mask=w_mask, other=0.0)  # [BLOCK_N, BLOCK_K]
        if NORM:
            wide = x.to(tl.float32)
            square += tl.sum(wide * wide, axis=1)
            norm = tl.load(norm_ptr + start + k, mask=start + k < K, other=0.0).to(tl.float32)
            x = (wide * norm[None, :]).to(x.dtype)
        acc = tl.dot(x, tl.trans(w), acc)
        if SILU:
            w_up = tl.load(w_rows + start + N * K, mask=w_mask, other=0.0)
            acc_up = tl.dot(x, tl.trans(w_up), acc_up)
    if NORM:
        factor = tl.rsqrt(square / K + eps)[:, None]
        acc *= factor
        acc_up *= factor
    if SPLIT == 1:
        _finish(acc, acc_up, i, n, row_mask, n_mask, out_ptr, out_stride, residual_ptr, residual_stride, SILU, RESIDUAL)
    else:
        mask = row_mask[:, None] & n_mask[None, :]
        cell = i[:, None] * N + n[None, :]
        tl.store(part_ptr + split * (32 * N) + cell, acc, mask=mask)
        if SILU:
            tl.store(part_ptr + split * (32 * N) + 16 * N + cell, acc_up, mask=mask)
        tl.debug_barrier()  # every thread's part is written before one thread counts it
        arrived = tl.atomic_add(count_ptr + tl.program_id(0), 1, sem="acq_rel", scope="gpu")
        if arrived == SPLIT - 1:
            tl.store(count_ptr + tl.program_id(0), 0)
            acc = tl.zeros([16, BLOCK_N], tl.float32)
            acc_up = tl.zeros([16, BLOCK_N], tl.float32)
            for other in tl.static_range(SPLIT):
                acc += tl.load(part_ptr + other * (32 * N) + cell, mask=mask, other=0.0, cache_modifier=".cg")
                if SILU:
                    acc_up += tl.load(part_ptr + other * (32 * N) + 16 * N + cell, mask=mask, other=0.0, cache_modifier=".cg")
            _finish(acc, acc_up, i, n, row_mask, n_mask, out_ptr, out_stride, residual_ptr, residual_stride, SILU, RESIDUAL)


@dataclass(frozen=True)
class GemvConfig:
    """How one layer is launched.

    Attributes:
        kind: ``"fma"`` or ``"dot"``.
        block_n: Weight rows of a program (of each half, for a gated MLP).
        block_k: Of a step along K.
        num_warps: Warps of a program.
        num_stages: Depth of the load pipeline (``dot``).
        split_k: Programs that share a block of weight rows (``dot`` without a norm).
    """

    kind: str = "fma"
    block_n: int = 8
    block_k: int = 1024
    num_warps: int = 4
    num_stages: int = 4
    split_k: int = 1


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
"""By (n, k, gated): block_n, block_k and warps of ``fma`` for one row and for two, measured on an H200;
``python -m vllm_model.tune`` measures another card."""


def default_gemv_config(rows: int, n: int, k: int, *, norm: bool = False, silu: bool = False) -> GemvConfig:
    """A launch shape from the sizes alone, not tuned. From 3 rows on, cuBLAS is faster where a norm is fused (H100)."""
    if rows <= 2:
        # One warp with two weight rows is within a tenth of the best almost everywhere.
        shapes = HOPPER.get((n, k, silu))
        return GemvConfig("fma", *(shapes[rows - 1] if shapes else (2, min(power_of_two(k), 512 if silu else 1024), 1)))
    block_n = 16 if silu or n < 4096 else 32
    split = 1
    if not norm:
        while split < 8 and -(-n // block_n) * split < 256 and k // (split * 2) >= 512:
            split *= 2
    return GemvConfig("dot", block_n, min(power_of_two(k), 256 if not silu else 128), 4, 4, split)


class GemvWorkspace:
    """Buffers of the K cut, shared by all layers of one stream.

    Args:
        max_width: The widest output (of one half, for a gated MLP) that is cut along K.
        device: Where the weights are.
        max_split: Most programs along K.
    """

    def __init__(self, max_width: int, device: torch.device | str, max_split: int = 8) -> None:
        self.max_width, self.max_split = max_width, max_split
        self.parts = torch.empty(max_split * 2 * MAX_ROWS * max_width, dtype=torch.float32, device=device)
        self.counts = torch.zeros(max_width, dtype=torch.int32, device=device)


def thin_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
    silu: bool = False,
    out: torch.Tensor | None = None,
    workspace: GemvWorkspace | None = None,
    config: GemvConfig | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """``y = norm(x) @ weight.T``, then ``silu(y[:, :n]) * y[:, n:]`` if ``silu``, then ``+ residual``.

    Args:
        x: ``[rows, k]`` bf16 or fp16, 1 to 16 rows (0 is allowed and does nothing), rows contiguous.
        weight: ``[n, k]``, or ``[2 * n, k]`` with ``silu``: gate, then up; contiguous, the type of ``x``.
        norm_weight: ``[k]``: ``x`` is replaced by its RMS norm.
        eps: Of the norm.
        residual: ``[rows, n]``, rows contiguous; may be ``out``.
        silu: Close a gated MLP.
        out: ``[rows, n]``, rows contiguous; a new tensor when None.
        workspace: Needed where the configuration cuts K.
        config: Launch shape; when None, what was measured on this card (1 and 2 rows), else :func:`default_gemv_config`.
        pdl: Programmatic dependent launch; the first weights are then read while the kernel before still runs.

    Returns:
        ``[rows, n]`` in the type of ``x``. Sums are float32.

    Raises:
        ValueError: More than 16 rows (4 for ``fma``), shapes that disagree, or a cut of K with a norm or without its workspace.
    """
    rows, k = x.shape
    n = weight.shape[0] // (2 if silu else 1)
    if rows > MAX_ROWS or weight.shape[1] != k or x.stride(1) != 1 or not weight.is_contiguous():
        raise ValueError(f"no thin product of {tuple(x.shape)} with {tuple(weight.shape)}")
    if out is None:
        out = x.new_empty(rows, n)
    if not rows:
        return out
    if config is None and rows <= 2 and (measured := lookup("thin", (n, k, int(silu), rows), x.device)):
        config = GemvConfig("fma", *measured)
    elif config is None:
        config = default_gemv_config(rows, n, k, norm=norm_weight is not None, silu=silu)
        if workspace is None and config.split_k > 1:
            config = GemvConfig(config.kind, config.block_n, config.block_k, config.num_warps, config.num_stages)
    strides = (x.stride(0), residual.stride(0) if residual is not None else 0, out.stride(0))
    if config.kind == "fma":
        if rows > 4:
            raise ValueError(f"fma takes 4 rows at most, got {rows}")
        launch(
            _fma_kernel,
            (triton.cdiv(n, config.block_n),),
            x,
            weight,
            norm_weight,
            residual,
            out,
            *strides,
            rows,
            eps,
            N=n,
            K=k,
            ROWS=power_of_two(rows),
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
    if config.split_k > 1 and (
        norm_weight is not None or workspace is None or n > workspace.max_width or config.split_k > workspace.max_split
    ):
        raise ValueError("a cut of K takes no norm, and a workspace that is large enough")
    launch(
        _dot_kernel,
        (triton.cdiv(n, config.block_n), config.split_k),
        x,
        weight,
        norm_weight,
        residual,
        out,
        workspace.parts if workspace is not None else None,
        workspace.counts if workspace is not None else None,
        *strides,
        rows,
        eps,
        N=n,
        K=k,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        SPLIT=config.split_k,
        STAGES=config.num_stages,
        NORM=norm_weight is not None,
        RESIDUAL=residual is not None,
        SILU=silu,
        PDL=pdl,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
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
