"""Rows that are held to a grammar: which tokens may come next, as bits.

The grammar is compiled by ``llguidance``, which also walks it. A row's matcher stands behind the tokens that the row has said;
for guesses it goes on to them and back::

    said                a  b  c
    known and guesses         | c  g0  g1       c is known, g are guesses
    may come after            |  m0  m1  m2     m1 is what may follow c g0

Where a grammar has ended the model's end-of-sequence tokens alone may come, so the request ends there unless ``ignore_eos``.
"""

import json
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from vllm_model.machine import usable_cores
from vllm_model.tokenizer import Tokenizer
from vllm_model.verifier import SampledEntries
from vllm_traits.batch import Batch, BatchState, IntArray
from vllm_traits.errors import BackendError, InvalidRequestError, VllmError
from vllm_traits.sampling_params import SamplingParams, StructuredOutputsParams

MOST_GRAMMARS = 1024
"""Compiled ones, several of one grammar counted each, that are kept for the next request with the same."""
LONGEST_GRAMMAR = 1 << 17
"""Bytes. Each rule may lead to another, and the compiler goes down to the last on the stack."""
COUNTS = tuple(bound + of for bound in ("min", "max") for of in ("Items", "Length", "Properties", "Contains"))
"""Of a schema, which the compiler writes out."""
LARGEST_COUNT = 10_000
STACK_BYTES = 256 << 20
"""Of the thread that compiles; memory that is not used is not taken."""
LIMITS = LLParserLimits(step_max_items=5_000, verbose_errors=False)
"""So that a token takes milliseconds at most; what needs more is refused, or ends with an error."""
MOST_THREADS = 16
"""That masks are found by."""
LEAST_PARALLEL = 4
"""Masks that are worth waking them."""
QUICK_SECONDS = 0.02
"""A grammar that is compiled in so much is compiled again for rows beside others with it."""
LONGEST_MESSAGE = 300
"""Characters of a compiler's message that are passed on."""


def token_bits(tokens: Sequence[int] | npt.NDArray[np.integer], words: int) -> IntArray:
    """int32 ``[words]`` with the bits of these tokens."""
    bits = np.zeros(words * 32, np.bool_)
    bits[np.asarray(tokens, np.int64)] = True
    return np.packbits(bits, bitorder="little").view(np.int32)


@dataclass(frozen=True, eq=False, slots=True)
class Original:
    """A compiled grammar at its beginning; its copies share its automaton, and a lock: one at a time finds what may come.

    Attributes:
        matcher: To be copied.
        seconds: That compiling took of a processor.
    """

    matcher: LLMatcher
    seconds: float


