# mypy: disable-error-code="no-untyped-call"
"""The forward pass in kernels, from token ids to logits, whoever attends."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from vllm_model.cuda.device import Device
from vllm_model.cuda.residual_stream import Choose, ResidualStream
from vllm_model.decoder import Decoder
from vllm_model.kernels.cluster_linear import has_clusters
from vllm_model.kernels.decode_plan import DecodePlan
from vllm_model.kernels.gemv import MAX_ROWS, thin_linear
from vllm_model.kernels.library_prefill import LEAST, can_use_library, library_prefill, padded
from vllm_model.kernels.linear import LinearWorkspace
from vllm_model.kernels.linear_table import choose_linear, has_table
from vllm_model.kernels.paged_decode import paged_decode
from vllm_model.kernels.paged_prefill import paged_prefill
from vllm_model.kernels.qk_norm_rope import qk_norm_rope
from vllm_model.kernels.rms_norm import rms_norm
from vllm_model.kernels.shared_prefix import PrefixWorkspace, attend_prefix
from vllm_model.kernels.warp_decode import Rotary, rotary_decode, suits_warps
from vllm_model.kv_cache import PagedKvCache

PARTS_ROOM = 1 << 22
"""Float32 values of the parts of products that cut their inputs."""

Attend = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""From a layer, its queries ``[tokens, heads, head_dim]`` and its QKV ``[tokens or more, width]`` to what is attended."""


