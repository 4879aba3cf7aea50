# mypy: disable-error-code="no-untyped-call"
"""Any step, kernel by kernel: what no graph is there for."""

import numpy as np
import numpy.typing as npt
import torch

from vllm_model.cuda.chunk_steps import MANY_TOKENS
from vllm_model.cuda.device import Device
from vllm_model.cuda.device_sampler import DeviceSampler, Sampling
from vllm_model.cuda.forward import Forward
from vllm_model.cuda.plans import DecodePlans
from vllm_model.cuda.rows import DeviceRows
from vllm_model.host_sampling import PIECE, sample_in_pieces, wanted_tokens
from vllm_model.kernels.library_prefill import LEAST, padded
from vllm_model.kernels.logits import Guessed
from vllm_model.sampler import token_logprobs
from vllm_model.verifier import Indices, SampledEntries, accept_guesses, guess_table, sampled_entries
from vllm_traits.backend import CompletedStep
from vllm_traits.batch import Batch
from vllm_traits.sampling_params import MAX_LOGPROBS


class LooseSteps:
    """Runs them.

    Args:
        device: Where.
        forward, rows, sampler, plans: What the steps are made of.
        max_num_batched_tokens: Tokens of the longest step.
    """

    def __init__(
        self,
        device: Device,
        forward: Forward,
        rows: DeviceRows,
        sampler: DeviceSampler,
        plans: DecodePlans,
        max_num_batched_tokens: int,
    ) -> None:
        self._max_num_batched_tokens = max_num_batched_tokens
        self._device, self._forward, self._rows, self._sampler, self._plans = device, forward, rows, sampler, plans

    def compile(self) -> None:
        """Launch what the steps need, for :meth:`Device.compile`."""
        forward, plans = self._forward, self._plans
        tokens = torch.zeros(MANY_TOKENS, dtype=torch.int32, device=self._device.device)
        none, starts = tokens[:4] - 1, tokens[:8]
        singles = {1, min(self._rows.max_num_seqs, MANY_TOKENS)}

        def attend(layer: int, q: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
            for rows in singles:
                forward.attend_single(layer, q[:rows], plans.update(tokens[:rows], tokens[:rows] - 1, forward.tables))
            return forward.attend_chunks(layer, q, none, starts[:5], none)

        for room in (0, len(tokens)) if forward.has_library else (0,):
            hidden = forward.layers(tokens, tokens, tokens, attend, room=room)
        for kind in ("greedy", "filtered"):
            self._sampler.draw(forward.logits(hidden[:4]), none, starts[:4], Sampling(kind))
        self._rows.keep(none, none)

    def run_widest(self) -> None:
        """What takes the most memory: the longest step, the most logits at once, and a prompt's scores; nothing is written."""
        forward, sampler = self._forward, self._sampler
        ints = torch.zeros(3, self._max_num_batched_tokens, dtype=torch.int32, device=self._device.device)
        token_ids, positions, slots = ints
        slots -= 1
        none = slots.new_full((1,), -1)
        starts = slots.new_tensor([0, len(slots)])

        def attend(layer: int, q: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
            return forward.attend_chunks(layer, q, none, starts, none)

        hidden = forward.layers(token_ids, positions, slots, attend, room=len(slots) if forward.has_library else 0)
        most = min(len(hidden), sampler.max_rows)
        sampler.draw(forward.logits(hidden[:most]), slots[:most], positions[:most], Sampling("filtered"))
        scored = hidden[:PIECE]
        token_logprobs(forward.logits(scored).float(), [0] * len(scored), MAX_LOGPROBS)

    def run(self, batch: Batch, mode: Sampling) -> torch.Tensor:
        """Start a step: what :meth:`DeviceSampler.keep` returns or, with guesses, its tokens, int32 ``[rows, width]``."""
        entries = sampled_entries(batch)
        if entries.width > 1:
            return self._verify(batch, entries, mode)
        return self.sample(batch, self._hidden(batch), mode)

    def sample(self, batch: Batch, hidden: torch.Tensor, mode: Sampling) -> torch.Tensor:
        """What :meth:`DeviceSampler.keep` returns for the hidden states of each row's last token, ``[rows, hidden]``."""
        # Rows that do not sample have slot -1 here.
        slots, positions = self._device.send_aligned(
            np.where(batch.sample, batch.slots, -1), batch.num_computed + batch.query_lens
        )
        logits = self._forward.logits(hidden)
        self._sampler.send_masks(batch)
        tokens = self._sampler.draw(logits, slots, positions, mode)
        return self._sampler.keep(logits, tokens, slots, mode)

    def run_with_host(self, batch: Batch) -> CompletedStep:
        """A step in which some row's logits need the host: not overlapped."""
        send, last_token = self._device.send, self._rows.last_token
        wanted, first = wanted_tokens(batch)
        hidden = self._hidden(batch, wanted)
        waiting = np.flatnonzero(batch.token_ids[batch.query_start[1:] - 1] < 0)
        last = last_token.cpu().numpy()
        pending = {row: int(last[batch.slots[row]]) for row in waiting.tolist()}

        def logits_of(places: Indices) -> torch.Tensor:
            return self._forward.logits(hidden[send(places, np.int64)]).float()

        output = sample_in_pieces(batch, logits_of, len(wanted), first, pending, self._sampler.held)
        rows = np.flatnonzero(batch.sample)
        if len(rows):
            newest = (output.token_ids[rows] >= 0).sum(axis=1) - 1
            slots, tokens = self._device.send_aligned(batch.slots[rows], output.token_ids[rows, newest])
            self._sampler.keep(hidden, tokens, slots, Sampling(adjusts=True))
        self._device.synchronize()
        return CompletedStep(output)

    def _verify(self, batch: Batch, entries: SampledEntries, mode: Sampling) -> torch.Tensor:
        """A step with guesses: the tokens that stand, int32 ``[rows, width]``."""
        send, send_aligned, most = self._device.send, self._device.send_aligned, self._sampler.max_rows
        hidden = self._hidden(batch, entries.tokens)
        entry_slots = batch.slots[entries.rows]
        where = entries.rows * entries.width + entries.places
        slots, positions, places, *more = send_aligned(entry_slots, entries.positions, where, *self._sampler.guessed(batch))
        self._sampler.send_masks(batch)
        sampled = torch.full((batch.num_rows, entries.width), -1, dtype=torch.int32, device=self._device.device)
        for start in range(0, len(entries), most):  # as many logits at once as a step without guesses has
            piece = slice(start, min(start + most, len(entries)))
            logits = self._forward.logits(hidden[piece])
            guessed = Guessed(*(each[piece] for each in more))
            tokens = self._sampler.draw(logits, slots[piece], positions[piece], mode, guessed)
            sampled.view(-1)[places[piece].long()] = tokens
        accepted = accept_guesses(sampled, send(guess_table(batch, entries.width), np.int32))
        last = accepted.gather(1, (accepted >= 0).sum(1, keepdim=True).clamp(min=1) - 1)[:, 0]
        row_slots = send(np.where(batch.sample, batch.slots, -1), np.int32)
        self._rows.keep(last, row_slots)
        self._sampler.count(accepted, row_slots, mode)
        return accepted

    def _hidden(self, batch: Batch, wanted: npt.NDArray[np.int64] | None = None) -> torch.Tensor:
        """Hidden states ``[rows, hidden]`` of each row's last token, or of ``wanted``."""
        send, forward, lens = self._device.send, self._forward, batch.query_lens
        self._rows.send_blocks(batch)
        rows = np.repeat(np.arange(batch.num_rows), lens)
        positions = np.arange(batch.num_tokens) - batch.query_start[rows] + batch.num_computed[rows]
        tokens = batch.token_ids
        token_ids, positions_, token_slots = self._device.send_aligned(tokens, positions, batch.slots[rows])
        if (tokens < 0).any():
            token_ids = torch.where(token_ids < 0, self._rows.last_token[token_slots.long()], token_ids)
        whole = (lens >= LEAST) & (batch.num_computed == 0) & forward.has_library
        dense = [(int(batch.query_start[row]), int(lens[row])) for row in np.flatnonzero(whole).tolist()]
        parts = []
        for single, members in ((True, np.flatnonzero(lens == 1)), (False, np.flatnonzero((lens > 1) & ~whole))):
            if len(members):
                at = np.flatnonzero(np.isin(rows, members))
                every = len(at) == len(rows)
                parts.append((single, self._part(batch, members), None if every else send(at, np.int64)))

        def attend(layer: int, q: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
            out = torch.empty_like(q)
            for start, length in dense:
                done = forward.attend_prompt(q, qkv, start, length)
                if length == batch.num_tokens:
                    return done
                out[start : start + length] = done
            for single, (slots, starts, computed, _), at in parts:
                mine = q if at is None else q[at]
                if single:
                    done = forward.attend_single(layer, mine, self._plans.of(len(mine)))
                else:
                    done = forward.attend_chunks(layer, mine, slots, starts, computed)
                if at is None:
                    return done
                out[at] = done
            return out[: batch.num_tokens]

        for single, (slots, _, _, ends), _ in parts:
            if single:
                self._plans.update(ends, slots, forward.tables)
        room = max((start + padded(length) for start, length in dense), default=0)
        keep = send(batch.query_start[1:] - 1 if wanted is None else wanted, np.int64)
        return forward.layers(token_ids, positions_, token_slots, attend, keep, room=max(room, len(tokens)) if dense else 0)

    def _part(self, batch: Batch, members: npt.NDArray[np.intp]) -> list[torch.Tensor]:
        """Slots, starts, first positions and lengths of some rows, as if they were alone."""
        lens, computed = batch.query_lens[members], batch.num_computed[members]
        starts = np.concatenate([[0], np.cumsum(lens)])
        return self._device.send_aligned(batch.slots[members], starts, computed, computed + lens)
