"""What every backend must satisfy, as functions that a test calls.

A backend's own test is one line a law::

    @pytest.mark.parametrize("law", conformance.LAWS)
    def test_conformance(law):
        law(make_backend)

``make_backend`` returns a fresh backend that was not initialised yet; the vocabulary needs at least 16 tokens and the context
at least 64. Each law raises ``AssertionError`` with what it saw.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vllm_traits.backend import ModelBackend
from vllm_traits.batch import LAST_SAMPLED, Batch, BatchOutput, BatchState
from vllm_traits.ids import SeqId, StepId
from vllm_traits.sampling_params import SamplingParams

MakeBackend = Callable[[], ModelBackend]

_BLOCK_SIZE = 16
_GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


class Driver:
    """A minimal engine: places sequences by hand and runs batches, so that a law can say exactly what runs when."""

    def __init__(self, backend: ModelBackend, max_num_seqs: int = 4, num_blocks: int = 32) -> None:
        self.backend = backend
        self.state = BatchState(max_num_seqs, min(backend.spec.max_model_len, 128), _BLOCK_SIZE)
        self._step = 0
        self._computed = np.zeros(max_num_seqs, np.int32)
        self._changed: list[int] = []
        backend.initialize(self.state, num_blocks=num_blocks, max_num_batched_tokens=256)

    def place(self, slot: int, prompt: Sequence[int], blocks: Sequence[int], params: SamplingParams = _GREEDY) -> None:
        """Give ``slot`` to a new sequence whose KV goes to ``blocks``."""
        state = self.state
        state.token_ids[slot, : len(prompt)] = prompt
        state.num_tokens[slot] = state.num_prompt_tokens[slot] = len(prompt)
        state.block_tables[slot, : len(blocks)] = blocks
        state.num_blocks[slot] = len(blocks)
        state.temperature[slot], state.top_p[slot] = params.temperature, params.top_p
        state.top_k[slot], state.min_p[slot] = max(params.top_k, 0), params.min_p
        state.presence_penalty[slot], state.frequency_penalty[slot] = params.presence_penalty, params.frequency_penalty
        state.repetition_penalty[slot] = params.repetition_penalty
        state.seed[slot] = params.seed or 0
        state.params[slot], state.stop_token_ids[slot] = params, ()
        self._computed[slot] = 0
        self._changed.append(slot)

    def run(self, rows: Sequence[tuple[int, Sequence[int]]], guesses: Mapping[int, Sequence[int]] | None = None) -> BatchOutput:
        """Run the given tokens of the given slots; a row whose tokens reach the known ones samples.

        Args:
            rows: Slots and the tokens that they run.
            guesses: By slot, tokens to verify after those; the row's tokens must reach the known ones.
        """
        self._step += 1
        guesses = guesses or {}
        slots = np.array([slot for slot, _ in rows], np.int32)
        num_draft = np.array([len(guesses.get(slot, ())) for slot, _ in rows], np.int32)
        tokens = [[*tokens, *guesses.get(slot, ())] for slot, tokens in rows]
        lengths = np.array([len(each) for each in tokens], np.int32)
        computed = self._computed[slots].copy()
        for slot, guessed in guesses.items():
            known = int(self.state.num_tokens[slot])
            self.state.token_ids[slot, known : known + len(guessed)] = guessed
        batch = Batch(
            step_id=StepId(self._step),
            state=self.state,
            slots=slots,
            seq_ids=tuple(SeqId(int(s)) for s in slots),
            token_ids=np.array([token for each in tokens for token in each], np.int32),
            query_start=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
            num_computed=computed,
            sample=computed + lengths - num_draft >= self.state.num_tokens[slots],
            num_draft=num_draft,
            changed_slots=np.array(self._changed, np.int32),
        )
        self._changed = []
        output = self.backend.submit(batch).result()
        height, width = output.token_ids.shape
        assert height == len(rows), f"token_ids has shape {output.token_ids.shape}"
        assert 1 <= width <= num_draft.max() + 1, f"token_ids has shape {output.token_ids.shape}"
        for row, slot in enumerate(slots.tolist()):
            self._take(batch, row, slot, output.token_ids[row].tolist())
        return output

    def _take(self, batch: Batch, row: int, slot: int, tokens: list[int]) -> None:
        """Take in what a row gave."""
        num_draft = int(batch.num_draft[row])
        self._computed[slot] += batch.query_lens[row] - num_draft
        if not batch.sample[row]:
            assert set(tokens) == {-1}, f"row {row} was not to be sampled"
            return
        given = [token for token in tokens if token != -1]
        assert tokens[: len(given)] == given, f"row {row} has a hole: {tokens}"
        assert 1 <= len(given) <= num_draft + 1, f"row {row} with {num_draft} guesses has {len(given)} tokens"
        assert all(0 <= token < self.backend.spec.vocab_size for token in given), f"sampled {given}"
        known = int(self.state.num_tokens[slot])
        self.state.token_ids[slot, known : known + len(given)] = given
        self.state.num_tokens[slot] += len(given)
        self._computed[slot] += len(given) - 1

    def rest(self, slot: int) -> tuple[int, list[int]]:
        """The row that runs all known tokens of ``slot`` which have not run."""
        return slot, self.state.token_ids[slot, self._computed[slot] : self.state.num_tokens[slot]].tolist()

    def output(self, slot: int) -> list[int]:
        """What was sampled for ``slot``."""
        return [int(t) for t in self.state.token_ids[slot, self.state.num_prompt_tokens[slot] : self.state.num_tokens[slot]]]

    def generate(self, slot: int, num_tokens: int, chunk: int = 256) -> list[int]:
        """Run ``slot`` alone until ``num_tokens`` were sampled."""
        done = int(self.state.num_prompt_tokens[slot]) + num_tokens
        while self.state.num_tokens[slot] < done:
            start, end = int(self._computed[slot]), int(self.state.num_tokens[slot])
            self.run([(slot, self.state.token_ids[slot, start : min(end, start + chunk)].tolist())])
        return [int(t) for t in self.state.token_ids[slot, done - num_tokens : done]]


def _prompt(backend: ModelBackend, length: int, salt: int = 0) -> list[int]:
    return [(7 * i + 3 * salt + 1) % min(backend.spec.vocab_size, 97) for i in range(length)]


def spec_is_sound(make_backend: MakeBackend) -> None:
    """The specification is usable and constant, and a block costs memory."""
    backend = make_backend()
    assert isinstance(backend, ModelBackend)
    assert backend.spec == backend.spec, "the spec must be constant"
    assert backend.spec.vocab_size > 0
    assert backend.spec.max_model_len > 0
    budget = backend.kv_cache_budget(block_size=_BLOCK_SIZE, max_num_seqs=4, max_num_batched_tokens=256)
    assert budget.bytes_per_block > 0
    assert budget.num_blocks > 0
    backend.close()
    backend.close()


def chunks_do_not_matter(make_backend: MakeBackend) -> None:
    """A prompt run whole, in pieces of 7 and in pieces of 1 gives the same tokens."""
    outputs = []
    for chunk in (256, 7, 1):
        driver = Driver(make_backend())
        driver.place(0, _prompt(driver.backend, 37), [5, 2, 9, 7])
        outputs.append(driver.generate(0, 6, chunk))
    assert outputs[0] == outputs[1] == outputs[2], outputs


def neighbours_do_not_matter(make_backend: MakeBackend) -> None:
    """Three sequences of different lengths in one step, seeded and greedy, give what each gives alone."""
    wanted = [_GREEDY, SamplingParams(temperature=0.8, seed=7, ignore_eos=True), _GREEDY]
    alone = []
    for slot, params in enumerate(wanted):
        driver = Driver(make_backend())
        driver.place(0, _prompt(driver.backend, 5 + 17 * slot, slot), [3, 1, 4, 6], params)
        alone.append(driver.generate(0, 5))
    driver = Driver(make_backend())
    for slot, params in enumerate(wanted):
        driver.place(slot, _prompt(driver.backend, 5 + 17 * slot, slot), [10 + slot, 20 + slot, 5 + slot, slot], params)
    for _ in range(5):
        driver.run([driver.rest(slot) for slot in (2, 0, 1)])
    together = [driver.output(slot) for slot in range(3)]
    assert together == alone, (together, alone)


def shared_blocks_serve_as_prefix(make_backend: MakeBackend) -> None:
    """A sequence that starts behind another's full block gives what it gives from scratch."""
    driver = Driver(make_backend())
    prompt = _prompt(driver.backend, 20)
    driver.place(0, prompt, [8, 3, 11])
    expected = driver.generate(0, 4)
    driver.place(1, prompt, [8, 12, 13])
    driver._computed[1] = _BLOCK_SIZE
    assert driver.generate(1, 4) == expected


