"""How many tokens are guessed, by whom, and when it is given up."""

import logging

import numpy as np
import pytest

from vllm_core.prefix_cache import root_key
from vllm_core.proposer import DraftRows
from vllm_core.speculator import FIRST_RETRY, MAX_FAILURES, Speculator, StepCost
from vllm_traits.batch import BatchState
from vllm_traits.ids import SeqId, SlotId

SLOTS = np.arange(2)


class Scripted:
    """Says what it is told to, and counts how often it is asked."""

    def __init__(self, name: str, says: list[list[int]] | Exception, seconds: float = 0.0) -> None:
        self.name, self.says, self.seconds = name, says, seconds
        self.num_asked = 0
        self.closed = False

    def propose(self, rows: DraftRows) -> list[list[int]]:
        self.num_asked += 1
        clock.now += self.seconds
        if isinstance(self.says, Exception):
            raise self.says
        return self.says[: len(rows.slots)]

    def forget(self, state: BatchState, slot: SlotId, root: bytes) -> None:
        if isinstance(self.says, Exception):
            raise self.says

    def close(self) -> None:
        self.closed = True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


clock = Clock()


def speculator_of(*proposers: Scripted, overlaps: bool = False) -> Speculator:
    return Speculator(proposers, max_num_seqs=4, max_draft_tokens=8, vocab_size=100, overlaps=overlaps, clock=clock)


def ask(speculator: Speculator, known: int = 10, most: int = 8) -> list[list[int]]:
    state = BatchState(4, 1024, 4)
    state.num_tokens[:] = known
    wanted = np.minimum(speculator.num_wanted(SLOTS, state.num_tokens[SLOTS]), most)
    rows = DraftRows(state, SLOTS.astype(np.int32), (SeqId(1), SeqId(2)), wanted.max(axis=0), [root_key(None)] * 2, [[], []])
    return [list(guess) for guess in speculator.propose(rows, wanted)]


def steps(speculator: Speculator, fixed: float, per_token: float, num_seqs: int = 1) -> None:
    for i in range(60):
        tokens = num_seqs * (1 + i % 5)
        speculator.cost.observe(tokens, num_seqs, fixed + per_token * tokens)


def wanted(speculator: Speculator, known: int = 10) -> int:
    return int(speculator.num_wanted(SLOTS[:1], np.array([known], np.int32))[0, 0])


def learn(speculator: Speculator, num_draft: int, num_right: int, known: int = 10, times: int = 1) -> None:
    for _ in range(times):
        speculator.observe(SLOTS[:1], *(np.array([value], np.int32) for value in (num_draft, num_right, known)))


def test_a_line_through_the_times_of_steps() -> None:
    cost = StepCost()
    assert cost.threshold(0.0) == 0.1
    for i in range(200):
        cost.observe(1 + i % 4, 1, 0.010 + 0.002 * (1 + i % 4))
    # One stream makes 1 / 15 ms on average: a guess, at 2 ms, must be right with about 2 / 15.
    assert cost.threshold(0.0) == pytest.approx(2 / 15, rel=0.1)
    assert cost.threshold(0.015) == pytest.approx(17 / 15, rel=0.1)


def test_times_that_make_no_line_give_no_negative_price() -> None:
    cost = StepCost()
    for i in range(100):
        cost.observe(1 + i % 4, 1, 0.010 - 0.002 * (i % 4))
    assert cost.threshold(0.0) == 0.0
    same = StepCost()
    for _ in range(100):
        same.observe(8, 8, 0.010)
    assert 0.0 < same.threshold(0.0) < 1.0


def test_what_is_right_is_guessed_further() -> None:
    speculator = speculator_of(Scripted("one", []))
    steps(speculator, 0.010, 0.001)
    at_first = wanted(speculator)
    learn(speculator, 8, 8, times=10)
    assert wanted(speculator) == 8
    learn(speculator, 8, 1, times=20)
    assert 1 <= wanted(speculator) < at_first


def test_what_is_wrong_is_given_up_and_tried_again_ever_more_rarely() -> None:
    speculator = speculator_of(Scripted("one", []))
    steps(speculator, 0.010, 0.002)
    known, pauses = 10, []
    for _ in range(40):
        start = known
        while wanted(speculator, known) == 0:
            known += 1
        pauses.append(known - start)
        learn(speculator, wanted(speculator, known), 0, known)
    assert FIRST_RETRY in pauses
    assert pauses[-1] == 256
    assert sum(pauses[:10]) < 1000
    learn(speculator, 1, 1, known, times=20)
    assert wanted(speculator, known + 256) > 1, "it can come back"


