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
from vllm_model.host_sampling import may_need_host, needs_host, sample_in_pieces, wanted_tokens
from vllm_model.kernels._launch import compiled_together, launch, power_of_two
from vllm_model.kernels.decode_plan import DecodePlan
from vllm_model.kernels.gemv import thin_linear
from vllm_model.kernels.library_prefill import LEAST, can_use_library, library_prefill, padded
from vllm_model.kernels.paged_decode import paged_decode
from vllm_model.kernels.paged_prefill import paged_prefill
from vllm_model.kernels.qk_norm_rope import qk_norm_rope
from vllm_model.kernels.rms_norm import rms_norm
from vllm_model.kernels.sampling import SamplerWorkspace, sample
from vllm_model.kernels.shared_prefix import PREFIX_TILE, PrefixWorkspace, attend_prefix, join_prefix
from vllm_model.kernels.silu_mul import silu_mul
from vllm_model.kv_cache import PagedKvCache
from vllm_model.model_config import ModelConfig
from vllm_model.verifier import Indices, SampledEntries, accept_guesses, guess_table, sampled_entries
from vllm_traits.backend import CompletedStep, KvCacheBudget, ModelSpec
from vllm_traits.batch import Batch, BatchOutput, BatchState
from vllm_traits.errors import BackendError, BackendOutOfMemoryError, ConfigError

GRAPH_SIZES = (1, 2, 4, *range(8, 129, 8), *range(144, 257, 16))
"""Rows that decode graphs are captured for."""
RING = 4
"""Steps whose tokens may wait to be read."""
THIN_ROWS = 2
"""Most rows for which our own products beat the library's."""
MAX_DRAFT_TOKENS = 8
"""Most guesses in a row."""
CHUNK_PARTS = (1, 2, 4, 8)
"""Steps with prompts are graphs of these parts of the longest: one by one their launches take longer than a small model."""
CHUNK_ROW_FIELDS = 6
"""Of a row of such a step: slot, start, position, last token, slot to sample for, position to sample."""
FEW_ROWS = 16
"""Up to here decode attention runs in another shape: there is less to read than programs to start."""
SHARED_ROWS = 17
"""Least rows with a common prefix for which its keys are read apart."""
SHARED_TOKENS = 512
"""Least length of such a prefix."""
FIELDS = 6
"""Of a row that the host sends: slot, position, token, place in the block tables, block, and how much of it is shared."""
LEADER = 4
"""Behind the rows: a slot with the shared prefix, its length, and room."""


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


Attend = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""From a layer, its queries ``[tokens, heads, head_dim]`` and its QKV ``[tokens or more, width]`` to what is attended."""


@dataclass(frozen=True, slots=True)
class _Prefix:
    """The shared prefix of a step's rows: a slot that has it, its tokens, and bool ``[rows]``, who has it."""

    leader: int
    length: int
    members: npt.NDArray[np.bool_]