def blocks_may_come_several_at_once(make_backend: MakeBackend) -> None:
    """A table that grows by two blocks between steps of one token serves as one that was whole from the start."""
    driver = Driver(make_backend())
    prompt = _prompt(driver.backend, _BLOCK_SIZE - 2)
    driver.place(0, prompt, [4, 1, 7])
    expected = driver.generate(0, 2 * _BLOCK_SIZE)
    driver.place(1, prompt, [9])
    driver.generate(1, 2)
    driver.state.block_tables[1, 1:3] = 12, 2
    driver.state.num_blocks[1] = 3
    assert driver.generate(1, 2 * _BLOCK_SIZE) == expected


def last_sampled_stands_for_the_token(make_backend: MakeBackend) -> None:
    """``LAST_SAMPLED`` runs the token that the slot sampled last (for backends that support overlap)."""
    driver = Driver(make_backend())
    if not driver.backend.spec.supports_overlap:
        return
    driver.place(0, _prompt(driver.backend, 9), [2, 1, 0])
    expected = driver.generate(0, 3)
    driver.place(1, _prompt(driver.backend, 9), [5, 6, 7])
    driver.run([(1, _prompt(driver.backend, 9))])
    for _ in range(2):
        driver.run([(1, [LAST_SAMPLED])])
    assert driver.state.token_ids[1, 9:12].tolist() == expected