def test_where_a_step_is_all_arithmetic_nothing_is_tried() -> None:
    speculator = speculator_of(Scripted("one", []))
    steps(speculator, 0.0, 0.001, num_seqs=64)
    speculator.cost._tokens_per_second = 1000.0
    assert wanted(speculator) == 0
    learn(speculator, 8, 8, times=5)
    assert wanted(speculator) == 0


def test_a_slow_guesser_must_be_right_more_often() -> None:
    fast, slow = Scripted("fast", [[1], [2]]), Scripted("slow", [[1], [2]], seconds=0.008)
    lengths = []
    for proposer in (fast, slow):
        speculator = speculator_of(proposer)
        steps(speculator, 0.010, 0.001)
        ask(speculator)
        lengths.append(wanted(speculator))
    assert lengths[0] > lengths[1]


def test_they_are_asked_in_turn_each_for_what_is_missing() -> None:
    first, second, third = Scripted("a", [[], [5]]), Scripted("b", [[6, 7]]), Scripted("c", [[8]])
    speculator = speculator_of(first, second, third)
    assert ask(speculator) == [[6, 7], [5]]
    assert third.num_asked == 0
    # The acceptance counts for who guessed.
    speculator.observe(SLOTS, np.array([2, 1], np.int32), np.array([0, 1], np.int32), np.array([11, 12], np.int32))
    chance = speculator._right / speculator._trials
    assert chance[1, 0] < chance[0, 0] == chance[2, 0]
    assert chance[0, 1] > chance[0, 0]


def test_looking_in_vain_has_a_price_only_where_steps_overlap() -> None:
    for overlaps in (False, True):
        proposer = Scripted("a", [[], []])
        speculator = speculator_of(proposer, overlaps=overlaps)
        for known in range(10, 110):
            if speculator.num_wanted(SLOTS, np.full(2, known, np.int32)).any():
                ask(speculator, known)
        assert proposer.num_asked == (100 if not overlaps else 9)


def test_guesses_outside_the_vocabulary_or_too_long_are_cut() -> None:
    assert ask(speculator_of(Scripted("a", [[1, 2, 100, 3], [-1, 5]]))) == [[1, 2], []]
    assert ask(speculator_of(Scripted("a", [list(range(50)), [4]])), most=3) == [[0, 1, 2], [4]]


@pytest.mark.parametrize("says", [ValueError("broken"), [[1]], [[1.5], ["x"]]])
def test_a_proposer_that_fails_costs_its_guesses_and_is_left_out_in_the_end(
    says: list[list[int]] | Exception, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = Scripted("bad", says), Scripted("good", [[7], [8]])
    speculator = speculator_of(bad, good)
    for _ in range(MAX_FAILURES + 2):
        assert ask(speculator) == [[7], [8]]
    assert bad.num_asked == MAX_FAILURES
    assert "bad failed and is left out" in caplog.text
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_a_slot_that_is_left_starts_anew() -> None:
    bad, good = Scripted("bad", ValueError("broken")), Scripted("good", [[7], [8]])
    speculator = speculator_of(good, bad)
    steps(speculator, 0.010, 0.002)
    fresh = wanted(speculator)
    learn(speculator, 4, 0, times=10)
    assert wanted(speculator) == 0
    speculator.forget(BatchState(4, 64, 4), SlotId(0), b"")
    assert wanted(speculator) == fresh
    speculator.close()
    assert good.closed
    assert bad.closed


def test_a_draft_is_paid_once_for_all_sequences_and_its_time_is_in_the_rate() -> None:
    """A step of the draft takes 4 ms for both sequences, one of the target 10: the guess of each costs 2 of 14 ms a token."""
    draft = Scripted("draft", [[5], [5]], seconds=0.004)
    speculator = speculator_of(draft)
    for _ in range(100):
        assert ask(speculator, most=1) == [[5], [5]]
        speculator.observe_step(4, 4, 0.010)
    assert speculator._threshold(0, 2) == pytest.approx((0.002 + 0.1 * 0.010 / 4) * 4 / 0.014, rel=0.05)
