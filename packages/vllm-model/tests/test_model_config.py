"""Configurations are read as their authors meant, or refused by name."""

from typing import Any

import pytest

from vllm_model.model_config import ModelConfig
from vllm_traits.errors import ModelLoadError, UnsupportedModelError

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "eos_token_id": [1, 2],
}


def test_qwen3() -> None:
    config = ModelConfig.from_hf(QWEN3)
    assert config.qk_norm
    assert not config.qkv_bias
    assert (config.head_dim, config.num_kv_heads) == (16, 2)
    assert config.rope.theta == 1e6
    assert config.eos_token_ids == (1, 2)
    assert config.dtype == "bfloat16"
    tensors = config.expected_tensors()
    assert tensors["model.layers.1.self_attn.q_proj.weight"] == (64, 32)
    assert tensors["model.layers.0.self_attn.k_norm.weight"] == (16,)
    assert "lm_head.weight" not in tensors


def test_qwen2_has_biases_and_llama_may() -> None:
    qwen2 = ModelConfig.from_hf(QWEN3 | {"architectures": ["Qwen2ForCausalLM"]})
    assert "model.layers.0.self_attn.q_proj.bias" in qwen2.expected_tensors()
    assert "model.layers.0.self_attn.o_proj.bias" not in qwen2.expected_tensors()
    llama = QWEN3 | {"architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": True}
    assert {"model.layers.0.self_attn.o_proj.bias", "model.layers.0.mlp.up_proj.bias"} <= set(
        ModelConfig.from_hf(llama).expected_tensors()
    )


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", ["type", "rope_type"])
def test_rope_scaling_in_both_spellings(key: str, name: str) -> None:
    config = ModelConfig.from_hf(QWEN3 | {key: {name: "linear", "factor": 4.0}})
    assert (config.rope.type, config.rope.factor) == ("linear", 4.0)


def test_mistral_is_limited_to_its_window() -> None:
    mistral = QWEN3 | {"architectures": ["MistralForCausalLM"], "sliding_window": 128}
    assert ModelConfig.from_hf(mistral).max_model_len == 128
    assert ModelConfig.from_hf(mistral | {"sliding_window": None}).max_model_len == 512
    assert ModelConfig.from_hf(QWEN3 | {"sliding_window": 128, "use_sliding_window": False}).max_model_len == 512


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, UnsupportedModelError, "GPT2LMHeadModel.*Qwen3ForCausalLM"),
        ({"architectures": None}, UnsupportedModelError, "Qwen3ForCausalLM"),
        ({"rope_scaling": {"type": "longrope"}}, UnsupportedModelError, "longrope.*yarn"),
        ({"hidden_act": "gelu"}, UnsupportedModelError, "gelu"),
        ({"num_attention_heads": 0}, ModelLoadError, "num_attention_heads"),
        ({"num_key_value_heads": 3}, ModelLoadError, "num_kv_heads"),
        ({"hidden_size": "big"}, ModelLoadError, "hidden_size"),
        ({"hidden_size": None}, ModelLoadError, "hidden_size"),
        ({"head_dim": 15}, ModelLoadError, "head_dim"),
        ({"vocab_size": -1}, ModelLoadError, "vocab_size"),
        ({"rms_norm_eps": "x"}, ModelLoadError, "rms_norm_eps"),
    ],
)
def test_what_does_not_work_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ModelConfig.from_hf(QWEN3 | change)


GGUF = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 256,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 5000.0,
    "llama.tie_word_embeddings": True,
    "tokenizer.ggml.tokens": ["a", "b"],
    "tokenizer.ggml.eos_token_id": 1,
}


def test_gguf() -> None:
    config = ModelConfig.from_gguf(GGUF)
    assert (config.family, config.head_dim, config.vocab_size, config.eos_token_ids) == ("llama", 8, 2, (1,))
    assert config.rope.theta == 5000
    assert config.dtype is None
    yarn = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0}
    assert ModelConfig.from_gguf(GGUF | yarn).rope.original_max_position == 256


def test_an_unknown_gguf_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'gemma'.*qwen3"):
        ModelConfig.from_gguf(GGUF | {"general.architecture": "gemma"})