@dataclass(slots=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    staged: torch.Tensor
    tokens: torch.Tensor


class _Step:
    """A step under way: its tokens lie in one place of the ring once the event has passed."""

    def __init__(self, tokens: torch.Tensor, event: torch.cuda.Event, sample: npt.NDArray[np.bool_], width: int) -> None:
        self._tokens, self._event, self._sample, self._width = tokens, event, sample, width

    def done(self) -> bool:
        return bool(self._event.query())

    def result(self) -> BatchOutput:
        try:
            self._event.synchronize()
        except RuntimeError as error:
            raise BackendError(f"A step failed on the device: {error}") from error
        rows = len(self._sample)
        tokens = self._tokens.numpy()[: rows * self._width].reshape(rows, self._width)
        return BatchOutput(token_ids=np.where(self._sample[:, None], tokens, -1))


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
            max_draft_tokens=MAX_DRAFT_TOKENS,
        )
        self.decoder = Decoder(config, weights, self.spec.max_model_len)
        self.device = self.decoder.embedding.device
        self.dtype = self.decoder.embedding.dtype
        self._cos_sin = torch.cat(self.decoder.rotary, dim=1).contiguous()  # [max_len, head_dim]
        self._kv_cache_memory_bytes = kv_cache_memory_bytes
        self._gpu_memory_utilization = gpu_memory_utilization
        self._graphs: dict[tuple[int, str, bool], _Graph] = {}
        self._pdl = torch.version.hip is None and torch.cuda.get_device_capability(self.device)[0] >= 9
        self._library = can_use_library(self.device, self.dtype, config.head_dim)
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
        self._rows_block = power_of_two(rows)
        self._needs_host = np.zeros(rows, np.bool_)
        self._plans = [
            DecodePlan(
                most,
                config.num_heads,
                config.num_kv_heads,
                config.head_dim,
                device,
                max_blocks=state.max_blocks_per_seq,
                block_size=state.block_size,
            )
            for most in (min(rows, FEW_ROWS), rows)
        ]
        self._prefix_workspace = PrefixWorkspace(rows, config.num_heads, config.head_dim, device)
        self._prefix_key = b""
        self._prefix: _Prefix | None = None
        self._workspace = SamplerWorkspace(rows, device)
        self._sizes = [*(size for size in GRAPH_SIZES if size < rows), rows]
        self._ring = [torch.zeros(rows * (1 + MAX_DRAFT_TOKENS), dtype=torch.int32, pin_memory=True) for _ in range(RING)]
        self._staging = [torch.zeros(FIELDS * rows + LEADER, dtype=torch.int32, pin_memory=True) for _ in range(RING)]
        self._stream = torch.cuda.Stream(device)
        self._turn = 0
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            self._compile()
            self._chunk_sizes = sorted(max_num_batched_tokens // part for part in CHUNK_PARTS)
            self._row_room = -(-(rows + 1) // 4) * 4
            room = 3 * max_num_batched_tokens + CHUNK_ROW_FIELDS * self._row_room
            self._chunk_staging = [torch.zeros(room, dtype=torch.int32, pin_memory=True) for _ in range(RING)]
            for size in reversed(self._chunk_sizes if self._chunk_sizes[0] > THIN_ROWS else []):
                self._graphs[size, "chunk", False] = self._capture_chunk(size, None)
            if self._library and LEAST <= max_num_batched_tokens == padded(max_num_batched_tokens):
                self._graphs[max_num_batched_tokens, "prompt", False] = self._capture_chunk(
                    max_num_batched_tokens, self._library_prefill
                )
            for size in reversed(self._sizes):  # the largest first: the others fit into its memory
                self._graphs[size, "plain", False] = self._capture(size, "plain", False)

    def _compile(self) -> None:
        """What steps need, several kernels at once."""
        with compiled_together(self.device):
            for size in sorted({self._sizes[0], min(2, self._sizes[-1]), min(64, self._sizes[-1]), self._sizes[-1]}):
                staged = torch.zeros(FIELDS * size + LEADER, dtype=torch.int32, device=self.device)
                self._decode_step(staged, size, "plain", False, torch.zeros)  # what is not launched leaves no token ids
            if self._sizes[-1] > FEW_ROWS:
                self._decode_step(staged, size, "plain", True, torch.zeros)
            tokens = torch.zeros(128, dtype=torch.int32, device=self.device)
            none, starts = tokens[:4] - 1, tokens[:8]

            def attend(layer: int, q: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
                cache = self._cache.layers[layer]
                return paged_prefill(q, cache, self._tables, none, starts[:5], none)

            for room in (0, len(tokens)) if self._library else (0,):
                self._layers(tokens, tokens, tokens, attend, None, room=room)

    def submit(self, batch: Batch) -> _Step | CompletedStep:
        try:
            with torch.inference_mode(), torch.cuda.stream(self._stream):
                self._send_changes(batch)
                if self._needs_host[batch.slots].any() and any(needs_host(batch, row) for row in range(batch.num_rows)):
                    return self._run_with_host(batch)
                if batch.num_tokens == batch.num_rows:  # so there are no guesses
                    return self._decode(batch)
                size = self._chunk_size(batch)
                if size is not None:
                    return self._run_chunk(batch, size)
                entries = sampled_entries(batch)
                if entries.width > 1:
                    return self._finish(batch, self._verify(batch, entries))
                return self._finish(batch, self._sample(batch, self._logits(self._forward(batch))))
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
        self._prefix_key = b""
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

    def _send_blocks(self, batch: Batch) -> None:
        """Bring new blocks of running sequences to the device."""
        state = batch.state
        grown = np.flatnonzero(state.num_blocks[batch.slots] > self._sent_blocks[batch.slots])
        for slot in batch.slots[grown].tolist():
            sent, now = int(self._sent_blocks[slot]), int(state.num_blocks[slot])
            self._tables[slot, sent:now] = self._to_device(state.block_tables[slot, sent:now], np.int32)
            self._sent_blocks[slot] = now

    def _stage(self, batch: Batch, size: int, prefix: _Prefix | None) -> torch.Tensor:
        """What a step of single tokens sends: pinned int32 ``[FIELDS * size + LEADER]``."""
        state, slots, rows = batch.state, batch.slots, batch.num_rows
        pinned = self._staging[self._turn % RING][: FIELDS * size + LEADER]
        ints = pinned.numpy()
        staged = ints[: FIELDS * size].reshape(FIELDS, size)
        if prefix is not None:
            staged[5] = 0
            staged[5, :rows] = prefix.members * prefix.length
            ints[FIELDS * size :] = prefix.leader, prefix.length, 0, 0
        staged[0], staged[3] = -1, -1
        staged[0, :rows], staged[1, :rows], staged[2, :rows] = slots, batch.num_computed, batch.token_ids
        if (state.num_blocks[slots] > self._sent_blocks[slots] + 1).any():
            self._send_blocks(batch)  # after a step that failed, or where room was made for guesses that were not
        grown = np.flatnonzero(state.num_blocks[slots] > self._sent_blocks[slots])
        if len(grown):
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
        mode = _mode(batch.state, slots)
        prefix = self._shared_prefix(batch)
        if prefix is not None:  # few sizes, since each is captured on demand
            size = min(power_of_two(size), self._sizes[-1])
        key = (size, mode, prefix is not None)
        found = self._graphs.get(key)
        if found is None:
            found = self._graphs[key] = self._capture(*key)
        found.staged.copy_(self._stage(batch, size, prefix), non_blocking=True)
        found.graph.replay()
        return self._finish(batch, found.tokens)

    def _chunk_size(self, batch: Batch) -> int | None:
        """Tokens of the graph that runs a step with prompts, if there is one."""
        if (batch.num_draft > 0).any() or 2 * batch.num_tokens <= self._chunk_sizes[0]:
            return None
        size = next((size for size in self._chunk_sizes if size >= batch.num_tokens), 0)
        known = (size, "chunk", False) in self._graphs
        return size if known and _mode(batch.state, batch.slots[batch.sample]) != "filtered" else None

    def _capture_chunk(self, size: int, library: Callable[..., torch.Tensor] | None) -> _Graph:
        """A step of up to ``size`` tokens of any rows; with ``library``, of that many of one prompt from its beginning."""
        room = self._row_room
        staged = torch.zeros(3 * size + CHUNK_ROW_FIELDS * room, dtype=torch.int32, device=self.device)
        tokens, rows = staged[: 3 * size].view(3, size), staged[3 * size :].view(CHUNK_ROW_FIELDS, room)
        tokens[2], rows[0], rows[4] = -1, -1, -1  # nothing is written
        most = self._workspace.max_rows

        def attend(layer: int, q: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
            if library is not None:
                return library(q, qkv, 0, size)
            return paged_prefill(
                q, self._cache.layers[layer], self._tables, rows[0, :most], rows[1, : most + 1], rows[2, :most]
            )

        def run() -> torch.Tensor:
            last = self._last_token[tokens[2].clamp(min=0)]
            token_ids = torch.where(tokens[0] < 0, last, tokens[0])
            keep = rows[3, :most].long()
            hidden = self._layers(token_ids, tokens[1], tokens[2], attend, keep, room=0 if library is None else size)
            drawn = self._draw(self._logits(hidden), rows[4, :most], rows[5, :most], "plain")
            self._keep(drawn, rows[4, :most])
            return drawn

        run()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            drawn = run()
        self._pool = self._pool or graph.pool()
        return _Graph(graph, staged, drawn)

    def _run_chunk(self, batch: Batch, size: int) -> _Step:
        self._send_blocks(batch)
        lens, n, end = batch.query_lens, batch.num_rows, batch.num_tokens
        whole = n == 1 and batch.num_computed[0] == 0 and end == size and (size, "prompt", False) in self._graphs
        graph = self._graphs[size, "prompt" if whole else "chunk", False]
        pinned = self._chunk_staging[self._turn % RING][: len(graph.staged)]
        ints = pinned.numpy()
        tokens, rows = ints[: 3 * size].reshape(3, size), ints[3 * size :].reshape(CHUNK_ROW_FIELDS, -1)
        member = np.repeat(np.arange(n), lens)
        tokens[0, :end], tokens[0, end:] = batch.token_ids, 0
        tokens[1, :end], tokens[1, end:] = np.arange(end) + (batch.num_computed - batch.query_start[:-1])[member], 0
        tokens[2, :end], tokens[2, end:] = batch.slots[member], -1
        rows[0, :n], rows[0, n:] = batch.slots, -1
        rows[1, : n + 1], rows[1, n + 1 :] = batch.query_start, end
        rows[2, :n], rows[2, n:] = batch.num_computed, 0
        rows[3, :n], rows[3, n:] = batch.query_start[1:] - 1, 0
        rows[4, :n], rows[4, n:] = np.where(batch.sample, batch.slots, -1), -1
        rows[5, :n], rows[5, n:] = batch.num_computed + lens, 0
        graph.staged.copy_(pinned, non_blocking=True)
        graph.graph.replay()
        return self._finish(batch, graph.tokens)

    def _shared_prefix(self, batch: Batch) -> _Prefix | None:
        """What most rows of a step of single tokens have in common, if it pays to read that apart."""
        slots, state = batch.slots, batch.state
        if len(slots) < SHARED_ROWS or self._plans[1].config.tile > PREFIX_TILE:
            return None
        key = slots.tobytes()
        if key != self._prefix_key:
            self._prefix_key, self._prefix = key, None
            blocks, counts = np.unique(state.block_tables[slots, 0], return_counts=True)
            if counts.max() >= max(SHARED_ROWS, len(slots) // 2):
                members = state.block_tables[slots, 0] == blocks[counts.argmax()]
                tables = state.block_tables[slots[members], : int((batch.num_computed[members] // state.block_size).min())]
                same = np.append((tables == tables[0]).all(axis=0), False)
                length = int(same.argmin()) * state.block_size // PREFIX_TILE * PREFIX_TILE
                if length >= SHARED_TOKENS:
                    self._prefix = _Prefix(int(slots[members][0]), length, members)
        return self._prefix

    def _capture(self, size: int, mode: str, shared: bool) -> _Graph:
        staged = torch.full((FIELDS * size + LEADER,), -1, dtype=torch.int32, device=self.device)
        staged[(FIELDS - 1) * size :] = 0
        self._decode_step(staged, size, mode, shared)  # compiles what is not compiled yet; slots of -1 touch nothing
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            tokens = self._decode_step(staged, size, mode, shared)
        self._pool = self._pool or graph.pool()
        return _Graph(graph, staged, tokens)

    def _decode_step(
        self, staged: torch.Tensor, size: int, mode: str, shared: bool, make: Callable[..., torch.Tensor] = torch.empty
    ) -> torch.Tensor:
        """Everything between the staged rows and the tokens, int32 ``[size]``."""
        ints = make(4, -(-size // 4) * 4, dtype=torch.int32, device=self.device)
        token_ids, positions, slots, seq_lens = ints[:, :size]
        pdl = self._pdl
        launch(
            _begin_kernel,
            (1,),
            staged,
            self._tables,
            self._last_token,
            token_ids,
            positions,
            slots,
            seq_lens,
            size,
            B=self._rows_block,
        )
        plan = self._plan_for(size)
        skips = staged[(FIELDS - 1) * size : FIELDS * size] if shared else None
        plan.update(seq_lens, slots, self._tables, skips=skips, pdl=pdl)

        def attend(layer: int, q: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
            cache = self._cache.layers[layer]
            if skips is None:
                return paged_decode(q, cache, plan, pdl=pdl)
            attend_prefix(q, cache, self._tables, staged[FIELDS * size :], self._prefix_workspace, pdl=pdl)
            out = paged_decode(q, cache, plan, lse=self._prefix_workspace.lse, pdl=pdl)
            join_prefix(out, skips, self._prefix_workspace, pdl=pdl)
            return out

        hidden = self._layers(token_ids, positions, slots, attend, None)
        tokens = self._draw(self._logits(hidden), slots, positions + 1, mode)
        self._keep(tokens, slots)
        return tokens

    def _forward(self, batch: Batch, wanted: npt.NDArray[np.int64] | None = None) -> torch.Tensor:
        """Any step, kernel by kernel: hidden states ``[rows, hidden]`` of each row's last token, or of ``wanted``."""
        lens = batch.query_lens
        self._send_blocks(batch)
        rows = np.repeat(np.arange(batch.num_rows), lens)
        positions = np.arange(batch.num_tokens) - batch.query_start[rows] + batch.num_computed[rows]
        tokens = batch.token_ids
        sent_ints = self._to_device(np.stack([_aligned(part) for part in (tokens, positions, batch.slots[rows])]), np.int32)
        token_ids, positions_, token_slots = sent_ints[:, : len(tokens)]
        if (tokens < 0).any():
            token_ids = torch.where(token_ids < 0, self._last_token[token_slots.long()], token_ids)
        whole = (lens >= LEAST) & (batch.num_computed == 0) & self._library
        dense = [(int(batch.query_start[row]), int(lens[row])) for row in np.flatnonzero(whole).tolist()]
        parts = []
        for single, members in ((True, np.flatnonzero(lens == 1)), (False, np.flatnonzero((lens > 1) & ~whole))):
            if len(members):
                at = np.flatnonzero(np.isin(rows, members))
                every = len(at) == len(rows)
                parts.append((single, self._part(batch, members), None if every else self._to_device(at, np.int64)))

        def attend(layer: int, q: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
            cache = self._cache.layers[layer]
            out = torch.empty_like(q)
            for start, length in dense:
                done = self._library_prefill(q, qkv, start, length)
                if length == batch.num_tokens:
                    return done
                out[start : start + length] = done
            for single, (slots, starts, computed, _), at in parts:
                mine = q if at is None else q[at]
                if single:
                    done = paged_decode(mine, cache, self._plan_for(len(mine)), pdl=self._pdl)
                else:
                    done = paged_prefill(mine, cache, self._tables, slots, starts, computed)
                if at is None:
                    return done
                out[at] = done
            return out[: batch.num_tokens]

        for single, (slots, _, _, ends), _ in parts:
            if single:
                self._plan_for(len(slots)).update(ends, slots, self._tables, pdl=self._pdl)
        room = max((start + padded(length) for start, length in dense), default=0)
        chosen = batch.query_start[1:] - 1 if wanted is None else wanted
        keep = self._to_device(chosen, np.int64)
        return self._layers(token_ids, positions_, token_slots, attend, keep, room=max(room, len(tokens)) if dense else 0)

    def _library_prefill(self, q: torch.Tensor, qkv: torch.Tensor, start: int, length: int) -> torch.Tensor:
        """Attention of the prompt at ``start`` of the step; ``q`` and ``qkv`` have room behind it."""
        config, end = self.config, start + padded(length)
        heads = qkv[start:end].view(end - start, -1, config.head_dim)
        _, k, v = heads.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        return library_prefill(q[start:end], k, v, length)

    def _plan_for(self, rows: int) -> DecodePlan:
        return self._plans[rows > FEW_ROWS]

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
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        attend: Attend,
        keep: torch.Tensor | None,
        *,
        room: int = 0,
    ) -> torch.Tensor:
        """The hidden states ``[rows, hidden]`` before the last norm; after the last attention only ``keep`` goes on.

        With ``room``, queries and QKV have that many rows, the last of them zeros.
        """
        decoder, config, tokens, pdl = self.decoder, self.config, len(token_ids), self._pdl
        eps = config.rms_norm_eps
        residual = F.embedding(token_ids, decoder.embedding)  # [tokens, hidden]
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        make = residual.new_zeros if room > tokens else residual.new_empty
        qkv_room = make(room, width) if room else None
        q_room = make(room, config.num_heads, config.head_dim) if room else None
        thin = tokens <= THIN_ROWS
        update: torch.Tensor | None = None
        for index, layer in enumerate(decoder.layers):
            qkv = self._qkv(layer, residual, update, thin, None if qkv_room is None else qkv_room[:tokens])
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
                eps=eps,
                out=None if q_room is None else q_room[:tokens],
                keep_k=room > 0,
                pdl=pdl,
            )
            attended = attend(index, q if q_room is None else q_room, qkv if qkv_room is None else qkv_room).view(tokens, -1)
            if keep is not None and index == len(decoder.layers) - 1:
                attended, residual = attended[keep], residual[keep]
            if thin and layer.o.bias is None and layer.down.bias is None and layer.gate_up.bias is None:
                residual = thin_linear(attended, layer.o.weight, residual=residual, pdl=pdl)
                inner = thin_linear(residual, layer.gate_up.weight, norm_weight=layer.post_norm, eps=eps, silu=True, pdl=pdl)
                residual = thin_linear(inner, layer.down.weight, residual=residual, pdl=pdl)
                continue
            x = rms_norm(layer.o(attended), layer.post_norm, eps, residual, pdl=pdl)
            update = layer.down(silu_mul(layer.gate_up(x), pdl=pdl))
        return residual if update is None else residual + update

    def _qkv(
        self,
        layer: Layer,
        residual: torch.Tensor,
        update: torch.Tensor | None,
        thin: bool,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        eps, pdl = self.config.rms_norm_eps, self._pdl
        if thin and update is None and layer.qkv.bias is None:
            return thin_linear(residual, layer.qkv.weight, norm_weight=layer.input_norm, eps=eps, pdl=pdl)
        if update is None:
            x = rms_norm(residual, layer.input_norm, eps, pdl=pdl)
        else:
            x = rms_norm(update, layer.input_norm, eps, residual, pdl=pdl)
        if out is None:
            return layer.qkv(x)
        if layer.qkv.bias is None:
            return torch.mm(x, layer.qkv.weight.t(), out=out)
        return torch.addmm(layer.qkv.bias, x, layer.qkv.weight.t(), out=out)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        decoder, pdl = self.decoder, self._pdl
        x = rms_norm(hidden, decoder.norm, self.config.rms_norm_eps, pdl=pdl)
        return thin_linear(x, decoder.lm_head.weight, pdl=pdl) if len(x) <= THIN_ROWS else decoder.lm_head(x)

    # --- tokens ---

    def _draw(self, logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, mode: str) -> torch.Tensor:
        """Sample: int32 ``[rows]``."""
        filters = (self._top_k, self._floats[1], self._floats[2]) if mode == "filtered" else (None, None, None)
        return sample(
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
            pdl=self._pdl,
        )

    def _keep(self, tokens: torch.Tensor, slots: torch.Tensor) -> None:
        """Each slot's last token, for the next step."""
        launch(_keep_kernel, (1,), tokens, slots, self._last_token, len(slots), B=self._rows_block)

    def _sample(self, batch: Batch, logits: torch.Tensor) -> torch.Tensor:
        """Of a step that is no graph; rows that do not sample have slot -1 here. Keeps the tokens for the next step."""
        slots = np.where(batch.sample, batch.slots, -1)
        positions = batch.num_computed + batch.query_lens
        ints = self._to_device(np.stack([_aligned(slots), _aligned(positions)]), np.int32)[:, : len(slots)]
        tokens = self._draw(logits, ints[0], ints[1], _mode(batch.state, batch.slots[batch.sample]))
        self._keep(tokens, ints[0])
        return tokens

    def _verify(self, batch: Batch, entries: SampledEntries) -> torch.Tensor:
        """A step with guesses: the tokens that stand, int32 ``[rows, width]``."""
        hidden = self._forward(batch, entries.tokens)
        slots = batch.slots[entries.rows]
        places = entries.rows * entries.width + entries.places
        ints = self._to_device(np.stack([_aligned(part) for part in (slots, entries.positions, places)]), np.int32)
        mode, most = _mode(batch.state, slots), self._workspace.max_rows
        sampled = torch.full((batch.num_rows, entries.width), -1, dtype=torch.int32, device=self.device)
        for start in range(0, len(entries), most):  # as many logits at once as a step without guesses has
            piece = slice(start, min(start + most, len(entries)))
            tokens = self._draw(self._logits(hidden[piece]), ints[0, piece], ints[1, piece], mode)
            sampled.view(-1)[ints[2, piece].long()] = tokens
        guesses = self._to_device(guess_table(batch, entries.width), np.int32)
        accepted = accept_guesses(sampled, guesses)
        last = accepted.gather(1, (accepted >= 0).sum(1, keepdim=True).clamp(min=1) - 1)[:, 0]
        whose = self._to_device(np.where(batch.sample, batch.slots, -1), np.int32)
        self._keep(last, whose)
        return accepted

    def _finish(self, batch: Batch, tokens: torch.Tensor) -> _Step:
        ring, width = self._ring[self._turn % RING], tokens.numel() // len(tokens)
        self._turn += 1
        ring[: batch.num_rows * width].copy_(tokens[: batch.num_rows].flatten(), non_blocking=True)
        event = torch.cuda.Event()
        event.record(self._stream)
        return _Step(ring, event, batch.sample, width)

    def _run_with_host(self, batch: Batch) -> CompletedStep:
        """A step in which some row's logits need the host (penalties, biases, log-probabilities): not overlapped."""
        wanted, first = wanted_tokens(batch)
        hidden = self._forward(batch, wanted)
        waiting = np.flatnonzero(batch.token_ids[batch.query_start[1:] - 1] < 0)
        last = self._last_token.cpu().numpy()
        pending = {row: int(last[batch.slots[row]]) for row in waiting.tolist()}

        def logits_of(places: Indices) -> torch.Tensor:
            return self._logits(hidden[self._to_device(places, np.int64)]).float()

        output = sample_in_pieces(batch, logits_of, len(wanted), first, pending)
        rows = np.flatnonzero(batch.sample)
        if len(rows):
            index = self._to_device(batch.slots[rows], np.int64)
            newest = (output.token_ids[rows] >= 0).sum(axis=1) - 1
            self._last_token[index] = self._to_device(output.token_ids[rows, newest], np.int32)
        self._stream.synchronize()
        return CompletedStep(output)


def _mode(state: BatchState, slots: npt.NDArray[np.int32]) -> str:
    """How these rows are sampled: all greedy, none filtered, or any way."""
    hot = state.temperature[slots] > 0
    if not hot.any():
        return "greedy"
    filtered = (state.top_k[slots] > 0) | (state.top_p[slots] < 1) | (state.min_p[slots] > 0)
    return "filtered" if (filtered & hot).any() else "plain"


def _aligned(array: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
    """Padded to whole 16 bytes of int32, so that what follows stays aligned: kernels are compiled for one alignment."""
    return np.pad(array, (0, -len(array) % 4))
