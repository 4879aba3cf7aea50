"""The CUDA backend against transformers and against itself alone. Run on a card; elsewhere these tests are skipped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vllm_core import Engine, EngineConfig, SamplingParams
from vllm_model import load_backend
from vllm_traits import conformance

pytestmark = pytest.mark.gpu
SHAPE = {"head_dim": 64, "hidden_size": 384, "intermediate_size": 512, "vocab_size": 1000}


@pytest.fixture(scope="module")
def folder(random_model: Callable[..., tuple[Path, Any]]) -> Path:
    return random_model("Qwen3ForCausalLM", **SHAPE)[0]


def load(folder: Path) -> Any:
    return load_backend(folder, device="cuda", dtype="bfloat16", kv_cache_memory_bytes=1 << 26)


@pytest.mark.parametrize("law", conformance.LAWS, ids=lambda law: law.__name__)
def test_the_contract(law: Callable[..., None], folder: Path) -> None:
    law(lambda: load(folder))


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("Qwen3ForCausalLM", SHAPE), ("LlamaForCausalLM", SHAPE), ("Qwen2ForCausalLM", {"hidden_size": 192})],
)
def test_logits_are_as_close_to_float32_as_those_of_transformers(
    architecture: str, changes: dict[str, Any], random_model: Callable[..., tuple[Path, Any]]
) -> None:
    """By the log-probabilities of a prompt, run in chunks beside another sequence."""
    folder, reference = random_model(architecture, **changes)
    for parameter in reference.parameters():
        parameter.data = parameter.data.bfloat16().float()
    tokens = np.random.default_rng(0).integers(0, 97, 200).tolist()
    backend = load(folder)
    engine = Engine(backend, config=EngineConfig(max_num_seqs=4, max_num_batched_tokens=64))
    engine.add_request("other", tokens[:50], SamplingParams(temperature=0, max_tokens=50))
    output = engine.add_request("a", tokens, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
    while engine.has_unfinished_requests():
        engine.step()
    assert output.prompt_logprobs is not None
    ours = torch.tensor([entry.logprobs[0] for entry in output.prompt_logprobs[1:] if entry])

    def logprobs(dtype: torch.dtype) -> torch.Tensor:
        with torch.inference_mode():
            logits = reference.to("cuda", dtype)(torch.tensor([tokens], device="cuda")).logits[0, :-1].float().cpu()
        return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]

    theirs, exact = logprobs(torch.bfloat16), logprobs(torch.float32)
    ratio = float((ours - exact).norm()) / float((theirs - exact).norm())
    assert ratio < 1.3


@pytest.mark.parametrize("special", [{}, {"top_p": 0.9, "top_k": 50}, {"repetition_penalty": 1.3}, {"logprobs": 2}])
def test_a_request_gives_the_same_tokens_alone_and_among_others(special: dict[str, Any], folder: Path) -> None:
    """The kernels' reductions depend on the row count, so rows run in steps of the same size: with as many others."""

    def run(seed: int) -> list[int]:
        engine = Engine(load(folder), config=EngineConfig(max_num_seqs=8))
        params = SamplingParams(seed=11, temperature=0.8, max_tokens=40, **special)
        outputs = [engine.add_request("mine", list(range(30)), params)]
        for i in range(7):
            other = SamplingParams(seed=seed + i, temperature=1.0, max_tokens=40, ignore_eos=True)
            outputs.append(engine.add_request(str(i), [seed + i] * 30, other))
        while engine.has_unfinished_requests():
            engine.step()
            engine.check_integrity()
        return outputs[0].outputs[0].token_ids

    assert run(1) == run(500)


