# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator, misc"
# ruff: noqa: N803, SIM102  constexprs are upper case in Triton, and decide alone whether a branch is compiled
"""Linear layers for some 3 to 256 rows, where reading the weights and starting kernels cost more than the arithmetic.

Tiles come by the copy engine (tensor descriptors) into a load pipeline. Each program asks for its first weights to be brought
into the second-level cache before it waits for the kernel ahead of it. A layer's norms need no kernels of their own: whoever
adds to the residual stream also writes it times the next norm's weight, and each tile's sums of squares; whoever reads that
applies the factor of a row to its result. Narrow layers are cut along K, with a last-arriver sum in fixed order.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from vllm_model.kernels._launch import launch, launch_options, power_of_two, rows_with_room, wait_for_previous, with_room
from vllm_model.kernels.cluster_linear import ClusterConfig, launch_cluster


@triton.jit
def _prefetch(pointers):
    """Bring 512 bytes behind each pointer into the second-level cache."""
    tl.inline_asm_elementwise(
        "{ cp.async.bulk.prefetch.L2.global [$1], 512; mov.u32 $0, 0; }",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["rows"])
def _linear_kernel(
    x_desc,  # [rows, k]
    w_desc,  # [n or 2 n, k]
    w_ptr,  # the same
    scale_ptr,  # float32 [rows, scale_parts]: sums of squares of x before its norm's weight, or None
    residual_ptr,  # [rows, n] or None, updated
    norm_ptr,  # [n]: of the norm behind the residual, or None
    out_ptr,  # [rows, n]: the result, or the updated residual times the norm's weight
    squares_ptr,  # float32 [rows, programs along n]
    part_ptr,  # float32 [tiles, SPLIT, 1 or 2, BLOCK_M, BLOCK_N]
    count_ptr,  # int32 [tiles], zero between launches
    out_stride,
    scale_parts,
    rows,
    n,
    k,
    eps,
    PARTS_BLOCK: tl.constexpr,
    SILU: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    m_tile = tl.program_id(0)  # programs that share weights are neighbours
    n_tile = tl.program_id(1)
    split = tl.program_id(2)
    m0 = m_tile * BLOCK_M
    n0 = n_tile * BLOCK_N
    m = m0 + tl.arange(0, BLOCK_M)
    j = n0 + tl.arange(0, BLOCK_N)
    share = tl.cdiv(tl.cdiv(k, BLOCK_K), SPLIT) * BLOCK_K
    begin = split * share
    end = tl.minimum(begin + share, k)
    if PREFETCH > 0:
        if m_tile == 0:
            ahead = tl.minimum(begin + tl.arange(0, PREFETCH) * 256, k - 256)
            places = w_ptr + tl.minimum(j, n - 1).to(tl.int64)[:, None] * k + ahead[None, :]
            _prefetch(places)
            if SILU:
                _prefetch(places + n.to(tl.int64) * k)
    wait_for_previous(PDL)
    m_mask = m < rows
    mask = m_mask[:, None] & (j < n)[None, :]
    io = m.to(tl.int64)[:, None] * out_stride + j[None, :]
    if scale_ptr is not None:
        part = tl.arange(0, PARTS_BLOCK)
        part_mask = m_mask[:, None] & (part < scale_parts)[None, :]
        squares = tl.load(scale_ptr + m[:, None] * scale_parts + part[None, :], mask=part_mask, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_up = acc
    for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        x = x_desc.load([m0, start])
        acc = tl.dot(x, w_desc.load([n0, start]).T, acc)
        if SILU:
            acc_up = tl.dot(x, w_desc.load([n + n0, start]).T, acc_up)
    last = True
    if SPLIT > 1:
        tile = m_tile * tl.num_programs(1) + n_tile
        halves: tl.constexpr = 2 if SILU else 1
        cell = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        parts = part_ptr + (tile * SPLIT * halves).to(tl.int64) * (BLOCK_M * BLOCK_N) + cell
        tl.store(parts + split * halves * (BLOCK_M * BLOCK_N), acc)
        if SILU:
            tl.store(parts + (split * halves + 1) * (BLOCK_M * BLOCK_N), acc_up)
        tl.debug_barrier()  # every thread's part is written before one thread counts it
        last = tl.atomic_add(count_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLIT - 1
        if last:
            tl.store(count_ptr + tile, 0)
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            acc_up = acc
            for other in tl.static_range(SPLIT):
                # Past the first-level cache: another multiprocessor wrote this during this launch.
                acc += tl.load(parts + other * halves * (BLOCK_M * BLOCK_N), cache_modifier=".cg")
                if SILU:
                    acc_up += tl.load(parts + (other * halves + 1) * (BLOCK_M * BLOCK_N), cache_modifier=".cg")
    if last:
        if scale_ptr is not None:
            factor = tl.rsqrt(tl.sum(squares, axis=1) / k + eps)[:, None]
            acc *= factor
            acc_up *= factor
        if SILU:
            acc = acc / (1.0 + tl.exp(-acc)) * acc_up
        element = out_ptr.dtype.element_ty
        if residual_ptr is not None:
            # Rounded before it is normalised, as in the residual stream.
            rounded = (acc + tl.load(residual_ptr + io, mask=mask, other=0.0).to(tl.float32)).to(element)
            tl.store(residual_ptr + io, rounded, mask=mask)
            acc = rounded.to(tl.float32)
            tl.store(squares_ptr + m * tl.num_programs(1) + n_tile, tl.sum(acc * acc, axis=1), mask=m_mask)
            acc *= tl.load(norm_ptr + j, mask=j < n, other=0.0).to(tl.float32)[None, :]
        tl.store(out_ptr + io, acc.to(element), mask=mask)


@dataclass(frozen=True)
class LinearConfig:
    """How one layer is launched.

    Attributes:
        block_m: Rows of a tile, a power of two from 16.
        block_n: Weight rows of a tile (of each half, for a gated MLP), a power of two.
        block_k: Of a step along K.
        num_warps: Warps of a program.
        num_stages: Depth of the load pipeline.
        split_k: Programs that share a tile.
        prefetch: Pieces of 256 weights that each weight row brings near before the kernel waits.
    """

    block_m: int = 64
    block_n: int = 64
    block_k: int = 64
    num_warps: int = 4
    num_stages: int = 4
    split_k: int = 1
    prefetch: int = 0


class LinearWorkspace:
    """Buffers of the cut along K, shared by all layers of one stream.

    Args:
        size: Float32 values of all parts of a launch.
        device: Where the weights are.
        tiles: Most tiles of a launch that is cut.
    """

    def __init__(self, size: int, device: torch.device | str, tiles: int = 4096) -> None:
        self.parts = torch.empty(size, dtype=torch.float32, device=device)
        self.counts = torch.zeros(tiles, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class Scaled:
    """Rows before the factor of their norm.

    Attributes:
        x: ``[rows, k]``: the residual stream times the norm's weight.
        squares: float32 ``[rows, parts]``: sums of squares of parts of the residual stream.
    """

    x: torch.Tensor
    squares: torch.Tensor


def fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the copy engine can read these: of one 16-bit type, rows of whole 16 bytes."""
    return (
        x.dtype == weight.dtype
        and x.element_size() == 2
        and x.stride(1) == 1
        and weight.is_contiguous()
        and (x.stride(0) | weight.shape[1]) % 8 == 0
        and (x.data_ptr() | weight.data_ptr()) % 16 == 0
    )