class Grammars:
    """Compiles grammars and finds what they allow, for one model's tokens.

    Args:
        tokenizer: Gives the tokenizer, when the first grammar comes: reading it takes seconds.
        vocab_size: Tokens that the model knows, at least the tokenizer's.
        eos_token_ids: The tokens that end a sequence.
    """

    def __init__(self, tokenizer: Callable[[], Tokenizer], vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self.eos_token_ids, self.words = eos_token_ids, -(-vocab_size // 32)
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._vocabulary: LLTokenizer | InvalidRequestError | None = None
        self._compiled: OrderedDict[bytes, tuple[Original, ...]] = OrderedDict()
        self._executor: LLExecutor | None = None

    @classmethod
    def of(cls, path: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> "Grammars | None":
        """Those of a model folder or ``.gguf`` file; None if it has no tokenizer or no end-of-sequence token."""
        ends = tuple(token for token in eos_token_ids if 0 <= token < vocab_size)
        if not ends or not (path.suffix == ".gguf" or (path / "tokenizer.json").exists()):
            return None
        return cls(lambda: Tokenizer.from_pretrained(path), vocab_size, ends)

    @cached_property
    def _threads(self) -> int:
        return min(usable_cores(), MOST_THREADS)

    def check(self, params: SamplingParams) -> None:
        """Compile what a request wants to be held to, if anything.

        Raises:
            InvalidRequestError: It is no grammar, or cannot be kept with another parameter; ``param`` names the field.
        """
        if params.structured_outputs is None:
            return
        if params.min_tokens > 0:
            raise InvalidRequestError("min_tokens must be 0 with structured_outputs, which says when to end.", "min_tokens")
        self.original(params.structured_outputs)

    def original(self, wanted: StructuredOutputsParams, used: Mapping[Original, int] = MappingProxyType({})) -> Original:
        """That with the fewest rows; a new one if all have some, it compiles quickly, and a thread has none.

        Args:
            wanted: The grammar.
            used: Rows that have copies, by original.

        Raises:
            InvalidRequestError: It is no grammar, too large, or nothing keeps it.
        """
        try:
            key = msgspec.json.encode(wanted)
        except (TypeError, ValueError, RecursionError) as error:
            raise _refused(str(error)) from error
        if len(key) > LONGEST_GRAMMAR:
            raise _refused(f"{len(key):,} bytes are too many; a grammar may have {LONGEST_GRAMMAR:,}.")
        found = self._compiled.get(key, ())
        if not found or self._another_helps(found, used):
            found = self._compiled[key] = (*found, self._compile(self._read_vocabulary(), _source(wanted)))
            self._compiled.move_to_end(key)
            while sum(map(len, self._compiled.values())) > MOST_GRAMMARS:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return min(found, key=lambda original: used.get(original, 0))

    def fill(self, walks: "Sequence[Walk]", bits: IntArray) -> None:
        """What may come behind each walk's matcher, and behind each of its guesses; all behind a guess that may not come.

        Args:
            walks: Where rows stand.
            bits: int32 ``[num, words]``, contiguous, to be written: a row for each walk and each of its guesses.

        Raises:
            BackendError: One takes too long. The matchers stand anywhere then.
        """
        passed = [0] * len(walks)
        # Copies of one original beside each other, so that it is mostly one thread that takes them.
        going, length = sorted(enumerate(walks), key=lambda entry: id(entry[1].held.original)), 0
        while going:
            self._fill([(walk.held.matcher, walk.row + length) for _, walk in going], bits)
            further = []
            for each, walk in going:
                if length == len(walk.guesses):
                    continue
                guess = walk.guesses[length]
                if self.consume(walk.held.matcher, [guess]):
                    passed[each] += 1
                elif not (walk.held.matcher.is_stopped() and guess in self.eos_token_ids):  # behind an end are more
                    bits[walk.row + length + 1 : walk.row + len(walk.guesses) + 1] = -1
                    continue
                further.append((each, walk))
            going, length = further, length + 1
        for walk, num in zip(walks, passed, strict=True):
            matcher = walk.held.matcher
            if matcher.is_error() or (num and not matcher.rollback(num)):
                raise BackendError(f"structured_outputs: {_short(matcher.get_error())}")
        first, *others = self.eos_token_ids
        ending = np.flatnonzero((bits[:, first // 32] >> (first % 32)) & 1)
        for token in others:
            bits[ending, token // 32] |= np.array(1 << token % 32, np.uint32).view(np.int32)

    def consume(self, matcher: LLMatcher, tokens: list[int]) -> int:
        """Go on, to the end at most; returns over how many tokens."""
        return matcher.try_consume_tokens([self.eos_token_ids[0] if token in self.eos_token_ids else token for token in tokens])

    def _another_helps(self, found: Sequence[Original], used: Mapping[Original, int]) -> bool:
        """Whether a row would wait for others less with an original of its own, and that is soon there."""
        waits = sum(used.values()) + 1 >= LEAST_PARALLEL and all(used.get(original, 0) for original in found)
        return waits and len(found) < self._threads and found[0].seconds < QUICK_SECONDS

    def _fill(self, places: list[tuple[LLMatcher, int]], bits: IntArray) -> None:
        """What may come behind each matcher, into its row."""
        start, row_bytes = bits.ctypes.data, bits[:1].nbytes
        if len(places) < LEAST_PARALLEL:
            for matcher, row in places:
                matcher.unsafe_compute_mask_ptr(start + row * row_bytes, row_bytes)
            return
        if self._executor is None:
            self._executor = LLExecutor(self._threads)
        self._executor.unsafe_compute_mask_ptr(places, start, row_bytes, len(bits))

    def _compile(self, vocabulary: LLTokenizer, source: str) -> Original:
        """In a thread with room for what refers to itself a thousand times over."""
        result, seconds = list[Any](), 0.0

        def compile_() -> None:
            nonlocal seconds
            begun = time.thread_time()
            try:
                matcher = LLMatcher(vocabulary, source, log_level=0, limits=LIMITS)
                bits = np.zeros(self.words, np.int32)
                if not matcher.is_error():
                    matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
                if matcher.stop_reason().startswith("NoExtension") and not matcher.is_accepting():
                    result.append(_refused("no text keeps this grammar."))
                else:
                    result.append(_refused(matcher.get_error()) if matcher.is_error() else matcher)
            except BaseException as error:
                result.append(_refused(str(error)))
            seconds = time.thread_time() - begun

        before = threading.stack_size(STACK_BYTES)
        try:
            thread = threading.Thread(target=compile_, name="grammar")
            thread.start()
        finally:
            threading.stack_size(before)
        thread.join()
        if isinstance(result[0], InvalidRequestError):
            raise result[0]
        return Original(result[0], seconds)

    def _read_vocabulary(self) -> LLTokenizer:
        if self._vocabulary is None:
            try:
                source = self._tokenizer().to_json()
                self._vocabulary = LLTokenizer(source, n_vocab=self._vocab_size, eos_token=self.eos_token_ids[0])
            except (ValueError, VllmError) as error:
                self._vocabulary = _refused(f"not with this model's tokenizer: {error}")
        if isinstance(self._vocabulary, InvalidRequestError):
            raise self._vocabulary
        return self._vocabulary


def _source(wanted: StructuredOutputsParams) -> str:
    """A grammar as llguidance spells it."""
    given = [name for name in StructuredOutputsParams.__struct_fields__ if getattr(wanted, name) not in (None, False)]
    if len(given) != 1:
        fields = ", ".join(StructuredOutputsParams.__struct_fields__)
        raise _refused(f"exactly one of {fields} must be given, not {' and '.join(given) or 'none'}.")
    try:
        if wanted.json is not None:
            schema = json.loads(wanted.json) if isinstance(wanted.json, str) else wanted.json
            for name, count in _counts(schema):
                if count > LARGEST_COUNT:
                    raise ValueError(f"{name} is {count}; it may be {LARGEST_COUNT} at most.")
            return LLMatcher.grammar_from_json_schema(schema)
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
    except (TypeError, ValueError, RecursionError) as error:
        raise _refused(str(error)) from error


def _counts(schema: Any) -> Iterator[tuple[str, int]]:
    """What a schema writes out so many times."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            waiting += part.values()
            yield from ((name, part[name]) for name in COUNTS if isinstance(part.get(name), int))
        elif isinstance(part, list):
            waiting += part


def _refused(message: str) -> InvalidRequestError:
    return InvalidRequestError(f"structured_outputs: {_short(message)}", "structured_outputs")


def _short(message: str) -> str:
    return message.partition("<")[0].strip()[:LONGEST_MESSAGE] or "too complex."


@dataclass(slots=True)
class HeldRow:
    """Where a row stands in its grammar."""

    wanted: StructuredOutputsParams
    original: Original
    matcher: LLMatcher
    """Behind what is known."""
    said: bytes = b""
    """What the matcher stands behind, and what came behind its end: int32."""
    passed: int = 0
    """Tokens that it has gone over."""


class Walk(NamedTuple):
    """What is to be found for a row.

    Attributes:
        held: Where it stands.
        guesses: What may follow.
        row: The first of its rows of bits.
    """

    held: HeldRow
    guesses: list[int]
    row: int


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
        self._held: dict[int, HeldRow] = {}
        self._used = Counter[Original]()

    def masks(
        self, batch: Batch, entries: SampledEntries, make: Callable[[int, int], IntArray] | None = None
    ) -> StepMasks | None:
        """What may be sampled, also by ``allowed_token_ids``; asked again for the same step, the same.

        Args:
            batch: The step; none of these rows' tokens is ``LAST_SAMPLED``.
            entries: Of the step.
            make: Gives the array for the bits.

        Returns:
            None if no row is held.

        Raises:
            BackendError: Something is no grammar, takes too long, or leaves nothing that may come.
        """
        params = batch.state.params
        held = [row for row, slot in enumerate(batch.slots.tolist()) if _wanted(params[slot]) is not None and batch.sample[row]]
        for slot in [slot for slot, row in self._held.items() if _wanted(params[slot]) is not row.wanted]:
            self._drop(slot)  # its sequence has left
        if not held:
            return None
        which = np.flatnonzero(np.isin(entries.rows, held))
        shape = len(which), self._grammars.words
        bits = np.empty(shape, np.int32) if make is None else make(*shape)
        slots, ends = batch.slots[held].tolist(), (batch.query_start[1:] - batch.num_draft)[held]
        lengths = (batch.num_computed + batch.query_lens - batch.num_draft - batch.state.num_prompt_tokens[batch.slots])[held]
        try:
            walks, at = list[Walk](), 0
            for slot, length, end, drafts in zip(
                slots, lengths.tolist(), ends.tolist(), batch.num_draft[held].tolist(), strict=True
            ):
                start = int(batch.state.num_prompt_tokens[slot])
                held_row = self._behind(slot, params[slot], batch.state.token_ids[slot, start : start + length])
                walks.append(Walk(held_row, batch.token_ids[end : end + drafts].tolist(), at))
                at += drafts + 1
            self._grammars.fill(walks, bits)
            for slot, length, walk in zip(slots, lengths.tolist(), walks, strict=True):
                self._narrow(batch.state, slot, length, bits[walk.row : walk.row + len(walk.guesses) + 1])
        except BaseException as error:
            for slot in slots:  # their matchers may stand anywhere
                self._drop(slot)
            if isinstance(error, VllmError):
                raise BackendError(error.message) from error
            raise
        return StepMasks(which, bits)

    def _narrow(self, state: BatchState, slot: int, length: int, bits: IntArray) -> None:
        """Take off what the request itself does not allow, behind ``length`` tokens and more."""
        params = state.params[slot]
        assert params is not None
        if params.allowed_token_ids is None and not params.min_tokens:
            return  # the grammar leaves something: at its end that
        if params.allowed_token_ids is not None:
            bits &= token_bits(params.allowed_token_ids, self._grammars.words)
        early = max(0, min(params.min_tokens - length, len(bits)))
        left = np.asarray(bits.any(axis=1))
        if early:
            left[:early] = (bits[:early] & ~token_bits(state.stop_token_ids[slot], self._grammars.words)).any(axis=1)
        if not left.all():
            raise BackendError("structured_outputs: nothing may come that allowed_token_ids and min_tokens allow as well.")

    def _behind(self, slot: int, params: SamplingParams | None, tokens: IntArray) -> HeldRow:
        """The slot's matcher behind these tokens: it goes back where they are others than before."""
        wanted = _wanted(params)
        assert wanted is not None
        held = self._held.get(slot)
        if held is None or held.wanted is not wanted:
            held = self._begin(slot, wanted)
        said, same = tokens.tobytes(), len(held.said) // tokens.itemsize
        if not said.startswith(held.said):
            before = np.frombuffer(held.said, tokens.dtype)[: len(tokens)]
            same = int(np.append(np.flatnonzero(before != tokens[: len(before)]), len(before))[0])
        back = held.passed - min(held.passed, same)
        if back and not held.matcher.rollback(back):
            held = self._begin(slot, wanted)
            back = same = 0
        held.passed -= back
        if held.passed == same:  # not behind its end
            held.passed += self._grammars.consume(held.matcher, tokens[same:].tolist())
        if held.passed < len(tokens) and not held.matcher.is_stopped():
            raise BackendError("structured_outputs: the row has said what its grammar does not allow.")
        held.said = said
        return held

    def _begin(self, slot: int, wanted: StructuredOutputsParams) -> HeldRow:
        self._drop(slot)
        original = self._grammars.original(wanted, self._used)
        held = self._held[slot] = HeldRow(wanted, original, original.matcher.deep_copy())
        self._used[original] += 1
        return held

    def _drop(self, slot: int) -> None:
        held = self._held.pop(slot, None)
        if held is not None:
            self._used -= Counter([held.original])


def _wanted(params: SamplingParams | None) -> StructuredOutputsParams | None:
    return None if params is None else params.structured_outputs
