"""Sequences that wait for a slot.

In order of their keys, or, under the ``lpm`` policy (longest prefix match), the one among the first few whose prompt is cached
furthest. A sequence whose prefix another one is just computing is *parked* until that block is there.
"""

from bisect import insort
from collections.abc import Callable
from heapq import heapify, heappop, heappush

from vllm_core.sequence import Sequence, Status

LPM_WINDOW = 64
"""Sequences among which the longest cached prefix is looked for."""
LPM_MAX_PASSES = 64
"""How often later ones may be let in before the first in order under ``lpm``."""


class WaitingQueue:
    """Who waits, and who is next.

    Args:
        count_hits: Of a sequence, its leading blocks that are cached; None: order alone decides.
    """

    def __init__(self, count_hits: Callable[[Sequence], int] | None = None) -> None:
        self.num_waiting = 0
        """Waiting and parked."""
        self._count_hits = count_hits
        self._heap: list[tuple[tuple[int, int, int], Sequence]] = []  # void entries are dropped when they come up
        self._front: list[Sequence] = []  # under lpm the first of them, in order
        self._parked: dict[bytes, list[Sequence]] = {}

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that is in no queue."""
        sequence.status = Status.WAITING
        self.num_waiting += 1
        self._push(sequence)

    def head(self) -> Sequence | None:
        """Who is to be let in next."""
        if self._count_hits is None:
            while self._heap:
                if _is_valid(*self._heap[0]):
                    return self._heap[0][1]
                heappop(self._heap)
            return None
        self._front = [sequence for sequence in self._front if sequence.status is Status.WAITING]
        while self._heap and len(self._front) < LPM_WINDOW:
            key, sequence = heappop(self._heap)
            if _is_valid(key, sequence):
                insort(self._front, sequence)
        if not self._front or self._front[0].num_passed >= LPM_MAX_PASSES:
            return self._front[0] if self._front else None
        return max(self._front, key=self._count_hits)  # of equal ones the first

    def take(self, sequence: Sequence) -> None:
        """``head`` was let in."""
        if self._count_hits is not None and self._front[0] is not sequence:
            self._front[0].num_passed += 1
        self._pull(sequence)
        self.num_waiting -= 1

    def park(self, sequence: Sequence, key: bytes) -> None:
        """``head`` waits until the block with this prefix key is there."""
        self._pull(sequence)
        sequence.status, sequence.awaits = Status.PARKED, key
        self._parked.setdefault(key, []).append(sequence)

    def wake(self, key: bytes) -> None:
        """The block is there, or will not come."""
        for sequence in self._parked.pop(key, ()):
            sequence.status, sequence.awaits = Status.WAITING, None
            self._push(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take out one that waits or is parked."""
        self.num_waiting -= 1
        if sequence.awaits is not None:
            parked = self._parked[sequence.awaits]
            parked.remove(sequence)
            if not parked:
                del self._parked[sequence.awaits]
            sequence.awaits = None
        sequence.status = Status.FINISHED
        self._compact()

    def rekey(self, sequence: Sequence, key: tuple[int, int, int]) -> None:
        """Give a waiting or parked sequence another place."""
        if key == sequence.key:
            return
        if sequence.status is Status.WAITING and sequence in self._front:
            self._front.remove(sequence)
        sequence.key = key
        if sequence.status is Status.WAITING:
            self._push(sequence)  # its old entry is void by its key
            self._compact()

    def check_integrity(self, is_computing: Callable[[bytes], bool]) -> None:
        """Prove that every sequence is in one queue, and that whoever is parked will be woken.

        Raises:
            AssertionError: It is not so.
        """
        waiting = [s for key, s in self._heap if _is_valid(key, s)]
        waiting += [s for s in self._front if s.status is Status.WAITING]
        parked = [s for group in self._parked.values() for s in group]
        everyone = waiting + parked
        assert len(set(map(id, everyone))) == len(everyone) == self.num_waiting, "a sequence is in two queues or in none"
        for key, group in self._parked.items():
            assert group, "an empty group is kept"
            assert is_computing(key), "nobody wakes a parked sequence"
            assert all(s.status is Status.PARKED and s.awaits == key for s in group)
        assert all(not s.blocks and s.slot is None for s in everyone), "a waiting sequence holds something"

    def _compact(self) -> None:
        """Who adds and aborts for ever must not fill the memory with void entries."""
        if len(self._heap) > 2 * self.num_waiting + 64:
            self._heap = [entry for entry in self._heap if _is_valid(*entry)]
            heapify(self._heap)

    def _push(self, sequence: Sequence) -> None:
        if self._front and sequence < self._front[-1]:
            insort(self._front, sequence)
            if len(self._front) <= LPM_WINDOW:
                return
            sequence = self._front.pop()
        heappush(self._heap, (sequence.key, sequence))

    def _pull(self, sequence: Sequence) -> None:
        if self._count_hits is None:
            assert self._heap[0][1] is sequence
            heappop(self._heap)
        else:
            self._front.remove(sequence)


def _is_valid(key: tuple[int, int, int], sequence: Sequence) -> bool:
    """Whether a heap's entry is the one that counts: a key given anew is another object."""
    return sequence.status is Status.WAITING and sequence.key is key
