"""All that a backend has on its device once the engine's size is known, and which kind of step runs a batch."""

from contextlib import suppress

import numpy as np

from vllm_model.cuda.chunk_steps import ChunkSteps
from vllm_model.cuda.decode_steps import LEAST_GRAPHS, DecodeSteps
from vllm_model.cuda.device import Device, Graph
from vllm_model.cuda.device_sampler import DeviceSampler
from vllm_model.cuda.finish import REPORT, Finisher, RunningStep
from vllm_model.cuda.forward import Forward
from vllm_model.cuda.kv_scales import measure_scales
from vllm_model.cuda.logits_rows import LogitsRows
from vllm_model.cuda.loose_steps import LooseSteps
from vllm_model.cuda.plans import DecodePlans
from vllm_model.cuda.rows import DeviceRows
from vllm_model.cuda.short_steps import ShortSteps
from vllm_model.decoder import Decoder
from vllm_model.kernels.logits import MOST_GUESSES
from vllm_model.kv_cache import PagedKvCache
from vllm_model.structured import Grammars, HeldRows
from vllm_traits.backend import CompletedStep
from vllm_traits.batch import Batch

GRAPHS_ON_DEMAND = 128
"""Room for so many graphs besides the widest: those of every size, and of other ways to sample as they come."""
SPARE_BYTES = 768 << 20
"""For what libraries take when they meet a shape for the first time."""
MAX_DRAFT_TOKENS = MOST_GUESSES
"""Most guesses in a row."""
MOST_LOGITS = 64 * (1 + MAX_DRAFT_TOKENS)
"""Tokens whose logits are held at once, if that is more than the slots."""


class Steps:
    """Runs batches.

    Args:
        device: Where.
        decoder: The weights.
        cache: The KV cache.
        max_num_seqs: Slots.
        max_blocks: Most blocks of a sequence.
        max_num_batched_tokens: Tokens of the longest step.
        grammars: For rows that are held to one, if there are any.
    """

    def __init__(
        self,
        device: Device,
        decoder: Decoder,
        cache: PagedKvCache,
        *,
        max_num_seqs: int,
        max_blocks: int,
        max_num_batched_tokens: int,
        grammars: Grammars | None = None,
    ) -> None:
        self._device = device
        self._rows = rows = DeviceRows(device, max_num_seqs, max_blocks)
        self._vocab_size: int = decoder.config.vocab_size
        held = None if grammars is None else HeldRows(grammars)
        most_logits = max(max_num_seqs, min(MOST_LOGITS, max_num_seqs * (1 + MAX_DRAFT_TOKENS)))
        self._logits_rows = logits_rows = LogitsRows(device, max_num_seqs, self._vocab_size, held, most_logits)
        self._sampler = sampler = DeviceSampler(device, rows, logits_rows, most_logits)
        self._forward = forward = Forward(device, decoder, cache, rows.tables)
        widest, fp8 = 1 + MAX_DRAFT_TOKENS, cache.scales is not None
        plans = DecodePlans(device, decoder.config, max_num_seqs, max_blocks, cache.block_size, widest, fp8=fp8)
        self._finisher = Finisher(device, rows, sampler.max_rows * (1 + REPORT))
        self.decode = DecodeSteps(device, forward, rows, sampler, plans, self._finisher.ring)
        self.short = ShortSteps(device, forward, rows, sampler, plans)
        self.chunk = ChunkSteps(device, forward, rows, max_num_batched_tokens)
        self.loose = LooseSteps(device, forward, rows, sampler, plans, max_num_batched_tokens)

    def compile(self) -> None:
        """Compile what steps launch, the kernels that take longest first; what only guesses need may come later."""
        self._device.compile(self.decode.compile, self.loose.compile, self.chunk.compile, later=[self.short.compile])

    def prepare(self) -> None:
        """Measure and capture what steps need."""
        if self._forward.cache.scales is not None:
            measure_scales(self._device, self._forward)
        self.chunk.capture_all()
        self.decode.capture_all()

    def measure(self) -> int:
        """Try the widest steps: bytes to keep for any step and all graphs, besides what is allocated by now."""
        device = self._device
        _, peak = device.taken_by(self.loose.run_widest)
        graphs = list[Graph]()  # while one is there, others may share its memory
        widest, _ = device.taken_by(lambda: graphs.extend(self.chunk.capture_widest() + self.decode.capture_widest()))
        few, _ = device.taken_by(self.decode.capture_least)
        more = few // LEAST_GRAPHS * GRAPHS_ON_DEMAND
        adjusted = 4 * self._sampler.max_rows * self._vocab_size  # a float32 copy of the logits, when some row wants it
        return peak + widest + more + adjusted + SPARE_BYTES

    def run(self, batch: Batch) -> RunningStep | CompletedStep:
        """Start a step. If it cannot be, what it sent goes again with the next; a part of it may have run."""
        try:
            return self._run(batch)
        except BaseException:
            self._rows.forget(batch.slots)
            with suppress(RuntimeError):
                self._device.synchronize()  # nobody else waits for that part, and what it reads is written again
            raise

    def _run(self, batch: Batch) -> RunningStep | CompletedStep:
        if len(batch.changed_slots):
            self.decode.prefixes.forget()
            self._rows.send_changes(batch)
            self._logits_rows.send_changes(batch)
        self._logits_rows.send_histories(batch)
        if self._logits_rows.need_host(batch):
            return self.loose.run_with_host(batch)
        mode, finish = self._sampler.mode(batch), self._finisher.finish
        num_logprobs = None
        if mode.reports:
            wanted = self._logits_rows.num_logprobs[batch.slots]
            num_logprobs = {row: int(wanted[row]) for row in np.flatnonzero((wanted >= 0) & batch.sample).tolist()}
        if batch.num_tokens == batch.num_rows:  # so there are no guesses
            place = None if mode.reports else self._finisher.next_place()
            return finish(batch, self.decode.run(batch, mode, place), num_logprobs, place=place)
        shape = self.short.shape_for(batch)
        if shape is not None:
            return finish(batch, self.short.run(batch, shape, mode), num_logprobs)
        if mode.reports and (batch.num_draft > 0).any():
            return self.loose.run_with_host(batch)
        size = self.chunk.size_for(batch)
        if size is not None:
            return finish(batch, self.loose.sample(batch, self.chunk.run(batch, size), mode), num_logprobs)
        return finish(batch, self.loose.run(batch, mode), num_logprobs)
