# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"
"""What a running sequence needs stands in rows of device tensors, by slot; only what changes is sent."""

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from vllm_model.cuda.device import Device
from vllm_model.kernels._launch import launch, power_of_two
from vllm_traits.batch import Batch, BatchState


@triton.jit(do_not_specialize=["rows"])
def _begin_kernel(staged, tables, last_token, token_ids, positions, slots, seq_lens, rows, B: tl.constexpr):  # noqa: N803
    """Take a step's rows from what the host sent, ``staged`` int32 ``[5 or more, rows]``; slot -1 is padding."""
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
def _keep_kernel(tokens, slots, last_token, ring, place, ring_stride, rows, B: tl.constexpr):  # noqa: N803
    """``last_token[slots] = tokens``, but for slot -1; and ``ring[place] = tokens``, but for place -1."""
    i = tl.arange(0, B)
    slot = tl.load(slots + i, mask=i < rows, other=-1)
    token = tl.load(tokens + i, mask=i < rows, other=0)
    tl.store(last_token + slot, token, mask=slot >= 0)
    if ring is not None:
        where = tl.load(place)
        tl.store(ring + where * ring_stride + i, token, mask=i < tl.where(where >= 0, rows, 0))


class DeviceRows:
    """The rows of all slots on the device.

    Args:
        device: Where.
        max_num_seqs: Slots.
        max_blocks: Most blocks of a sequence.

    Attributes:
        tables: int32 ``[slots, max_blocks]``, block tables.
        last_token: int32 ``[slots]``, what was sampled last.
        temperature, top_p, min_p: float32 ``[slots]``.
        top_k: int32 ``[slots]``.
        seed: int64 ``[slots]``.
    """

    def __init__(self, device: Device, max_num_seqs: int, max_blocks: int) -> None:
        where = device.device
        self._device = device
        self.max_num_seqs, self.max_blocks = max_num_seqs, max_blocks
        self.tables = torch.zeros(max_num_seqs, max_blocks, dtype=torch.int32, device=where)
        self.last_token = torch.zeros(max_num_seqs, dtype=torch.int32, device=where)
        self._floats = torch.zeros(3, max_num_seqs, dtype=torch.float32, device=where)
        self.temperature, self.top_p, self.min_p = self._floats
        self.top_k = torch.zeros(max_num_seqs, dtype=torch.int32, device=where)
        self.seed = torch.zeros(max_num_seqs, dtype=torch.int64, device=where)
        self._sent_blocks: npt.NDArray[np.int32] = np.zeros(max_num_seqs, np.int32)
        self._rows_block = power_of_two(max_num_seqs)

    def send_changes(self, batch: Batch) -> None:
        """Bring parameters and block tables of slots with new sequences to the device."""
        changed, state, send = batch.changed_slots, batch.state, self._device.send
        if len(changed) == 0:
            return
        index = send(changed, np.int64)
        floats = np.stack([state.temperature[changed], state.top_p[changed], state.min_p[changed]])
        self._floats[:, index] = send(floats, np.float32)
        self.top_k[index] = send(state.top_k[changed], np.int32)
        self.seed[index] = send(state.seed[changed], np.int64)
        most = int(state.num_blocks[changed].max())
        self.tables[index, :most] = send(state.block_tables[changed, :most], np.int32)
        self._sent_blocks[changed] = state.num_blocks[changed]

    def forget(self, slots: npt.NDArray[np.int32]) -> None:
        """A step failed: what was sent for these may not have arrived, and goes again."""
        self._sent_blocks[slots] = 0

    def send_blocks(self, batch: Batch) -> None:
        """Bring new blocks of running sequences to the device."""
        places, blocks = self._take_new_blocks(batch)
        if len(places):
            self.tables.view(-1)[self._device.send(places, np.int64)] = self._device.send(blocks, np.int32)

    def stage_blocks(self, batch: Batch, places: npt.NDArray[np.int32], blocks: npt.NDArray[np.int32]) -> None:
        """Write new blocks to what a step sends: places in the tables, -1 where there are no more, and the blocks there."""
        places[:] = -1
        new_places, new_blocks = self._take_new_blocks(batch, at_once=len(places))
        places[: len(new_places)], blocks[: len(new_places)] = new_places, new_blocks

    def _take_new_blocks(self, batch: Batch, at_once: int | None = None) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """Places in the tables and blocks that the device does not have yet; what is more than ``at_once`` is sent here."""
        state, slots = batch.state, batch.slots
        sent, now = self._sent_blocks[slots], state.num_blocks[slots]
        counts = np.maximum(now - sent, 0)
        rows = np.repeat(np.arange(len(slots)), counts)
        offsets = np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows] + sent[rows]
        places, blocks = slots[rows] * np.int64(self.max_blocks) + offsets, state.block_tables[slots[rows], offsets]
        self._sent_blocks[slots] = np.maximum(now, sent)
        if at_once is not None and len(places) > at_once:  # after a failed step, or where room was made for many guesses
            self.tables.view(-1)[self._device.send(places, np.int64)] = self._device.send(blocks, np.int32)
            return places[:0], blocks[:0]
        return places, blocks

    def stage(self, batch: Batch, staged: npt.NDArray[np.int32]) -> None:
        """Write rows of single tokens as :meth:`begin` takes them: slot, position, token, a place in the tables, block there.

        Args:
            staged: int32 ``[5 or more, rows or more]``.
        """
        rows = batch.num_rows
        staged[0] = -1
        staged[0, :rows], staged[1, :rows], staged[2, :rows] = batch.slots, batch.num_computed, batch.token_ids
        self.stage_blocks(batch, staged[3], staged[4])

    def begin(self, staged: torch.Tensor, ints: torch.Tensor) -> None:
        """Take in what :meth:`stage` wrote.

        Args:
            staged: int32 ``[5 or more, rows]``, contiguous.
            ints: int32 ``[4, rows]``, to be written: token ids, positions, slots, and lengths with this step's token.
        """
        rows = ints.shape[1]
        token_ids, positions, slots, seq_lens = ints
        launch(
            _begin_kernel,
            (1,),
            staged,
            self.tables,
            self.last_token,
            token_ids,
            positions,
            slots,
            seq_lens,
            rows,
            B=self._rows_block,
        )

    def keep(
        self, tokens: torch.Tensor, slots: torch.Tensor, ring: torch.Tensor | None = None, place: torch.Tensor | None = None
    ) -> None:
        """Each slot's last token, for the next step; slot -1 is none.

        Args:
            tokens, slots: int32 ``[rows]``.
            ring: int32 ``[places, room]`` in the host's memory: they are written there too.
            place: int32 ``[1]``, where in it; -1: nowhere.
        """
        stride = 0 if ring is None else ring.stride(0)
        launch(_keep_kernel, (1,), tokens, slots, self.last_token, ring, place, stride, len(slots), B=self._rows_block)


def sampling_mode(state: BatchState, slots: npt.NDArray[np.int32]) -> str:
    """How these rows are sampled: all ``greedy``, none filtered (``plain``), or any way (``filtered``)."""
    hot = state.temperature[slots] > 0
    if not hot.any():
        return "greedy"
    filtered = (state.top_k[slots] > 0) | (state.top_p[slots] < 1) | (state.min_p[slots] > 0)
    return "filtered" if (filtered & hot).any() else "plain"
