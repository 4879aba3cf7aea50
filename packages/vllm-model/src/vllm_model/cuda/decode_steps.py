# mypy: disable-error-code="no-untyped-call"
"""Steps of one token a row: graphs of the next larger size, from what the host sent to the sampled tokens."""

from collections.abc import Callable

import torch

from vllm_model.cuda.device import Device, Graph, Parts, through
from vllm_model.cuda.device_sampler import DeviceSampler, Sampling
from vllm_model.cuda.finish import RING
from vllm_model.cuda.forward import Forward
from vllm_model.cuda.plans import DecodePlans
from vllm_model.cuda.rows import DeviceRows
from vllm_model.cuda.shared_rows import SharedPrefix, SharedPrefixes
from vllm_model.kernels._launch import power_of_two
from vllm_model.kernels.decode_plan import FEW_ROWS
from vllm_model.kernels.shared_prefix import PrefixWorkspace, join_prefix
from vllm_traits.batch import Batch

GRAPH_SIZES = (1, 2, 4, *range(8, 129, 8), *range(144, 257, 16))
"""Rows that graphs are captured for."""
LEAST_GRAPHS = 4
"""Graphs that are captured to measure what one takes: the device gives memory in pieces of megabytes."""
RAW_ROWS = range(17, 97)
"""Rows for which decode attention finishes queries and keys itself. With fewer, many programs would do that for each pair; with
more, each for several.
"""
FIELDS = 6
"""Of a row that the host sends: the five of :meth:`DeviceRows.stage`, and how much of it is shared."""
TAIL = 4
"""Behind the rows: a slot with the shared prefix, its length, the place of the ring for the tokens, and room."""


