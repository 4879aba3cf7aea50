"""The made-up model of the fake backend: arithmetic on the tokens themselves.

A prefix has a *tag*, a 63-bit hash folded token by token. The next token is a function of the tag, the sampling parameters, the
seed, and (where a parameter says so) the tokens generated before, so that whoever knows the prompt can say what the output must
be: :func:`expected_tokens`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_traits.batch import BatchState, IntArray, LongArray, TokenLogprobs

EMPTY_TAG = 0x1E3779B97F4A7C15
"""The tag of no tokens."""

_MASK = (1 << 63) - 1
_ADD, _FIRST, _SECOND = 0x632BE59BD9B4E019, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(tag: int, token: int) -> int:
    """The tag of a prefix and one token more (a splitmix64 step)."""
    x = (tag ^ (token + _ADD)) * _FIRST & 0xFFFFFFFFFFFFFFFF
    x = (x ^ (x >> 29)) * _SECOND & 0xFFFFFFFFFFFFFFFF
    return (x ^ (x >> 32)) & _MASK


def mix_array(tags: LongArray, tokens: LongArray) -> LongArray:
    """:func:`mix`, element by element."""
    x = (tags.astype(np.uint64) ^ (tokens.astype(np.uint64) + np.uint64(_ADD))) * np.uint64(_FIRST)
    x = (x ^ (x >> np.uint64(29))) * np.uint64(_SECOND)
    return ((x ^ (x >> np.uint64(32))) & np.uint64(_MASK)).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Choice:
    """How one sequence's tokens are chosen.

    Args:
        vocab_size: Token ids are below it.
        temperature: Above 0 the seed counts.
        seed: Of the noise.
        structured: A grammar allows even tokens only.
        penalised: A token that was generated before gives way to the next one that was not.
        min_tokens, stop_token_ids: These give way while fewer tokens than that were generated.
    """

    vocab_size: int
    temperature: float = 0.0
    seed: int = 0
    structured: bool = False
    penalised: bool = False
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()

    @classmethod
    def of_slot(cls, state: BatchState, slot: int, vocab_size: int) -> "Choice":
        """What the state's row says."""
        params = state.params[slot]
        assert params is not None, f"slot {slot} has no parameters"
        penalties = (state.presence_penalty[slot], state.frequency_penalty[slot], state.repetition_penalty[slot] - 1)
        return cls(
            vocab_size=vocab_size,
            temperature=float(state.temperature[slot]),
            seed=int(state.seed[slot]),
            structured=params.structured_outputs is not None,
            penalised=any(penalties),
            min_tokens=params.min_tokens,
            stop_token_ids=state.stop_token_ids[slot],
        )

    def next_token(self, tag: int, generated: Sequence[int]) -> int:
        """The token after a prefix.

        Args:
            tag: The prefix's.
            generated: Its tokens after the prompt.
        """
        first = (mix(tag, self.seed) if self.temperature > 0 else tag) % self.vocab_size
        if self.structured:
            first -= first % 2
        barred = set(generated) if self.penalised else set()
        if len(generated) < self.min_tokens:
            barred.update(self.stop_token_ids)
        if first not in barred:
            return first
        for distance in range(1, self.vocab_size):
            token = (first + distance) % self.vocab_size
            if token not in barred and not (self.structured and token % 2):
                return token
        return first


def tag_of(tokens: Iterable[int]) -> int:
    """The tag of a prefix."""
    tag = EMPTY_TAG
    for token in tokens:
        tag = mix(tag, token)
    return tag


def expected_tokens(
    prompt: Sequence[int],
    num_tokens: int,
    vocab_size: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    structured: bool = False,
    penalised: bool = False,
    min_tokens: int = 0,
    stop_token_ids: tuple[int, ...] = (),
) -> list[int]:
    """What a :class:`~vllm_traits.fake_backend.FakeBackend` says to ``prompt``, whatever runs beside it.

    Args:
        prompt: The tokens before.
        num_tokens: How many to say; nothing ends them earlier.
        vocab_size, temperature, seed, structured, penalised, min_tokens, stop_token_ids: As in :class:`Choice`.
    """
    choice = Choice(vocab_size, temperature, seed, structured, penalised, min_tokens, stop_token_ids)
    tag, output = tag_of(prompt), list[int]()
    for _ in range(num_tokens):
        output.append(choice.next_token(tag, output))
        tag = mix(tag, output[-1])
    return output


def fast_tokens(seeds: npt.NDArray[np.integer], positions: npt.NDArray[np.integer], vocab_size: int) -> IntArray:
    """The tokens of a backend that keeps no cache: a hash of seed and position, int32 in their common shape."""
    x = seeds.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + positions.astype(np.uint64) * np.uint64(_FIRST)
    x ^= x >> np.uint64(29)
    x *= np.uint64(_SECOND)
    return ((x >> np.uint64(32)) % np.uint64(vocab_size)).astype(np.int32)


def made_up_logprobs(tag: int, chosen: int, num: int, vocab_size: int) -> TokenLogprobs:
    """A made-up distribution: the greedy choice has half of the mass, its successors half of the rest each."""
    top = [(tag + i) % vocab_size for i in range(num)]
    rank = (chosen - tag) % vocab_size + 1
    return TokenLogprobs([chosen, *top], [-0.6931 * rank, *(-0.6931 * (i + 1) for i in range(num))], rank)
