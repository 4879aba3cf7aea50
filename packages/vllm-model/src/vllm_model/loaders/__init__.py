"""Configuration and weights from a Hugging Face folder or a GGUF file."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from vllm_model.loaders.dummy import dummy_weights
from vllm_model.loaders.gguf_file import read_gguf_header, read_gguf_metadata
from vllm_model.loaders.gguf_loader import ROPE_FACTORS, llama3_scaling, load_gguf
from vllm_model.loaders.safetensors_loader import load_safetensors
from vllm_model.quantization import Quantization, Weight
from vllm_traits.errors import ConfigError, ModelLoadError

if TYPE_CHECKING:
    from vllm_model.model_config import ModelConfig

LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]

__all__ = ["LoadFormat", "load_config", "load_weights", "read_gguf_metadata"]


def load_config(path: str | Path) -> "ModelConfig":
    """The configuration of a folder (``config.json``; ``generation_config.json`` adds end-of-sequence ids) or ``.gguf`` file.

    Raises:
        ModelLoadError: Nothing there, or it cannot be read.
        UnsupportedModelError: An architecture that is not supported.
    """
    from vllm_model.model_config import ModelConfig

    path = Path(path)
    if path.suffix == ".gguf":
        header = read_gguf_header(path)
        tied = "output.weight" not in header.tensors
        metadata = header.metadata | {f"{header.architecture}.tie_word_embeddings": tied}
        if ROPE_FACTORS in header.tensors:
            metadata |= llama3_scaling(path, header)
        return ModelConfig.from_gguf(metadata)
    raw = _read_json(path / "config.json")
    if (path / "generation_config.json").is_file():
        generation = _read_json(path / "generation_config.json")
        if generation.get("eos_token_id") is not None:
            raw["eos_token_id"] = _ids(raw.get("eos_token_id")) + [
                token for token in _ids(generation["eos_token_id"]) if token not in _ids(raw.get("eos_token_id"))
            ]
    return ModelConfig.from_hf(raw)


def load_weights(
    path: str | Path,
    config: "ModelConfig",
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    load_format: LoadFormat = "auto",
    quantization: Quantization | None = "none",
    seed: int = 0,
) -> dict[str, Weight]:
    """All tensors of ``config.expected_tensors()`` under Hugging Face names, as ``dtype`` on ``device`` or quantized.

    Args:
        dtype: Of what is not quantized.
        device: Only the CPU has quantized weights.
        quantization: See :func:`~vllm_model.quantization.as_asked`.
        load_format: ``auto`` goes by the path: a ``.gguf`` file, else a folder of safetensors. ``dummy`` reads nothing.
        seed: Of the ``dummy`` weights.

    Raises:
        ConfigError: ``load_format`` is not one of those above.
        WeightsError: A tensor is missing, surplus or misshapen.
        ModelLoadError: The files cannot be read.
    """
    path, device = Path(path), torch.device(device)
    expected = {name: tuple(shape) for name, shape in config.expected_tensors().items()}
    if load_format == "auto":
        load_format = "gguf" if path.suffix == ".gguf" else "safetensors"
    if load_format == "dummy":
        return dummy_weights(expected, dtype=dtype, device=device, seed=seed, quantization=quantization)
    if load_format == "gguf":
        return load_gguf(path, expected, dtype=dtype, device=device, quantization=quantization)
    if load_format == "safetensors":
        return load_safetensors(path, expected, dtype=dtype, device=device, quantization=quantization)
    raise ConfigError(f"load_format is {load_format!r}; it must be auto, safetensors, gguf or dummy.")


def _ids(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"Cannot read {path}: {error}.") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} is not a JSON object.")
    return value
