"""Products by cuBLASLt with algorithms of our choice: its first suggestion, which torch takes, is not always its fastest.

It is the library that torch has loaded, called by ctypes. Whatever is not as expected leaves the product to torch.
"""

import ctypes
import logging
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from vllm_model.kernels._launch import num_sms
from vllm_model.kernels.linear import fits

logger = logging.getLogger(__name__)

TYPES = {torch.bfloat16: 14, torch.float16: 2}  # CUDA_R_16BF, CUDA_R_16F
SUMS = (68, 0)  # CUBLAS_COMPUTE_32F, CUDA_R_32F
VERSION, MULTIPROCESSORS = 1301, 132  # of cuBLASLt, 13.1, and of the card that algorithms were measured with
WORKSPACE = 32 << 20
"""Most bytes that a product may take besides its result, as with torch."""


class Algorithm(NamedTuple):
    """How a product is computed, in cuBLASLt's own numbers (``cublasLtMatmulAlgoConfigAttributes_t``)."""

    id: int
    tile: int = 0
    stages: int = 0
    split_k: int = 1
    reduction: int = 0
    swizzle: int = 0
    custom: int = 0
    inner_shape: int = 0
    cluster_shape: int = 0


ATTRIBUTES: dict[str, tuple[int, type[Any]]] = {
    "id": (0, ctypes.c_int32),
    "tile": (1, ctypes.c_uint32),
    "stages": (6, ctypes.c_uint32),
    "split_k": (2, ctypes.c_int32),
    "reduction": (3, ctypes.c_uint32),
    "swizzle": (4, ctypes.c_uint32),
    "custom": (5, ctypes.c_uint32),
    "inner_shape": (7, ctypes.c_uint16),
    "cluster_shape": (8, ctypes.c_uint16),
}
"""Number and type of each field of :class:`Algorithm`."""


