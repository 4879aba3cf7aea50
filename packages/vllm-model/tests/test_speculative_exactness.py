"""Guesses change how many tokens come at once, never which: token for token, in every report, and in distribution."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vllm_model import load_backend, resolve_model
from vllm_model.tokenizer import Tokenizer
from vllm_traits import Batch, BatchOutput, BatchState, ModelBackend, SamplingParams, SeqId, TokenLogprobs
from vllm_traits.ids import StepId

Propose = Callable[[int, list[int]], Sequence[int]]
"""From a slot and its known tokens to guesses."""
STOP = 5
GREEDY = SamplingParams(temperature=0, ignore_eos=True)
WARM = {"temperature": 0.9, "ignore_eos": True}
KINDS = {
    "greedy": GREEDY,
    "sampled": SamplingParams(**WARM),
    "top_k": SamplingParams(**WARM, top_k=12),
    "top_p": SamplingParams(**WARM, top_p=0.8),
    "min_p": SamplingParams(**WARM, min_p=0.05),
    "all filters": SamplingParams(**WARM, top_k=30, top_p=0.9, min_p=0.02),
    "penalties": SamplingParams(**WARM, presence_penalty=0.7, frequency_penalty=0.4, repetition_penalty=1.3),
    "greedy penalties": SamplingParams(temperature=0, frequency_penalty=1.5, repetition_penalty=1.2),
    "logit_bias": SamplingParams(**WARM, logit_bias={3: 2.5, 7: -4.0}),
    "allowed": SamplingParams(**WARM, allowed_token_ids=[*range(10, 30), STOP]),
    "min_tokens": SamplingParams(**WARM, min_tokens=9, logit_bias={STOP: 6.0}),
}


class Speculator:
    """The least engine that runs guesses: all its sequences step together, each block table its own."""

    def __init__(self, backend: ModelBackend, num_seqs: int, max_len: int = 128) -> None:
        self.backend = backend
        self.state = BatchState(num_seqs, max_len, 16)
        per_seq = self.state.max_blocks_per_seq
        self.state.block_tables[:] = np.arange(num_seqs * per_seq).reshape(num_seqs, per_seq)
        self.state.num_blocks[:] = per_seq
        self.computed = np.zeros(num_seqs, np.int32)
        self.steps = 0
        self.logprobs: list[list[TokenLogprobs]] = [[] for _ in range(num_seqs)]
        self.prompt_logprobs: list[list[TokenLogprobs]] = [[] for _ in range(num_seqs)]
        backend.initialize(self.state, num_blocks=num_seqs * per_seq, max_num_batched_tokens=num_seqs * max_len)

    def place(self, slot: int, prompt: Sequence[int], params: SamplingParams, seed: int = 0) -> None:
        state = self.state
        state.token_ids[slot, : len(prompt)] = prompt
        state.num_tokens[slot] = state.num_prompt_tokens[slot] = len(prompt)
        for name in ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
            getattr(state, name)[slot] = getattr(params, name)
        state.seed[slot], state.params[slot], state.stop_token_ids[slot] = seed, params, (STOP,)
        self.computed[slot] = 0

    def known(self, slot: int) -> list[int]:
        return self.state.token_ids[slot, : self.state.num_tokens[slot]].tolist()

    def step(self, slots: Sequence[int], guesses: Sequence[Sequence[int]], *, chunk: int | None = None) -> BatchOutput:
        """Verify guesses; with ``chunk`` run that many known tokens only, and sample nothing."""
        state, index = self.state, np.array(slots, np.int32)
        self.steps += 1
        rows = []
        for slot, guess in zip(slots, guesses, strict=True):
            known = int(state.num_tokens[slot])
            state.token_ids[slot, known : known + len(guess)] = guess
            end = known + len(guess) if chunk is None else int(self.computed[slot]) + chunk
            rows.append(state.token_ids[slot, self.computed[slot] : end])
        lengths = [len(row) for row in rows]
        batch = Batch(
            step_id=StepId(self.steps),
            state=state,
            slots=index,
            seq_ids=tuple(SeqId(slot) for slot in slots),
            token_ids=np.concatenate(rows).astype(np.int32),
            query_start=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
            num_computed=self.computed[index],
            sample=np.full(len(slots), chunk is None),
            num_draft=np.array([len(guess) for guess in guesses], np.int32),
            changed_slots=index,
        )
        output = self.backend.submit(batch).result()
        assert output.token_ids.shape[1] <= max(len(guess) for guess in guesses) + 1
        for row, slot in enumerate(slots):
            tokens = output.token_ids[row][output.token_ids[row] >= 0]
            known = int(state.num_tokens[slot])
            state.token_ids[slot, known : known + len(tokens)] = tokens
            state.num_tokens[slot] += len(tokens)
            self.computed[slot] = self.computed[slot] + chunk if chunk is not None else state.num_tokens[slot] - 1
            self.logprobs[slot] += output.logprobs.get(row, [])
            self.prompt_logprobs[slot] += output.prompt_logprobs.get(row, [])
        return output

    def generate(self, num_tokens: int, propose: Propose = lambda slot, known: ()) -> list[list[int]]:
        """``num_tokens`` tokens of every sequence."""
        done = self.state.num_prompt_tokens + num_tokens
        while True:
            slots = np.flatnonzero(self.state.num_tokens < done).tolist()
            if not slots:
                prompts = self.state.num_prompt_tokens
                return [self.state.token_ids[slot, prompts[slot] : done[slot]].tolist() for slot in range(len(done))]
            self.step(slots, [propose(slot, self.known(slot)) for slot in slots])


@pytest.fixture(scope="module")
def folder(random_model: Callable[..., tuple[Path, Any]]) -> Path:
    return random_model("Qwen3ForCausalLM", head_dim=16)[0]


PROMPTS = [[(7 * i + 5 * slot + 1) % 97 for i in range(6 + 5 * slot)] for slot in range(3)]


def oracle(tokens: list[list[int]], kind: str, prompts: list[list[int]], vocab_size: int = 97, most: int = 16) -> Propose:
    """Guesses that know the answer: ``right`` ones, ``wrong`` ones, or ``mixed`` ones of changing number."""
    rng = np.random.default_rng(3)

    def propose(slot: int, known: list[int]) -> list[int]:
        done = len(known) - len(prompts[slot])
        guess = np.array(tokens[slot][done : done + (4 if kind != "mixed" else int(rng.integers(0, most + 1)))], np.int64)
        spoilt = np.ones(len(guess), bool) if kind == "wrong" else rng.random(len(guess)) < 0.2 * (kind == "mixed")
        return np.where(spoilt, (guess + 1 + rng.integers(0, 3, len(guess))) % vocab_size, guess).tolist()

    return propose


@pytest.mark.parametrize("params", KINDS.values(), ids=KINDS.keys())
def test_the_tokens_are_those_without_guesses(params: SamplingParams, folder: Path) -> None:
    def run(propose: Propose | None = None) -> tuple[list[list[int]], int]:
        driver = Speculator(load_backend(folder), 3)
        for slot in range(3):
            driver.place(slot, PROMPTS[slot], params, seed=slot)
        return (driver.generate(24, propose) if propose else driver.generate(24)), driver.steps

    plain, steps = run()
    assert steps == 24
    if params.min_tokens:
        assert all(STOP not in tokens[: params.min_tokens] for tokens in plain)
        assert any(STOP in tokens for tokens in plain)
    for kind, most in (("right", 5), ("mixed", 23), ("wrong", 24)):
        tokens, steps = run(oracle(plain, kind, PROMPTS))
        assert tokens == plain, kind
        assert steps <= most, kind
    assert steps == 24  # all guesses were wrong


def test_reports_are_those_without_guesses(folder: Path) -> None:
    params = SamplingParams(**WARM, logprobs=3, prompt_logprobs=2, frequency_penalty=0.5)

    def run(propose: Propose | None = None) -> Speculator:
        driver = Speculator(load_backend(folder), 3)
        for slot in range(3):
            driver.place(slot, PROMPTS[slot], params, seed=slot)
        driver.step(range(3), [()] * 3, chunk=4)  # the prompts come in two pieces, the second with guesses behind it
        driver.generate(20, propose) if propose else driver.generate(20)
        return driver

    plain = run()
    tokens = [[entry.token_ids[0] for entry in entries] for entries in plain.logprobs]
    assert [len(own) for own in tokens] == [20] * 3
    guessed = run(oracle(tokens, "mixed", PROMPTS))
    assert guessed.steps < plain.steps
    for slot in range(3):
        assert len(plain.prompt_logprobs[slot]) == len(PROMPTS[slot]) - 1
        for name in ("logprobs", "prompt_logprobs"):
            one, other = getattr(plain, name)[slot], getattr(guessed, name)[slot]
            if name == "logprobs":  # the last step may have given more than was asked for
                assert [entry.token_ids[0] for entry in other] == guessed.known(slot)[len(PROMPTS[slot]) :]
                other = other[:20]
            assert [entry.token_ids for entry in one] == [entry.token_ids for entry in other]
            assert [entry.rank for entry in one] == [entry.rank for entry in other]
            for mine, theirs in zip(one, other, strict=True):
                assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(**WARM, top_p=0.95)], ids=["greedy", "sampled"])
def test_smollm2(params: SamplingParams) -> None:
    path = resolve_model("default")
    tokenizer = Tokenizer.from_pretrained(path)
    prompts = [tokenizer.encode(text) for text in ("The capital of France is", "1, 2, 3, 5, 8, 13,", "Once upon a time,")]
    backend = load_backend(path, dtype="float32", max_model_len=128)

    def run(propose: Propose | None = None) -> tuple[list[list[int]], int]:
        driver = Speculator(backend, 3)
        for slot, ids in enumerate(prompts):
            driver.place(slot, ids, params, seed=slot)
        return (driver.generate(40, propose) if propose else driver.generate(40)), driver.steps

    plain, _ = run()
    for kind in ("right", "mixed", "wrong"):
        tokens, steps = run(oracle(plain, kind, prompts, backend.spec.vocab_size))
        assert tokens == plain, kind
        assert steps <= {"right": 8, "mixed": 20, "wrong": 40}[kind]


# --- in distribution ---

VOCABULARY = 9
NUM_SEEDS = 6000
PROMPT = [1, 4, 2]


def within(statistic: float, degrees: int) -> bool:
    """Whether a chi-squared statistic is at most five standard deviations above its mean (a chance below 1e-4 for the degrees
    of freedom here, and seeds are fixed).
    """
    return statistic < degrees + 5 * (2 * degrees) ** 0.5


def chi_squared(counts: np.ndarray, probabilities: np.ndarray) -> tuple[float, int]:
    """The statistic and its degrees of freedom; cells that expect fewer than 5 are one cell."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    return float(((observed - wanted) ** 2 / wanted).sum()), len(wanted) - 1


