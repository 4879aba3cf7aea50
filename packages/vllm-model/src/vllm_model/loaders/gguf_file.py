"""The header of a GGUF file: metadata and tensor directory, read straight from the mapped bytes.

The ``gguf`` library's own reader makes several numpy views for every array element, which takes seconds for a vocabulary; this
reads the same in milliseconds and checks every count and length against the file before it believes it. Format: ggml's
``docs/gguf.md``, versions 2 and 3, little endian.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from vllm_traits.errors import ModelLoadError, UnsupportedModelError, WeightsError

MAGIC: Final = b"GGUF"
DEFAULT_ALIGNMENT: Final = 32
MAX_KEY_BYTES: Final = 65_535
MAX_DIMS: Final = 4
MAX_DEPTH: Final = 4

_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING: Final = 8
_ARRAY: Final = 9
_U64: Final = struct.Struct("<Q")
_U32: Final = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One entry of the tensor directory.

    Attributes:
        name: llama.cpp's name, such as ``blk.0.attn_q.weight``.
        shape: Row-major (torch's order; the file stores it reversed).
        type: How the values are stored.
        start: Offset of the first byte in the file.
        num_bytes: Bytes stored, at most up to the end of the file.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Metadata (scalars as Python values, arrays as lists) and the tensors by name."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """``general.architecture``.

        Raises:
            ModelLoadError: The file does not say.
        """
        value = self.metadata.get("general.architecture")
        if not isinstance(value, str):
            raise ModelLoadError("The GGUF file has no general.architecture.")
        return value


def read_gguf_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata of a GGUF file: scalars as ``int``, ``float``, ``bool`` or ``str``, arrays as lists.

    Raises:
        ModelLoadError: The file is missing, truncated or not GGUF.
    """
    return read_gguf_header(path).metadata


def read_gguf_header(path: str | Path) -> GgufHeader:
    """Metadata and tensor directory of a GGUF file; no tensor data is touched.

    Raises:
        UnsupportedModelError: A GGUF version, byte order or tensor type that is not known.
        WeightsError: A tensor reaches past the end of the file, or comes twice.
        ModelLoadError: The file is missing, truncated or not GGUF.
    """
    path = Path(path)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Cursor(data, path).header()
    except (OSError, ValueError) as error:  # mmap refuses an empty file with ValueError
        raise ModelLoadError(f"Cannot read {path}: {error}.") from error


class _Cursor:
    """Walks through the header; every read is checked against the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.size = len(data)
        self.path = path
        self.pos = 0

    def header(self) -> GgufHeader:
        if self.take(4) != MAGIC:
            raise ModelLoadError(f"{self.path} is not a GGUF file: it does not begin with 'GGUF'.")
        version = self.u32()
        if version not in (2, 3):
            raise UnsupportedModelError(f"{self.path} has GGUF version {version}; 2 and 3, little endian, are supported.")
        num_tensors, num_entries = self.u64(), self.u64()
        # An entry takes at least 13 bytes and a tensor 24: what cannot fit is refused before any loop.
        if num_entries * 13 + num_tensors * 24 > self.size:
            raise ModelLoadError(f"{self.path} claims {num_entries} entries and {num_tensors} tensors, more than it can hold.")
        metadata: dict[str, Any] = {}
        for _ in range(num_entries):
            key = self.string(MAX_KEY_BYTES)
            if key in metadata:
                raise ModelLoadError(f"{self.path} holds the metadata key {key!r} twice.")
            metadata[key] = self.value(self.u32(), key, 0)
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ModelLoadError(f"{self.path}: general.alignment is {alignment!r}, not a power of two.")
        infos = [self.tensor_info() for _ in range(num_tensors)]
        base = -(-self.pos // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for info in infos:
            tensor = self.placed(info, base)
            if tensor.name in tensors:
                raise WeightsError(f"{self.path} holds the tensor {tensor.name!r} twice.")
            tensors[tensor.name] = tensor
        return GgufHeader(metadata, tensors)

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string(MAX_KEY_BYTES)
        num_dims = self.u32()
        if not 1 <= num_dims <= MAX_DIMS:
            raise WeightsError(f"{self.path}: tensor {name!r} has {num_dims} dimensions; 1 to {MAX_DIMS} are possible.")
        shape = tuple(reversed([self.u64() for _ in range(num_dims)]))
        return name, shape, self.u32(), self.u64()

    def placed(self, info: tuple[str, tuple[int, ...], int, int], base: int) -> GgufTensor:
        name, shape, code, offset = info
        try:
            kind = GGMLQuantizationType(code)
        except ValueError as error:
            raise UnsupportedModelError(f"{self.path}: tensor {name!r} has the unknown GGML type {code}.") from error
        block, block_bytes = GGML_QUANT_SIZES[kind]
        count = 1
        for length in shape:
            count *= length
        if count == 0 or shape[-1] % block:
            raise WeightsError(
                f"{self.path}: tensor {name!r} of shape {shape} cannot be stored in {kind.name} blocks of {block}."
            )
        num_bytes = count // block * block_bytes
        if base + offset + num_bytes > self.size:
            raise WeightsError(
                f"{self.path}: tensor {name!r} ends at byte {base + offset + num_bytes}, but the file has {self.size} bytes; "
                "it is damaged or was not downloaded to the end."
            )
        return GgufTensor(name, shape, kind, base + offset, num_bytes)

    def value(self, kind: int, key: str, depth: int) -> Any:
        if kind == _STRING:
            return self.string(self.size)
        if kind == _ARRAY:
            return self.array(key, depth)
        code = _SCALARS.get(kind)
        if code is None:
            raise ModelLoadError(f"{self.path}: metadata key {key!r} has the unknown type {kind}.")
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def array(self, key: str, depth: int) -> list[Any]:
        kind, count = self.u32(), self.u64()
        if kind == _STRING:
            return self.strings(count)
        if kind == _ARRAY:
            if depth == MAX_DEPTH or count * 12 > self.size - self.pos:
                raise self.truncated()
            return [self.array(key, depth + 1) for _ in range(count)]
        code = _SCALARS.get(kind)
        if code is None:
            raise ModelLoadError(f"{self.path}: metadata key {key!r} has elements of the unknown type {kind}.")
        raw = self.take(count * struct.calcsize("<" + code))
        return list(struct.unpack(f"<{count}{code}", raw))

    def strings(self, count: int) -> list[str]:
        # The loop of the file: a vocabulary and its merges are hundreds of thousands of strings, hence no method calls.
        data, pos, size, length_at = self.data, self.pos, self.size, _U64.unpack_from
        if count * 8 > size - pos:
            raise self.truncated()
        out: list[str] = []
        for _ in range(count):
            if pos + 8 > size:
                raise self.truncated()
            end = pos + 8 + length_at(data, pos)[0]
            if end > size:
                raise self.truncated()
            out.append(data[pos + 8 : end].decode("utf-8", "replace"))
            pos = end
        self.pos = pos
        return out

    def string(self, limit: int) -> str:
        length = self.u64()
        if length > limit:
            raise self.truncated()
        return self.take(length).decode("utf-8", "replace")

    def u32(self) -> int:
        return int(_U32.unpack(self.take(4))[0])

    def u64(self) -> int:
        return int(_U64.unpack(self.take(8))[0])

    def take(self, count: int) -> bytes:
        if count > self.size - self.pos:
            raise self.truncated()
        start, self.pos = self.pos, self.pos + count
        return self.data[start : self.pos]

    def truncated(self) -> ModelLoadError:
        return ModelLoadError(f"{self.path} is damaged or truncated: its GGUF header breaks off near byte {self.pos}.")
