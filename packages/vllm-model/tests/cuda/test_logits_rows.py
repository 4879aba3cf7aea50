"""Rows with penalties, bias, bans and log-probabilities stay on the device: the tokens of the host's sampler."""

from collections.abc import Callable
from typing import Any

import pytest

from vllm_core import Engine, EngineConfig, SamplingParams

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")
KINDS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.4},
    {"presence_penalty": 1.5, "frequency_penalty": 0.7, "temperature": 0.0},
    {"logit_bias": {3: 50.0, 5: 50.5, 7: -100.0}, "repetition_penalty": 3.0},
    {"allowed_token_ids": list(range(10, 30)), "top_k": 5},
    {"min_tokens": 6, "stop_token_ids": [*range(40)], "logit_bias": {2: 9.0}},
    {"logprobs": 3},
    {"logprobs": 0, "top_p": 0.7, "frequency_penalty": 1.0},
    {},
]


def run(backend: Any, kinds: list[dict[str, Any]], **settings: Any) -> list[Any]:
    engine = Engine(backend, config=EngineConfig(max_num_seqs=8, max_num_batched_tokens=32, **settings))
    outputs = []
    for i, kind in enumerate(kinds):
        params = SamplingParams(**{"temperature": 0.9, "seed": i, "max_tokens": 10, "ignore_eos": True} | kind)
        outputs.append(engine.add_request(str(i), [(5 * j + i) % 97 for j in range(12 + i)], params))
    while engine.has_unfinished_requests():
        engine.step()
    return [output.outputs[0] for output in outputs]


@pytest.fixture
def on_the_host(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """From now on every step of a special row runs there."""
    from vllm_model.cuda.logits_rows import LogitsRows

    return lambda: monkeypatch.setattr(LogitsRows, "need_host", lambda self, batch: bool(self._special[batch.slots].any()))


def spied(backend: Any) -> list[Any]:
    """Steps that it is going to run on the host."""
    host_steps: list[Any] = []
    initialize = backend.initialize

    def spy(*args: Any, **settings: Any) -> None:
        initialize(*args, **settings)
        real = backend.steps.loose.run_with_host
        backend.steps.loose.run_with_host = lambda batch: host_steps.append(batch) or real(batch)

    backend.initialize = spy
    return host_steps


def test_tokens_and_logprobs_are_those_of_the_host(make_backend: Callable[..., Any], on_the_host: Callable[[], Any]) -> None:
    backend = make_backend()
    host_steps = spied(backend)
    ours = run(backend, KINDS)
    assert not host_steps
    on_the_host()
    theirs = run(make_backend(), KINDS)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.token_ids == other.token_ids
        assert (mine.logprobs is None) == (other.logprobs is None)
        for a, b in zip(mine.logprobs or [], other.logprobs or [], strict=True):
            assert (a.token_ids, a.rank) == (b.token_ids, b.rank)
            assert a.logprobs == pytest.approx(b.logprobs, abs=2e-3)
    assert len({tuple(each.token_ids) for each in ours}) == len(ours)


def test_guesses_beside_them_change_nothing(make_backend: Callable[..., Any]) -> None:
    kinds = [KINDS[0], KINDS[3], KINDS[5] | {"temperature": 0.0}, {"temperature": 0.0}, KINDS[4]]
    alone = run(make_backend(), kinds)
    backend = make_backend()
    host_steps = spied(backend)
    guessed = run(backend, kinds, max_draft_tokens=3, proposers=("ngram",), prompt_lookup_min=1)
    assert not host_steps
    assert {width for _, width, mode in backend.steps.short.graphs if mode.reports} - {1}
    assert [each.token_ids for each in guessed] == [each.token_ids for each in alone]
    for mine, other in zip(guessed, alone, strict=True):
        assert (mine.logprobs is None) == (other.logprobs is None)
        for a, b in zip(mine.logprobs or [], other.logprobs or [], strict=True):
            assert a.token_ids == b.token_ids
            assert a.rank == b.rank
            assert a.logprobs == pytest.approx(b.logprobs, abs=2e-3)


def test_preempted_rows_count_what_they_had_said(make_backend: Callable[..., Any]) -> None:
    """With too few blocks for all, and each alone."""
    kinds = [{"frequency_penalty": 1.5, "repetition_penalty": 1.2, "max_tokens": 24} for _ in range(3)]
    crowd = run(make_backend(), kinds, num_blocks=6)
    for i, each in enumerate(crowd):
        alone = run(make_backend(), [*({"max_tokens": 1} for _ in range(i)), kinds[i]])
        assert alone[-1].token_ids == each.token_ids
