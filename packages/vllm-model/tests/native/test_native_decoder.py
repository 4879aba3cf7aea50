"""Whole steps of the compiled decoder against torch's, in float32 and bfloat16."""

from ctypes import CDLL
from typing import Any

import numpy as np
import pytest
import torch

from vllm_model.backend import TorchBackend
from vllm_model.kv_cache import PagedKvCache
from vllm_model.model_config import ModelConfig, RopeConfig
from vllm_model.native_decoder import NativeDecoder
from vllm_model.quantization import QuantizedTensor, Weight, quantize
from vllm_traits import BatchState
from vllm_traits.batch import Batch
from vllm_traits.conformance import batch_of


def config_of(**changes: Any) -> ModelConfig:
    shape = {
        "family": "llama",
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "rope": RopeConfig(),
        "max_model_len": 256,
        "tie_word_embeddings": False,
    }
    return ModelConfig(**(shape | changes))


def weights_of(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Random ones, so large that what a wrong place gives does not hide behind the residual stream."""
    hidden, dim = config.hidden_size, config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    products = {
        "self_attn.q_proj": (config.num_heads * dim, hidden, config.qkv_bias),
        "self_attn.k_proj": (config.num_kv_heads * dim, hidden, config.qkv_bias),
        "self_attn.v_proj": (config.num_kv_heads * dim, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, config.num_heads * dim, config.o_bias),
        "mlp.gate_proj": (config.intermediate_size, hidden, config.mlp_bias),
        "mlp.up_proj": (config.intermediate_size, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, config.intermediate_size, config.mlp_bias),
    }
    for i in range(config.num_layers):
        prefix = f"model.layers.{i}"
        for name, (n, k, has_bias) in products.items():
            shapes[f"{prefix}.{name}.weight"] = (n, k)
            if has_bias:
                shapes[f"{prefix}.{name}.bias"] = (n,)
        shapes[f"{prefix}.input_layernorm.weight"] = shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        if config.qk_norm:
            shapes[f"{prefix}.self_attn.q_norm.weight"] = shapes[f"{prefix}.self_attn.k_norm.weight"] = (dim,)
    torch.manual_seed(0)
    return {name: torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) == 2 else 1.0) for name, shape in shapes.items()}


class Sequences:
    """Some sequences of random tokens in random blocks, run in random steps."""

    def __init__(self, config: ModelConfig, lengths: list[int], block_size: int, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.lengths = lengths
        self.state = BatchState(len(lengths), config.max_model_len, block_size)
        self.num_blocks = sum(-(-length // block_size) for length in lengths) + 3
        free = self.rng.permutation(self.num_blocks).tolist()
        for slot, length in enumerate(lengths):
            self.state.token_ids[slot, :length] = self.rng.integers(0, config.vocab_size, length)
            blocks = [free.pop() for _ in range(-(-length // block_size))]
            self.state.block_tables[slot, : len(blocks)] = blocks
            self.state.num_blocks[slot] = len(blocks)
        self.computed = [0] * len(lengths)

    def step(self, most: int) -> tuple[Batch, np.ndarray] | None:
        """Chunks of up to ``most`` tokens of some sequences, and which tokens are wanted: now and then none, or all."""
        left = [slot for slot, length in enumerate(self.lengths) if self.computed[slot] < length]
        if not left:
            return None
        slots = self.rng.permutation(left)[: self.rng.integers(1, len(left) + 1)].tolist()
        rows = [(slot, self.computed[slot]) for slot in slots]
        for slot in slots:
            size = int(self.rng.choice([1, most // 8 + 1, most]))
            self.computed[slot] = min(self.lengths[slot], self.computed[slot] + size)
            self.state.num_tokens[slot] = self.computed[slot]
        batch = batch_of(self.state, rows)
        share = self.rng.choice([0.0, 0.3, 1.0])
        return batch, np.flatnonzero(self.rng.random(batch.num_tokens) < share)


def native_of(
    kernels: CDLL, config: ModelConfig, weights: dict[str, Weight], sequences: Sequences, dtype: torch.dtype
) -> NativeDecoder:
    native = NativeDecoder(kernels, config, weights, config.max_model_len, dtype)
    block_size = sequences.state.block_size
    cache = PagedKvCache(
        num_layers=config.num_layers,
        num_blocks=sequences.num_blocks,
        num_kv_heads=config.num_kv_heads,
        block_size=NativeDecoder.stored_tokens(block_size),
        head_dim=config.head_dim,
        dtype=native.dtype,
        device=torch.device("cpu"),
    )
    native.attach(cache, block_size)
    return native


def torch_of(config: ModelConfig, weights: dict[str, Weight], sequences: Sequences) -> TorchBackend:
    backend = TorchBackend(config, weights)
    backend.initialize(sequences.state, num_blocks=sequences.num_blocks, max_num_batched_tokens=4096)
    return backend


def compare(kernels: CDLL, config: ModelConfig, lengths: list[int], block_size: int, most: int = 40) -> None:
    """Both decoders through the same steps, hidden states within float32's rounding."""
    sequences, weights = Sequences(config, lengths, block_size), weights_of(config)
    native = native_of(kernels, config, dict(weights), sequences, torch.float32)
    reference = torch_of(config, dict(weights), sequences)
    while (step := sequences.step(most)) is not None:
        batch, wanted = step
        with torch.inference_mode():
            expected = reference._hidden(batch, wanted)
        ours = native.hidden(batch, wanted)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-4)
        torch.testing.assert_close(native.logits(ours), reference._logits(expected), rtol=1e-4, atol=5e-4)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (4, 1), (16, 1)])
