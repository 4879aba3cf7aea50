"""The decoder of :mod:`vllm_model.decoder` in compiled kernels: a step is one call."""

import ctypes
import math
from collections.abc import Sequence

import numpy as np
import torch

from vllm_model.kv_cache import PagedKvCache
from vllm_model.model_config import ModelConfig
from vllm_model.native import PANEL, DecoderStruct, LayerStruct, PackedWeight, ProductStruct, StepStruct
from vllm_model.quantization import QuantizedTensor, Weight, concatenated
from vllm_model.rotary import rotary_tables
from vllm_model.verifier import Indices
from vllm_traits.batch import Batch
from vllm_traits.errors import BackendOutOfMemoryError


class NativeDecoder:
    """Weights packed for the kernels, and the calls.

    Between products all numbers are float32. What a product and the cache take is bfloat16 if ``dtype`` is and the processor
    multiplies such pairs, else float32.

    Args:
        kernels: Of :func:`~vllm_model.native.load_kernels`.
        config: The model's shape.
        weights: By Hugging Face's names; emptied.
        max_len: Positions to make rotary tables for.
        dtype: bfloat16 or float32.

    Attributes:
        dtype: Of the cache.
        nbytes: Of the packed weights.
    """

    def __init__(
        self, kernels: ctypes.CDLL, config: ModelConfig, weights: dict[str, Weight], max_len: int, dtype: torch.dtype
    ) -> None:
        self.config = config
        self.dtype = torch.bfloat16 if dtype == torch.bfloat16 and kernels.has_dot() else torch.float32
        self._kernels = kernels
        self._kept: list[object] = []  # what the structures point to
        self._cache: PagedKvCache | None = None  # likewise
        self.nbytes = 0
        embedding = self._packed([weights.pop("model.embed_tokens.weight")])[0]
        head = embedding if config.tie_word_embeddings else self._packed([weights.pop("lm_head.weight")])[0]
        self._head = head
        layers = (LayerStruct * config.num_layers)(
            *(self._layer(weights, f"model.layers.{i}") for i in range(config.num_layers))
        )
        norm = _plain(weights, "model.norm.weight")
        assert norm is not None
        assert not weights, f"weights without a use: {list(weights)[:3]}"
        cos, sin = rotary_tables(config.rope, config.head_dim, max_len)
        self._layers = layers
        self._struct = DecoderStruct(
            dot=self.dtype == torch.bfloat16,
            num_layers=config.num_layers,
            hidden=config.hidden_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate=config.intermediate_size,
            eps=config.rms_norm_eps,
            embedding=embedding.struct,
            lm_head=head.struct,
            norm=self._floats(norm),
            cos=self._floats(cos),
            sin=self._floats(sin),
            layers=layers,
        )

    @staticmethod
    def stored_tokens(block_size: int) -> int:
        """Room of a block in tokens: a block size that is no multiple of 16 leaves lanes of its panels empty."""
        return block_size // math.gcd(block_size, PANEL) * PANEL

    def attach(self, cache: PagedKvCache, block_size: int) -> None:
        """Use this cache from now on, made for :meth:`stored_tokens` of ``block_size``; its order is the kernels' own."""
        self._struct.block_size, self._struct.panel_tokens = block_size, math.gcd(block_size, PANEL)
        self._cache = cache  # even a step that runs while the backend is closed writes to it
        for layer, tensor in zip(self._layers, cache.layers, strict=True):
            layer.cache = tensor.data_ptr()

    def hidden(self, batch: Batch, wanted: Indices) -> torch.Tensor:
        """Run a step's tokens: float32 ``[len(wanted), hidden_size]``, the last hidden states of the wanted ones, normed.

        Raises:
            BackendOutOfMemoryError: No memory for the step; nothing was changed.
        """
        out = torch.empty(len(wanted), self.config.hidden_size)
        everything = len(wanted) == batch.num_tokens
        assert 0 <= batch.token_ids.min() <= batch.token_ids.max() < self.config.vocab_size
        wanted = np.ascontiguousarray(wanted, np.int64)
        arrays = (batch.token_ids, batch.query_start, batch.num_computed, batch.slots, batch.state.block_tables)
        token_ids, query_start, num_computed, slots, tables = (np.ascontiguousarray(array, np.int32) for array in arrays)
        step = StepStruct(
            num_tokens=batch.num_tokens,
            num_rows=batch.num_rows,
            num_wanted=len(wanted),
            token_ids=token_ids.ctypes.data,
            query_start=query_start.ctypes.data,
            num_computed=num_computed.ctypes.data,
            slots=slots.ctypes.data,
            tables=tables.ctypes.data,
            table_stride=tables.shape[1],
            wanted=None if everything else wanted.ctypes.data,
            hidden=out.data_ptr(),
        )
        if self._kernels.decoder_hidden(self._struct, step):
            raise BackendOutOfMemoryError(f"A step of {batch.num_tokens} tokens ran out of memory.")
        return out

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of hidden states: float32 ``[rows, vocab_size]``."""
        return self._head(hidden, dot=bool(self._struct.dot))

    def release(self) -> None:
        """Give back the memory that steps have kept for the next ones; another step takes it anew."""
        self._kernels.release()

    def _layer(self, weights: dict[str, Weight], prefix: str) -> LayerStruct:
        def named(*names: str) -> list[PackedWeight]:
            biases = [_plain(weights, f"{prefix}.{name}.bias") for name in names]
            return self._packed([weights.pop(f"{prefix}.{name}.weight") for name in names], biases)

        def norm(name: str) -> int | None:
            weight = _plain(weights, f"{prefix}.{name}.weight")
            return None if weight is None else self._floats(weight)

        qkv = [packed.struct for packed in named("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")]
        array = (ProductStruct * len(qkv))(*qkv)
        self._kept.append(array)
        return LayerStruct(
            input_norm=norm("input_layernorm"),
            qkv=array,
            num_qkv=len(qkv),
            q_norm=norm("self_attn.q_norm"),
            k_norm=norm("self_attn.k_norm"),
            o=named("self_attn.o_proj")[0].struct,
            post_norm=norm("post_attention_layernorm"),
            gate=named("mlp.gate_proj")[0].struct,
            up=named("mlp.up_proj")[0].struct,
            down=named("mlp.down_proj")[0].struct,
        )

    def _packed(self, parts: list[Weight], biases: Sequence[torch.Tensor | None] = (None,)) -> list[PackedWeight]:
        """One product of all parts if they are of one kind, else one of each."""
        joined = _joined(parts)
        if joined is not None:
            given = [torch.zeros(part.shape[0]) if bias is None else bias for part, bias in zip(parts, biases, strict=True)]
            parts, biases = [joined], [None if all(bias is None for bias in biases) else torch.cat(given)]
        packed = [PackedWeight(self._kernels, part, bias) for part, bias in zip(parts, biases, strict=True)]
        self._kept += packed
        self.nbytes += sum(one.nbytes for one in packed)
        return packed

    def _floats(self, tensor: torch.Tensor) -> int:
        kept = tensor.float().contiguous()
        self._kept.append(kept)
        return kept.data_ptr()


def _plain(weights: dict[str, Weight], name: str) -> torch.Tensor | None:
    """What is never quantized, if it is there."""
    weight = weights.pop(name, None)
    assert not isinstance(weight, QuantizedTensor)
    return weight


def _joined(parts: list[Weight]) -> Weight | None:
    floats = [part for part in parts if isinstance(part, torch.Tensor)]
    quantized = [part for part in parts if isinstance(part, QuantizedTensor)]
    if not quantized:
        return floats[0] if len(floats) == 1 else torch.cat(floats)
    return concatenated(quantized) if not floats and len({part.bits for part in quantized}) == 1 else None
