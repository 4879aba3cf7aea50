"""Where there is no CUDA device, the backend runs on Triton's interpreter, which must be chosen before kernels are imported."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16  # ties nearer than bfloat16 can tell are many in so small a model
SHAPE = {"head_dim": 16, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="session")
def small_folder(random_model: Callable[..., tuple[Path, Any]]) -> Path:
    return random_model("Qwen3ForCausalLM", **SHAPE)[0]


@pytest.fixture(scope="session")
def make_backend(small_folder: Path) -> Callable[..., Any]:
    """A function to a fresh CUDA backend of a very small model, on whatever device there is."""
    from vllm_model.cuda_backend import CudaBackend
    from vllm_model.loaders import load_config, load_weights

    def make(**settings: Any) -> Any:
        config = load_config(small_folder)
        weights = load_weights(small_folder, config, dtype=DTYPE, device=torch.device(DEVICE))
        return CudaBackend(config, weights, **{"kv_cache_memory_bytes": 1 << 24} | settings)

    return make
