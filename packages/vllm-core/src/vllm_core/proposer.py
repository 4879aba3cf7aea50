"""What guesses the tokens to come.

A guess that the model would have said saves a step, a wrong one wastes its place in one; what is said never changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vllm_traits.batch import BatchState, IntArray
from vllm_traits.ids import SeqId, SlotId


@dataclass(frozen=True, slots=True)
class DraftRows:
    """Sequences that guesses are wanted for. All their known tokens but the last are in the KV cache.

    Attributes:
        state: The persistent rows; ``state.token_ids[slot, :state.num_tokens[slot]]`` are a sequence's tokens.
        slots: int32 ``[num_rows]``.
        seq_ids: ``[num_rows]``.
        num_wanted: int32 ``[num_rows]``, at least 1. A sequence has blocks for as many tokens behind its known ones.
        roots: ``[num_rows]``: sequences with another root (another ``cache_salt``) must not be learnt from.
        keys: ``[num_rows]``, the prefix keys of a sequence's full blocks; empty without prefix caching.
    """

    state: BatchState
    slots: IntArray
    seq_ids: tuple[SeqId, ...]
    num_wanted: IntArray
    roots: Sequence[bytes]
    keys: Sequence[Sequence[bytes]]


class Proposer(Protocol):
    """Guesses. Used from the engine's thread; an exception that it raises costs its guesses, nothing else."""

    @property
    def name(self) -> str:
        """For logs and metrics."""

    def propose(self, rows: DraftRows) -> Sequence[Sequence[int]]:
        """By row, at most ``num_wanted`` guesses for the tokens after the known ones; empty: none."""

    def forget(self, state: BatchState, slot: SlotId, root: bytes) -> None:
        """The sequence of a slot leaves (ended or preempted); its tokens still stand there."""

    def close(self) -> None:
        """Give back what it holds; idempotent."""
