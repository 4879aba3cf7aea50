"""How many tokens are guessed for each sequence, by whom, and whether it pays.

A guess costs its place in the step, ``b`` seconds of a step of ``a + b * tokens``, and the time to make it; it brings a token
if it and all before it are right. With acceptance ``p`` the ``j``-th guess is worth ``p**j`` tokens, and it is made while that
is more than the tokens which the engine makes without it in the same time::

    p**j > (b + c) * tokens per second          a, b: fitted to the steps so far; c: seconds for a guess; p: per sequence

A draft model guesses for all sequences at once, so ``c`` is the time of its step divided by their number; and the tokens per
second are those with the time for guesses in it, or guesses that pay would raise the bar for themselves.

At one stream on a device that waits for memory ``b`` is small, and guesses are long; in a full batch the right side nears 1 and
there are none. A sequence whose guesses did not pay tries one now and then.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import takewhile

import numpy as np
import numpy.typing as npt

from vllm_core.proposer import DraftRows, Proposer
from vllm_traits.batch import BatchState, IntArray, LongArray
from vllm_traits.ids import SlotId

logger = logging.getLogger(__name__)

PRIOR_RIGHT, PRIOR_TRIALS = 1.5, 2.0
"""What a sequence starts with, as if so many guesses had been right of so many."""
MEMORY = 0.8
"""What is left of old trials when new ones are counted."""
FIRST_RETRY, LAST_RETRY = 16, 256
"""Tokens until a sequence whose guesses did not pay tries again; doubles from the one to the other."""
LONGEST_BREAK = 16
"""Most tokens until a sequence is looked at again for which nothing was found."""
HOPELESS = 0.9
"""Where the right side of the rule is above this, nothing is tried at all."""
HOPELESS_RETRY = 1024
"""But one guess for the first in order whenever its length is a multiple of this: what was measured may have been bad luck."""
RECENT = 8
"""Calls whose fastest says what a guess for every row takes; a call that catches up with a long prompt says nothing."""
MAX_FAILURES = 3
"""Exceptions in a row after which a proposer is not asked any more."""


class StepCost:
    """A line through the times of past steps, ``seconds = a + b * tokens``, that forgets slowly."""

    def __init__(self) -> None:
        self._sums = np.zeros(5)  # 1, tokens, tokens**2, seconds, tokens * seconds
        self._tokens_per_second = 0.0

    def observe(self, num_tokens: int, num_new: int, seconds: float, guessing: float = 0.0) -> None:
        """A step ran ``num_tokens`` tokens in ``seconds``, after guesses that took ``guessing``, and brought ``num_new``."""
        self._sums *= 0.98
        self._sums += (1.0, num_tokens, num_tokens**2, seconds, num_tokens * seconds)
        rate = num_new / max(seconds + guessing, 1e-9)
        self._tokens_per_second += 0.1 * (rate - self._tokens_per_second) if self._tokens_per_second else rate

    def threshold(self, seconds_per_guess: float) -> float:
        """The right side of the rule above; 0.1 until enough was seen."""
        count, tokens, squares, seconds, products = self._sums.tolist()
        if count < 4:
            return 0.1
        spread = squares - tokens**2 / count
        share = seconds / max(tokens, 1.0)  # b is at most this: a is not negative
        slope = (products - tokens * seconds / count) / spread if spread > 0.1 * count else 0.1 * share
        return (min(max(slope, 0.0), share) + seconds_per_guess) * self._tokens_per_second


class Speculator:
    """Asks proposers in turn, and learns what their guesses are worth. What it decides changes speed, never output.

    Args:
        proposers: Asked in this order, each for the sequences that have no guess yet.
        max_num_seqs: Slots.
        max_draft_tokens: Most guesses for a sequence in one step.
        vocab_size: Guesses outside it are dropped.
        overlaps: The model's steps overlap where there are no guesses; then looking for some has a price even if none is found.
        clock: Seconds.
    """

    def __init__(
        self,
        proposers: Sequence[Proposer],
        *,
        max_num_seqs: int,
        max_draft_tokens: int,
        vocab_size: int,
        overlaps: bool,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.proposers = list(proposers)
        self.max_draft_tokens = max_draft_tokens
        self.cost = StepCost()
        self._vocab_size = vocab_size
        self._overlaps = overlaps
        self._clock = clock
        shape = (len(self.proposers), max_num_seqs)
        self._right: npt.NDArray[np.float64] = np.full(shape, PRIOR_RIGHT)
        self._trials: npt.NDArray[np.float64] = np.full(shape, PRIOR_TRIALS)
        self._pause: IntArray = np.full(shape, FIRST_RETRY, np.int32)
        self._next_try: IntArray = np.zeros(shape, np.int32)  # known tokens from which guesses are tried again
        self._misses: IntArray = np.zeros(shape, np.int32)
        self._seconds: list[deque[float]] = [deque(maxlen=RECENT) for _ in self.proposers]
        self._guessing = 0.0
        """Seconds of the guesses for the step under way."""
        self._failures = [0] * len(self.proposers)
        self._source: IntArray = np.zeros(max_num_seqs, np.int32)  # whose guesses a slot's step holds

    def num_wanted(self, slots: LongArray, num_tokens: IntArray) -> IntArray:
        """Guesses worth making, int32 ``[num_proposers, len(slots)]``, for sequences of ``num_tokens`` known tokens."""
        wanted = np.zeros((len(self.proposers), len(slots)), np.int32)
        for i in range(len(self.proposers)):
            if self._failures[i] >= MAX_FAILURES:
                continue
            bound = self._threshold(i, len(slots))
            if bound > HOPELESS:
                wanted[i, :1] = num_tokens[:1] % HOPELESS_RETRY == 0
                continue
            chance = np.clip(self._right[i, slots] / self._trials[i, slots], 0.01, 0.99)
            worth = np.floor(math.log(max(bound, 1e-6)) / np.log(chance)).astype(np.int32)
            again = num_tokens >= self._next_try[i, slots]
            wanted[i] = np.where(again, np.clip(worth, 1, self.max_draft_tokens), 0)
        return wanted

    def propose(self, rows: DraftRows, wanted: IntArray) -> list[Sequence[int]]:
        """Guesses by row, at most ``rows.num_wanted``; ``wanted`` is ``num_wanted``'s."""
        guesses: list[Sequence[int]] = [() for _ in range(len(rows.slots))]
        self._guessing = 0.0
        for i, proposer in enumerate(self.proposers):
            limits = np.minimum(wanted[i], rows.num_wanted)
            which = [row for row in np.flatnonzero(limits > 0).tolist() if not guesses[row]]
            if not which:
                continue
            start = self._clock()
            found = self._ask(i, proposer, _take(rows, which, limits[which]))
            took = self._clock() - start
            self._guessing += took
            longest = max(map(len, found), default=0)
            if longest:
                self._seconds[i].append(took / longest)
            for row, guess in zip(which, found, strict=True):
                slot = rows.slots[row]
                if len(guess):
                    guesses[row], self._source[slot], self._misses[i, slot] = guess, i, 0
                elif self._overlaps:
                    self._misses[i, slot] += 1
                    pause = min(1 << int(self._misses[i, slot]), LONGEST_BREAK)
                    self._next_try[i, slot] = rows.state.num_tokens[slot] + pause
        return guesses

    def observe_step(self, num_tokens: int, num_new: int, seconds: float) -> None:
        """The step after the last guesses, if there were any, ran ``num_tokens`` tokens and brought ``num_new``."""
        self.cost.observe(num_tokens, num_new, seconds, self._guessing)
        self._guessing = 0.0

    def observe(self, slots: LongArray, num_draft: IntArray, num_right: IntArray, num_tokens: IntArray) -> None:
        """Of ``num_draft`` guesses the first ``num_right`` were right; the sequences have ``num_tokens`` tokens now."""
        source = self._source[slots]
        self._right[source, slots] = self._right[source, slots] * MEMORY + num_right
        self._trials[source, slots] = self._trials[source, slots] * MEMORY + np.minimum(num_right + 1, num_draft)
        self._pause[source, slots] = np.where(num_right > 0, FIRST_RETRY, self._pause[source, slots])
        bounds = [self._threshold(i, len(slots)) for i in range(len(self.proposers))]
        for i, slot, known in zip(source.tolist(), slots.tolist(), num_tokens.tolist(), strict=True):
            if self._right[i, slot] / self._trials[i, slot] < bounds[i]:
                self._next_try[i, slot] = known + self._pause[i, slot]
                self._pause[i, slot] = min(2 * int(self._pause[i, slot]), LAST_RETRY)

    def forget(self, state: BatchState, slot: SlotId, root: bytes) -> None:
        """The sequence of a slot leaves; its tokens still stand there."""
        for i, proposer in enumerate(self.proposers):
            self._right[i, slot], self._trials[i, slot] = PRIOR_RIGHT, PRIOR_TRIALS
            self._pause[i, slot], self._next_try[i, slot], self._misses[i, slot] = FIRST_RETRY, 0, 0
            try:
                proposer.forget(state, slot, root)
            except Exception:
                self._fail(i)

    def close(self) -> None:
        """Close the proposers."""
        for proposer in self.proposers:
            proposer.close()

    def _threshold(self, i: int, num_rows: int) -> float:
        """How likely a guess of a proposer must be, of which each of ``num_rows`` sequences gets one at the same time."""
        return self.cost.threshold(min(self._seconds[i], default=0.0) / num_rows)

    def _ask(self, i: int, proposer: Proposer, rows: DraftRows) -> list[Sequence[int]]:
        try:
            found = proposer.propose(rows)
            if len(found) != len(rows.slots):
                raise ValueError(f"{len(found)} guesses for {len(rows.slots)} rows")
            checked = [self._checked(guess[:wanted]) for guess, wanted in zip(found, rows.num_wanted.tolist(), strict=True)]
        except Exception:
            self._fail(i)
            return [()] * len(rows.slots)
        self._failures[i] = 0
        return checked

    def _checked(self, guess: Sequence[int]) -> Sequence[int]:
        """Up to the first that is no token."""
        return list(takewhile(lambda token: 0 <= token < self._vocab_size, guess))

    def _fail(self, i: int) -> None:
        self._failures[i] += 1
        last = self._failures[i] == MAX_FAILURES
        logger.warning("Proposer %s failed%s", self.proposers[i].name, " and is left out" if last else "", exc_info=True)


def _take(rows: DraftRows, which: Sequence[int], num_wanted: IntArray) -> DraftRows:
    """Some of the rows."""
    return DraftRows(
        state=rows.state,
        slots=rows.slots[which],
        seq_ids=tuple([rows.seq_ids[row] for row in which]),
        num_wanted=num_wanted,
        roots=[rows.roots[row] for row in which],
        keys=[rows.keys[row] for row in which],
    )
