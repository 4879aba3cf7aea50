"""Weights of a GGUF file under Hugging Face names, packed as they are stored or dequantized.

llama.cpp's converter reorders the rows of ``q_proj`` and ``k_proj`` of the ``llama`` family (Mistral included) so that rotary
pairs are neighbours; that is undone here. Other families (Qwen) are stored as they were.
"""

import math
import mmap
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGMLQuantizationType as Type

from vllm_model.loaders.gguf_file import GgufHeader, GgufTensor, read_gguf_header
from vllm_model.loaders.gguf_packed import EXACT, read_packed
from vllm_model.quantization import Quantization, Weight, as_asked, quantizable
from vllm_traits.errors import ModelLoadError, UnsupportedModelError, WeightsError

_PLAIN: Final[dict[Type, np.dtype[np.floating]]] = {Type.F32: np.dtype("<f4"), Type.F16: np.dtype("<f2")}
FLOATS: Final = (Type.F32, Type.F16, Type.BF16)
SUPPORTED_TYPES: Final = (
    *FLOATS,
    *(Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0),
    *(Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K),
)
PERMUTED_ARCHITECTURES: Final = frozenset({"llama", "mistral", "mistral3"})

_TOP: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_PART: Final = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS: Final = "rope_freqs.weight"
"""Not a weight: the divisors of Llama 3's rotary frequencies, which the configuration takes in."""


def hf_name(name: str) -> str | None:
    """The Hugging Face name of llama.cpp's ``name``; None where there is none."""
    if name in _TOP:
        return _TOP[name]
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or not parts[1].isdecimal() or parts[2] not in _PART:
        return None
    return f"model.layers.{int(parts[1])}.{_PART[parts[2]]}.{parts[3]}"


