# mypy: disable-error-code="no-untyped-call"
"""Tokens from logits on the device, for rows by slot."""

from typing import NamedTuple

import torch

from vllm_model.cuda.device import Device
from vllm_model.cuda.finish import REPORT
from vllm_model.cuda.logits_rows import LogitsRows
from vllm_model.cuda.rows import DeviceRows, sampling_mode
from vllm_model.kernels.logits import Guessed
from vllm_model.kernels.logprobs import token_logprobs
from vllm_model.kernels.sampling import SamplerWorkspace, sample
from vllm_model.structured import HeldRows
from vllm_traits.batch import Batch, IntArray
from vllm_traits.sampling_params import MAX_LOGPROBS


class Sampling(NamedTuple):
    """What a step does with logits; a graph is of one such way."""

    kind: str = "plain"
    """Of :func:`~vllm_model.cuda.rows.sampling_mode`."""
    adjusts: bool = False
    """Penalties, bias, allowed and banned tokens are applied, and what is sampled is counted."""
    reports: bool = False
    """Log-probabilities come with the tokens."""
    held: bool = False
    """What grammars allow is sent while the model runs; a graph of such a step has two parts."""


class DeviceSampler:
    """Draws with the parameters that stand in the rows.

    Args:
        device: Where.
        rows: Parameters by slot.
        logits_rows: What changes logits, by slot.
        max_rows: Most rows drawn at once.
    """

    def __init__(self, device: Device, rows: DeviceRows, logits_rows: LogitsRows, max_rows: int) -> None:
        self.max_rows = max_rows
        self._rows, self._logits_rows, self._pdl = rows, logits_rows, device.pdl
        self._workspace = SamplerWorkspace(self.max_rows, device.device)

    def mode(self, batch: Batch) -> Sampling:
        """What a step must do."""
        slots = batch.slots[batch.sample]
        kind = sampling_mode(batch.state, slots)
        logits_rows = self._logits_rows
        reports = bool((logits_rows.num_logprobs[slots] >= 0).any())
        return Sampling(kind, logits_rows.adjust(batch), reports, logits_rows.hold(batch))

    @property
    def held(self) -> HeldRows | None:
        """Rows that are held to a grammar."""
        return self._logits_rows.held

    def send_masks(self, batch: Batch) -> None:
        """As :meth:`LogitsRows.send_masks`."""
        self._logits_rows.send_masks(batch)

    def guessed(self, batch: Batch) -> tuple[IntArray, IntArray, IntArray]:
        """As :meth:`LogitsRows.guessed`."""
        return self._logits_rows.guessed(batch)

    def draw(
        self,
        logits: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        mode: Sampling,
        guessed: Guessed | None = None,
    ) -> torch.Tensor:
        """One token a row.

        Args:
            logits: ``[rows, vocab_size]``.
            slots: int32 ``[rows]``; -1: no token.
            positions: int32 ``[rows]``, of the tokens to be drawn.
            mode: What to apply.
            guessed: Of a step with guesses.

        Returns:
            int32 ``[rows]``.
        """
        rows = self._rows
        if mode.adjusts:
            logits = self._logits_rows.adjusted(logits, slots, positions, guessed)
        filters = (rows.top_k, rows.top_p, rows.min_p) if mode.kind == "filtered" else (None, None, None)
        return sample(
            logits,
            slots,
            positions,
            rows.temperature,
            rows.seed,
            self._workspace,
            top_k=filters[0],
            top_p=filters[1],
            min_p=filters[2],
            greedy=mode.kind == "greedy",
            pdl=self._pdl,
        )

    def count(self, tokens: torch.Tensor, slots: torch.Tensor, mode: Sampling) -> None:
        """What was sampled, for penalties; as :meth:`LogitsRows.count`."""
        if mode.adjusts:
            self._logits_rows.count(tokens, slots)

    def keep(
        self,
        logits: torch.Tensor,
        tokens: torch.Tensor,
        slots: torch.Tensor,
        mode: Sampling,
        ring: torch.Tensor | None = None,
        place: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Make what was drawn each slot's last token, at most one a slot; ``ring`` and ``place`` as of :meth:`DeviceRows.keep`.

        Returns:
            ``tokens``; if the step reports, int32 ``[rows, REPORT]``: token, its log-probability, its rank, the
            log-probabilities of the most likely tokens and these; what is float32 in its bits.
        """
        self._rows.keep(tokens, slots, ring, place)
        self.count(tokens, slots, mode)
        if not mode.reports:
            return tokens
        return self.report(logits, tokens)

    def report(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """What :meth:`keep` returns of a step that reports."""
        logprobs, ranks = token_logprobs(logits, tokens, self._workspace, pdl=self._pdl)
        chosen = logits.gather(1, tokens.clamp(0, logits.shape[1] - 1).long()[:, None]).float()
        num = min(MAX_LOGPROBS, logits.shape[1])
        top = logits.topk(num, dim=-1)
        values = top.values.float() - (chosen - logprobs[:, None])
        out = tokens.new_zeros(len(tokens), REPORT)
        out[:, 0], out[:, 1], out[:, 2] = tokens, logprobs.view(torch.int32), ranks
        out[:, 3 : 3 + num], out[:, 3 + MAX_LOGPROBS : 3 + MAX_LOGPROBS + num] = values.view(torch.int32), top.indices
        return out