def seeds_decide(make_backend: MakeBackend) -> None:
    """The same seed repeats the tokens; different seeds do not all agree."""
    outputs = []
    for seed in (1, 1, 2, 3, 4):
        driver = Driver(make_backend())
        params = SamplingParams(temperature=2.0, seed=seed, ignore_eos=True)
        driver.place(0, _prompt(driver.backend, 11), [0, 1, 2], params)
        outputs.append(driver.generate(0, 8))
    assert outputs[0] == outputs[1], outputs
    assert len({tuple(o) for o in outputs}) > 1, outputs


_KINDS = (
    _GREEDY,
    SamplingParams(temperature=0.9, seed=11, ignore_eos=True),
    SamplingParams(
        temperature=0.7, seed=5, presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.3, ignore_eos=True
    ),
)
"""Greedy, seeded, penalised."""


def guesses_change_nothing(make_backend: MakeBackend) -> None:
    """Right, partly right and wrong guesses give the tokens of single steps, greedy, seeded and penalised, beside other rows
    and after an unfinished prompt (for backends that verify guesses).
    """
    most, length, num = make_backend().spec.max_draft_tokens, 19, 10
    if not most:
        return
    for params in _KINDS:
        driver = Driver(make_backend())
        prompt = _prompt(driver.backend, length, 2)
        driver.place(0, prompt, [3, 9], params)
        truth = driver.generate(0, num)
        for num_right in range(most + 1):
            _guess(make_backend(), prompt, params, truth, num_right)


def _guess(backend: ModelBackend, prompt: list[int], params: SamplingParams, truth: list[int], num_right: int) -> None:
    """Generate ``truth`` with as many guesses a step as may be, of which the first ``num_right`` are right."""
    driver, most, vocab_size = Driver(backend), backend.spec.max_draft_tokens, backend.spec.vocab_size
    other, chunked = _prompt(backend, 7, 5), _prompt(backend, 50, 6)
    driver.place(0, prompt, [12, 4], params)
    driver.place(1, other, [1, 0], _KINDS[1])  # decodes without guesses
    driver.place(2, chunked, [5, 6, 7, 8])  # is still at its prompt
    driver.run([(0, prompt[:6])])
    while len(driver.output(0)) < len(truth):
        done = len(driver.output(0))
        right = truth[done : done + min(most, len(truth) - done - 1)]
        guessed = [token if i < num_right else (token + 1) % vocab_size for i, token in enumerate(right)]
        at = int(driver._computed[2])
        rows = [driver.rest(1), driver.rest(0)]
        if at + 4 < len(chunked):
            rows.insert(1, (2, chunked[at : at + 4]))
        output = driver.run(rows, {0: guessed})
        given = [token for token in output.token_ids[-1].tolist() if token != -1]
        assert given == truth[done : done + min(num_right, len(right)) + 1], (
            f"guesses {guessed}, {num_right} of them right, gave {given} in place of {truth[done:]} with {params}"
        )


LAWS: tuple[Callable[[MakeBackend], None], ...] = (
    spec_is_sound,
    chunks_do_not_matter,
    neighbours_do_not_matter,
    shared_blocks_serve_as_prefix,
    blocks_may_come_several_at_once,
    last_sampled_stands_for_the_token,
    seeds_decide,
    guesses_change_nothing,
)
"""Every law, for ``pytest.mark.parametrize``."""


def batch_of(state: BatchState, rows: list[tuple[int, int]], *, params: SamplingParams | None = None, step: int = 1) -> Batch:
    """A step that runs ``(slot, num_computed)`` rows up to all their known tokens, sampling after each."""
    slots = np.array([slot for slot, _ in rows], np.int32)
    computed = np.array([start for _, start in rows], np.int32)
    lens = state.num_tokens[slots] - computed
    for slot in slots.tolist():
        state.params[slot] = params or state.params[slot] or SamplingParams(temperature=0)
    tokens = [state.token_ids[slot, start : state.num_tokens[slot]] for slot, start in rows]
    return Batch(
        step_id=StepId(step),
        state=state,
        slots=slots,
        seq_ids=tuple(SeqId(int(slot)) for slot in slots),
        token_ids=np.concatenate(tokens).astype(np.int32),
        query_start=np.concatenate([[0], np.cumsum(lens)]).astype(np.int32),
        num_computed=computed,
        sample=np.ones(len(rows), np.bool_),
        num_draft=np.zeros(len(rows), np.int32),
        changed_slots=slots,
    )
