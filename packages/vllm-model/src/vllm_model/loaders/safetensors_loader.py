"""Weights of a folder of safetensors files, one or sharded, memory-mapped and checked strictly.

A file is ``u64 header length | JSON header | data``; the header is checked against the file's size and against the
configuration before any memory is taken.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from vllm_model.quantization import Quantization, Weight, as_asked
from vllm_traits.errors import ModelLoadError, UnsupportedModelError, WeightsError

INDEX_FILE: Final = "model.safetensors.index.json"
MAX_HEADER_BYTES: Final = 100_000_000
DTYPE_BYTES: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor of a folder lies, and its shape."""

    file: Path
    shape: tuple[int, ...]


def load_safetensors(
    folder: Path,
    expected: dict[str, tuple[int, ...]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization | None = "none",
) -> dict[str, Weight]:
    """The tensors ``expected`` (name to shape) of a folder, as ``dtype`` on ``device``, or quantized.

    Raises:
        WeightsError: A tensor is missing, surplus, misshapen, or lies outside its file.
        UnsupportedModelError: A tensor has a dtype other than F64, F32, F16, BF16.
        ModelLoadError: No safetensors file, or one that cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    entries: dict[str, TensorEntry] = {}
    for file in weight_files(folder):
        for name, entry in read_header(file).items():
            if name in entries:
                raise WeightsError(f"Tensor {name!r} is in both {entries[name].file.name} and {file.name}.")
            entries[name] = entry
    _check(entries, expected, folder)
    by_file: dict[Path, list[str]] = {}
    for name in expected:
        by_file.setdefault(entries[name].file, []).append(name)
    weights: dict[str, Weight] = {}
    for file, names in by_file.items():
        try:
            with safe_open(file, framework="pt", device="cpu") as tensors:
                for name in names:
                    weights[name] = as_asked(name, tensors.get_tensor(name).to(device), quantization, dtype)
        except (OSError, SafetensorError) as error:
            raise ModelLoadError(f"Cannot read {file}: {error}.") from error
    return weights


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those that the index names, else all of them.

    Raises:
        ModelLoadError: There is none, or the index names one that is not there.
    """
    index = folder / INDEX_FILE
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ModelLoadError(f"{folder} holds no *.safetensors file.")
        return files
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{index} is not an index of safetensors files: {error!r}.") from error
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise ModelLoadError(f"{index} names {name!r}, which is not a file of that folder.")
    return [folder / name for name in names]


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one file by name, every offset checked against the file's size.

    Raises:
        WeightsError: A tensor's bytes are not those of its shape, or lie outside the file.
        UnsupportedModelError: A dtype that cannot be read.
        ModelLoadError: The file is missing, truncated or not safetensors.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise ModelLoadError(f"{file} is too short to be a safetensors file.")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise ModelLoadError(f"{file} is damaged or truncated: header of {length} bytes in a file of {size}.")
            header = json.loads(stream.read(length))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"Cannot read the header of {file}: {error}.") from error
    if not isinstance(header, dict):
        raise ModelLoadError(f"The header of {file} is not a JSON object.")
    data_bytes = size - 8 - length
    return {name: _entry(name, info, file, data_bytes) for name, info in header.items() if name != "__metadata__"}


def _entry(name: str, info: Any, file: Path, data_bytes: int) -> TensorEntry:
    try:
        dtype, shape, (start, end) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise ModelLoadError(f"{file}: the header entry of {name!r} is not a tensor's.") from error
    if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise WeightsError(f"{file}: tensor {name!r} has a shape or offsets that are not whole numbers.")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise UnsupportedModelError(f"{file}: tensor {name!r} has dtype {dtype!r}; supported: {', '.join(DTYPE_BYTES)}.")
    if end > data_bytes or end - start != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise WeightsError(
            f"{file}: tensor {name!r} ({dtype} {shape}) claims bytes {start} to {end} of {data_bytes}; the file is damaged or "
            "was not downloaded to the end."
        )
    return TensorEntry(file, shape)


def _check(entries: dict[str, TensorEntry], expected: dict[str, tuple[int, ...]], folder: Path) -> None:
    for name, shape in expected.items():
        if name not in entries:
            missing = sum(other not in entries for other in expected)
            raise WeightsError(f"{folder}: tensor {name!r} is missing ({missing} missing in all).")
        if entries[name].shape != tuple(shape):
            raise WeightsError(
                f"{folder}: tensor {name!r} has shape {entries[name].shape}; the configuration says {tuple(shape)}."
            )
    for name in entries:
        # A tied head stored a second time, and buffers that old checkpoints carry, hold nothing of their own.
        if name not in expected and name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq"):
            raise WeightsError(f"{folder}: tensor {name!r} is surplus: the configuration has no place for it.")
