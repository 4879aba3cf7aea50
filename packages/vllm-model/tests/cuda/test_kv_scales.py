"""The e4m3 KV cache, on a card or on Triton's interpreter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_core import Engine, EngineConfig, SamplingParams
from vllm_traits import conformance

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")
E4M3 = torch.float8_e4m3fn


def logprobs(backend: Any, num_cached: int = 0) -> tuple[torch.Tensor, Engine]:
    """Of a prompt in chunks and of what follows it, token by token."""
    engine = Engine(backend, config=EngineConfig(max_num_seqs=4, max_num_batched_tokens=24, num_blocks=12))
    params = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=0, logprobs=0, ignore_eos=True)
    output = engine.add_request("a", [7 * i % 97 for i in range(60)], params)
    while engine.has_unfinished_requests():
        engine.step()
    assert output.prompt_logprobs is not None
    assert output.outputs[0].logprobs is not None
    entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    return torch.tensor([entry.logprobs[0] for entry in entries if entry]), engine


@pytest.mark.gpu
@pytest.mark.parametrize("law", conformance.LAWS, ids=lambda law: law.__name__)
def test_the_contract(law: Callable[..., None], make_backend: Callable[..., Any]) -> None:
    law(lambda: make_backend(kv_cache_dtype=E4M3))


def test_answers_are_nearly_those_of_the_full_cache_in_half_the_memory(make_backend: Callable[..., Any]) -> None:
    full, small = make_backend(), make_backend(kv_cache_dtype=E4M3)
    sizes = [
        backend.kv_cache_budget(block_size=16, max_num_seqs=4, max_num_batched_tokens=24).bytes_per_block
        for backend in (full, small)
    ]
    assert sizes[0] == 2 * sizes[1]
    (expected, _), (got, _) = logprobs(full), logprobs(small)
    assert 0 < float((got - expected).norm() / expected.norm()) < 0.1


def test_scales_leave_room_above_and_below_what_the_cache_holds(make_backend: Callable[..., Any]) -> None:
    backend = make_backend(kv_cache_dtype=E4M3)
    logprobs(backend)
    cache = backend.steps._forward.cache
    assert (cache.scales.log2() % 1 == 0).all()
    for layer in cache.layers:
        largest = layer.float().abs().amax(dim=(0, 3, 4))  # [heads, keys or values]
        assert (largest > 448 / 64).all()
        assert (largest < 448 / 2).all()