def test_a_mixed_load_with_preemption_and_aborts_ends_clean(folder: Path) -> None:
    rng = np.random.default_rng(1)
    engine = Engine(
        load(folder), config=EngineConfig(max_num_seqs=32, max_num_batched_tokens=256, num_blocks=80, max_model_len=256)
    )
    head = rng.integers(0, 1000, 64).tolist()
    outputs = []
    for i in range(200):
        prompt = (head if i % 2 else []) + rng.integers(0, 1000, int(rng.integers(1, 100))).tolist()
        params = SamplingParams(temperature=float(i % 3) / 2, seed=i, max_tokens=int(rng.integers(1, 80)), ignore_eos=True)
        outputs.append(engine.add_request(str(i), prompt, params))
    steps = 0
    while engine.has_unfinished_requests():
        if steps % 10 == 0:
            engine.abort(str(int(rng.integers(0, 200))))
        engine.step()
        steps += 1
    engine.check_integrity()
    assert engine.scheduler.num_preemptions > 0
    for output in outputs:
        choice = output.outputs[0]
        assert choice.finish_reason in ("length", "abort")
        assert all(0 <= token < 1000 for token in choice.token_ids)
    assert engine.scheduler.pool.num_free == 80


def test_a_shared_prefix_changes_nothing(random_model: Callable[..., tuple[Path, Any]]) -> None:
    """Rows behind a common prefix read it apart; reductions differ, so a near tie may fall the other way."""
    folder, _ = random_model("Qwen3ForCausalLM", **SHAPE, max_position_embeddings=2048)
    rng = np.random.default_rng(3)
    head = rng.integers(0, 1000, 700).tolist()
    prompts = [head + rng.integers(0, 1000, 5 + i).tolist() for i in range(20)]

    def run(shared: bool) -> list[list[int]]:
        engine = Engine(load(folder), config=EngineConfig(max_num_seqs=32, enable_prefix_caching=shared))
        engine.add_request("first", head, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
        while engine.has_unfinished_requests():
            engine.step()
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        outputs = [engine.add_request(str(i), prompt, params) for i, prompt in enumerate(prompts)]
        while engine.has_unfinished_requests():
            engine.step()
        shared_graphs = [key for key in engine.target_model.steps.decode.graphs if key[2]]  # type: ignore[attr-defined]
        assert bool(shared_graphs) == shared
        return [output.outputs[0].token_ids for output in outputs]

    alone, together = run(False), run(True)
    assert sum(a == b for a, b in zip(alone, together, strict=True)) >= 16


def test_a_full_first_chunk_is_a_graph(random_model: Callable[..., tuple[Path, Any]]) -> None:
    """The same tokens as when the prompt runs in smaller chunks."""
    folder, _ = random_model("Qwen3ForCausalLM", **SHAPE, max_position_embeddings=4096)
    rng = np.random.default_rng(4)
    prompts = [rng.integers(0, 1000, length).tolist() for length in (1024, 1025, 2048, 1500, 3000)]

    def run(budget: int) -> list[list[int]]:
        engine = Engine(load(folder), config=EngineConfig(max_num_seqs=8, max_num_batched_tokens=budget))
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        outputs = []
        for i, prompt in enumerate(prompts):
            outputs.append(engine.add_request(str(i), prompt, params))
            while engine.has_unfinished_requests():
                engine.step()
        return [output.outputs[0].token_ids for output in outputs]

    small, large = run(256), run(1024)
    assert sum(a == b for a, b in zip(small, large, strict=True)) >= 4


def test_whatever_a_start_launches_was_compiled_together(
    random_model: Callable[..., tuple[Path, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From an empty cache: each kernel up to the first token is found there, by a shape that no other test has."""
    from triton import knobs

    seen: list[tuple[str, bool]] = []
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(knobs.compilation, "listener", lambda **kernel: seen.append((kernel["src"].name, kernel["cache_hit"])))
    folder, _ = random_model("Qwen3ForCausalLM", **SHAPE | {"hidden_size": 320, "intermediate_size": 640}, num_hidden_layers=4)
    engine = Engine(load(folder), config=EngineConfig(max_num_seqs=256))
    engine.add_request("a", list(range(50)), SamplingParams(temperature=0.5, seed=1, max_tokens=3, ignore_eos=True))
    while engine.has_unfinished_requests():
        engine.step()
    assert len(seen) > 5
    assert [name for name, hit in seen if not hit] == []
