"""Time and trouble for the fake backend: a clock that nobody waits for, and the ways in which a step can fail."""

from dataclasses import dataclass
from enum import Enum


class Fault(Enum):
    """What befalls one step."""

    SUBMIT = "submit raises"
    RESULT = "result raises, and what the step wrote is spoilt"
    OUT_OF_MEMORY = "the same, for want of memory"
    LATE = "the step takes a thousand times as long"
    FEW_ROWS = "the output is a row short"
    FLAT = "the output has one axis"
    SURPLUS = "a row has more tokens than guesses and one"
    MISSING = "a row that was to be sampled has no token"
    OUTSIDE = "a token is outside the vocabulary"
    DIE = "this step and all after it raise"


@dataclass
class VirtualDevice:
    """Runs steps one after the other on a clock of its own, in seconds. Waiting moves the clock.

    Args:
        base: What every step takes.
        per_token: What each of its tokens adds.
    """

    base: float = 0.01
    per_token: float = 0.0001
    now: float = 0.0
    busy_until: float = 0.0

    def clock(self) -> float:
        """The time, as an engine's clock."""
        return self.now

    def start(self, num_tokens: int, *, slowness: float = 1.0) -> float:
        """Queue a step; returns when it will be over."""
        begin = max(self.now, self.busy_until)
        self.busy_until = begin + slowness * (self.base + self.per_token * num_tokens)
        return self.busy_until

    def advance(self, until: float) -> None:
        """Let time pass; a moment that is past already changes nothing."""
        self.now = max(self.now, until)
