# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"
"""The model on a CUDA device: a decode step is one graph, from token ids to the sampled token.

What a running sequence needs stands in rows of device tensors, by slot: block table, last token, sampling parameters. A step
sends one small buffer from the host (which slots, how far each is, which blocks are new) and reads one back (the tokens), so
step N+1 is launched before step N has been read. Steps of single tokens replay a graph of the next larger size; others, and
rows whose logits need the host, launch the same kernels one by one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from vllm_model.decoder import Decoder, Layer
from vllm_model.host_sampling import may_need_host, needs_host, sample_on_host, wanted_tokens
from vllm_model.kernels.gemv import thin_linear
from vllm_model.kernels.paged_decode import DecodePlan, paged_decode
from vllm_model.kernels.paged_prefill import paged_prefill
from vllm_model.kernels.qk_norm_rope import qk_norm_rope
from vllm_model.kernels.rms_norm import rms_norm
from vllm_model.kernels.sampling import SamplerWorkspace, sample
from vllm_model.kernels.silu_mul import silu_mul
from vllm_model.kv_cache import PagedKvCache
from vllm_model.model_config import ModelConfig
from vllm_traits.backend import CompletedStep, KvCacheBudget, ModelSpec
from vllm_traits.batch import Batch, BatchOutput, BatchState
from vllm_traits.errors import BackendError, BackendOutOfMemoryError, ConfigError

GRAPH_SIZES = (1, 2, 4, *range(8, 129, 8), *range(144, 257, 16))
"""Rows that decode graphs are captured for."""
RING = 4
"""Steps whose tokens may wait to be read."""
THIN_ROWS = 2
"""Most rows for which our own products beat the library's."""
FIELDS = 5
"""Of a row that the host sends: slot, position, token, place in the block tables, block."""


