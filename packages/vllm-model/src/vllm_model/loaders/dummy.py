"""Random weights, for measurements without a checkpoint."""

import torch

from vllm_model.quantization import Quantization, Weight, as_asked

STD = 0.02
"""Standard deviation, as most of these models are initialised."""


def dummy_weights(
    expected: dict[str, tuple[int, ...]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    quantization: Quantization | None = "none",
) -> dict[str, Weight]:
    """Tensors of the shapes ``expected``, made on ``device``: norms one, all else normal; the same for the same seed."""
    generator = torch.Generator(device=device).manual_seed(seed)
    weights: dict[str, Weight] = {}
    for name, shape in expected.items():
        tensor = torch.empty(shape, dtype=dtype, device=device)
        if name.endswith("norm.weight"):
            weights[name] = tensor.fill_(1.0)
        else:
            weights[name] = as_asked(name, tensor.normal_(0.0, STD, generator=generator), quantization, dtype)
    return weights
