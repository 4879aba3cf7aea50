# mypy: disable-error-code="no-untyped-call"
"""How a step's tokens come back: into one of a few places in the host's memory, read once the event behind them has passed."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from vllm_model.cuda.device import Device
from vllm_model.cuda.rows import DeviceRows
from vllm_traits.batch import Batch, BatchOutput, TokenLogprobs
from vllm_traits.errors import BackendError, BackendOutOfMemoryError
from vllm_traits.sampling_params import MAX_LOGPROBS

REPORT = 3 + 2 * MAX_LOGPROBS
"""Numbers that :meth:`DeviceSampler.report` makes of a token."""
RING = 4
"""Steps whose tokens may wait to be read."""


class RunningStep:
    """A step under way: its tokens lie in one place of the ring once the event has passed.

    Args:
        tokens: The place, int32 ``[rows * width or more]``; a step that reports has ``REPORT`` more for each token behind the
            tokens of a row, or if that is one, in its stead.
        event: Behind the copy; None: it is over.
        batch: The step.
        width: Numbers of a row.
        rows: What is told if it fails.
        num_logprobs: By row, how many log-probabilities are wanted; None: the step reports none.
    """

    def __init__(
        self,
        tokens: torch.Tensor,
        event: torch.cuda.Event | None,
        batch: Batch,
        width: int,
        rows: DeviceRows,
        num_logprobs: Mapping[int, int] | None,
    ) -> None:
        self._num_logprobs = num_logprobs
        self._tokens, self._event, self._width, self._rows = tokens, event, width, rows
        self._sample, self._slots = batch.sample, batch.slots
        self._most = int(batch.num_draft.max()) + 1

    def done(self) -> bool:
        return self._event is None or bool(self._event.query())

    def result(self) -> BatchOutput:
        try:
            if self._event is not None:
                self._event.synchronize()
        except RuntimeError as error:
            self._rows.forget(self._slots)
            if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
                raise BackendOutOfMemoryError(f"A step ran out of device memory: {error}") from error
            raise BackendError(f"A step failed on the device: {error}") from error
        rows = len(self._sample)
        read = self._tokens.numpy()[: rows * self._width].reshape(rows, self._width)
        token_ids = np.where(self._sample[:, None], read[:, : self._most], -1)
        if self._num_logprobs is None:
            return BatchOutput(token_ids=token_ids)
        reports = read[:, read.shape[1] // (1 + REPORT) :].reshape(rows, -1, REPORT)
        given = (token_ids >= 0).sum(axis=1)
        return BatchOutput(
            token_ids=token_ids,
            logprobs={row: [_report(each, n) for each in reports[row, : given[row]]] for row, n in self._num_logprobs.items()},
        )


def _report(read: npt.NDArray[np.int32], num: int) -> TokenLogprobs:
    """Of one row of what :meth:`DeviceSampler.keep` made."""
    most = (len(read) - 3) // 2
    floats, top = read.view(np.float32), read[3 + most :]
    return TokenLogprobs([int(read[0]), *top[:num].tolist()], [float(floats[1]), *floats[3 : 3 + num].tolist()], int(read[2]))


class Finisher:
    """Where the tokens of steps come back to.

    Args:
        device: Where they are.
        rows: Of the steps.
        room: Most tokens of a step.

    Attributes:
        ring: int32 ``[places, room]`` in the host's memory, which the device writes by itself.
    """

    def __init__(self, device: Device, rows: DeviceRows, room: int) -> None:
        self._device, self._rows = device, rows
        self.ring = device.pinned(RING * room).view(RING, room)
        self._turn = 0

    def next_place(self) -> int:
        """Of the ring, for a step's tokens."""
        self._turn += 1
        return self._turn % RING

    def finish(
        self,
        batch: Batch,
        tokens: torch.Tensor,
        num_logprobs: Mapping[int, int] | None = None,
        *,
        place: int | None = None,
    ) -> RunningStep:
        """The step that has these tokens, int32 ``[rows or more, ...]``, or what :meth:`DeviceSampler.keep` made of them.

        Args:
            place: Where the step itself writes its tokens; None: they are copied.
        """
        width = tokens.numel() // len(tokens)
        ring = self.ring[self.next_place() if place is None else place]
        if place is None:
            ring[: batch.num_rows * width].copy_(tokens[: batch.num_rows].flatten(), non_blocking=True)
        return RunningStep(ring, self._device.mark(), batch, width, self._rows, num_logprobs)
