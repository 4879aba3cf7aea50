"""The CUDA backend with all that it does, on a card or on Triton's interpreter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_core import Engine, EngineConfig, SamplingParams
from vllm_traits import conformance

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")


@pytest.mark.parametrize("law", conformance.LAWS, ids=lambda law: law.__name__)
def test_the_contract(law: Callable[..., None], make_backend: Callable[..., Any]) -> None:
    if law is conformance.guesses_change_nothing and not torch.cuda.is_available():
        pytest.skip("hundreds of steps, which take the interpreter minutes")
    law(make_backend)


@pytest.mark.parametrize(("num_right", "temperature"), [(0, 0.0), (2, 0.9), (8, 0.9)])
def test_steps_with_guesses_are_graphs(num_right: int, temperature: float, make_backend: Callable[..., Any]) -> None:
    """Beside a row without guesses and one that is still at its prompt: the tokens of single steps."""
    params = SamplingParams(temperature=temperature, seed=5, ignore_eos=True)
    prompt = [(7 * i + 3) % 97 for i in range(19)]
    driver = conformance.Driver(make_backend())
    driver.place(0, prompt, [3, 9], params)
    truth = driver.generate(0, 10)
    backend = make_backend()
    conformance._guess(backend, prompt, params, truth, num_right)
    assert {width for _, width, _ in backend.steps.short.graphs} >= {9}


def test_a_draft_on_the_device_guesses_what_the_target_says(make_backend: Callable[..., Any]) -> None:
    """The same model twice: every guess is right, and the tokens are those of the target alone."""

    def run(draft: Any) -> Any:
        config = EngineConfig(
            max_num_seqs=3, max_num_batched_tokens=64, num_blocks=32, max_draft_tokens=3 if draft is not None else 0
        )
        engine = Engine(make_backend(), draft, config=config)
        outputs = [
            engine.add_request(
                str(i), [i + 1] * (5 + i), SamplingParams(temperature=0.9, seed=i, max_tokens=9, ignore_eos=True)
            )
            for i in range(2)
        ]
        while engine.has_unfinished_requests():
            engine.step()
        return [output.outputs[0].token_ids for output in outputs], engine.scheduler

    alone, _ = run(None)
    together, scheduler = run(make_backend())
    assert together == alone
    assert scheduler.num_draft_tokens > 0


@pytest.mark.parametrize("special", [{"temperature": 0.0}, {"top_p": 0.8, "repetition_penalty": 1.5}, {"logprobs": 2}], ids=str)
def test_prompts_are_graphs_however_they_are_sampled(special: dict[str, Any], make_backend: Callable[..., Any]) -> None:
    """Kernel by kernel, the host takes longer for a short prompt than the device; the tokens are the same."""

    def run(graphs: bool) -> list[list[int]]:
        engine = Engine(make_backend(), config=EngineConfig(max_num_seqs=3, max_num_batched_tokens=64, num_blocks=32))
        steps: Any = engine.target_model.steps
        if graphs:
            steps.loose.run = None  # it must not be called
        else:
            steps.chunk.size_for = lambda batch: None
        params = SamplingParams(**{"temperature": 0.9, "seed": 3, "max_tokens": 3, "ignore_eos": True} | special)
        outputs = [engine.add_request(str(length), list(range(length)), params) for length in (1, 3, 70)]
        while engine.has_unfinished_requests():
            engine.step()
        return [output.outputs[0].token_ids for output in outputs]

    tokens, others = run(graphs=True), run(graphs=False)
    assert [len(each) for each in tokens] == [3, 3, 3]
    if not torch.cuda.is_available():  # where products of other sizes round differently
        assert tokens == others


def test_a_long_row_beside_a_prompt_is_not_read_by_a_graphs_few_programs(
    make_backend: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_model.cuda.chunk_steps.LONGEST_SINGLE", 20)
    driver = conformance.Driver(make_backend())
    loose, runs = driver.backend.steps.loose, []  # type: ignore[attr-defined]
    monkeypatch.setattr(loose, "run", lambda *args, run=loose.run: (runs.append(1), run(*args))[1])
    for slot, (length, blocks) in enumerate([(19, [3, 9]), (30, [4, 5]), (60, [6, 7, 8, 10])]):
        driver.place(slot, list(range(length)), blocks)
    driver.run([(0, range(18)), (1, range(29))])
    driver.run([(0, [18]), (2, range(20))])
    assert not runs
    driver.run([(1, [29]), (2, range(20, 40))])
    assert len(runs) == 1
