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