class Forward:
    """A decoder's weights, run with Triton kernels.

    Args:
        device: Where it runs.
        decoder: The weights.
        cache: Where keys and values go.
        tables: int32 ``[slots, max_blocks]``, the block tables.

    Attributes:
        has_library: Whether whole prompts may be attended by the library's kernel.
    """

    def __init__(self, device: Device, decoder: Decoder, cache: PagedKvCache, tables: torch.Tensor) -> None:
        self.config = decoder.config
        self.cache, self.tables = cache, tables
        self._decoder, self._pdl = decoder, device.pdl
        ours = has_table(device.device)
        self._choose: Choose = (
            partial(choose_linear, clusters=has_clusters(device.device)) if ours else lambda rows, n, k, silu: None
        )
        self._workspace = LinearWorkspace(PARTS_ROOM if ours else 0, device.device)
        self._thin_rows = MAX_ROWS if device.device.type == "cuda" else 0  # of interpreted kernels these are the slowest
        self._cos_sin = torch.cat(decoder.rotary, dim=1).contiguous()  # [max_len, head_dim]
        self.has_library = can_use_library(device.device, decoder.embedding.dtype, self.config.head_dim)

    def layers(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        attend: Attend,
        keep: torch.Tensor | None = None,
        *,
        room: int = 0,
        raw: bool = False,
    ) -> torch.Tensor:
        """Run a step's tokens through the layers.

        Args:
            token_ids, positions, slots: int32 ``[tokens]``; where the slot is -1, nothing is written.
            attend: The attention of this step.
            keep: int64 ``[rows]``, tokens that go on after the last attention; None: all.
            room: Queries and QKV have that many rows, the last of them zeros; 0: as many as tokens.
            raw: In place of queries, ``attend`` is given all heads as the product left them, ``[tokens, heads, head_dim]``,
                and writes keys and values itself.

        Returns:
            The hidden states ``[rows, hidden]`` before the last norm.
        """
        decoder, config, tokens, pdl = self._decoder, self.config, len(token_ids), self._pdl
        stream = ResidualStream(
            F.embedding(token_ids, decoder.embedding),
            eps=config.rms_norm_eps,
            choose=self._choose,
            workspace=self._workspace,
            thin_rows=self._thin_rows,
            pdl=pdl,
        )
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        make = stream.residual.new_zeros if room > tokens else stream.residual.new_empty
        qkv_room = make(room, width) if room else None
        q_room = make(room, config.num_heads, config.head_dim) if room else None
        next_norms = [*(layer.input_norm for layer in decoder.layers[1:]), decoder.norm]
        for index, (layer, next_norm) in enumerate(zip(decoder.layers, next_norms, strict=True)):
            qkv = stream.read(layer.qkv, layer.input_norm, out=None if qkv_room is None else qkv_room[:tokens])
            if raw:
                q = qkv.view(tokens, -1, config.head_dim)
            else:
                q = qk_norm_rope(
                    qkv,
                    self._cos_sin,
                    positions,
                    slots,
                    self.tables,
                    self.cache.layers[index],
                    config.num_heads,
                    q_weight=layer.q_norm,
                    k_weight=layer.k_norm,
                    eps=config.rms_norm_eps,
                    k_scale=self.cache.k_scales[index],
                    v_scale=self.cache.v_scales[index],
                    out=None if q_room is None else q_room[:tokens],
                    keep_k=room > 0,
                    pdl=pdl,
                )
            attended = attend(index, q if q_room is None else q_room, qkv if qkv_room is None else qkv_room).view(tokens, -1)
            if keep is not None and index == len(decoder.layers) - 1:
                attended = attended[keep]
                stream.keep(keep)
            stream.add(attended, layer.o, layer.post_norm)
            stream.add(stream.read(layer.gate_up, layer.post_norm, silu=True), layer.down, next_norm)
        return stream.total()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of :meth:`layers`' hidden states: ``[rows, vocab_size]``."""
        decoder, pdl = self._decoder, self._pdl
        x = rms_norm(hidden, decoder.norm, self.config.rms_norm_eps, pdl=pdl)
        return thin_linear(x, decoder.lm_head.weight, pdl=pdl) if len(x) <= self._thin_rows else decoder.lm_head(x)

    def attend_single(self, layer: int, q: torch.Tensor, plan: DecodePlan, lse: torch.Tensor | None = None) -> torch.Tensor:
        """Attention of rows of one token, as :func:`paged_decode`."""
        cache = self.cache
        scales = cache.k_scales[layer], cache.v_scales[layer]
        return paged_decode(q, cache.layers[layer], plan, lse=lse, k_scale=scales[0], v_scale=scales[1], pdl=self._pdl)

    def takes_raw(self, plan: DecodePlan) -> bool:
        """Whether :meth:`attend_raw` is there for the steps of a plan."""
        return suits_warps(plan, self.cache.layers[0], self._decoder.embedding.dtype, self._cos_sin.shape[1])

    def attend_raw(self, layer: int, heads: torch.Tensor, plan: DecodePlan) -> torch.Tensor:
        """Attention of rows of one token whose heads are as the product left them; ``plan`` leaves the newest keys out."""
        weights = self._decoder.layers[layer]
        rotary = Rotary(self._cos_sin, weights.q_norm, weights.k_norm, self.config.rms_norm_eps)
        return rotary_decode(heads, self.cache.layers[layer], plan, rotary, pdl=self._pdl)

    def attend_few(self, layer: int, q: torch.Tensor, plan: DecodePlan, queries: int, starts: torch.Tensor) -> torch.Tensor:
        """``queries`` tokens of each row, the first at ``starts``, int32 ``[rows]``."""
        cache = self.cache
        return paged_decode(
            q,
            cache.layers[layer],
            plan,
            queries=queries,
            first_positions=starts,
            k_scale=cache.k_scales[layer],
            v_scale=cache.v_scales[layer],
            pdl=self._pdl,
        )

    def attend_chunks(
        self, layer: int, q: torch.Tensor, slots: torch.Tensor, starts: torch.Tensor, computed: torch.Tensor
    ) -> torch.Tensor:
        """Attention of rows of any tokens, as :func:`paged_prefill`."""
        cache = self.cache
        scales = cache.k_scales[layer], cache.v_scales[layer]
        return paged_prefill(q, cache.layers[layer], self.tables, slots, starts, computed, k_scale=scales[0], v_scale=scales[1])

    def attend_prefix(self, layer: int, q: torch.Tensor, leader: torch.Tensor, workspace: PrefixWorkspace) -> None:
        """Attention of all rows over one shared prefix, as :func:`attend_prefix` of the kernels."""
        cache = self.cache
        scales = cache.k_scales[layer], cache.v_scales[layer]
        attend_prefix(
            q, cache.layers[layer], self.tables, leader, workspace, k_scale=scales[0], v_scale=scales[1], pdl=self._pdl
        )

    def load_library(self) -> None:
        """Have the library of :meth:`attend_prompt` loaded, by a short prompt; its plans are each thread's own."""
        config, like = self.config, self._decoder.embedding
        heads = like.new_zeros(padded(LEAST), config.num_heads + 2 * config.num_kv_heads, config.head_dim)
        q, k, v = heads.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        library_prefill(q, k, v, LEAST)

    def attend_prompt(self, q: torch.Tensor, qkv: torch.Tensor, start: int, length: int) -> torch.Tensor:
        """The library's attention of the whole prompt at ``start`` of the step; ``q`` and ``qkv`` have room behind it."""
        config, end = self.config, start + padded(length)
        heads = qkv[start:end].view(end - start, -1, config.head_dim)
        _, k, v = heads.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        return library_prefill(q[start:end], k, v, length)
