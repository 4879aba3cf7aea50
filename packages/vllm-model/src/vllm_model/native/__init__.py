"""The compiled kernels: which of them this processor can run, and what passes between them and Python.

The structures are those of ``decoder.c`` and ``products.h``, field by field.
"""

import ctypes
import logging
import os
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
import torch

from vllm_model.native import build
from vllm_model.native.build import VARIANTS, fingerprint, library_path, machine
from vllm_model.quantization import GROUP, QuantizedTensor, Weight
from vllm_traits.batch import FloatArray, IntArray, LongArray
from vllm_traits.errors import BackendOutOfMemoryError, ConfigError

logger = logging.getLogger(__name__)

F32, BF16, INT4, INT8 = range(4)
PANEL: Final = 16
"""Outputs that lie together in a packed weight."""
NEEDED: Final = {
    "amx": {"amx_tile", "amx_bf16", "avx512_bf16", "avx512bw", "avx512dq", "avx512vl"},
    "avx512bf16": {"avx512f", "avx512_bf16", "avx512bw", "avx512dq", "avx512vl", "fma", "f16c"},
    "avx2": {"avx2", "fma", "f16c"},
    "neon": set[str](),
}
"""What the kernel's list of a processor's features must hold for a variant."""


class ProductStruct(Structure):
    """``Product`` of ``products.h``."""

    _fields_ = [("type", c_int32), ("n", c_int32), ("k", c_int32), ("data", c_void_p), ("bias", c_void_p)]


class LayerStruct(Structure):
    """``Layer`` of ``decoder.c``."""

    _fields_ = [
        ("input_norm", c_void_p),
        ("qkv", POINTER(ProductStruct)),
        ("num_qkv", c_int32),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("o", ProductStruct),
        ("post_norm", c_void_p),
        ("gate", ProductStruct),
        ("up", ProductStruct),
        ("down", ProductStruct),
        ("cache", c_void_p),
    ]