def linear(
    x: torch.Tensor | Scaled,
    weight: torch.Tensor,
    config: LinearConfig | ClusterConfig,
    *,
    silu: bool = False,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    workspace: LinearWorkspace | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """``y = x @ weight.T``, of normalised rows where ``x`` is :class:`Scaled`; with ``silu``: ``silu(y[:, :n]) * y[:, n:]``.

    Args:
        x: ``[rows, k]`` bf16 or fp16, or scaled; :func:`fits` must hold.
        weight: ``[n, k]``, or ``[2 * n, k]`` with ``silu``: gate, then up.
        config: Launch shape, of this kernel or the one by clusters.
        silu: Close a gated MLP.
        eps: Of the norm.
        out: ``[rows, n]``, rows contiguous; a new tensor when None.
        workspace: Needed where the configuration cuts K.
        pdl: Programmatic dependent launch; the first weights are then read while the kernel before still runs.

    Returns:
        ``[rows, n]`` in the type of ``x``. Sums are float32.

    Raises:
        ValueError: Shapes that disagree, a cut of K that does not fit the workspace, or what a product by clusters cannot read.
    """
    plain = x.x if isinstance(x, Scaled) else x
    n = weight.shape[0] // (2 if silu else 1)
    if out is None:
        out = with_room(plain, len(plain), n)
    _launch(x, weight, config, out, None, None, None, silu, eps, workspace, pdl)
    return out


def linear_residual(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    config: LinearConfig | ClusterConfig,
    *,
    workspace: LinearWorkspace | None = None,
    pdl: bool = False,
) -> Scaled:
    """``residual += x @ weight.T`` in place, and what the product behind the next norm reads.

    Args:
        x: ``[rows, k]`` bf16 or fp16; :func:`fits` must hold.
        weight: ``[n, k]``.
        residual: ``[rows, n]``, contiguous, updated.
        norm_weight: ``[n]``, of the next norm.
        config: Launch shape.
        workspace: Needed where the configuration cuts K.
        pdl: Programmatic dependent launch.

    Raises:
        ValueError: As :func:`linear`.
    """
    rows, n = residual.shape
    parts = triton.cdiv(n, config.block_n)
    squares = torch.empty(rows, parts, dtype=torch.float32, device=x.device)
    out = with_room(residual, rows, n)
    _launch(x, weight, config, out, residual, norm_weight, squares, False, 0.0, workspace, pdl)
    return Scaled(out, squares)


def _launch(
    x: torch.Tensor | Scaled,
    weight: torch.Tensor,
    config: LinearConfig | ClusterConfig,
    out: torch.Tensor,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    squares: torch.Tensor | None,
    silu: bool,
    eps: float,
    workspace: LinearWorkspace | None,
    pdl: bool,
) -> None:
    scale, x = (x.squares, x.x) if isinstance(x, Scaled) else (None, x)
    (rows, k), n = x.shape, out.shape[1]
    if weight.shape != (n * (2 if silu else 1), k) or (residual is not None and not residual.is_contiguous()):
        raise ValueError(f"no product of {tuple(x.shape)} with {tuple(weight.shape)}")
    if not rows:
        return
    if isinstance(config, ClusterConfig):
        launch_cluster(x, weight, scale, residual, norm_weight, out, squares, config, silu=silu, eps=eps, pdl=pdl)
        return
    m_tiles, n_tiles = triton.cdiv(rows, config.block_m), triton.cdiv(n, config.block_n)
    if config.split_k > 1:
        size = m_tiles * n_tiles * config.split_k * config.block_m * config.block_n * (2 if silu else 1)
        if workspace is None or size > len(workspace.parts) or m_tiles * n_tiles > len(workspace.counts):
            raise ValueError(f"a cut of K needs a workspace of {size}")
    parts = 1 if scale is None else scale.shape[1]
    launch(
        _linear_kernel,
        (m_tiles, n_tiles, config.split_k),
        TensorDescriptor(x, [rows_with_room(x, config.block_m), k], list(x.stride()), [config.block_m, config.block_k]),
        TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k]),
        weight,
        scale,
        residual,
        norm_weight,
        out,
        squares,
        workspace.parts if workspace is not None and config.split_k > 1 else None,
        workspace.counts if workspace is not None and config.split_k > 1 else None,
        out.stride(0),
        parts,
        rows,
        n,
        k,
        eps,
        PARTS_BLOCK=power_of_two(parts),
        SILU=silu,
        SPLIT=config.split_k,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        STAGES=config.num_stages,
        PREFETCH=config.prefetch if pdl and k >= 256 else 0,
        PDL=pdl,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(pdl),
    )


def linear_reference(
    x: torch.Tensor, weight: torch.Tensor, norm_weight: torch.Tensor | None = None, eps: float = 1e-6, silu: bool = False
) -> torch.Tensor:
    """What :func:`linear` computes of ``x`` before its norm, in the type of its arguments."""
    if norm_weight is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm_weight
    y = x @ weight.T
    if silu:
        gate, up = y.chunk(2, dim=-1)
        y = torch.nn.functional.silu(gate) * up
    return y
