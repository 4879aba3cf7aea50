"""Every architecture gives transformers' logits, by prefill, by chunks and token by token."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vllm_model.backend import TorchBackend, load_backend
from vllm_model.native_backend import NativeBackend
from vllm_traits import BatchState
from vllm_traits.conformance import batch_of

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("Qwen3ForCausalLM", {"head_dim": 16}),
    ("Qwen3ForCausalLM", {"head_dim": 32, "tie_word_embeddings": True, "rope_parameters": YARN}),
    ("Qwen2ForCausalLM", {}),
    ("LlamaForCausalLM", {}),
    ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}}),
    ("MistralForCausalLM", {"sliding_window": None, "head_dim": 8}),
]


def error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference relative to the largest logit."""
    return float((ours.double() - reference.double()).abs().max() / reference.abs().max())


def backend_of(folder: Path, kernels: str, monkeypatch: pytest.MonkeyPatch) -> TorchBackend:
    """On the compiled kernels, or on torch's operations."""
    if kernels == "torch":
        monkeypatch.setattr("vllm_model.backend.load_kernels", lambda: None)
    backend = load_backend(folder)
    assert isinstance(backend, TorchBackend)
    assert isinstance(backend, NativeBackend) == (kernels == "compiled")
    assert backend.dtype == torch.float32
    return backend


KERNELS = pytest.mark.parametrize("kernels", ["compiled", "torch"])


@KERNELS
@pytest.mark.parametrize(("architecture", "changes"), MODELS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(MODELS)])
def test_logits_are_those_of_transformers(
    architecture: str,
    changes: dict[str, Any],
    kernels: str,
    random_model: Callable[..., tuple[Path, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kernels == "compiled" and changes.get("head_dim", 8) % 16:
        changes = changes | {"head_dim": 16}
    folder, reference = random_model(architecture, **changes)
    backend = backend_of(folder, kernels, monkeypatch)
    state = BatchState(4, backend.spec.max_model_len, 16)
    backend.initialize(state, num_blocks=40, max_num_batched_tokens=512)
    rng = np.random.default_rng(0)
    free = rng.permutation(40).tolist()
    lengths = [97, 40, 1, 16]
    for slot, length in enumerate(lengths):
        state.token_ids[slot, :length] = rng.integers(0, 97, length)
        blocks = [free.pop() for _ in range(-(-length // 16))]
        state.block_tables[slot, : len(blocks)] = blocks
        state.num_blocks[slot] = len(blocks)

    def logits(rows: list[tuple[int, int]], ends: list[int]) -> torch.Tensor:
        state.num_tokens[: len(lengths)] = 0
        for (slot, _), end in zip(rows, ends, strict=True):
            state.num_tokens[slot] = end
        batch = batch_of(state, rows)
        with torch.inference_mode():
            return backend._logits(backend._hidden(batch, np.arange(batch.num_tokens)))

    with torch.inference_mode():
        expected = [
            reference(torch.from_numpy(state.token_ids[slot, :length].astype(np.int64))[None]).logits[0]
            for slot, length in enumerate(lengths)
        ]
    # Together and at once; then in chunks, the last of one token, beside another sequence's decode.
    whole = logits([(0, 0), (2, 0), (1, 0)], [97, 1, 40])
    assert error(whole, torch.cat([expected[0], expected[2], expected[1]])) < 1e-4
    first = logits([(3, 0), (0, 0)], [7, 50])
    second = logits([(3, 7), (0, 50)], [15, 96])
    third = logits([(3, 15), (0, 96)], [16, 97])
    assert error(torch.cat([first[:7], second[:8], third[:1]]), expected[3]) < 1e-4
    assert error(torch.cat([first[7:], second[8:], third[1:]]), expected[0]) < 1e-4


@KERNELS
def test_last_layer_runs_only_the_rows_that_are_wanted(
    kernels: str, random_model: Callable[..., tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = random_model("LlamaForCausalLM", head_dim=16)
    backend = backend_of(folder, kernels, monkeypatch)
    state = BatchState(1, 64, 16)
    backend.initialize(state, num_blocks=4, max_num_batched_tokens=64)
    state.token_ids[0, :10] = np.arange(10)
    state.num_tokens[0] = 10
    batch = batch_of(state, [(0, 0)])
    with torch.inference_mode():
        every = backend._hidden(batch, np.arange(10))
        some = backend._hidden(batch, np.array([3, 9]))
    torch.testing.assert_close(some, every[[3, 9]])
    assert len(backend._hidden(batch, np.array([], np.int64))) == 0  # a chunk of a prompt


def test_a_cut_decoder_has_the_first_layers_alone(
    random_model: Callable[..., tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = random_model("Qwen3ForCausalLM", num_hidden_layers=3)
    decoder = backend_of(folder, "torch", monkeypatch).decoder
    assert decoder is not None
    short = decoder.cut(2)
    assert [id(layer) for layer in short.layers] == [id(layer) for layer in decoder.layers[:2]]
    assert (short.config.num_layers, decoder.config.num_layers, len(decoder.layers)) == (2, 3, 3)
    assert short.embedding is decoder.embedding