class Result(ctypes.Structure):
    """``cublasLtMatmulHeuristicResult_t``: an algorithm, and the bytes of workspace that it needs."""

    _fields_ = [
        ("algo", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


def check(status: int) -> None:
    """Raise RuntimeError unless a call went well."""
    if status:
        raise RuntimeError(f"cuBLASLt: status {status}")


@lru_cache(maxsize=16)
def library(device: torch.device) -> tuple[Any, ctypes.c_void_p]:
    """cuBLASLt, and a handle for a device.

    Raises:
        OSError, RuntimeError: It is not there, or does not know the device.
    """
    lt = ctypes.CDLL(f"libcublasLt.so.{str(torch.version.cuda).split('.')[0]}")  # a name that is loaded gives what is loaded
    lt.cublasLtGetVersion.restype = ctypes.c_size_t
    lt.cublasLtMatmul.argtypes = [*[ctypes.c_void_p] * 14, ctypes.c_size_t, ctypes.c_void_p]
    handle = ctypes.c_void_p()
    with torch.cuda.device(device):
        check(lt.cublasLtCreate(ctypes.byref(handle)))
    return lt, handle


@lru_cache(maxsize=16)
def has_algorithms(device: torch.device) -> bool:
    """Whether algorithms may be chosen: with cuBLASLt and a card of Hopper's like those that they were measured with."""
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    if num_sms(device) != MULTIPROCESSORS:
        return False
    try:
        return bool(library(device)[0].cublasLtGetVersion() // 100 == VERSION)
    except Exception as error:
        logger.info("cuBLASLt's algorithms are left to torch: %s", error)
        return False


class Product:
    """``y = x @ weight.T`` as cuBLASLt sees it, by columns: ``y.T = weight @ x.T``.

    Args:
        device: Where.
        dtype: Of all three, bfloat16 or float16.
        rows, n, k: ``x`` is ``[rows, k]``, ``weight`` ``[n, k]``.
        x_stride, y_stride: Elements between rows.

    Attributes:
        given: What most calls begin with: the handle and the descriptors of the operation and of its four matrices.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, rows: int, n: int, k: int, x_stride: int, y_stride: int
    ) -> None:
        self.lt, handle = library(device)
        operation, transposed = ctypes.c_void_p(), ctypes.c_int32(1)
        check(self.lt.cublasLtMatmulDescCreate(ctypes.byref(operation), *SUMS))
        check(self.lt.cublasLtMatmulDescSetAttribute(operation, 3, ctypes.byref(transposed), ctypes.c_size_t(4)))  # of A
        self._type = TYPES[dtype]
        a, b, y = self._layout(k, n, k), self._layout(k, rows, x_stride), self._layout(n, rows, y_stride)
        self.given = (handle, operation, a, b, y, y)
        self._one, self._zero = ctypes.c_float(1), ctypes.c_float(0)

    def _layout(self, rows: int, columns: int, stride: int) -> ctypes.c_void_p:
        layout = ctypes.c_void_p()
        sizes = ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(stride)
        check(self.lt.cublasLtMatrixLayoutCreate(ctypes.byref(layout), self._type, *sizes))
        return layout

    def configured(self, algorithm: Algorithm) -> Result:
        """What :meth:`launch` takes.

        Raises:
            RuntimeError: This product cannot be computed so.
        """
        made, result = Result(), Result()
        algo = ctypes.byref(made.algo)
        check(self.lt.cublasLtMatmulAlgoInit(self.given[0], *SUMS, *[self._type] * 4, algorithm.id, algo))
        for name, value in algorithm._asdict().items():
            number, kind = ATTRIBUTES[name]
            if name != "id":
                size = ctypes.c_size_t(ctypes.sizeof(kind))
                check(self.lt.cublasLtMatmulAlgoConfigSetAttribute(algo, number, ctypes.byref(kind(value)), size))
        check(self.lt.cublasLtMatmulAlgoCheck(*self.given, algo, ctypes.byref(result)) or result.state)
        if result.workspace > WORKSPACE:
            raise RuntimeError(f"cuBLASLt: {algorithm} needs {result.workspace} bytes")
        made.workspace = result.workspace
        return made

    def launch(self, result: Result, x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> bool:
        """Compute ``y`` on torch's current stream; False: cuBLASLt refused, and nothing was done."""
        workspace = x.new_empty(result.workspace, dtype=torch.uint8)
        handle, operation, a_layout, b_layout, c_layout, d_layout = self.given
        with torch.cuda.device(x.device):
            status: int = self.lt.cublasLtMatmul(
                handle,
                operation,
                ctypes.byref(self._one),
                weight.data_ptr(),
                a_layout,
                x.data_ptr(),
                b_layout,
                ctypes.byref(self._zero),
                y.data_ptr(),
                c_layout,
                y.data_ptr(),
                d_layout,
                ctypes.byref(result.algo),
                workspace.data_ptr(),
                result.workspace,
                torch.cuda.current_stream(x.device).cuda_stream,
            )
        return status == 0


@lru_cache(maxsize=1024)
def _configured(algorithm: Algorithm, *product: Any) -> tuple[Product, Result] | None:
    """None: torch does it."""
    try:
        made = Product(*product)
        return made, made.configured(algorithm)
    except Exception as error:
        logger.info("a product is left to torch: %s", error)
        return None


def library_linear(
    x: torch.Tensor, weight: torch.Tensor, algorithm: Algorithm | None, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``x @ weight.T`` by cuBLASLt, or by torch where it cannot be computed so.

    Args:
        x: ``[rows, inputs]``.
        weight: ``[outputs, inputs]``.
        algorithm: None: torch's choice.
        out: ``[rows, outputs]``, where the result goes.

    Returns:
        ``[rows, outputs]``, ``out`` if that was given.
    """
    if algorithm is not None and x.dtype in TYPES and fits(x, weight) and has_algorithms(x.device):
        y = x.new_empty(len(x), len(weight)) if out is None else out
        whole = y.dtype == x.dtype and y.stride(1) == 1 and y.stride(0) % 8 == 0 and y.data_ptr() % 16 == 0
        shape = len(x), *weight.shape, x.stride(0), y.stride(0)
        found = _configured(algorithm, x.device, x.dtype, *shape) if whole else None
        if found is not None and found[0].launch(found[1], x, weight, y):
            return y
    return F.linear(x, weight) if out is None else torch.mm(x, weight.t(), out=out)
