"""One decoder for Llama, Mistral, Qwen2 and Qwen3: RMSNorm, grouped-query attention, SwiGLU."""

from copy import copy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from vllm_model.attention import AttentionPlan, GqaAttention
from vllm_model.kv_cache import PagedKvCache
from vllm_model.model_config import ModelConfig
from vllm_model.rotary import apply_rotary, rotary_tables


@dataclass(slots=True)
class Linear:
    """``x @ weight.T + bias``; weight ``[out, in]``."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(slots=True)
class Layer:
    """The weights of one layer; q, k and v are one product, gate and up another."""

    input_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Linear
    post_norm: torch.Tensor
    gate_up: Linear
    down: Linear


class Decoder:
    """The forward pass.

    Args:
        config: Its shape.
        weights: By Hugging Face's names; emptied, so that merged tensors do not stay twice in memory.
        max_len: Positions to make rotary tables for.
    """

    def __init__(self, config: ModelConfig, weights: dict[str, torch.Tensor], max_len: int) -> None:
        self.config = config
        self.embedding = weights.pop("model.embed_tokens.weight")
        self.norm = weights.pop("model.norm.weight")
        self.lm_head = Linear(self.embedding if config.tie_word_embeddings else weights.pop("lm_head.weight"))
        self.layers = [_take_layer(weights, f"model.layers.{i}") for i in range(config.num_layers)]
        assert not weights, f"weights without a use: {list(weights)[:3]}"
        cos, sin = rotary_tables(config.rope, config.head_dim, max_len)
        self.rotary = cos.to(self.embedding.device), sin.to(self.embedding.device)
        self._attention: list[GqaAttention] = []

    def cut(self, layers: int) -> "Decoder":
        """The same weights with the first layers alone."""
        short = copy(self)
        short.layers = self.layers[:layers]
        short.config = replace(self.config, num_layers=len(short.layers))
        return short

    def attach(self, cache: PagedKvCache) -> None:
        """Use this cache from now on."""
        self._attention = [GqaAttention(i, self.config.num_heads, cache) for i in range(self.config.num_layers)]

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, plan: AttentionPlan, rows: torch.Tensor | None
    ) -> torch.Tensor:
        """Run a step's tokens: the :meth:`logits` of their :meth:`hidden` states, float32 ``[num_rows, vocab_size]``."""
        return self.logits(self.hidden(token_ids, positions, plan, rows))

    def hidden(
        self, token_ids: torch.Tensor, positions: torch.Tensor, plan: AttentionPlan, rows: torch.Tensor | None
    ) -> torch.Tensor:
        """Run a step's tokens through the layers.

        Args:
            token_ids, positions: int64 ``[num_tokens]``.
            rows: int64 ``[num_rows]``, the tokens whose logits are wanted; None: all.

        Returns:
            ``[num_rows, hidden_size]``.
        """
        eps = self.config.rms_norm_eps
        cos, sin = (table[positions][:, None] for table in self.rotary)  # [num_tokens, 1, head_dim / 2]
        residual = F.embedding(token_ids, self.embedding)  # [num_tokens, hidden]
        for index, layer in enumerate(self.layers):
            x = rms_norm(residual, layer.input_norm, eps)
            attended = self._attend(index, layer, x, cos, sin, plan)
            if index == len(self.layers) - 1 and rows is not None:
                # Past the last attention only the rows whose logits are wanted matter.
                attended, residual = attended[rows], residual[rows]
            residual = residual + layer.o(attended)
            x = rms_norm(residual, layer.post_norm, eps)
            gate, up = layer.gate_up(x).chunk(2, dim=-1)
            residual = residual + layer.down(F.silu(gate) * up)
        return rms_norm(residual, self.norm, eps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of hidden states ``[num_rows, hidden_size]``: float32 ``[num_rows, vocab_size]``."""
        return self.lm_head(hidden).float()

    def _attend(
        self, index: int, layer: Layer, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, plan: AttentionPlan
    ) -> torch.Tensor:
        config = self.config
        heads = layer.qkv(x).view(len(x), -1, config.head_dim)  # [num_tokens, num_heads + 2 * num_kv_heads, head_dim]
        q, k, v = torch.split(heads, [config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = rms_norm(q, layer.q_norm, config.rms_norm_eps), rms_norm(k, layer.k_norm, config.rms_norm_eps)
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        else:
            both = apply_rotary(heads[:, : config.num_heads + config.num_kv_heads], cos, sin)
            q, k = torch.split(both, [config.num_heads, config.num_kv_heads], dim=1)
        return self._attention[index](q, k, v, plan)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / rms(x) * weight`` over the last dimension, computed in float32, in ``x``'s dtype."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def _take_layer(weights: dict[str, torch.Tensor], prefix: str) -> Layer:
    def merged(*names: str) -> Linear:
        parts = [weights.pop(f"{prefix}.{name}.weight") for name in names]
        biases = [weights.pop(f"{prefix}.{name}.bias", None) for name in names]
        present = [bias for bias in biases if bias is not None]
        weight = parts[0] if len(parts) == 1 else torch.cat(parts)
        return Linear(weight, torch.cat(present) if present else None)

    return Layer(
        input_norm=weights.pop(f"{prefix}.input_layernorm.weight"),
        qkv=merged("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        q_norm=weights.pop(f"{prefix}.self_attn.q_norm.weight", None),
        k_norm=weights.pop(f"{prefix}.self_attn.k_norm.weight", None),
        o=merged("self_attn.o_proj"),
        post_norm=weights.pop(f"{prefix}.post_attention_layernorm.weight"),
        gate_up=merged("mlp.gate_proj", "mlp.up_proj"),
        down=merged("mlp.down_proj"),
    )