class DecoderStruct(Structure):
    """``Decoder`` of ``decoder.c``."""

    _fields_ = [
        ("dot", c_int32),
        ("num_layers", c_int32),
        ("hidden", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("intermediate", c_int32),
        ("block_size", c_int32),
        ("panel_tokens", c_int32),
        ("eps", c_float),
        ("embedding", ProductStruct),
        ("lm_head", ProductStruct),
        ("norm", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("layers", POINTER(LayerStruct)),
    ]


class StepStruct(Structure):
    """``Step`` of ``decoder.c``."""

    _fields_ = [
        ("num_tokens", c_int32),
        ("num_rows", c_int32),
        ("num_wanted", c_int32),
        ("token_ids", c_void_p),
        ("query_start", c_void_p),
        ("num_computed", c_void_p),
        ("slots", c_void_p),
        ("tables", c_void_p),
        ("table_stride", c_int64),
        ("wanted", c_void_p),
        ("hidden", c_void_p),
    ]


class DrawStruct(Structure):
    """``Draw`` of ``sampling.h``."""

    _fields_ = [
        ("logits", c_void_p),
        ("stride", c_int64),
        ("rows", c_int32),
        ("vocab_size", c_int32),
        ("temperature", c_void_p),
        ("min_p", c_void_p),
        ("top_p", c_void_p),
        ("top_k", c_void_p),
        ("seeds", c_void_p),
        ("positions", c_void_p),
        ("tokens", c_void_p),
        ("room", c_void_p),
    ]


class PackingStruct(Structure):
    """``Packing`` of ``decoder.c``."""

    _fields_ = [
        ("type", c_int32),
        ("n", c_int32),
        ("k", c_int32),
        ("weight", c_void_p),
        ("scales", c_void_p),
        ("minimums", c_void_p),
        ("out", c_void_p),
    ]


@cache
def load_kernels() -> ctypes.CDLL | None:
    """The fastest variant that is built and that this processor runs; None: there is none.

    ``VLLM_CPU_ISA`` names the fastest one to consider, or ``none``.

    Raises:
        ConfigError: It names another.
    """
    names = list(VARIANTS.get(machine(), {}))
    most = os.environ.get("VLLM_CPU_ISA")
    if most is not None:
        known = [*names, "none"]
        if most not in known:
            raise ConfigError(f"VLLM_CPU_ISA is {most!r}; on this machine it must be one of {', '.join(known)}.")
        names = names[known.index(most) :]
    return next((kernels for kernels in map(load_variant, names) if kernels is not None), None)


@cache
def load_variant(name: str) -> ctypes.CDLL | None:
    """One variant, with one thread so far; None if it is not built, or not for this processor."""
    path = library_path(name)
    if not _features() >= NEEDED[name] or not path.exists():
        return None
    try:
        library = ctypes.CDLL(str(path))
        library.sources.restype = ctypes.c_char_p
        current = library.sources().decode() == fingerprint()
    except (OSError, AttributeError):  # damaged, or older than that function
        current = False
    if not current:
        _warn_of_other_sources()
        return None
    return library if _typed(library).set_threads(1) == 0 else None


@cache
def _warn_of_other_sources() -> None:
    """Once, for all variants."""
    logger.warning("The compiled kernels are of other sources and are not used; `python %s` builds them anew.", build.__file__)


def draw_tokens(
    kernels: ctypes.CDLL,
    logits: torch.Tensor,
    temperature: FloatArray,
    seeds: LongArray,
    positions: LongArray,
    *,
    min_p: FloatArray | None = None,
    top_p: FloatArray | None = None,
    top_k: IntArray | None = None,
) -> torch.Tensor:
    """The tokens of rows of logits: the greatest, or a draw by the noise of :mod:`vllm_model.noise` from what filters leave.

    Args:
        logits: float32 ``[rows, vocab_size]``, the last dimension contiguous.
        temperature: float32 ``[rows]``, 0 is greedy.
        seeds, positions: int64 ``[rows]``.
        min_p, top_p: float32 ``[rows]``; None: no filter.
        top_k: int32 ``[rows]``, 0 keeps all; None: no filter.

    Returns:
        int64 ``[rows]``.

    Raises:
        BackendOutOfMemoryError: No memory for the filters.
    """
    assert logits.stride(1) == 1
    rows = len(logits)
    tokens = torch.empty(rows, dtype=torch.int64)
    floats = [
        np.ascontiguousarray(part, np.float32)
        for part in (temperature, np.zeros(rows) if min_p is None else min_p, np.ones(rows) if top_p is None else top_p)
    ]
    top_k = np.ascontiguousarray(np.zeros(rows) if top_k is None else top_k, np.int32)
    seeds, positions = np.ascontiguousarray(seeds, np.int64), np.ascontiguousarray(positions, np.int64)
    failed = kernels.draw(
        DrawStruct(
            logits=logits.data_ptr(),
            stride=logits.stride(0),
            rows=rows,
            vocab_size=logits.shape[1],
            temperature=floats[0].ctypes.data,
            min_p=floats[1].ctypes.data,
            top_p=floats[2].ctypes.data,
            top_k=top_k.ctypes.data,
            seeds=seeds.ctypes.data,
            positions=positions.ctypes.data,
            tokens=tokens.data_ptr(),
        )
    )
    if failed:
        raise BackendOutOfMemoryError(f"Sampling {rows} rows ran out of memory.")
    return tokens


def _features() -> set[str]:
    if machine() != "x86_64":
        return set()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    library.decoder_hidden.argtypes = [POINTER(DecoderStruct), POINTER(StepStruct)]
    library.product.argtypes = [POINTER(ProductStruct), c_int32, c_void_p, c_int32, c_void_p]
    library.draw.argtypes = [POINTER(DrawStruct)]
    library.release.restype = None
    library.pack.argtypes = [POINTER(PackingStruct)]
    library.pack.restype = None
    library.packed_bytes.argtypes = [c_int32, c_int64, c_int64]
    library.packed_bytes.restype = c_int64
    library.set_threads.argtypes = [c_int32]
    return library


class PackedWeight:
    """A weight ``[n, k]`` as the kernels want it, with its bias.

    Args:
        weight: float32, bfloat16 or quantized; ``k`` even.
        bias: ``[n]``, or None.

    Attributes:
        nbytes: Held in memory.
    """

    def __init__(self, kernels: ctypes.CDLL, weight: Weight, bias: torch.Tensor | None = None) -> None:
        n, k = weight.shape
        scales = minimums = None
        if isinstance(weight, QuantizedTensor):
            kind = INT4 if weight.bits == 4 else INT8
            scales = weight.scales.contiguous()
            minimums = None if weight.minimums is None else weight.minimums.contiguous()
            values = weight.q.contiguous()
        else:
            kind = BF16 if weight.dtype == torch.bfloat16 else F32
            values = weight.contiguous() if kind == BF16 else weight.float().contiguous()
        assert k % (GROUP if scales is not None else 2) == 0
        self._kernels = kernels
        self._data = torch.empty(kernels.packed_bytes(kind, n, k) + 64, dtype=torch.uint8)
        at = (self._data.data_ptr() + 63) // 64 * 64
        packing = PackingStruct(kind, n, k, values.data_ptr(), _address(scales), _address(minimums), at)
        kernels.pack(packing)
        self._bias = None
        if bias is not None:
            self._bias = torch.zeros(-(-n // PANEL) * PANEL)
            self._bias[:n] = bias
        self.struct = ProductStruct(kind, n, k, at, _address(self._bias))
        self.nbytes = self._data.nbytes

    def __call__(self, x: torch.Tensor, *, dot: bool) -> torch.Tensor:
        """float32 ``[rows, k]`` to float32 ``[rows, n]``; with ``dot`` inputs are rounded to bfloat16 first."""
        assert x.shape[1] == self.struct.k
        assert not (dot and self.struct.type == F32)
        x = x.float().contiguous()
        rows = len(x)
        out = torch.empty(rows, -(-self.struct.n // PANEL) * PANEL)
        if self._kernels.product(self.struct, dot, x.data_ptr(), rows, out.data_ptr()):
            raise BackendOutOfMemoryError(f"A product of {rows} rows ran out of memory.")
        return out[:, : self.struct.n]


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
