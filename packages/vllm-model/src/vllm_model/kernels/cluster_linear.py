# mypy: disable-error-code="import-not-found, import-untyped, unused-ignore"
"""Products of few rows whose inputs are cut among a cluster of Hopper's multiprocessors (``cluster_linear.cu``).

Such a product takes some 4 us, of which reading its weights takes 1 or 2; the rest is one thing waiting for the other. Here
weights come into shared memory before the kernel ahead has ended, a cluster's programs add up through each other's shared
memory, and norms of rows and the residual are fetched meanwhile. Triton has no way to say that, hence CUDA C++, compiled by
NVRTC within some 0.2 s. Torch for CUDA brings it and ``cuda.bindings``; without them :mod:`~vllm_model.kernels.linear` does it.
"""

import ctypes
import hashlib
import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from vllm_model.kernels._launch import rows_with_room, take_down

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cluster_linear.cu")
CUBIN = "cluster_linear.cubin"


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
    lines = {
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
    return "".join(f"#define {name} {value}\n" for name, value in lines.items()) + SOURCE.read_text()


def _check(result: tuple[Any, ...]) -> Any:
    """What a call of CUDA returned behind its status."""
    if int(result[0]):
        raise RuntimeError(f"CUDA: {result[0]!r}")
    return result[1] if len(result) > 1 else None


def compiled(text: str) -> bytes:
    """Machine code of a program for compute capability 9.0a, from Triton's cache on disk if it is there.

    Raises:
        RuntimeError: It does not compile.
    """
    from cuda.bindings import nvrtc
    from triton.runtime.cache import get_cache_manager

    cache = get_cache_manager(hashlib.sha256(f"{nvrtc.nvrtcVersion()}{text}".encode()).hexdigest())
    found = cache.get_file(CUBIN)
    if found is not None:
        return Path(found).read_bytes()
    program = _check(nvrtc.nvrtcCreateProgram(text.encode(), SOURCE.name.encode(), 0, [], []))
    options = [b"--gpu-architecture=sm_90a", b"--std=c++17"]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(error):
        log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program))
        _check(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"{SOURCE.name} does not compile: {log.decode()}")
    code: bytes = b" " * _check(nvrtc.nvrtcGetCUBINSize(program))
    _check(nvrtc.nvrtcGetCUBIN(program, code))
    _check(nvrtc.nvrtcDestroyProgram(program))
    cache.put(code, CUBIN, binary=True)
    return code


@lru_cache(maxsize=16)
def has_clusters(device: torch.device) -> bool:
    """Whether the compiler and the driver's interface are there and understand the program: torch for CUDA brings both."""
    try:
        x = torch.empty(64, 64, dtype=torch.bfloat16, device=device)
        _tensor_map(x.dtype, x.data_ptr(), *x.shape, 64, 64, 1)
        return bool(compiled(source(ClusterConfig(), x.dtype, False, False, True)))
    except Exception as error:  # not installed, without its library, or of another age: Triton's products do as well
        logger.info("products by clusters are left to Triton: %s", error)
        return False


@lru_cache(maxsize=256)
def _function(text: str, shared: int, device: int) -> Any:
    """The program on a device, which is the current one."""
    from cuda.bindings import driver

    module = _check(driver.cuModuleLoadData(compiled(text)))
    function = _check(driver.cuModuleGetFunction(module, b"cluster_linear"))
    most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _check(driver.cuFuncSetAttribute(function, most, shared))
    return function


class _TensorMap:
    """A copy of the driver's 128 bytes where it wants them: at a multiple of 64, which Python's objects are not.

    Args:
        address: Of the driver's.
    """

    def __init__(self, address: int) -> None:
        self._memory = (ctypes.c_char * 256)()
        self.address = -(-ctypes.addressof(self._memory) // 128) * 128
        ctypes.memmove(self.address, address, 128)


@lru_cache(maxsize=4096)
def _tensor_map(
    dtype: torch.dtype, pointer: int, rows: int, columns: int, stride: int, box_rows: int, chunks: int
) -> _TensorMap:
    """How the copy engine reads ``chunks`` tiles of ``box_rows`` rows and 64 columns, side by side in a matrix."""
    from cuda.bindings import driver

    types, long, short = driver.CUtensorMapDataType, driver.cuuint64_t, driver.cuuint32_t
    made = _check(
        driver.cuTensorMapEncodeTiled(
            types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if dtype == torch.bfloat16 else types.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            3,
            pointer,
            [long(64), long(rows), long(columns // 64)],
            [long(stride * dtype.itemsize), long(64 * dtype.itemsize)],
            [short(64), short(box_rows), short(chunks)],
            [short(1), short(1), short(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return _TensorMap(made.getPtr())


@lru_cache(maxsize=16)
def _attributes(cluster: int, pdl: bool) -> list[Any]:
    from cuda.bindings import driver

    shape, early = driver.CUlaunchAttribute(), driver.CUlaunchAttribute()
    shape.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    shape.value.clusterDim.x, shape.value.clusterDim.y, shape.value.clusterDim.z = cluster, 1, 1
    early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    early.value.programmaticStreamSerializationAllowed = 1
    return [shape, early] if pdl else [shape]


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
    if take_down(text, lambda: compiled(text)):
        return
    from cuda.bindings import driver

    with torch.cuda.device(x.device):
        function = _function(text, shared_bytes(config), x.device.index or 0)
    columns, chunks = config.block_n // (2 if silu else 1), config.chunks
    maps = (
        _tensor_map(x.dtype, x.data_ptr(), rows_with_room(x, config.block_m), k, x.stride(0), config.block_m, chunks),
        _tensor_map(weight.dtype, weight.data_ptr(), len(weight), k, k, columns, chunks),
    )
    values = [
        *(ctypes.c_void_p(0 if each is None else each.data_ptr()) for each in (scale, residual, norm_weight, out, squares)),
        ctypes.c_longlong(out.stride(0)),
        *(ctypes.c_int(each) for each in (1 if scale is None else scale.shape[1], rows, n, k)),
        ctypes.c_float(eps),
    ]
    addresses = [*(each.address for each in maps), *(ctypes.addressof(each) for each in values)]
    launch = driver.CUlaunchConfig()
    launch.gridDimX, launch.gridDimY, launch.gridDimZ = -(-n // columns) * config.cluster, -(-rows // config.block_m), 1
    launch.blockDimX = (2 if scale is None else 3) * config.block_m + 32
    launch.blockDimY = launch.blockDimZ = 1
    launch.sharedMemBytes = shared_bytes(config)
    launch.hStream = torch.cuda.current_stream(x.device).cuda_stream
    launch.attrs = _attributes(config.cluster, pdl)
    launch.numAttrs = len(launch.attrs)
    parameters = (ctypes.c_void_p * len(addresses))(*addresses)
    with torch.cuda.device(x.device):
        _check(driver.cuLaunchKernelEx(launch, function, ctypes.addressof(parameters), 0))
