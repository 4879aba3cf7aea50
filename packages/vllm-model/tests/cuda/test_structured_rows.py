"""Rows that are held to a grammar, on the device: in steps with all others. On a card or on Triton's interpreter."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_core import Engine, EngineConfig, SamplingParams
from vllm_model.structured import Grammars
from vllm_model.tokenizer import Tokenizer
from vllm_traits import conformance
from vllm_traits.sampling_params import StructuredOutputsParams

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")
REGEX = r"(ab|cd){1,2}-[0-9]{2}"


@pytest.fixture(scope="module")
def grammars(tmp_path_factory: pytest.TempPathFactory, write_tokenizer: Callable[[Path], int]) -> Grammars:
    folder = tmp_path_factory.mktemp("tokenizer")
    end = write_tokenizer(folder)
    return Grammars(lambda: Tokenizer.from_pretrained(folder), 97, (end,))


def held(regex: str, end: int, **params: Any) -> SamplingParams:
    options = {"temperature": 1.0, "max_tokens": 12, "stop_token_ids": [end], "seed": 1} | params
    return SamplingParams(**options, structured_outputs=StructuredOutputsParams(regex=regex))


def text_of(output: Any, end: int) -> str:
    return "".join(chr(32 + token) for token in output.outputs[0].token_ids if token != end)


def test_they_run_beside_others_in_the_same_steps(make_backend: Callable[..., Any], grammars: Grammars) -> None:
    end, free = grammars.eos_token_ids[0], SamplingParams(temperature=1.0, seed=7, max_tokens=8, ignore_eos=True)
    digits = [ord(digit) - 32 for digit in "0123456789"]

    def run(with_held: bool) -> tuple[list[int], list[Any], Any]:
        backend = make_backend(grammars=grammars)
        engine = Engine(backend, config=EngineConfig(max_num_seqs=4, max_num_batched_tokens=64, num_blocks=32))
        backend.steps.loose.run_with_host = None  # it must not be called
        other = engine.add_request("free", [1, 2, 3], free)
        rows = []
        if with_held:
            rows.append(engine.add_request("a", [4, 5], held(REGEX, end)))
            rows.append(engine.add_request("b", [6], held(REGEX, end, temperature=0.0, repetition_penalty=1.3)))
            rows.append(engine.add_request("c", [8], held(r"[a-z0-9]{3}", end, allowed_token_ids=[*digits, end], logprobs=1)))
        while engine.has_unfinished_requests():
            engine.step()
        return other.outputs[0].token_ids, rows, backend

    alone, _, _ = run(with_held=False)
    beside, (a, b, c), backend = run(with_held=True)
    assert beside == alone
    for row in (a, b):
        assert re.fullmatch(REGEX, text_of(row, end)), text_of(row, end)
    assert re.fullmatch(r"[0-9]{3}", text_of(c, end))
    assert any(size > 1 and mode.held for size, mode, _ in backend.steps.decode.graphs)


def test_a_row_for_which_nothing_is_left_costs_the_others_nothing(make_backend: Callable[..., Any], grammars: Grammars) -> None:
    """That turns out in steps of one token when the model has begun to run, on a card while it runs, and more often than there
    are buffers to send steps from.
    """
    end, params = grammars.eos_token_ids[0], SamplingParams(temperature=1.0, seed=7, max_tokens=12, ignore_eos=True)
    seven = ord("7") - 32

    def run(num_bad: int) -> tuple[list[int], list[Any]]:
        config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=64, num_blocks=32)
        engine = Engine(make_backend(grammars=grammars), config=config)
        good = engine.add_request("good", [1, 2, 3], params)
        bad = held("[0-9]{2}", end, allowed_token_ids=[seven])  # behind both nothing is left
        others = [engine.add_request(f"bad {i}", [4, 5], bad) for i in range(num_bad)]
        while engine.has_unfinished_requests():
            engine.step()
        return good.outputs[0].token_ids, others

    alone, _ = run(0)
    beside, others = run(3)
    assert beside == alone
    for other in others:
        assert other.outputs[0].finish_reason == "abort"
        assert other.outputs[0].token_ids == [seven, seven]


@pytest.mark.parametrize("num_right", [0, 3, 8])
def test_guesses_change_nothing(num_right: int, make_backend: Callable[..., Any], grammars: Grammars) -> None:
    """Each guess under what may come there: verified and accepted in a graph."""
    params = held(r"(ab|[c-z]+ ){4,9}", grammars.eos_token_ids[0], temperature=0.9, seed=5)
    prompt = [(7 * i + 3) % 95 for i in range(19)]
    driver = conformance.Driver(make_backend(grammars=grammars))
    driver.place(0, prompt, [3, 9], params)
    truth = driver.generate(0, 10)
    assert re.match(r"(ab|[c-z]+ |[c-z])", "".join(chr(32 + token) for token in truth))
    backend = make_backend(grammars=grammars)
    conformance._guess(backend, prompt, params, truth, num_right)
    assert any(mode.held and width > 1 for _, width, mode in backend.steps.short.graphs)


def test_guesses_that_no_graph_is_for(make_backend: Callable[..., Any], grammars: Grammars) -> None:
    """Kernel by kernel, the same."""
    params = held(r"(ab|[c-z]+ ){4,9}", grammars.eos_token_ids[0], seed=2)
    prompt = [5, 6, 7]
    driver = conformance.Driver(make_backend(grammars=grammars))
    driver.place(0, prompt, [3, 9], params)
    truth = driver.generate(0, 6)
    other = conformance.Driver(make_backend(grammars=grammars))
    steps: Any = other.backend.steps  # type: ignore[attr-defined]
    steps.short.shape_for = lambda batch: None
    other.place(0, prompt, [3, 9], params)
    other.run([other.rest(0)])
    while len(other.output(0)) < len(truth):
        done = len(other.output(0))
        other.run([other.rest(0)], {0: [*truth[done : done + 2], 0]})
    assert other.output(0)[: len(truth)] == truth


def test_what_a_slot_was_held_to_is_gone_with_its_row(make_backend: Callable[..., Any], grammars: Grammars) -> None:
    """And a step with more guesses under a grammar than there is room for runs on the host, the same."""
    params, free = held(r"[a-d]{6,9}", grammars.eos_token_ids[0], seed=2), SamplingParams(temperature=0.9, seed=4)
    prompt = [5, 6, 7]

    def generate(first: SamplingParams | None) -> list[int]:
        driver = conformance.Driver(make_backend(grammars=grammars))
        if first is not None:
            driver.place(0, prompt, [1, 2], first)
            driver.generate(0, 3)
        driver.place(0, prompt, [3, 9], free)
        return driver.generate(0, 4)

    assert generate(params) == generate(None)
    driver, other = (conformance.Driver(make_backend(grammars=grammars)) for _ in range(2))
    for each in (driver, other):
        each.place(0, prompt, [3, 9], params)
    truth = driver.generate(0, 5)
    steps: Any = other.backend.steps  # type: ignore[attr-defined]
    steps._logits_rows._most_guessed = 2
    other.run([other.rest(0)])
    steps.short.run = None  # it must not be called
    while len(other.output(0)) < len(truth):
        done = len(other.output(0))
        other.run([other.rest(0)], {0: [*truth[done : done + 2], 0]})
    assert other.output(0)[: len(truth)] == truth
