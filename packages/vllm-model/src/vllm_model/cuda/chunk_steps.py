# mypy: disable-error-code="no-untyped-call"
"""Steps with prompts as graphs of a few sizes: launched one by one, their kernels take longer than a small model."""

import numpy as np
import torch

from vllm_model.cuda.device import Device, Graph
from vllm_model.cuda.finish import RING
from vllm_model.cuda.forward import Forward
from vllm_model.cuda.rows import DeviceRows
from vllm_model.kernels import gemv
from vllm_model.kernels._launch import take_down
from vllm_model.kernels.library_prefill import LEAST, padded
from vllm_traits.batch import Batch

CHUNK_PARTS = (1, 2, 4, 8, 16, 32, 64)
"""The graphs' sizes as parts of the longest step."""
MANY_TOKENS = 512
"""From here on all products are the library's."""
LONGEST_SINGLE = 16384
"""Most keys of a row of one token in a graph: in one program a KV head, they take longer than a step kernel by kernel."""
CHUNK_ROW_FIELDS = 4
"""Of a row that the host sends: slot, start, position, last token."""


class ChunkSteps:
    """Replays them. Each ends with hidden states: tokens are drawn outside, in any way.

    Args:
        device: Where.
        forward, rows: What the steps are made of.
        max_num_batched_tokens: Tokens of the longest step.
    """

    def __init__(self, device: Device, forward: Forward, rows: DeviceRows, max_num_batched_tokens: int) -> None:
        self._device, self._forward, self._rows = device, forward, rows
        self._sizes = sorted(max(max_num_batched_tokens // part, 1) for part in CHUNK_PARTS)
        longest = self._sizes[-1]
        self._has_prompt = forward.has_library and LEAST <= longest == padded(longest)
        self._graphs: dict[int, Graph] = {}
        self._prompt: Graph | None = None
        """Of the longest step when it is the beginning of one prompt."""
        self._row_room = -(-(rows.max_num_seqs + 1) // 4) * 4
        room = 3 * max_num_batched_tokens + CHUNK_ROW_FIELDS * self._row_room
        self._staging = [device.pinned(room) for _ in range(RING)]
        self._turn = 0

    def compile(self) -> None:
        """Launch what the short ones need, for :meth:`Device.compile`; the others are as any long step."""
        for size in self._sizes:
            if gemv.MAX_ROWS < size < MANY_TOKENS:
                self._run(self._empty(size), size, as_prompt=False)
        if self._has_prompt:
            take_down("attention of a prompt", self._forward.load_library)

    def capture_all(self) -> None:
        """The graphs of all sizes, the largest first."""
        for size in reversed(self._sizes):
            if size > gemv.MAX_ROWS:
                self._graphs[size] = self._capture(size, as_prompt=False)
        if self._has_prompt:
            self._prompt = self._capture(self._sizes[-1], as_prompt=True)

    def capture_widest(self) -> list[Graph]:
        """The graphs that take the most memory, to be measured."""
        longest = self._sizes[-1]
        kinds = (False, True) if self._has_prompt else (False,)
        return [self._capture(longest, as_prompt=kind) for kind in kinds]

    def size_for(self, batch: Batch) -> int | None:
        """Tokens of the graph that runs this step, if there is one."""
        singles = batch.query_lens == 1
        if (batch.num_draft > 0).any() or (batch.num_computed[singles] > LONGEST_SINGLE).any():
            return None
        return next((size for size in self._sizes if size in self._graphs and size >= batch.num_tokens), None)

    def run(self, batch: Batch, size: int) -> torch.Tensor:
        """Start a step in the graph of that size: hidden states of each row's last token, ``[rows, hidden]``."""
        self._rows.send_blocks(batch)
        lens, n, end = batch.query_lens, batch.num_rows, batch.num_tokens
        whole = n == 1 and batch.num_computed[0] == 0 and end == self._sizes[-1]
        graph = self._prompt if whole and self._prompt is not None else self._graphs[size]
        self._turn += 1
        pinned = self._staging[self._turn % RING][: len(graph.staged)]
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
        graph.staged.copy_(pinned, non_blocking=True)
        return graph.replay()[:n]

    def _capture(self, size: int, *, as_prompt: bool) -> Graph:
        staged = self._empty(size)
        return self._device.capture(staged, lambda: self._run(staged, size, as_prompt=as_prompt))

    def _empty(self, size: int) -> torch.Tensor:
        """Staged tokens and rows that touch nothing."""
        staged = torch.zeros(3 * size + CHUNK_ROW_FIELDS * self._row_room, dtype=torch.int32, device=self._device.device)
        staged[2 * size : 3 * size + self._row_room] = -1
        return staged

    def _run(self, staged: torch.Tensor, size: int, *, as_prompt: bool) -> torch.Tensor:
        """A step of up to ``size`` tokens of any rows, or of that many of one prompt from its beginning."""
        forward, most = self._forward, self._rows.max_num_seqs
        tokens, rows = staged[: 3 * size].view(3, size), staged[3 * size :].view(CHUNK_ROW_FIELDS, -1)

        def attend(layer: int, q: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
            if as_prompt:
                return forward.attend_prompt(q, qkv, 0, size)
            return forward.attend_chunks(layer, q, rows[0, :most], rows[1, : most + 1], rows[2, :most])

        last = self._rows.last_token[tokens[2].clamp(min=0)]
        token_ids = torch.where(tokens[0] < 0, last, tokens[0])
        keep = rows[3, : min(most, size)].long()
        return forward.layers(token_ids, tokens[1], tokens[2], attend, keep, room=size if as_prompt else 0)