class DecodeSteps:
    """Replays and captures them.

    Args:
        device: Where.
        forward, rows, sampler, plans: What the steps are made of.
        ring: int32 ``[places, room]`` in the host's memory, where they write their tokens.
    """

    def __init__(
        self,
        device: Device,
        forward: Forward,
        rows: DeviceRows,
        sampler: DeviceSampler,
        plans: DecodePlans,
        ring: torch.Tensor,
    ) -> None:
        self._ring = ring
        self._device, self._forward, self._rows, self._sampler, self._plans = device, forward, rows, sampler, plans
        config, most = forward.config, rows.max_num_seqs
        self.sizes = [*(size for size in GRAPH_SIZES if size < most), most]
        self.graphs: dict[tuple[int, Sampling, bool], Graph] = {}
        """By rows, mode of sampling, and whether a shared prefix is read apart."""
        self.prefixes = SharedPrefixes()
        self._prefix_workspace = PrefixWorkspace(most, config.num_heads, config.head_dim, device.device)
        self._staging = [device.pinned(FIELDS * most + TAIL) for _ in range(RING)]
        self._turn = 0

    def compile(self) -> None:
        """Launch what the steps need, for :meth:`Device.compile`."""
        for size in self._kinds():
            through(self._run(self._empty(size), size, Sampling(), False, torch.zeros))  # not launched, it leaves no token ids
        last = self.sizes[-1]
        if last > FEW_ROWS:
            through(self._run(self._empty(last), last, Sampling(), True, torch.zeros))

    def _kinds(self) -> list[int]:
        """Sizes whose steps have all kernels of ours that those of any size have."""
        first, last = self.sizes[0], self.sizes[-1]
        return sorted({first, *(min(size, last) for size in (2, 64, 96, 128)), last})

    def capture_all(self) -> None:
        """The graphs of all sizes. The largest is first: the others fit into its memory. Those with new kernels are next."""
        kinds = self._kinds()
        for size in [*reversed(kinds), *(size for size in reversed(self.sizes) if size not in kinds)]:
            self.graphs[size, Sampling(), False] = self._capture(size, Sampling(), False, has_run=size not in kinds)

    def capture_widest(self) -> list[Graph]:
        """The graphs that take the most memory, to be measured."""
        return [self._capture(self.sizes[-1], mode, False) for mode in (Sampling("filtered"), Sampling())]

    def capture_least(self) -> list[Graph]:
        """Some that take only what every graph does, to be measured after the widest."""
        return [self._capture(self.sizes[0], Sampling(), False, has_run=i > 0) for i in range(LEAST_GRAPHS)]

    def run(self, batch: Batch, mode: Sampling, place: int | None) -> torch.Tensor:
        """Start a step: what :meth:`DeviceSampler.keep` returns; the tokens also go to this place of the ring, if given."""
        size = next(size for size in self.sizes if size >= batch.num_rows)
        prefix = self.prefixes.of(batch)
        if prefix is not None:  # few sizes, since each is captured on demand
            size = min(power_of_two(size), self.sizes[-1])
        key = (size, mode, prefix is not None)
        found = self.graphs.get(key)
        if found is None:
            found = self.graphs[key] = self._capture(*key)
        found.staged.copy_(self._stage(batch, size, prefix, place), non_blocking=True)
        return found.replay(lambda: self._sampler.send_masks(batch))

    def _stage(self, batch: Batch, size: int, prefix: SharedPrefix | None, place: int | None) -> torch.Tensor:
        """What a step sends: pinned int32 ``[FIELDS * size + TAIL]``."""
        self._turn += 1
        pinned = self._staging[self._turn % RING][: FIELDS * size + TAIL]
        ints = pinned.numpy()
        staged = ints[: FIELDS * size].reshape(FIELDS, size)
        shared = (0, 0)
        if prefix is not None:
            staged[5] = 0
            staged[5, : batch.num_rows] = prefix.members * prefix.length
            shared = prefix.leader, prefix.length
        ints[FIELDS * size :] = *shared, -1 if place is None else place, 0
        self._rows.stage(batch, staged)
        return pinned

    def _empty(self, size: int) -> torch.Tensor:
        """Staged rows that touch nothing."""
        staged = torch.full((FIELDS * size + TAIL,), -1, dtype=torch.int32, device=self._device.device)
        staged[(FIELDS - 1) * size : -2] = 0  # the place of the ring stays none
        return staged

    def _capture(self, size: int, mode: Sampling, shared: bool, *, has_run: bool = False) -> Graph:
        staged = self._empty(size)
        return self._device.capture_parts(staged, lambda: self._run(staged, size, mode, shared), has_run=has_run)

    def _run(
        self, staged: torch.Tensor, size: int, mode: Sampling, shared: bool, make: Callable[..., torch.Tensor] = torch.empty
    ) -> Parts:
        """Everything between the staged rows and the tokens, int32 ``[size]``; it stops where grammars' bits are sent."""
        forward, workspace, pdl = self._forward, self._prefix_workspace, self._device.pdl
        ints = make(4, -(-size // 4) * 4, dtype=torch.int32, device=self._device.device)[:, :size]
        self._rows.begin(staged, ints)
        token_ids, positions, slots, seq_lens = ints
        skips = staged[(FIELDS - 1) * size : FIELDS * size] if shared else None
        raw = size in RAW_ROWS and skips is None and forward.takes_raw(self._plans.of(size))
        plan = self._plans.update(seq_lens, slots, forward.tables, skips, leave_newest=raw)

        def attend(layer: int, q: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
            if raw:
                return forward.attend_raw(layer, q, plan)
            if skips is None:
                return forward.attend_single(layer, q, plan)
            forward.attend_prefix(layer, q, staged[FIELDS * size :], workspace)
            out = forward.attend_single(layer, q, plan, workspace.lse)
            join_prefix(out, skips, workspace, pdl=pdl)
            return out

        hidden = forward.layers(token_ids, positions, slots, attend, raw=raw)
        logits = forward.logits(hidden)
        if mode.held:
            yield
        tokens = self._sampler.draw(logits, slots, seq_lens, mode)
        place = staged[FIELDS * size + 2 : FIELDS * size + 3]
        return self._sampler.keep(logits, tokens, slots, mode, self._ring, place)