def test_heads(kernels: CDLL, head_dim: int, heads: int, kv_heads: int) -> None:
    config = config_of(head_dim=head_dim, num_heads=heads, num_kv_heads=kv_heads)
    compare(kernels, config, [97, 33, 1, 16], block_size=16)


def test_groups_larger_than_an_item(kernels: CDLL) -> None:
    """64 heads of queries for one of keys: more rows than an item holds otherwise."""
    compare(kernels, config_of(num_heads=64, num_kv_heads=1), [70, 20], block_size=16)


@pytest.mark.parametrize("block_size", [1, 4, 8, 16, 24, 32, 48])
def test_block_sizes(kernels: CDLL, block_size: int) -> None:
    compare(kernels, config_of(head_dim=32), [150, 70, 9], block_size)


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": True},
        {"qkv_bias": True},
        {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "qk_norm": True},
        {"tie_word_embeddings": True},
        {"hidden_size": 48, "intermediate_size": 80},
        {"vocab_size": 5, "hidden_size": 160, "intermediate_size": 16, "num_layers": 1},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_architectures(kernels: CDLL, changes: dict[str, Any]) -> None:
    compare(kernels, config_of(**changes), [97, 40, 1, 16], block_size=16)


@pytest.mark.parametrize("block_size", [16, 24])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_keys_split_among_threads(kernels: CDLL, block_size: int, threads: int) -> None:
    """One long sequence has fewer heads than there are threads to use, so its keys are split and joined."""
    kernels.set_threads(threads)
    compare(kernels, config_of(max_model_len=2048, num_heads=8), [1500, 300], block_size, most=700)


@pytest.mark.parametrize("kinds", [("int4", "int4", "int8"), ("int8", "float32", "float32"), ("int4", "int4", "int4")])
def test_kinds_of_weights_side_by_side(kernels: CDLL, kinds: tuple[str, str, str]) -> None:
    """Queries, keys and values of different kinds are different products; gate and up too."""
    config = config_of(qkv_bias=True)
    packed: dict[str, Weight] = dict(weights_of(config))
    kind_of = {"q_proj": kinds[0], "k_proj": kinds[1], "v_proj": kinds[2], "gate_proj": kinds[0], "up_proj": kinds[2]}
    kind_of |= {"embed_tokens": kinds[2], "o_proj": "int4", "down_proj": "int8"}
    for name, weight in packed.items():
        kind = kind_of.get(name.split(".")[-2])
        if name.endswith(".weight") and kind in ("int4", "int8"):
            assert isinstance(weight, torch.Tensor)
            packed[name] = quantize(weight, 4 if kind == "int4" else 8)
    plain = {name: w.dequantize(torch.float32) if isinstance(w, QuantizedTensor) else w for name, w in packed.items()}
    sequences = Sequences(config, [97, 40, 5], 16)
    native = native_of(kernels, config, packed, sequences, torch.float32)
    reference = torch_of(config, dict(plain), sequences)
    while (step := sequences.step(40)) is not None:
        with torch.inference_mode():
            torch.testing.assert_close(native.hidden(*step), reference._hidden(*step), rtol=1e-4, atol=3e-4)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_bfloat16_is_no_further_from_the_truth_than_torch(kernels: CDLL, qk_norm: bool) -> None:
    """Root mean square of the error against the same weights in float32; the kernels round less often than torch."""
    config = config_of(head_dim=64, hidden_size=128, intermediate_size=256, num_layers=4, qk_norm=qk_norm)
    weights = {name: weight.bfloat16() for name, weight in weights_of(config).items()}
    sequences = Sequences(config, [150, 70, 33], 16)
    native = native_of(kernels, config, dict(weights), sequences, torch.bfloat16)
    assert native.dtype == (torch.bfloat16 if kernels.has_dot() else torch.float32)
    rounded = torch_of(config, dict(weights), sequences)
    exact = torch_of(config, {name: weight.float() for name, weight in weights.items()}, sequences)
    errors = np.zeros(2)
    while (step := sequences.step(40)) is not None:
        with torch.inference_mode():
            truth = exact._hidden(*step)
            errors += [float((ours.float() - truth).square().sum()) for ours in (native.hidden(*step), rounded._hidden(*step))]
    assert errors[0] <= errors[1]
    assert errors[1] > 0


def test_a_sequence_does_not_see_what_others_left_in_its_blocks(kernels: CDLL) -> None:
    """Lanes of a panel that no token has been written to hold another sequence's keys and values."""
    config = config_of()
    sequences, weights = Sequences(config, [21], 16), weights_of(config)
    native = native_of(kernels, config, dict(weights), sequences, torch.float32)
    sequences.state.num_tokens[0] = 21
    batch = batch_of(sequences.state, [(0, 0)])
    alone = native.hidden(batch, np.arange(21))
    dirty = native_of(kernels, config, dict(weights), sequences, torch.float32)
    cache = PagedKvCache(
        num_layers=2,
        num_blocks=sequences.num_blocks,
        num_kv_heads=2,
        block_size=16,
        head_dim=16,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    for layer in cache.layers:
        layer.fill_(1e6)
    dirty.attach(cache, 16)
    assert torch.equal(dirty.hidden(batch, np.arange(21)), alone)
