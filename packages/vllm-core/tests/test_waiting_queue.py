"""Who is let in next."""

from random import Random

import numpy as np
import pytest

from vllm_core import SamplingParams
from vllm_core.outputs import CompletionOutput, RequestMetrics, RequestOutput
from vllm_core.prefix_cache import root_key
from vllm_core.sequence import Request, Sequence, Status, queue_key
from vllm_core.waiting_queue import LPM_MAX_PASSES, LPM_WINDOW, WaitingQueue
from vllm_traits.ids import SeqId


def sequence_of(arrival: int, priority: int = 0, aging: int = 0) -> Sequence:
    completion = CompletionOutput(0)
    output = RequestOutput(str(arrival), [1], [completion], RequestMetrics(0.0))
    return Sequence(
        seq_id=SeqId(arrival),
        request=Request(str(arrival), SamplingParams(), priority, arrival, output),
        completion=completion,
        key=queue_key(arrival, 0, priority, aging),
        prompt=np.array([1], np.int32),
        limit=10,
        seed=0,
        stop_token_ids=(),
        own_stops=frozenset(),
        root=root_key(None),
    )


def drain(queue: WaitingQueue) -> list[int]:
    order = []
    while (head := queue.head()) is not None:
        queue.take(head)
        head.status = Status.RUNNING
        order.append(head.request.arrival)
        queue.check_integrity(lambda key: True)
    return order


def test_first_come_first_served_whatever_the_order_of_adding() -> None:
    queue = WaitingQueue()
    for arrival in (3, 1, 2, 5, 4):
        queue.add(sequence_of(arrival))
    assert queue.num_waiting == 5
    assert drain(queue) == [1, 2, 3, 4, 5]
    assert queue.num_waiting == 0


def test_a_level_of_priority_is_overtaken_by_so_many_and_no_more() -> None:
    queue = WaitingQueue()
    queue.add(sequence_of(1, priority=1, aging=3))
    for arrival in range(2, 9):
        queue.add(sequence_of(arrival, priority=0, aging=3))
    assert drain(queue) == [2, 3, 1, 4, 5, 6, 7, 8]


def test_without_aging_priorities_are_strict() -> None:
    queue = WaitingQueue()
    queue.add(sequence_of(1, priority=1))
    for arrival in range(2, 9):
        queue.add(sequence_of(arrival))
    assert drain(queue)[-1] == 1


def test_the_parked_come_back_when_their_block_is_there() -> None:
    queue = WaitingQueue()
    first, second = sequence_of(1), sequence_of(2)
    queue.add(first)
    queue.add(second)
    queue.park(first, b"key")
    assert queue.head() is second
    assert queue.num_waiting == 2
    queue.check_integrity(lambda key: key == b"key")
    with pytest.raises(AssertionError, match="nobody wakes"):
        queue.check_integrity(lambda key: False)
    queue.wake(b"another")
    assert queue.head() is second
    queue.wake(b"key")
    assert queue.head() is first


@pytest.mark.parametrize("lpm", [False, True])
@pytest.mark.parametrize("parked", [False, True])
def test_removed_ones_are_never_let_in(lpm: bool, parked: bool) -> None:
    queue = WaitingQueue((lambda sequence: 0) if lpm else None)
    first, second = sequence_of(1), sequence_of(2)
    queue.add(first)
    queue.add(second)
    assert queue.head() is first
    if parked:
        queue.park(first, b"key")
    queue.remove(first)
    assert first.status is Status.FINISHED
    queue.wake(b"key")
    queue.check_integrity(lambda key: True)
    assert drain(queue) == [2]


def test_who_adds_and_aborts_for_ever_does_not_fill_the_memory() -> None:
    queue = WaitingQueue()
    queue.add(sequence_of(0))
    for arrival in range(1, 10_000):
        sequence = sequence_of(arrival)
        queue.add(sequence)
        queue.remove(sequence)
    assert len(queue._heap) < 200
    assert drain(queue) == [0]


def test_who_changes_priorities_for_ever_does_not_either() -> None:
    queue = WaitingQueue()
    sequence = sequence_of(1)
    queue.add(sequence)
    for priority in range(10_000):
        queue.rekey(sequence, (priority, 1, 0))
    assert len(queue._heap) < 200
    assert drain(queue) == [1]


