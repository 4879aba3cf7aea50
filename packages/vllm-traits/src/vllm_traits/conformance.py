"""What every backend must satisfy, as functions that a test calls.

A backend's own test is one line a law::

    @pytest.mark.parametrize("law", conformance.LAWS)
    def test_conformance(law):
        law(make_backend)

``make_backend`` returns a fresh backend that was not initialised yet; the vocabulary needs at least 16 tokens and the context
at least 64. Each law raises ``AssertionError`` with what it saw.
"""

from collections.abc import Callable, Sequence

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

    def run(self, rows: Sequence[tuple[int, Sequence[int]]]) -> BatchOutput:
        """Run the given tokens of the given slots; a row whose tokens reach the known ones samples."""
        self._step += 1
        slots = np.array([slot for slot, _ in rows], np.int32)
        lengths = [len(tokens) for _, tokens in rows]
        computed = self._computed[slots].copy()
        batch = Batch(
            step_id=StepId(self._step),
            state=self.state,
            slots=slots,
            seq_ids=tuple(SeqId(int(s)) for s in slots),
            token_ids=np.array([t for _, tokens in rows for t in tokens], np.int32),
            query_start=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
            num_computed=computed,
            sample=computed + lengths >= self.state.num_tokens[slots],
            num_draft=np.zeros(len(rows), np.int32),
            changed_slots=slots[computed == 0],
        )
        output = self.backend.submit(batch).result()
        assert output.token_ids.shape == (len(rows), 1), f"token_ids has shape {output.token_ids.shape}"
        self._computed[slots] += lengths
        for row, slot in enumerate(slots.tolist()):
            if batch.sample[row]:
                token = int(output.token_ids[row, 0])
                assert 0 <= token < self.backend.spec.vocab_size, f"sampled {token}"
                self.state.token_ids[slot, self.state.num_tokens[slot]] = token
                self.state.num_tokens[slot] += 1
            else:
                assert output.token_ids[row, 0] == -1, f"row {row} was not to be sampled"
        return output

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
        driver.run(
            [
                (slot, driver.state.token_ids[slot, driver._computed[slot] : driver.state.num_tokens[slot]].tolist())
                for slot in (2, 0, 1)
            ]
        )
    together = [driver.state.token_ids[s, 5 + 17 * s : 10 + 17 * s].tolist() for s in range(3)]
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


LAWS: tuple[Callable[[MakeBackend], None], ...] = (
    spec_is_sound,
    chunks_do_not_matter,
    neighbours_do_not_matter,
    shared_blocks_serve_as_prefix,
    last_sampled_stands_for_the_token,
    seeds_decide,
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
