"""A sequence: one choice of one request.

It is three lengths, ``0 <= num_cached <= num_computed <= num_tokens``; while it runs, the lengths that change in every step
live in the scheduler's arrays at its slot, and here is the rest.
"""

from dataclasses import dataclass, field
from enum import Enum

from vllm_core.outputs import CompletionOutput, RequestOutput
from vllm_traits.batch import IntArray
from vllm_traits.ids import BlockId, SeqId, SlotId
from vllm_traits.sampling_params import SamplingParams


def queue_key(arrival: int, index: int, priority: int, aging: int) -> tuple[int, int, int]:
    """The order of choice ``index`` of the request that came as number ``arrival``.

    A level of priority is worth ``aging`` arrivals: a request is overtaken by at most that many later ones for each level
    between them, so none waits for ever. 0: levels are strict.
    """
    return (arrival + priority * aging, arrival, index) if aging else (priority, arrival, index)


class Status(Enum):
    """The one queue that a sequence is in."""

    WAITING = "waiting"
    PARKED = "parked"
    """Waiting for another sequence to finish computing a prefix of this one's prompt."""
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """What a caller added, and what it is shown."""

    request_id: str
    params: SamplingParams
    priority: int
    arrival: int
    """Counts up by one with every request."""
    output: RequestOutput
    sequences: "list[Sequence]" = field(default_factory=list)
    num_left: int = 0
    """Choices that have not ended."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice.

    Attributes:
        key: Its place in every queue, see :func:`queue_key`. Lower runs first and is preempted last.
        prompt: int32 ``[num_prompt_tokens]``.
        limit: Length in tokens at which it ends.
        seed: Of its noise.
        stop_token_ids: Tokens that end it, the model's end-of-sequence tokens included unless ignored.
        own_stops: Those of them that the request named.
        root: Prefix key before its first block.
        keys: Prefix keys of its known full blocks.
        blocks: Its block table.
        num_registered: Blocks, from the first, that the cache knows or knew.
        num_failures: Steps with it that failed without its getting past the place since.
        failed_at: That place, in computed tokens.
        awaits: The prefix key that it is parked for.
        num_passed: How often one behind it in the queue was let in before it.
        num_hits: Its leading blocks that were cached when it was last looked at, a hint.
    """

    seq_id: SeqId
    request: Request
    completion: CompletionOutput
    key: tuple[int, int, int]
    prompt: IntArray
    limit: int
    seed: int
    stop_token_ids: tuple[int, ...]
    own_stops: frozenset[int]
    root: bytes
    last_token_time: float = 0.0
    """On the engine's clock; while it runs, the slot's."""
    keys: list[bytes] = field(default_factory=list)
    blocks: list[BlockId] = field(default_factory=list)
    num_registered: int = 0
    slot: SlotId | None = None
    status: Status = Status.WAITING
    num_failures: int = 0
    failed_at: int = 0
    was_admitted: bool = False
    awaits: bytes | None = None
    num_passed: int = 0
    num_hits: int = 0

    @property
    def params(self) -> SamplingParams:
        """The request's parameters."""
        return self.request.params

    @property
    def num_tokens(self) -> int:
        """Known tokens, prompt and output."""
        return len(self.prompt) + len(self.completion.token_ids)

    def __lt__(self, other: "Sequence") -> bool:
        return self.key < other.key
