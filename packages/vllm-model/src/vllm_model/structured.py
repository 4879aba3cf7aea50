"""Rows that are held to a grammar: which tokens may come next, as bits.

The grammar is compiled by ``llguidance``, which also walks it. A row's matcher stands behind the tokens that the row has said;
for guesses it goes on to them and back::

    said                a  b  c
    known and guesses         | c  g0  g1       c is known, g are guesses
    may come after            |  m0  m1  m2     m1 is what may follow c g0

Where a grammar has ended the model's end-of-sequence token alone may come, so the request ends there unless ``ignore_eos``.
"""

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer, grammar_from

from vllm_model.tokenizer import Tokenizer
from vllm_model.verifier import SampledEntries
from vllm_traits.batch import Batch, IntArray
from vllm_traits.errors import BackendError, InvalidRequestError, VllmError
from vllm_traits.sampling_params import SamplingParams, StructuredOutputsParams

MOST_GRAMMARS = 64
"""Compiled ones that are kept for the next request with the same."""
LONGEST_MESSAGE = 300
"""Characters of a compiler's message that are passed on."""


class Grammars:
    """Compiles them, for one model's tokens.

    Args:
        tokenizer: Gives the tokenizer, when the first grammar comes: reading it takes seconds.
        vocab_size: Tokens that the model knows, at least the tokenizer's.
        eos_token_id: The token that ends a sequence.
    """

    def __init__(self, tokenizer: Callable[[], Tokenizer], vocab_size: int, eos_token_id: int) -> None:
        self.eos_token_id, self.words = eos_token_id, -(-vocab_size // 32)
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._vocabulary: LLTokenizer | None = None
        self._compiled: OrderedDict[bytes, LLMatcher] = OrderedDict()

    @classmethod
    def of(cls, path: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> "Grammars | None":
        """Those of a model folder or ``.gguf`` file; None if it has no tokenizer or no end-of-sequence token."""
        if not eos_token_ids or not (path.suffix == ".gguf" or (path / "tokenizer.json").exists()):
            return None
        return cls(lambda: Tokenizer.from_pretrained(path), vocab_size, eos_token_ids[0])

    def check(self, params: SamplingParams) -> None:
        """Compile what a request wants to be held to, if anything.

        Raises:
            InvalidRequestError: It is no grammar, or cannot be kept with another parameter; ``param`` names the field.
        """
        if params.structured_outputs is None:
            return
        if params.min_tokens > 0:
            raise InvalidRequestError("min_tokens must be 0 with structured_outputs, which says when to end.", "min_tokens")
        self.matcher(params.structured_outputs)

    def matcher(self, wanted: StructuredOutputsParams) -> LLMatcher:
        """A new matcher at its beginning.

        Raises:
            InvalidRequestError: It is no grammar.
        """
        key = msgspec.json.encode(wanted)
        found = self._compiled.get(key)
        if found is None:
            found = LLMatcher(self._read_vocabulary(), _source(wanted), log_level=0)
            if found.is_error():
                raise _refused(found.get_error())
            self._compiled[key] = found
            if len(self._compiled) > MOST_GRAMMARS:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return found.deep_copy()

    def _read_vocabulary(self) -> LLTokenizer:
        if self._vocabulary is None:
            try:
                self._vocabulary = _vocabulary(self._tokenizer().to_json(), self._vocab_size, self.eos_token_id)
            except ValueError as error:
                raise _refused(f"not for this model's tokenizer: {error}") from error
        return self._vocabulary


@lru_cache(maxsize=2)
def _vocabulary(tokenizer: str, vocab_size: int, eos_token_id: int) -> LLTokenizer:
    """For a draft model and its target it is the same, and takes seconds."""
    return LLTokenizer(tokenizer, n_vocab=vocab_size, eos_token=eos_token_id)


def _source(wanted: StructuredOutputsParams) -> str:
    """A grammar as llguidance spells it."""
    given = [name for name in StructuredOutputsParams.__struct_fields__ if getattr(wanted, name) not in (None, False)]
    if len(given) != 1:
        fields = ", ".join(StructuredOutputsParams.__struct_fields__)
        raise _refused(f"exactly one of {fields} must be given, not {' and '.join(given) or 'none'}.")
    try:
        if wanted.json is not None:
            return LLMatcher.grammar_from_json_schema(json.loads(wanted.json) if isinstance(wanted.json, str) else wanted.json)
        if wanted.json_object:
            return LLMatcher.grammar_from_json_schema({"type": "object"})
        if wanted.choice is not None:
            strings = isinstance(wanted.choice, list) and all(isinstance(each, str) and each for each in wanted.choice)
            if not wanted.choice or not strings:
                raise ValueError("choice must hold strings that are not empty")
            return grammar_from("choice", json.dumps(wanted.choice))
        if wanted.regex is not None:
            return LLMatcher.grammar_from_regex(wanted.regex)
        return grammar_from("grammar", wanted.grammar or "")
    except (TypeError, ValueError) as error:
        raise _refused(str(error)) from error


def _refused(message: str) -> InvalidRequestError:
    message = message.partition("<state>")[0].strip()[:LONGEST_MESSAGE]
    return InvalidRequestError(f"structured_outputs: {message}", "structured_outputs")


@dataclass(slots=True)
class _Held:
    """A row."""

    wanted: StructuredOutputsParams
    matcher: LLMatcher
    said: IntArray = field(default_factory=lambda: np.zeros(0, np.int32))
    """What the matcher stands behind."""


class StepMasks(NamedTuple):
    """What may be sampled in a step, where not everything may.

    Attributes:
        entries: int64 ``[num]``, which of the step's :class:`SampledEntries`, ascending.
        bits: int32 ``[num, ceil(vocab_size / 32)]``, bit ``token % 32`` of word ``token // 32``: may come.
    """

    entries: npt.NDArray[np.int64]
    bits: IntArray

    def allowed(self, vocab_size: int) -> npt.NDArray[np.bool_]:
        """The bits one by one: bool ``[num, vocab_size]``."""
        return np.unpackbits(self.bits.view(np.uint8), axis=1, count=vocab_size, bitorder="little").view(np.bool_)

    def part(self, part: slice) -> "StepMasks":
        """Of some of the entries, counted from the first of them."""
        chosen = slice(*np.searchsorted(self.entries, [part.start, part.stop]).tolist())
        return StepMasks(self.entries[chosen] - part.start, self.bits[chosen])


class HeldRows:
    """The rows that are held to a grammar, by slot.

    Args:
        grammars: Of the model.
    """

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._held: dict[int, _Held] = {}

    def masks(self, batch: Batch, entries: SampledEntries) -> StepMasks | None:
        """What may be sampled; asked again for the same step, the same.

        Args:
            batch: The step; none of these rows' tokens is ``LAST_SAMPLED``.
            entries: Of the step.

        Returns:
            None if no row is held.

        Raises:
            BackendError: Something is no grammar.
        """
        params = batch.state.params
        held = [row for row, slot in enumerate(batch.slots.tolist()) if _wanted(params[slot]) is not None and batch.sample[row]]
        if not held:
            return None
        which = np.flatnonzero(np.isin(entries.rows, held))
        bits: IntArray = np.empty((len(which), self._grammars.words), np.int32)
        at = 0
        try:
            for row in held:
                at += self._fill(batch, row, bits[at:])
        except VllmError as error:
            raise BackendError(error.message) from error
        return StepMasks(which, bits)

    def _fill(self, batch: Batch, row: int, bits: IntArray) -> int:
        """What may come after each of the row's last tokens, into the first ``num_draft + 1``; returns how many these are."""
        slot, drafts = int(batch.slots[row]), int(batch.num_draft[row])
        end = int(batch.num_computed[row] + batch.query_start[row + 1] - batch.query_start[row])
        tokens = batch.state.token_ids[slot, int(batch.state.num_prompt_tokens[slot]) : end - drafts]
        guesses = batch.token_ids[batch.query_start[row + 1] - drafts : batch.query_start[row + 1]].tolist()
        matcher = self._behind(slot, batch.state.params[slot], tokens)
        passed = 0
        for place in range(drafts + 1):
            matcher.unsafe_compute_mask_ptr(bits[place].ctypes.data, bits[place].nbytes)
            # What follows a guess that may not come is thrown away with it, whatever it is.
            if place == passed < drafts and guesses[place] != self._grammars.eos_token_id and not matcher.is_stopped():
                passed += matcher.try_consume_tokens([guesses[place]])
        if passed:
            matcher.rollback(passed)
        return drafts + 1

    def _behind(self, slot: int, params: SamplingParams | None, tokens: IntArray) -> LLMatcher:
        """The slot's matcher behind these tokens: it goes back where they are others than before."""
        wanted = _wanted(params)
        assert wanted is not None
        held = self._held.get(slot)
        if held is None or held.wanted is not wanted:
            held = self._held[slot] = _Held(wanted, self._grammars.matcher(wanted))
        length = min(len(held.said), len(tokens))
        others = np.flatnonzero(held.said[:length] != tokens[:length])
        same = int(others[0]) if len(others) else length
        back = len(held.said) - same
        if back and (held.matcher.is_error() or not held.matcher.rollback(back)):
            held.matcher, same = self._grammars.matcher(wanted), 0
        if len(tokens) > same:
            held.matcher.consume_tokens(tokens[same:].tolist())  # behind what may not come it lets the row end, for good
        held.said = tokens.copy()
        return held.matcher


def _wanted(params: SamplingParams | None) -> StructuredOutputsParams | None:
    return None if params is None else params.structured_outputs