@triton.jit(do_not_specialize=["rows"])
def _begin_kernel(staged, tables, last_token, token_ids, positions, slots, seq_lens, rows, B: tl.constexpr):  # noqa: N803
    """Take a step's rows from what the host sent, ``staged`` int32 ``[FIELDS, rows]``; slot -1 is padding."""
    i = tl.arange(0, B)
    mask = i < rows
    slot = tl.load(staged + i, mask=mask, other=-1)
    position = tl.load(staged + rows + i, mask=mask, other=0)
    token = tl.load(staged + 2 * rows + i, mask=mask, other=0)
    place = tl.load(staged + 3 * rows + i, mask=mask, other=-1)
    block = tl.load(staged + 4 * rows + i, mask=mask, other=0)
    tl.store(tables + place, block, mask=mask & (place >= 0))
    last = tl.load(last_token + slot, mask=mask & (slot >= 0), other=0)
    tl.store(token_ids + i, tl.where(token < 0, last, token), mask=mask)
    tl.store(positions + i, position, mask=mask)
    tl.store(slots + i, slot, mask=mask)
    tl.store(seq_lens + i, tl.where(slot >= 0, position + 1, 0), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _keep_kernel(tokens, slots, last_token, rows, B: tl.constexpr):  # noqa: N803
    """``last_token[slots] = tokens``, but for slot -1."""
    i = tl.arange(0, B)
    slot = tl.load(slots + i, mask=i < rows, other=-1)
    tl.store(last_token + slot, tl.load(tokens + i, mask=i < rows, other=0), mask=slot >= 0)


Attend = Callable[[int, torch.Tensor], torch.Tensor]


@dataclass(slots=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    staged: torch.Tensor
    tokens: torch.Tensor


class _Step:
    """A step under way: its tokens lie in one place of the ring once the event has passed."""

    def __init__(self, tokens: torch.Tensor, event: torch.cuda.Event, sample: npt.NDArray[np.bool_]) -> None:
        self._tokens, self._event, self._sample = tokens, event, sample

    def done(self) -> bool:
        return bool(self._event.query())

    def result(self) -> BatchOutput:
        try:
            self._event.synchronize()
        except RuntimeError as error:
            raise BackendError(f"A step failed on the device: {error}") from error
        tokens = np.full((len(self._sample), 1), -1, np.int32)
        tokens[:, 0] = np.where(self._sample, self._tokens.numpy()[: len(self._sample)], -1)
        return BatchOutput(token_ids=tokens)


class CudaBackend:
    """Runs a :class:`Decoder`'s weights with Triton kernels. Arguments as :class:`~vllm_model.backend.TorchBackend`."""

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, torch.Tensor],
        *,
        name: str = "model",
        max_model_len: int | None = None,
        kv_cache_memory_bytes: int | None = None,
        gpu_memory_utilization: float = 0.9,
    ) -> None:
        if max_model_len is not None and not 2 <= max_model_len <= config.max_model_len:
            raise ConfigError(f"max_model_len is {max_model_len}; this model allows 2 to {config.max_model_len}.")
        self.config = config
        self.spec = ModelSpec(
            name=name,
            vocab_size=config.vocab_size,
            max_model_len=max_model_len or config.max_model_len,
            eos_token_ids=config.eos_token_ids,
            supports_overlap=True,
        )
        self.decoder = Decoder(config, weights, self.spec.max_model_len)
        self.device = self.decoder.embedding.device
        self.dtype = self.decoder.embedding.dtype
        self._cos_sin = torch.cat(self.decoder.rotary, dim=1).contiguous()  # [max_len, head_dim]
        self._kv_cache_memory_bytes = kv_cache_memory_bytes
        self._gpu_memory_utilization = gpu_memory_utilization
        self._graphs: dict[tuple[int, str], _Graph] = {}
        self._pool: Any = None

    def kv_cache_budget(self, *, block_size: int, max_num_seqs: int, max_num_batched_tokens: int) -> KvCacheBudget:
        config = self.config
        per_block = PagedKvCache.bytes_per_block(
            config.num_layers, config.num_kv_heads, block_size, config.head_dim, self.dtype
        )
        if self._kv_cache_memory_bytes is not None:
            return KvCacheBudget(available_bytes=self._kv_cache_memory_bytes, bytes_per_block=per_block)
        # The widest step: activations of every token, the logits of every sequence, and the graphs.
        width = (
            4 * config.hidden_size
            + 4 * config.intermediate_size
            + 4 * (config.num_heads + config.num_kv_heads) * config.head_dim
        )
        step = max_num_batched_tokens * width * 2 + max_num_seqs * config.vocab_size * 12 + (1 << 30)
        free, total = torch.cuda.mem_get_info(self.device)
        available = int(free - total * (1 - self._gpu_memory_utilization)) - step
        return KvCacheBudget(available_bytes=max(0, available), bytes_per_block=per_block)

    def initialize(self, state: BatchState, *, num_blocks: int, max_num_batched_tokens: int) -> None:
        config, device, rows = self.config, self.device, state.max_num_seqs
        try:
            self._cache = PagedKvCache(
                num_layers=config.num_layers,
                num_blocks=num_blocks,
                num_kv_heads=config.num_kv_heads,
                block_size=state.block_size,
                head_dim=config.head_dim,
                dtype=self.dtype,
                device=device,
            )
        except torch.OutOfMemoryError as error:
            raise BackendOutOfMemoryError(f"{num_blocks} KV blocks do not fit into the device's memory.") from error
        self._tables = torch.zeros(rows, state.max_blocks_per_seq, dtype=torch.int32, device=device)
        self._last_token = torch.zeros(rows, dtype=torch.int32, device=device)
        self._floats = torch.zeros(3, rows, dtype=torch.float32, device=device)  # temperature, top_p, min_p
        self._top_k = torch.zeros(rows, dtype=torch.int32, device=device)
        self._seed = torch.zeros(rows, dtype=torch.int64, device=device)
        self._sent_blocks = np.zeros(rows, np.int32)
        self._needs_host = np.zeros(rows, np.bool_)
        self._plan = DecodePlan(
            rows,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            device,
            max_blocks=state.max_blocks_per_seq,
            block_size=state.block_size,
        )
        self._workspace = SamplerWorkspace(rows, device)
        self._sizes = [*(size for size in GRAPH_SIZES if size < rows), rows]
        self._ring = [torch.zeros(rows, dtype=torch.int32, pin_memory=True) for _ in range(RING)]
        self._staging = [torch.zeros(FIELDS * rows, dtype=torch.int32, pin_memory=True) for _ in range(RING)]
        self._stream = torch.cuda.Stream(device)
        self._turn = 0
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            for size in reversed(self._sizes):  # the largest first: the others fit into its memory
                self._graphs[size, "plain"] = self._capture(size, "plain")

    def submit(self, batch: Batch) -> _Step | CompletedStep:
        try:
            with torch.inference_mode(), torch.cuda.stream(self._stream):
                self._send_changes(batch)
                if self._needs_host[batch.slots].any() and any(needs_host(batch, row) for row in range(batch.num_rows)):
                    return self._run_with_host(batch)
                if batch.num_tokens == batch.num_rows:
                    return self._decode(batch)
                return self._finish(batch, self._sample(batch, self._forward(batch)))
        except torch.OutOfMemoryError as error:
            raise BackendOutOfMemoryError(f"A step of {batch.num_tokens} tokens ran out of device memory.") from error
        except RuntimeError as error:
            raise BackendError(f"A step of {batch.num_tokens} tokens failed: {error}") from error

    def close(self) -> None:
        self._graphs.clear()
        self._cache = None  # type: ignore[assignment]  # nothing runs after this

    # --- state ---

    def _send_changes(self, batch: Batch) -> None:
        """Bring parameters and block tables of slots with new sequences to the device."""
        changed = batch.changed_slots
        if len(changed) == 0:
            return
        state, index = batch.state, self._to_device(changed, np.int64)
        floats = np.stack([state.temperature[changed], state.top_p[changed], state.min_p[changed]])
        self._floats[:, index] = self._to_device(floats, np.float32)
        self._top_k[index] = self._to_device(state.top_k[changed], np.int32)
        self._seed[index] = self._to_device(state.seed[changed], np.int64)
        most = int(state.num_blocks[changed].max())
        self._tables[index, :most] = self._to_device(state.block_tables[changed, :most], np.int32)
        self._sent_blocks[changed] = state.num_blocks[changed]
        for slot in changed.tolist():
            params = state.params[slot]
            self._needs_host[slot] = params is not None and may_need_host(params)

    def _stage(self, batch: Batch, size: int) -> torch.Tensor:
        """What a step of single tokens sends: pinned int32 ``[FIELDS, size]``."""
        state, slots, rows = batch.state, batch.slots, batch.num_rows
        pinned = self._staging[self._turn % RING][: FIELDS * size]
        staged = pinned.numpy().reshape(FIELDS, size)
        staged[0], staged[3] = -1, -1
        staged[0, :rows], staged[1, :rows], staged[2, :rows] = slots, batch.num_computed, batch.token_ids
        grown = np.flatnonzero(state.num_blocks[slots] > self._sent_blocks[slots])
        if len(grown):  # a step of one token takes one block at most
            at = slots[grown]
            last = state.num_blocks[at] - 1
            staged[3, grown] = at * state.max_blocks_per_seq + last
            staged[4, grown] = state.block_tables[at, last]
            self._sent_blocks[at] = state.num_blocks[at]
        return pinned

    def _to_device(self, array: npt.NDArray[np.generic], dtype: npt.DTypeLike) -> torch.Tensor:
        host = torch.from_numpy(np.ascontiguousarray(array, dtype)).pin_memory()
        return host.to(self.device, non_blocking=True)

    # --- steps ---

    def _decode(self, batch: Batch) -> _Step:
        """One token a row: replay the graph of the next size."""
        size = next(size for size in self._sizes if size >= batch.num_rows)
        slots = batch.slots
        hot = batch.state.temperature[slots] > 0
        filtered = (batch.state.top_k[slots] > 0) | (batch.state.top_p[slots] < 1) | (batch.state.min_p[slots] > 0)
        mode = "greedy" if not hot.any() else "filtered" if (filtered & hot).any() else "plain"
        found = self._graphs.get((size, mode))
        if found is None:
            found = self._graphs[size, mode] = self._capture(size, mode)
        found.staged.copy_(self._stage(batch, size), non_blocking=True)
        found.graph.replay()
        return self._finish(batch, found.tokens)

    def _capture(self, size: int, mode: str) -> _Graph:
        staged = torch.full((FIELDS * size,), -1, dtype=torch.int32, device=self.device)
        self._decode_step(staged, size, mode)  # compiles what is not compiled yet; slots of -1 touch nothing
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            tokens = self._decode_step(staged, size, mode)
        self._pool = self._pool or graph.pool()
        return _Graph(graph, staged, tokens)

    def _decode_step(self, staged: torch.Tensor, size: int, mode: str) -> torch.Tensor:
        """Everything between the staged rows and the tokens, int32 ``[size]``."""
        ints = torch.empty(4, -(-size // 4) * 4, dtype=torch.int32, device=self.device)
        token_ids, positions, slots, seq_lens = ints[:, :size]
        block = triton.next_power_of_2(size)
        _begin_kernel[(1,)](staged, self._tables, self._last_token, token_ids, positions, slots, seq_lens, size, B=block)
        self._plan.update(seq_lens, slots, self._tables)

        def attend(layer: int, q: torch.Tensor) -> torch.Tensor:
            return paged_decode(q, self._cache.layers[layer], self._plan)

        hidden = self._layers(token_ids, positions, slots, attend, None)
        return self._draw(self._logits(hidden), slots, positions + 1, mode)

    def _forward(self, batch: Batch, wanted: npt.NDArray[np.int64] | None = None) -> torch.Tensor:
        """Any step, kernel by kernel: the logits ``[rows, vocab]`` of each row's last token, or of the ``wanted`` tokens."""
        state, lens = batch.state, batch.query_lens
        grown = np.flatnonzero(state.num_blocks[batch.slots] > self._sent_blocks[batch.slots])
        for slot in batch.slots[grown].tolist():
            sent, now = int(self._sent_blocks[slot]), int(state.num_blocks[slot])
            self._tables[slot, sent:now] = self._to_device(state.block_tables[slot, sent:now], np.int32)
            self._sent_blocks[slot] = now
        rows = np.repeat(np.arange(batch.num_rows), lens)
        positions = np.arange(batch.num_tokens) - batch.query_start[rows] + batch.num_computed[rows]
        tokens = batch.token_ids
        sent_ints = self._to_device(np.stack([_aligned(part) for part in (tokens, positions, batch.slots[rows])]), np.int32)
        token_ids, positions_, token_slots = sent_ints[:, : len(tokens)]
        if (tokens < 0).any():
            token_ids = torch.where(token_ids < 0, self._last_token[token_slots.long()], token_ids)
        parts = []
        for single in (True, False):
            members = np.flatnonzero((lens == 1) == single)
            if len(members):
                at = np.flatnonzero(np.isin(rows, members))
                parts.append(
                    (single, self._part(batch, members), None if len(at) == len(rows) else self._to_device(at, np.int64))
                )

        def attend(layer: int, q: torch.Tensor) -> torch.Tensor:
            cache = self._cache.layers[layer]
            out = torch.empty_like(q)
            for single, (slots, starts, computed, ends), at in parts:
                mine = q if at is None else q[at]
                if single:
                    done = paged_decode(mine, cache, self._plan)
                else:
                    done = paged_prefill(mine, cache, self._tables, slots, starts, computed)
                if at is None:
                    return done
                out[at] = done
            return out

        for single, (slots, _, _, ends), _ in parts:
            if single:
                self._plan.update(ends, slots, self._tables)
        chosen = batch.query_start[1:] - 1 if wanted is None else wanted
        keep = self._to_device(chosen, np.int64)
        return self._logits(self._layers(token_ids, positions_, token_slots, attend, keep))

    def _part(self, batch: Batch, members: npt.NDArray[np.intp]) -> tuple[torch.Tensor, ...]:
        """Slots, starts, first positions and lengths of some rows, as if they were alone."""
        lens = batch.query_lens[members]
        starts = np.concatenate([[0], np.cumsum(lens)])
        computed = batch.num_computed[members]
        pieces = [batch.slots[members], starts, computed, computed + lens]
        flat = self._to_device(np.concatenate([_aligned(piece) for piece in pieces]), np.int32)
        places = np.cumsum([0, *(len(_aligned(piece)) for piece in pieces)]).tolist()
        return tuple(flat[at : at + len(piece)] for at, piece in zip(places, pieces, strict=False))

    def _layers(
        self, token_ids: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, attend: Attend, keep: torch.Tensor | None
    ) -> torch.Tensor:
        """The hidden states ``[rows, hidden]`` before the last norm; after the last attention only ``keep`` goes on."""
        decoder, config = self.decoder, self.config
        residual = F.embedding(token_ids, decoder.embedding)  # [tokens, hidden]
        thin = len(token_ids) <= THIN_ROWS
        update: torch.Tensor | None = None
        for index, layer in enumerate(decoder.layers):
            qkv = self._qkv(layer, residual, update, thin)
            q = qk_norm_rope(
                qkv,
                self._cos_sin,
                positions,
                slots,
                self._tables,
                self._cache.layers[index],
                config.num_heads,
                q_weight=layer.q_norm,
                k_weight=layer.k_norm,
                eps=config.rms_norm_eps,
            )
            attended = attend(index, q).view(len(token_ids), -1)
            if keep is not None and index == len(decoder.layers) - 1:
                attended, residual = attended[keep], residual[keep]
            if thin and layer.o.bias is None and layer.down.bias is None and layer.gate_up.bias is None:
                residual = thin_linear(attended, layer.o.weight, residual=residual)
                inner = thin_linear(
                    residual, layer.gate_up.weight, norm_weight=layer.post_norm, eps=config.rms_norm_eps, silu=True
                )
                residual = thin_linear(inner, layer.down.weight, residual=residual)
                continue
            x = rms_norm(layer.o(attended), layer.post_norm, config.rms_norm_eps, residual)
            update = layer.down(silu_mul(layer.gate_up(x)))
        return residual if update is None else residual + update

    def _qkv(self, layer: Layer, residual: torch.Tensor, update: torch.Tensor | None, thin: bool) -> torch.Tensor:
        eps = self.config.rms_norm_eps
        if thin and update is None and layer.qkv.bias is None:
            return thin_linear(residual, layer.qkv.weight, norm_weight=layer.input_norm, eps=eps)
        if update is None:
            return layer.qkv(rms_norm(residual, layer.input_norm, eps))
        return layer.qkv(rms_norm(update, layer.input_norm, eps, residual))

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        decoder = self.decoder
        x = rms_norm(hidden, decoder.norm, self.config.rms_norm_eps)
        return thin_linear(x, decoder.lm_head.weight) if len(x) <= THIN_ROWS else decoder.lm_head(x)

    # --- tokens ---

    def _draw(self, logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, mode: str) -> torch.Tensor:
        """Sample, and keep each slot's token for the next step: int32 ``[rows]``."""
        filters = (self._top_k, self._floats[1], self._floats[2]) if mode == "filtered" else (None, None, None)
        tokens = sample(
            logits,
            slots,
            positions,
            self._floats[0],
            self._seed,
            self._workspace,
            top_k=filters[0],
            top_p=filters[1],
            min_p=filters[2],
            greedy=mode == "greedy",
        )
        _keep_kernel[(1,)](tokens, slots, self._last_token, len(slots), B=triton.next_power_of_2(len(slots)))
        return tokens

    def _sample(self, batch: Batch, logits: torch.Tensor) -> torch.Tensor:
        """Of a step that is no graph; rows that do not sample have slot -1 here."""
        slots = np.where(batch.sample, batch.slots, -1)
        positions = batch.num_computed + batch.query_lens
        ints = self._to_device(np.stack([_aligned(slots), _aligned(positions)]), np.int32)[:, : len(slots)]
        own = batch.slots[batch.sample]
        filtered = (batch.state.top_k[own] > 0) | (batch.state.top_p[own] < 1) | (batch.state.min_p[own] > 0)
        mode = "filtered" if filtered.any() else "plain" if (batch.state.temperature[own] > 0).any() else "greedy"
        return self._draw(logits, ints[0], ints[1], mode)

    def _finish(self, batch: Batch, tokens: torch.Tensor) -> _Step:
        ring = self._ring[self._turn % RING]
        self._turn += 1
        ring[: batch.num_rows].copy_(tokens[: batch.num_rows], non_blocking=True)
        event = torch.cuda.Event()
        event.record(self._stream)
        return _Step(ring, event, batch.sample)

    def _run_with_host(self, batch: Batch) -> CompletedStep:
        """A step in which some row's logits need the host (penalties, biases, log-probabilities): not overlapped."""
        wanted, first = wanted_tokens(batch)
        logits = self._forward(batch, wanted).float()
        waiting = np.flatnonzero(batch.token_ids[batch.query_start[1:] - 1] < 0)
        last = self._last_token.cpu().numpy()
        output = sample_on_host(batch, logits, first, {row: int(last[batch.slots[row]]) for row in waiting.tolist()})
        rows = np.flatnonzero(batch.sample)
        if len(rows):
            index = self._to_device(batch.slots[rows], np.int64)
            self._last_token[index] = self._to_device(output.token_ids[rows, 0], np.int32)
        self._stream.synchronize()
        return CompletedStep(output)


def _aligned(array: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
    """Padded to whole 16 bytes of int32, so that what follows stays aligned: kernels are compiled for one alignment."""
    return np.pad(array, (0, -len(array) % 4))
