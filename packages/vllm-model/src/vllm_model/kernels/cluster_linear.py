# mypy: disable-error-code="import-not-found, import-untyped, unused-ignore"
"""Products of some 17 to 128 rows by clusters of multiprocessors of Hopper (``cluster_linear.cu``), compiled on first use.

What such a product waits for is not memory but the second-level cache, from which every program reads all rows of the input.
Programs of a cluster read a part each and hand it to all others, or cut the inputs and add up through each other's shared
memory. Triton has neither, hence CUDA C++, compiled by NVRTC, which comes with torch for CUDA.
"""

import ctypes
import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from vllm_model.kernels._launch import rows_with_room

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
        ahead: Copies of weights besides those of the stages that are brought into the second-level cache at once.
    """

    block_m: int = 64
    block_n: int = 32
    chunks: int = 2
    stages: int = 4
    cluster: int = 4
    ahead: int = 0


def shared_bytes(config: ClusterConfig) -> int:
    """Shared memory of a program."""
    stages = config.stages * config.chunks * (config.block_m + config.block_n) * 128
    sums = config.block_m * (config.block_n + 4) * 4
    return (stages + sums if config.cluster > 1 else max(stages, sums)) + 16 * config.stages + 8 + 4 * config.block_m + 1024


def source(config: ClusterConfig, dtype: torch.dtype, silu: bool, scaled: bool, residual: bool) -> str:
    """The program's text."""
    columns = config.block_n // (2 if silu else 1)
    values = columns // 2
    kind = "bf16" if dtype == torch.bfloat16 else "f16"
    product = (
        f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} "
        f"{{{', '.join(f'%{i}' for i in range(values))}}}, %{values}, %{values + 1}, p, 1, 1, 0, 0;"
    )
    outputs = ", ".join(f'\\"+f\\"(d[{i}])'.replace("\\", "") for i in range(values))
    lines = {
        "ELEMENT_IS_BF16": int(dtype == torch.bfloat16),
        "BM": config.block_m,
        "BN": config.block_n,
        "CHUNKS": config.chunks,
        "STAGES": config.stages,
        "CLUSTER": config.cluster,
        "AHEAD": config.ahead,
        "SILU": int(silu),
        "SCALED": int(scaled),
        "RESIDUAL": int(residual),
        "WGMMA(d, a, b)": f'asm volatile("{{ .reg .pred p; setp.ne.b32 p, 1, 0; {product} }}" : {outputs} : "l"(a), "l"(b))',
    }
    return "".join(f"#define {name} {value}\n" for name, value in lines.items()) + SOURCE.read_text()


def compiled(text: str) -> bytes:
    """Machine code for compute capability 9.0a, from the cache of Triton's kernels if it is there.

    Raises:
        RuntimeError: It does not compile.
    """
    from cuda.bindings import nvrtc
    from triton.runtime.cache import get_cache_manager

    def check(result: tuple[Any, ...]) -> Any:
        if int(result[0]):
            raise RuntimeError(f"NVRTC: {result[0]}")
        return result[1] if len(result) > 1 else None

    version = nvrtc.nvrtcVersion()
    cache = get_cache_manager(hashlib.sha256(f"{version}{text}".encode()).hexdigest())
    found = cache.get_file("cluster_linear.cubin")
    if found is not None:
        return Path(found).read_bytes()
    program = check(nvrtc.nvrtcCreateProgram(text.encode(), b"cluster_linear.cu", 0, [], []))
    options = [b"--gpu-architecture=sm_90a", b"--std=c++17"]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(error):
        log = b" " * check(nvrtc.nvrtcGetProgramLogSize(program))
        check(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"NVRTC: {log.decode()}")
    code = b" " * check(nvrtc.nvrtcGetCUBINSize(program))
    check(nvrtc.nvrtcGetCUBIN(program, code))
    check(nvrtc.nvrtcDestroyProgram(program))
    cache.put(code, "cluster_linear.cubin", binary=True)
    return code


def _check(result: tuple[Any, ...]) -> Any:
    if int(result[0]):
        raise RuntimeError(f"CUDA: {result[0]}")
    return result[1] if len(result) > 1 else None


@lru_cache(maxsize=256)
def _function(config: ClusterConfig, dtype: torch.dtype, silu: bool, scaled: bool, residual: bool, device: int) -> Any:
    from cuda.bindings import driver

    module = _check(driver.cuModuleLoadData(compiled(source(config, dtype, silu, scaled, residual))))
    function = _check(driver.cuModuleGetFunction(module, b"cluster_linear"))
    most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _check(driver.cuFuncSetAttribute(function, most, shared_bytes(config)))
    return function


def _tensor_map(x: torch.Tensor, rows: int, chunks: int) -> Any:
    """How the copy engine reads ``chunks`` tiles of ``rows`` rows and 64 columns, side by side in the matrix."""
    from cuda.bindings import driver

    types = driver.CUtensorMapDataType
    size, steps = x.element_size(), (64, x.stride(0))
    return _check(
        driver.cuTensorMapEncodeTiled(
            types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if x.dtype == torch.bfloat16 else types.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            3,
            x.data_ptr(),
            [driver.cuuint64_t(each) for each in (64, rows_with_room(x, rows), x.shape[1] // 64)],
            [driver.cuuint64_t(each * size) for each in reversed(steps)],
            [driver.cuuint32_t(each) for each in (64, rows, chunks)],
            [driver.cuuint32_t(1)] * 3,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


def n_tiles(config: ClusterConfig, n: int, silu: bool) -> int:
    """Tiles along the outputs: parts of a row's sum of squares."""
    return -(-n // (config.block_n // (2 if silu else 1)))


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
    """Launch the product; arguments as of the kernels in :mod:`linear`, outputs a multiple of 8."""
    from cuda.bindings import driver

    (rows, k), n = x.shape, out.shape[1]
    function = _function(config, x.dtype, silu, scale is not None, residual is not None, x.device.index or 0)
    maps = (
        _tensor_map(x, config.block_m, config.chunks),
        _tensor_map(weight, config.block_n // (2 if silu else 1), config.chunks),
    )

    def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
        return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())

    values = [
        *(pointer(each) for each in (scale, residual, norm_weight, out, squares)),
        ctypes.c_longlong(out.stride(0)),
        ctypes.c_int(1 if scale is None else scale.shape[1]),
        ctypes.c_int(rows),
        ctypes.c_int(n),
        ctypes.c_int(k),
        ctypes.c_float(eps),
    ]
    addresses = [*(each.getPtr() for each in maps), *(ctypes.addressof(each) for each in values)]
    parameters = (ctypes.c_void_p * len(addresses))(*addresses)
    launch = driver.CUlaunchConfig()
    launch.gridDimX = n_tiles(config, n, silu) * config.cluster
    launch.gridDimY, launch.gridDimZ = -(-rows // config.block_m), 1
    launch.blockDimX, launch.blockDimY, launch.blockDimZ = (2 if scale is None else 3) * config.block_m + 32, 1, 1
    launch.sharedMemBytes = shared_bytes(config)
    launch.hStream = torch.cuda.current_stream(x.device).cuda_stream
    attributes = []
    shape = driver.CUlaunchAttribute()
    shape.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    shape.value.clusterDim.x, shape.value.clusterDim.y, shape.value.clusterDim.z = config.cluster, 1, 1
    attributes.append(shape)
    if pdl:
        early = driver.CUlaunchAttribute()
        early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        attributes.append(early)
    launch.attrs, launch.numAttrs = attributes, len(attributes)
    _check(driver.cuLaunchKernelEx(launch, function, ctypes.addressof(parameters), 0))
