# mypy: disable-error-code="import-not-found, import-untyped, unused-ignore"
"""Kernels in CUDA C++ for Hopper: compiled by NVRTC, kept in Triton's cache, launched by the driver.

Torch for CUDA brings NVRTC and ``cuda.bindings``.
"""

import ctypes
import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch


def _check(result: tuple[Any, ...]) -> Any:
    """What a call of CUDA returned behind its status."""
    if int(result[0]):
        raise RuntimeError(f"CUDA: {result[0]!r}")
    return result[1] if len(result) > 1 else None


def text_of(source: Path, definitions: dict[str, int | str]) -> str:
    """A program's text with what the host puts before it, and what all programs share (``hopper.cuh``)."""
    defined = "".join(f"#define {name} {value}\n" for name, value in definitions.items())
    return defined + source.with_name("hopper.cuh").read_text() + source.read_text()


def compiled(name: str, text: str) -> bytes:
    """Machine code of a program for compute capability 9.0a, from Triton's cache on disk if it is there.

    Raises:
        RuntimeError: It does not compile.
    """
    from cuda.bindings import nvrtc
    from triton.runtime.cache import get_cache_manager

    cubin = f"{name}.cubin"
    cache = get_cache_manager(hashlib.sha256(f"{nvrtc.nvrtcVersion()}{text}".encode()).hexdigest())
    found = cache.get_file(cubin)
    if found is not None:
        return Path(found).read_bytes()
    program = _check(nvrtc.nvrtcCreateProgram(text.encode(), f"{name}.cu".encode(), 0, [], []))
    options = [b"--gpu-architecture=sm_90a", b"--std=c++17"]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(error):
        log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program))
        _check(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"{name}.cu does not compile: {log.decode()}")
    code: bytes = b" " * _check(nvrtc.nvrtcGetCUBINSize(program))
    _check(nvrtc.nvrtcGetCUBIN(program, code))
    _check(nvrtc.nvrtcDestroyProgram(program))
    cache.put(code, cubin, binary=True)
    return code


@lru_cache(maxsize=256)
def _function(name: str, text: str, shared: int, device: int) -> Any:
    """The program on a device, which is the current one."""
    from cuda.bindings import driver

    module = _check(driver.cuModuleLoadData(compiled(name, text)))
    function = _check(driver.cuModuleGetFunction(module, name.encode()))
    most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _check(driver.cuFuncSetAttribute(function, most, shared))
    return function


class TensorMap:
    """A copy of the driver's 128 bytes where it wants them: at a multiple of 64, which Python's objects are not.

    Args:
        address: Of the driver's.
    """

    def __init__(self, address: int) -> None:
        self._memory = (ctypes.c_char * 256)()
        self.address = -(-ctypes.addressof(self._memory) // 128) * 128
        ctypes.memmove(self.address, address, 128)


@lru_cache(maxsize=4096)
def tensor_map(
    dtype: torch.dtype,
    pointer: int,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    *,
    promotion: int = 256,
) -> TensorMap:
    """How the copy engine reads boxes, 64 elements wide, of a tensor of bfloat16 or float16 into rows of 128 swizzled bytes.

    Args:
        sizes: Elements of each dimension, the innermost first.
        strides: In elements, of all dimensions but the innermost.
        box: Elements of a box.
        promotion: Bytes that the second-level cache reads at once, 128 or 256.
    """
    from cuda.bindings import driver

    promotions = driver.CUtensorMapL2promotion
    types, long, short = driver.CUtensorMapDataType, driver.cuuint64_t, driver.cuuint32_t
    made = _check(
        driver.cuTensorMapEncodeTiled(
            types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if dtype == torch.bfloat16 else types.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            len(sizes),
            pointer,
            [long(size) for size in sizes],
            [long(stride * dtype.itemsize) for stride in strides],
            [short(size) for size in box],
            [short(1)] * len(sizes),
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            getattr(promotions, f"CU_TENSOR_MAP_L2_PROMOTION_L2_{promotion}B"),
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return TensorMap(made.getPtr())


@lru_cache(maxsize=16)
def _attributes(cluster: int, pdl: bool) -> list[Any]:
    from cuda.bindings import driver

    shape, early = driver.CUlaunchAttribute(), driver.CUlaunchAttribute()
    shape.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    shape.value.clusterDim.x, shape.value.clusterDim.y, shape.value.clusterDim.z = cluster, 1, 1
    early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    early.value.programmaticStreamSerializationAllowed = 1
    return [*([shape] if cluster > 1 else []), *([early] if pdl else [])]


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """As an argument; None: null."""
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())


def launch_cuda(
    name: str,
    text: str,
    maps: Sequence[TensorMap],
    values: Sequence[Any],
    device: torch.device,
    *,
    grid: tuple[int, int],
    threads: int,
    shared: int,
    cluster: int = 1,
    pdl: bool = False,
) -> None:
    """Launch the function ``name`` of a program on torch's current stream.

    Args:
        maps, values: Its arguments, tensor maps before ctypes' values.
        grid: Programs.
        threads: Of a program.
        shared: Bytes of shared memory of a program.
        cluster: Programs of a cluster.
        pdl: Programmatic dependent launch.
    """
    from cuda.bindings import driver

    addresses = [*(each.address for each in maps), *(ctypes.addressof(each) for each in values)]
    launch = driver.CUlaunchConfig()
    launch.gridDimX, launch.gridDimY, launch.gridDimZ = *grid, 1
    launch.blockDimX, launch.blockDimY, launch.blockDimZ = threads, 1, 1
    launch.sharedMemBytes = shared
    launch.hStream = torch.cuda.current_stream(device).cuda_stream
    launch.attrs = _attributes(cluster, pdl)
    launch.numAttrs = len(launch.attrs)
    parameters = (ctypes.c_void_p * len(addresses))(*addresses)
    with torch.cuda.device(device):
        function = _function(name, text, shared, device.index or 0)
        _check(driver.cuLaunchKernelEx(launch, function, ctypes.addressof(parameters), 0))
