"""A model's shape, read from ``config.json`` or GGUF metadata.

One decoder serves several architectures; what tells them apart is here, and the names of their weights too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vllm_traits.errors import ModelLoadError, UnsupportedModelError

RopeType = Literal["default", "linear", "llama3", "yarn"]

HF_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
GGUF_ARCHITECTURES = {"llama": "llama", "mistral": "mistral", "mistral3": "mistral", "qwen2": "qwen2", "qwen3": "qwen3"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding; the names of the scalings' parameters are Hugging Face's."""

    theta: float = 10000.0
    type: RopeType = "default"
    factor: float = 1.0
    original_max_position: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder: grouped-query attention, rotary positions, RMSNorm, SwiGLU.

    Attributes:
        family: ``llama``, ``mistral``, ``qwen2`` or ``qwen3``.
        qk_norm: RMSNorm over each head of queries and keys (Qwen3).
        dtype: What the weights are stored in: ``float32``, ``float16`` or ``bfloat16``; None: quantized.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_model_len: int
    tie_word_embeddings: bool
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    eos_token_ids: tuple[int, ...] = ()
    dtype: str | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ModelLoadError(f"The model's {name} is {getattr(self, name)}; it must be at least 1.")
        if self.max_model_len < 2:
            raise ModelLoadError(f"The model's context length is {self.max_model_len}; it must be at least 2.")
        if self.num_heads % self.num_kv_heads:
            raise ModelLoadError(
                f"The model's num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})."
            )
        if self.head_dim % 2:
            raise ModelLoadError(f"The model's head_dim is {self.head_dim}; rotary positions need an even one.")
        if not self.rms_norm_eps >= 0 or not self.rope.theta > 0 or not self.rope.factor > 0:
            raise ModelLoadError("The model's rms_norm_eps, rope theta and rope factor must be positive numbers.")

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """From ``config.json``.

        Raises:
            UnsupportedModelError: Another architecture or rotary scaling.
            ModelLoadError: A value is missing or of the wrong type.
        """
        family = _hf_family(raw)
        heads, hidden = _number(raw, "num_attention_heads"), _number(raw, "hidden_size")
        if heads < 1:
            raise ModelLoadError(f"config.json: num_attention_heads is {heads}; it must be at least 1.")
        max_len = _number(raw, "max_position_embeddings")
        window = raw.get("sliding_window")
        if window is not None and (family == "mistral" or raw.get("use_sliding_window")):
            max_len = min(max_len, int(window))  # within the window, attention is the full one
        activation = raw.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise UnsupportedModelError(f"config.json: hidden_act {activation!r} is not supported, only silu.")
        eos = raw.get("eos_token_id")
        return cls(
            family=family,
            vocab_size=_number(raw, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_number(raw, "intermediate_size"),
            num_layers=_number(raw, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=_number(raw, "num_key_value_heads", heads),
            head_dim=_number(raw, "head_dim", hidden // heads),
            rms_norm_eps=_real(raw, "rms_norm_eps", 1e-6),
            rope=_hf_rope(raw),
            max_model_len=max_len,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qk_norm=family == "qwen3",
            qkv_bias=family == "qwen2" or bool(raw.get("attention_bias", False)),
            o_bias=family != "qwen2" and bool(raw.get("attention_bias", False)),
            mlp_bias=bool(raw.get("mlp_bias", False)),
            eos_token_ids=tuple(int(token) for token in (eos if isinstance(eos, list) else [eos] if eos is not None else [])),
            dtype=raw.get("dtype") or raw.get("torch_dtype") or "float32",
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "ModelConfig":
        """From a GGUF file's metadata, with ``{arch}.tie_word_embeddings`` added.

        Raises:
            UnsupportedModelError: Another architecture or rotary scaling.
            ModelLoadError: A value is missing or of the wrong type.
        """
        arch = metadata.get("general.architecture")
        if arch not in GGUF_ARCHITECTURES:
            raise UnsupportedModelError(
                f"GGUF architecture {arch!r} is not supported; these are: {', '.join(GGUF_ARCHITECTURES)}."
            )
        family = GGUF_ARCHITECTURES[str(arch)]
        values = {key.removeprefix(f"{arch}."): value for key, value in metadata.items()}
        heads, hidden = _number(values, "attention.head_count"), _number(values, "embedding_length")
        if heads < 1:
            raise ModelLoadError(f"GGUF: attention.head_count is {heads}; it must be at least 1.")
        tokens = metadata.get("tokenizer.ggml.tokens", ())
        eos = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
        return cls(
            family=family,
            vocab_size=len(tokens) or _number(values, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_number(values, "feed_forward_length"),
            num_layers=_number(values, "block_count"),
            num_heads=heads,
            num_kv_heads=_number(values, "attention.head_count_kv", heads),
            head_dim=_number(values, "attention.key_length", hidden // heads),
            rms_norm_eps=_real(values, "attention.layer_norm_rms_epsilon", 1e-6),
            rope=_gguf_rope(values),
            max_model_len=_number(values, "context_length"),
            tie_word_embeddings=bool(values["tie_word_embeddings"]),
            qk_norm=family == "qwen3",
            qkv_bias=family == "qwen2",
            eos_token_ids=tuple(dict.fromkeys(int(token) for token in eos if token is not None)),
        )

    def expected_tensors(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face's name and the shape of every weight."""
        hidden, inner, dim = self.hidden_size, self.intermediate_size, self.head_dim
        q, kv = self.num_heads * dim, self.num_kv_heads * dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}"
            shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
            for name, rows in (("q", q), ("k", kv), ("v", kv)):
                shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (rows, hidden)
                if self.qkv_bias:
                    shapes[f"{prefix}.self_attn.{name}_proj.bias"] = (rows,)
            shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, q)
            if self.o_bias:
                shapes[f"{prefix}.self_attn.o_proj.bias"] = (hidden,)
            if self.qk_norm:
                shapes[f"{prefix}.self_attn.q_norm.weight"] = shapes[f"{prefix}.self_attn.k_norm.weight"] = (dim,)
            shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
            for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
                shapes[f"{prefix}.mlp.{name}_proj.weight"] = shape
                if self.mlp_bias:
                    shapes[f"{prefix}.mlp.{name}_proj.bias"] = shape[:1]
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes


def _hf_family(raw: Mapping[str, Any]) -> str:
    architectures = raw.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if name not in HF_ARCHITECTURES:
        raise UnsupportedModelError(f"Architecture {name!r} is not supported; these are: {', '.join(HF_ARCHITECTURES)}.")
    return HF_ARCHITECTURES[name]


def _hf_rope(raw: Mapping[str, Any]) -> RopeConfig:
    """Of transformers 5 (``rope_parameters``) or before (``rope_theta`` and ``rope_scaling``)."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise ModelLoadError("config.json: rope_scaling must be an object.")
    theta = _real(scaling if "rope_theta" in scaling else raw, "rope_theta", 10000.0)
    if _real(scaling, "partial_rotary_factor", _real(raw, "partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedModelError("config.json: partial_rotary_factor other than 1 is not supported.")
    kind = _rope_type(scaling.get("rope_type", scaling.get("type", "default")))
    original = scaling.get("original_max_position_embeddings", raw.get("original_max_position_embeddings"))
    if original is None and kind in ("llama3", "yarn"):
        original = raw.get("max_position_embeddings")
    attention = scaling.get("attention_factor")
    return RopeConfig(
        theta=theta,
        type=kind,
        factor=_real(scaling, "factor", 1.0),
        original_max_position=None if original is None else int(original),
        low_freq_factor=_real(scaling, "low_freq_factor", 1.0),
        high_freq_factor=_real(scaling, "high_freq_factor", 4.0),
        beta_fast=_real(scaling, "beta_fast", 32.0),
        beta_slow=_real(scaling, "beta_slow", 1.0),
        attention_factor=None if attention is None else float(attention),
        truncate=bool(scaling.get("truncate", True)),
    )


def _gguf_rope(values: Mapping[str, Any]) -> RopeConfig:
    kind = values.get("rope.scaling.type", "none")
    original = values.get("rope.scaling.original_context_length")
    if original is None and kind == "yarn":
        original = values.get("context_length")
    return RopeConfig(
        theta=_real(values, "rope.freq_base", 10000.0),
        type="default" if kind == "none" else _rope_type(kind),
        factor=_real(values, "rope.scaling.factor", 1.0),
        original_max_position=None if original is None else int(original),
        low_freq_factor=_real(values, "rope.scaling.low_freq_factor", 1.0),
        high_freq_factor=_real(values, "rope.scaling.high_freq_factor", 4.0),
    )


def _rope_type(kind: object) -> RopeType:
    if kind in ("default", "linear", "llama3", "yarn"):
        return kind
    raise UnsupportedModelError(f"Rotary scaling {kind!r} is not supported; these are: default, linear, llama3, yarn.")


def _number(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = values.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int):
        raise ModelLoadError(f"The model's {key} is {value!r}; it must be an integer.")
    return value


def _real(values: Mapping[str, Any], key: str, default: float) -> float:
    value = values.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ModelLoadError(f"The model's {key} is {value!r}; it must be a number.")
    return float(value)