def llama3_scaling(path: Path, header: GgufHeader) -> dict[str, str | float]:
    """Llama 3's rotary scaling as ``rope.scaling.*`` metadata, of a file that has it only as a tensor of frequency divisors.

    The divisors are 1 for short wavelengths, ``factor`` for long ones, and between them follow from two more numbers, which
    are the same in every Llama 3 (``low_freq_factor`` 1, ``high_freq_factor`` 4, 8192 tokens): the result is checked.

    Raises:
        UnsupportedModelError: The divisors are not of that form.
    """
    arch, tensor = header.architecture, header.tensors[ROPE_FACTORS]
    low, high, original = 1.0, 4.0, 8192
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        stored = read_tensor(data, tensor).astype(np.float64).reshape(-1)  # [rotary_dim / 2]
    factor = float(stored.max())
    base = float(header.metadata.get(f"{arch}.rope.freq_base", 10000.0))
    turns = original * base ** -(np.arange(len(stored)) / len(stored)) / (2 * math.pi)  # within the original context
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    if not np.isfinite(factor) or factor < 1 or not np.allclose(stored, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise UnsupportedModelError(
            f"{path}: {ROPE_FACTORS} holds rotary factors other than Llama 3's, which are not supported."
        )
    return {
        f"{arch}.rope.scaling.type": "llama3",
        f"{arch}.rope.scaling.factor": factor,
        f"{arch}.rope.scaling.low_freq_factor": low,
        f"{arch}.rope.scaling.high_freq_factor": high,
        f"{arch}.rope.scaling.original_context_length": original,
    }


def load_gguf(
    path: Path,
    expected: dict[str, tuple[int, ...]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization | None = "none",
) -> dict[str, Weight]:
    """The tensors ``expected`` (Hugging Face name to shape) of a GGUF file, as ``dtype`` on ``device``, or quantized.

    Raises:
        UnsupportedModelError: A tensor is stored in a type that cannot be read; the message lists those that can.
        WeightsError: A tensor is missing, surplus or misshapen.
        ModelLoadError: The file cannot be read.
    """
    header = read_gguf_header(path)
    chosen = _match(header, expected, path)
    weights: dict[str, Weight] = {}
    with path.open("rb") as file:
        # Private and writable only because torch takes no other; the last view closes it.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    for name, tensor in chosen.items():
        order = _row_order(name, tensor.shape[0], header)
        stored: Weight
        if quantizable(tensor.shape) and (tensor.type in EXACT or (quantization != "none" and tensor.type not in FLOATS)):
            stored = read_packed(data, tensor)
            stored = stored if order is None else stored.rows(order)
        else:
            stored = torch.from_numpy(read_tensor(data, tensor))
            stored = stored if order is None else stored[order]
        fitted = as_asked(name, stored, quantization, dtype)
        weights[name] = fitted.to(device) if isinstance(fitted, torch.Tensor) else fitted
    return weights


def read_tensor(data: mmap.mmap, tensor: GgufTensor) -> npt.NDArray[np.float32]:
    """The values of one tensor, float32 of ``tensor.shape``, in memory of their own.

    Raises:
        UnsupportedModelError: The type is not one of ``SUPPORTED_TYPES``.
    """
    _check_type(tensor)
    if tensor.type in _PLAIN:
        plain = np.frombuffer(data, _PLAIN[tensor.type], math.prod(tensor.shape), tensor.start)
        return plain.astype(np.float32).reshape(tensor.shape)
    # Copied out, so that no view of the mapping outlives it.
    raw = np.frombuffer(data[tensor.start : tensor.start + tensor.num_bytes], np.uint8)
    if tensor.type == Type.BF16:
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(tensor.shape)
    from gguf.quants import dequantize  # here, for it takes a while to import

    rows = raw.reshape(math.prod(tensor.shape[:-1]), -1)  # [num_rows, bytes_per_row]
    return np.ascontiguousarray(dequantize(rows, tensor.type), np.float32).reshape(tensor.shape)


def _match(header: GgufHeader, expected: dict[str, tuple[int, ...]], path: Path) -> dict[str, GgufTensor]:
    """Every expected tensor with its entry; shapes, types and completeness are checked before anything is allocated."""
    found: dict[str, GgufTensor] = {}
    for tensor in header.tensors.values():
        name = hf_name(tensor.name)
        if name == "lm_head.weight" and name not in expected:
            continue  # a tied head stored a second time
        if tensor.name == ROPE_FACTORS:
            continue
        if name is None or name not in expected:
            raise WeightsError(f"{path}: tensor {tensor.name!r} is surplus: the configuration has no place for it.")
        if tensor.shape != tuple(expected[name]):
            raise WeightsError(
                f"{path}: tensor {tensor.name!r} ({name}) has shape {tensor.shape}; the configuration says {expected[name]}."
            )
        _check_type(tensor)
        found[name] = tensor
    missing = [name for name in expected if name not in found]
    if missing:
        raise WeightsError(f"{path}: tensor {missing[0]!r} is missing ({len(missing)} missing in all).")
    return {name: found[name] for name in expected}


def _check_type(tensor: GgufTensor) -> None:
    if tensor.type not in SUPPORTED_TYPES:
        known = ", ".join(kind.name for kind in SUPPORTED_TYPES)
        raise UnsupportedModelError(
            f"Tensor {tensor.name!r} is stored as {tensor.type.name}, which is not supported. Supported: {known}."
        )


def _row_order(name: str, rows: int, header: GgufHeader) -> torch.Tensor | None:
    """Where to take each row of ``[head, half, pair]`` from llama.cpp's ``[head, pair, half]``; None: it is in its place."""
    if header.architecture not in PERMUTED_ARCHITECTURES or (".q_proj." not in name and ".k_proj." not in name):
        return None
    key = f"{header.architecture}.attention.head_count"
    heads = header.metadata.get(key)
    if ".k_proj." in name:
        heads = header.metadata.get(key + "_kv", heads)
    if not isinstance(heads, int) or heads < 1 or rows % (2 * heads):
        raise ModelLoadError(f"{name} has {rows} rows, which {heads!r} heads ({key}) cannot share out evenly.")
    return torch.arange(rows).view(heads, rows // heads // 2, 2).transpose(1, 2).flatten()