def next_distribution(backend: Any, prefixes: list[list[int]], temperature: float) -> np.ndarray:
    """float64 ``[len(prefixes), VOCABULARY]``, from the model's own log-probabilities."""
    driver = Speculator(backend, len(prefixes), 16)
    for slot, prefix in enumerate(prefixes):
        driver.place(slot, prefix, SamplingParams(temperature=0, logprobs=VOCABULARY))
    driver.step(range(len(prefixes)), [()] * len(prefixes))
    logits = np.empty((len(prefixes), VOCABULARY))
    for slot, (entry,) in enumerate(driver.logprobs):
        logits[slot, entry.token_ids] = entry.logprobs
    weights = np.exp(logits / temperature)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.fixture(scope="module")
def target(random_model: Callable[..., tuple[Path, Any]]) -> Path:
    return random_model("Qwen3ForCausalLM", head_dim=16, vocab_size=VOCABULARY, num_hidden_layers=1)[0]


@pytest.fixture(scope="module")
def draft(random_model: Callable[..., tuple[Path, Any]]) -> Path:
    """Another model over the same vocabulary, near the target in what it says only by chance."""
    return random_model("Qwen2ForCausalLM", vocab_size=VOCABULARY, num_hidden_layers=1)[0]


def drawn(target: Path, temperature: float, propose: Callable[[Speculator, int], list[list[int]]] | None) -> tuple[Any, Any]:
    """Three tokens for each of many seeds, and the first step's output."""
    driver = Speculator(load_backend(target), NUM_SEEDS, 16)
    for slot in range(NUM_SEEDS):
        driver.place(slot, PROMPT, SamplingParams(temperature=temperature), seed=slot)
    guesses = propose(driver, NUM_SEEDS) if propose else [[]] * NUM_SEEDS
    first = driver.step(range(NUM_SEEDS), guesses)
    return np.array(driver.generate(3)), first.token_ids


