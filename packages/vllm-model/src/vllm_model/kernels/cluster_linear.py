"""Products of few rows whose inputs are cut among a cluster of Hopper's multiprocessors (``cluster_linear.cu``).

Such a product takes some 4 us, of which reading its weights takes 1 or 2; the rest is one thing waiting for the other. Here
weights come into shared memory before the kernel ahead has ended, a cluster's programs add up through each other's shared
memory, and norms of rows and the residual are fetched meanwhile. Triton has no way to say that, hence CUDA C++, compiled by
NVRTC within some 0.2 s. Without it :mod:`~vllm_model.kernels.linear` does the same.
"""

import ctypes
import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from vllm_model.kernels._cuda import TensorMap, compiled, launch_cuda, pointer, tensor_map, text_of
from vllm_model.kernels._launch import rows_with_room, take_down

logger = logging.getLogger(__name__)

NAME = "cluster_linear"
SOURCE = Path(__file__).with_name("cluster_linear.cu")


@dataclass(frozen=True)
class ClusterConfig:
    """How one product is launched.

    Attributes:
        block_m: Rows of a tile, 64 or 128.
        block_n: Weight rows of a tile, a multiple of 8; of a gated MLP (a multiple of 16) half of them gate, half up.
        chunks: Of 64 inputs each, that one copy brings.
        stages: Depth of the load pipeline, in such copies.
        cluster: Programs that share a tile's inputs: 1, 2, 4 or 8.
    """

    block_m: int = 64
    block_n: int = 32
    chunks: int = 2
    stages: int = 4
    cluster: int = 4


def shared_bytes(config: ClusterConfig) -> int:
    """Shared memory of a program."""
    stages = config.stages * config.chunks * (config.block_m + config.block_n) * 128
    sums = config.block_m * (config.block_n + 4) * 4
    return (stages + sums if config.cluster > 1 else max(stages, sums)) + 16 * config.stages + 8 + 4 * config.block_m + 1024


@lru_cache(maxsize=256)
def source(config: ClusterConfig, dtype: torch.dtype, silu: bool, scaled: bool, residual: bool) -> str:
    """The program's text."""
    columns = config.block_n // (2 if silu else 1)
    values = columns // 2
    kind = "bf16" if dtype == torch.bfloat16 else "f16"
    product = (
        f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} "
        f"{{{', '.join(f'%{i}' for i in range(values))}}}, %{values}, %{values + 1}, p, 1, 1, 0, 0;"
    )
    sums = ", ".join(f'"+f"(d[{i}])' for i in range(values))
    lines: dict[str, int | str] = {
        "ELEMENT_IS_BF16": int(dtype == torch.bfloat16),
        "BM": config.block_m,
        "BN": config.block_n,
        "CHUNKS": config.chunks,
        "STAGES": config.stages,
        "CLUSTER": config.cluster,
        "SILU": int(silu),
        "SCALED": int(scaled),
        "RESIDUAL": int(residual),
        "WGMMA(d, a, b)": f'asm volatile("{{ .reg .pred p; setp.ne.b32 p, 1, 0; {product} }}" : {sums} : "l"(a), "l"(b))',
    }
    return text_of(SOURCE, lines)


def _matrix(x: torch.Tensor, rows: int, columns: int, box_rows: int, chunks: int) -> TensorMap:
    """How the copy engine reads ``chunks`` tiles of ``box_rows`` rows and 64 columns, side by side in a matrix."""
    return tensor_map(x.dtype, x.data_ptr(), (64, rows, columns // 64), (x.stride(0), 64), (64, box_rows, chunks))


@lru_cache(maxsize=16)
def has_clusters(device: torch.device) -> bool:
    """Whether the compiler and the driver's interface are there and understand the program: torch for CUDA brings both."""
    try:
        x = torch.empty(64, 64, dtype=torch.bfloat16, device=device)
        _matrix(x, len(x), 64, 64, 1)
        return bool(compiled(NAME, source(ClusterConfig(), x.dtype, False, False, True)))
    except Exception as error:  # not installed, without its library, or of another age: Triton's products do as well
        logger.info("products by clusters are left to Triton: %s", error)
        return False


def launch_cluster(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    out: torch.Tensor,
    squares: torch.Tensor | None,
    config: ClusterConfig,
    *,
    silu: bool,
    eps: float,
    pdl: bool,
) -> None:
    """Launch a product; what is given as of :mod:`~vllm_model.kernels.linear`.

    Raises:
        ValueError: Inputs are no multiple of 64, outputs none of 8, something is not of the type of ``x`` or not aligned,
            or a tile of a product with a residual is not 16, 32, 64 or 128 wide.
    """
    (rows, k), n = x.shape, out.shape[1]
    others = [each for each in (residual, norm_weight, out) if each is not None]
    aligned = out.stride(0) % 8 == 0 and out.stride(1) == 1 and not any(each.data_ptr() % 8 for each in others)
    whole = k % 64 == 0 and n % 8 == 0 and (residual is None or config.block_n in (16, 32, 64, 128))
    if not (aligned and whole and all(each.dtype == x.dtype for each in others)):
        raise ValueError(f"no product by clusters of {tuple(x.shape)} with {tuple(weight.shape)}")
    text = source(config, x.dtype, silu, scale is not None, residual is not None)
    if take_down(text, lambda: compiled(NAME, text)):
        return
    columns, chunks = config.block_n // (2 if silu else 1), config.chunks
    maps = (
        _matrix(x, rows_with_room(x, config.block_m), k, config.block_m, chunks),
        _matrix(weight, len(weight), k, columns, chunks),
    )
    values = [
        *(pointer(each) for each in (scale, residual, norm_weight, out, squares)),
        ctypes.c_longlong(out.stride(0)),
        *(ctypes.c_int(each) for each in (1 if scale is None else scale.shape[1], rows, n, k)),
        ctypes.c_float(eps),
    ]
    launch_cuda(
        NAME,
        text,
        maps,
        values,
        x.device,
        grid=(-(-n // columns) * config.cluster, -(-rows // config.block_m)),
        threads=(2 if scale is None else 3) * config.block_m + 32,
        shared=shared_bytes(config),
        cluster=config.cluster,
        pdl=pdl,
    )