def test_those_that_wake_do_not_swell_what_is_compared() -> None:
    queue = WaitingQueue(lambda sequence: 0)
    for arrival in range(1, 1000):
        queue.add(sequence_of(arrival))
    for _ in range(500):
        head = queue.head()
        assert head is not None
        queue.park(head, b"key")
    queue.wake(b"key")
    assert len(queue._front) <= LPM_WINDOW
    queue.check_integrity(lambda key: True)
    assert sorted(drain(queue)) == list(range(1, 1000))


@pytest.mark.parametrize("lpm", [False, True])
def test_another_key_is_another_place(lpm: bool) -> None:
    queue = WaitingQueue((lambda sequence: 0) if lpm else None)
    sequences = [sequence_of(arrival) for arrival in range(1, 6)]
    for sequence in sequences:
        queue.add(sequence)
    queue.head()
    queue.rekey(sequences[3], (-1, 4, 0))
    queue.rekey(sequences[0], (9, 1, 0))
    queue.rekey(sequences[0], (8, 1, 0))
    queue.check_integrity(lambda key: True)
    assert drain(queue) == [4, 2, 3, 5, 1]


def test_a_parked_one_keeps_its_new_key() -> None:
    queue = WaitingQueue()
    sequences = [sequence_of(arrival) for arrival in (1, 2, 3)]
    for sequence in sequences:
        queue.add(sequence)
    queue.park(sequences[0], b"key")
    queue.rekey(sequences[0], (9, 1, 0))
    queue.wake(b"key")
    assert drain(queue) == [2, 3, 1]


def test_the_longest_cached_prefix_goes_first_but_not_for_ever() -> None:
    hits = {1: 0}
    queue = WaitingQueue(lambda sequence: hits.get(sequence.request.arrival, 5))
    queue.add(sequence_of(1))
    order = []
    for arrival in range(2, 3 * LPM_MAX_PASSES):
        queue.add(sequence_of(arrival))
        head = queue.head()
        assert head is not None
        queue.take(head)
        head.status = Status.RUNNING
        order.append(head.request.arrival)
    assert order.index(1) == LPM_MAX_PASSES
    assert order[:3] == [2, 3, 4]


def test_only_the_first_few_are_compared() -> None:
    asked = set()

    def count_hits(sequence: Sequence) -> int:
        asked.add(sequence.request.arrival)
        return sequence.request.arrival

    queue = WaitingQueue(count_hits)
    for arrival in range(1, 10 * LPM_WINDOW):
        queue.add(sequence_of(arrival))
    head = queue.head()
    assert head is not None
    assert head.request.arrival == LPM_WINDOW
    assert asked == set(range(1, LPM_WINDOW + 1))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("lpm", [False, True])
def test_every_sequence_is_let_in_once(seed: int, lpm: bool) -> None:
    r = Random(seed)
    queue = WaitingQueue((lambda sequence: r.randint(0, 3)) if lpm else None)
    waiting: dict[int, Sequence] = {}
    parked: dict[int, bytes] = {}
    let_in = []
    arrival = 0
    for _ in range(400):
        action = r.random()
        if action < 0.4:
            arrival += 1
            waiting[arrival] = sequence_of(arrival)
            queue.add(waiting[arrival])
        elif action < 0.6 and (head := queue.head()) is not None:
            queue.take(head)
            head.status = Status.RUNNING
            let_in.append(waiting.pop(head.request.arrival).request.arrival)
        elif action < 0.7 and (head := queue.head()) is not None:
            parked[head.request.arrival] = b"%d" % r.randint(0, 3)
            queue.park(head, parked[head.request.arrival])
        elif action < 0.8:
            key = b"%d" % r.randint(0, 3)
            queue.wake(key)
            parked = {name: other for name, other in parked.items() if other != key}
        elif action < 0.9 and waiting:
            name = r.choice(list(waiting))
            queue.remove(waiting.pop(name))
            parked.pop(name, None)
        elif waiting:
            sequence = waiting[r.choice(list(waiting))]
            queue.rekey(sequence, (r.randint(-5, 5), sequence.request.arrival, 0))
        queue.check_integrity(lambda key: True)
        assert queue.num_waiting == len(waiting)
        assert (queue.head() is None) == (len(waiting) == len(parked))
    assert len(set(let_in)) == len(let_in)
