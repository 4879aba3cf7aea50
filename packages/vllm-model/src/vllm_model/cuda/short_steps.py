# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"
"""Steps of a few tokens a row, known ones and guesses, as graphs: drafted by whomever, verified and accepted on the device.

The rows are padded to one width. What the host sends is a grid of tokens and a list of rows::

    row 0     t  g0  g1  g2   .       t is known, g are guesses; after each a token is sampled
    row 1     t   .   .   .   .
    row 2     k   t   .   .   .       k is known too: after t alone something is sampled
"""

from collections.abc import Callable

import numpy as np
import torch
import triton
import triton.language as tl

from vllm_model.cuda.device import Device, Graph, Parts, through
from vllm_model.cuda.device_sampler import DeviceSampler, Sampling
from vllm_model.cuda.finish import RING
from vllm_model.cuda.forward import Forward
from vllm_model.cuda.plans import DecodePlans
from vllm_model.cuda.rows import DeviceRows
from vllm_model.kernels._launch import launch, power_of_two
from vllm_model.kernels.accept import accept
from vllm_model.kernels.decode_plan import FEW_ROWS
from vllm_model.kernels.logits import Guessed
from vllm_traits.batch import Batch

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Rows that graphs are captured for, when they are needed."""
WIDTHS = (2, 3, 5, 9)
"""Tokens of a row."""
TOKEN_FIELDS = 8
"""Of a token that the host sends: itself, position, slot, slot to sample for, a new block (place in the tables, block), the row
of the bitmask, and how many guesses end with it."""
ROW_FIELDS = 5
"""Of a row: slot, length with these tokens, position of the first, place of the first that is sampled after, how many are."""
BLOCK = 256


@triton.jit(do_not_specialize=["tokens", "room"])
def _begin_kernel(staged, tables, last_token, token_ids, tokens, room, B: tl.constexpr):  # noqa: N803
    """Take in new blocks, and put the tokens sampled last where they are wanted; ``staged`` int32 ``[8, room]``."""
    i = tl.program_id(0) * B + tl.arange(0, B)
    mask = i < tokens
    token = tl.load(staged + i, mask=mask, other=0)
    slot = tl.load(staged + 2 * room + i, mask=mask, other=-1)
    place = tl.load(staged + 4 * room + i, mask=mask, other=-1)
    block = tl.load(staged + 5 * room + i, mask=mask, other=0)
    tl.store(tables + place, block, mask=mask & (place >= 0))
    last = tl.load(last_token + slot, mask=mask & (slot >= 0), other=0)
    tl.store(token_ids + i, tl.where(token < 0, last, token), mask=mask)


class ShortSteps:
    """Replays and captures them.

    Args:
        device: Where.
        forward, rows, sampler, plans: What the steps are made of.
    """

    def __init__(self, device: Device, forward: Forward, rows: DeviceRows, sampler: DeviceSampler, plans: DecodePlans) -> None:
        self._device, self._forward, self._rows, self._sampler, self._plans = device, forward, rows, sampler, plans
        most = rows.max_num_seqs
        self._sizes = [*(size for size in SIZES if size < most), most]
        self._widths = [width for width in WIDTHS if width <= plans.max_queries]
        self.graphs: dict[tuple[int, int, Sampling], Graph] = {}
        """By rows, width, and mode of sampling."""
        room = TOKEN_FIELDS * _up(sampler.max_rows) + ROW_FIELDS * _up(most)
        self._staging = [device.pinned(room) for _ in range(RING)]
        self._turn = 0

    def compile(self) -> None:
        """Launch what the steps need, for :meth:`Device.compile`."""
        group = self._plans.of(1, several=True).group
        tiles = {max(16, power_of_two(width * group)): width for width in self._widths}  # of decode attention's products
        for width in sorted({*self._widths[:1], *tiles.values()}):
            for size in {1, min(FEW_ROWS + 1, self._rows.max_num_seqs)}:
                if size * width <= self._sampler.max_rows:
                    through(self._run(self._empty(size, width), size, width, Sampling(), torch.zeros))

    def shape_for(self, batch: Batch) -> tuple[int, int] | None:
        """Rows and width of the graph that runs this step, if there is one."""
        longest = int(batch.query_lens.max())
        width = next((width for width in self._widths if width >= longest), 0)
        size = next(size for size in self._sizes if size >= batch.num_rows)
        return (size, width) if width and size * width <= self._sampler.max_rows else None

    def run(self, batch: Batch, shape: tuple[int, int], mode: Sampling) -> torch.Tensor:
        """Start a step in the graph of that shape: its tokens, int32 ``[rows or more, width]``.

        If the step reports, behind a row's tokens is, for each of them, what :meth:`DeviceSampler.report` says of it.
        """
        key = (*shape, mode)
        found = self.graphs.get(key)
        if found is None:
            staged = self._empty(*shape)
            found = self.graphs[key] = self._device.capture_parts(staged, lambda: self._run(staged, *key))
        found.staged.copy_(self._stage(batch, *shape, mode), non_blocking=True)
        return found.replay(lambda: self._sampler.send_masks(batch))

    def _stage(self, batch: Batch, size: int, width: int, mode: Sampling) -> torch.Tensor:
        """What a step sends: pinned int32, :data:`TOKEN_FIELDS` of each token, then :data:`ROW_FIELDS` of each row."""
        room, rows_room = _up(size * width), _up(size)
        self._turn += 1
        pinned = self._staging[self._turn % RING][: TOKEN_FIELDS * room + ROW_FIELDS * rows_room]
        ints = pinned.numpy()
        tokens, rows = ints[: TOKEN_FIELDS * room].reshape(-1, room), ints[TOKEN_FIELDS * room :].reshape(-1, rows_room)
        lens, n = batch.query_lens, batch.num_rows
        member = np.repeat(np.arange(n), lens)
        place = np.arange(batch.num_tokens) - batch.query_start[member]
        at, first = member * width + place, lens - 1 - batch.num_draft
        tokens[:2], tokens[2:4], tokens[6:] = 0, -1, 0
        tokens[0, at], tokens[1, at] = batch.token_ids, batch.num_computed[member] + place
        tokens[2, at] = batch.slots[member]
        sampled = batch.sample[member] & (place >= first[member])
        tokens[3, at] = np.where(sampled, batch.slots[member], -1)
        if mode.adjusts:
            tokens[6, at[sampled]], _, tokens[7, at[sampled]] = self._sampler.guessed(batch)
        self._rows.stage_blocks(batch, tokens[4, : size * width], tokens[5, : size * width])
        rows[0], rows[1:] = -1, 0
        rows[0, :n], rows[1, :n], rows[2, :n] = batch.slots, batch.num_computed + lens, batch.num_computed
        rows[3, :n], rows[4, :n] = first, np.where(batch.sample, batch.num_draft + 1, 0)
        return pinned

    def _empty(self, size: int, width: int) -> torch.Tensor:
        """Staged rows that touch nothing."""
        room, rows_room = _up(size * width), _up(size)
        staged = torch.zeros(TOKEN_FIELDS * room + ROW_FIELDS * rows_room, dtype=torch.int32, device=self._device.device)
        staged[2 * room : 5 * room] = -1
        staged[TOKEN_FIELDS * room :][:rows_room] = -1
        return staged

    def _run(
        self, staged: torch.Tensor, size: int, width: int, mode: Sampling, make: Callable[..., torch.Tensor] = torch.empty
    ) -> Parts:
        """Everything between what was sent and what :meth:`run` returns; it stops where grammars' bits are sent."""
        forward, rows = self._forward, self._rows
        num, room = size * width, _up(size * width)
        _, positions, slots, sampled_slots, *_, mask_rows, num_guesses = staged[: TOKEN_FIELDS * room].view(-1, room)[:, :num]
        row_slots, lens, starts, first, counts = staged[TOKEN_FIELDS * room :].view(ROW_FIELDS, -1)[:, :size]
        token_ids = make(num, dtype=torch.int32, device=staged.device)
        grid = (-(-num // BLOCK),)
        launch(_begin_kernel, grid, staged, rows.tables, rows.last_token, token_ids, num, room, B=BLOCK)
        plan = self._plans.update(lens, row_slots, forward.tables, several=True)

        def attend(layer: int, q: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
            return forward.attend_few(layer, q, plan, width, starts)

        hidden = forward.layers(token_ids, positions, slots, attend)
        guessed = Guessed(mask_rows, token_ids, num_guesses)
        logits = forward.logits(hidden)
        if mode.held:
            yield
        drawn = self._sampler.draw(logits, sampled_slots, positions + 1, mode, guessed)
        accepted = accept(drawn.view(size, width), token_ids.view(size, width), row_slots, first, counts, rows.last_token)
        self._sampler.count(accepted, row_slots, mode)
        if not mode.reports:
            return accepted
        reports = self._sampler.report(logits, drawn).view(size, width, -1)
        places = (first[:, None] + torch.arange(width, device=first.device)).clamp(max=width - 1).long()
        return torch.cat((accepted, reports.gather(1, places[:, :, None].expand_as(reports)).flatten(1)), dim=1)


def _up(length: int) -> int:
    """Whole 16 bytes of int32, so that what follows stays aligned: kernels are compiled for one alignment."""
    return -(-length // 4) * 4