def check_joint(tokens: np.ndarray, target: Path, temperature: float) -> None:
    """The first two tokens follow ``p(a) p(b | a)``, by chi-squared over all pairs."""
    first = next_distribution(load_backend(target), [PROMPT], temperature)[0]
    second = next_distribution(load_backend(target), [[*PROMPT, a] for a in range(VOCABULARY)], temperature)
    joint = (first[:, None] * second).reshape(-1)
    counts = np.bincount(tokens[:, 0] * VOCABULARY + tokens[:, 1], minlength=VOCABULARY**2)
    assert within(*chi_squared(counts, joint))
    wrong = chi_squared(counts, np.full(VOCABULARY**2, VOCABULARY**-2.0))
    assert not within(*wrong)  # the test can tell


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_point_mass_guesses_leave_the_distribution(temperature: float, target: Path) -> None:
    """As in Leviathan et al.: accepted with ``p(guess)``, and what replaces it follows ``norm(max(0, p - q))``."""
    p = next_distribution(load_backend(target), [PROMPT], temperature)[0]
    guess = int(np.argsort(p)[-2])
    plain, _ = drawn(target, temperature, None)
    tokens, step = drawn(target, temperature, lambda driver, num: [[guess, 3]] * num)
    np.testing.assert_array_equal(tokens, plain)
    check_joint(tokens, target, temperature)
    accepted = step[:, 1] >= 0
    assert within(*chi_squared(np.bincount(accepted, minlength=2), np.array([1 - p[guess], p[guess]])))
    replaced = np.bincount(step[~accepted, 0], minlength=VOCABULARY)
    residual = np.where(np.arange(VOCABULARY) == guess, 0.0, p)
    assert replaced[guess] == 0
    assert within(*chi_squared(replaced, residual / residual.sum()))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_guesses_drawn_with_the_same_noise_leave_the_distribution(temperature: float, target: Path, draft: Path) -> None:
    """The Gumbel coupling: two draws agree with chance ``sum_i 1 / sum_j max(p_j / p_i, q_j / q_i)``."""
    drafts: list[np.ndarray] = []

    def propose(driver: Speculator, num: int) -> list[list[int]]:
        drafter = Speculator(load_backend(draft), num, 16)
        for slot in range(num):
            drafter.place(slot, PROMPT, SamplingParams(temperature=temperature), seed=slot)
        drafts.append(np.array(drafter.generate(2)))
        return drafts[0].tolist()

    plain, _ = drawn(target, temperature, None)
    tokens, step = drawn(target, temperature, propose)
    np.testing.assert_array_equal(tokens, plain)
    check_joint(tokens, target, temperature)
    p = next_distribution(load_backend(target), [PROMPT], temperature)[0]
    q = next_distribution(load_backend(draft), [PROMPT], temperature)[0]
    agree = sum(1 / np.maximum(p / p[i], q / q[i]).sum() for i in range(VOCABULARY))
    distance = 0.5 * np.abs(p - q).sum()
    assert (1 - distance) / (1 + distance) <= agree <= 1 - distance
    counts = np.bincount(step[:, 1] >= 0, minlength=2)
    assert within(*chi_squared(counts, np.array([1 - agree, agree])))
    assert torch.equal(torch.from_numpy(step[:, 1] >= 0), torch.from_numpy(drafts[0][:, 0] == tokens[:, 0]))
