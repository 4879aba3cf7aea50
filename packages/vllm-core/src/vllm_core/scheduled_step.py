"""What passes between scheduling a step and taking its result in."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_core.outputs import RequestOutput
from vllm_core.sequence import Sequence
from vllm_traits.batch import Batch, BoolArray, IntArray, LongArray
from vllm_traits.ids import SeqId


@dataclass(frozen=True, slots=True)
class RunningSet:
    """The running sequences in order, as lists that steady decode uses again and again.

    Attributes:
        slots: int64 ``[num_running]``: numpy takes int64 indices several times faster than the batch's int32.
        batch_slots: int32, the same.
        outputs: Of their requests, each once.
    """

    slots: LongArray
    batch_slots: IntArray
    sequences: list[Sequence]
    seq_ids: tuple[SeqId, ...]
    outputs: list[RequestOutput]


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """A batch, and what is needed to take its result in.

    Attributes:
        slots: int64 ``[num_rows]``, the batch's.
        ends: int32 ``[num_rows]``, tokens in the KV cache after it, guesses included.
        epochs: int64 ``[num_rows]``: a row whose slot has another epoch by now is void.
        running: Set if the rows are all that ran, in order.
        has_guesses: Whether any row holds guesses.
    """

    batch: Batch
    slots: LongArray
    ends: IntArray
    epochs: LongArray
    running: RunningSet | None
    has_guesses: bool


@dataclass(frozen=True, slots=True)
class Committed:
    """What a step brought.

    Attributes:
        sequences: Those that have tokens more; the ended ones are taken out already.
        outputs: Of their requests, each once.
        num_new: Tokens, over all of them.
        is_first: bool ``[len(sequences)]``: its first token is among them.
        since_last: float64 ``[len(sequences)]``, seconds since its tokens before, where it has some.
        ended: Those that ended.
    """

    sequences: list[Sequence]
    outputs: list[RequestOutput]
    num_new: int
    is_first: BoolArray
    since_last: npt.NDArray[np.float64]
    ended: list[Sequence]
