"""What bfloat16 costs, against transformers in float32 with the same weights; on the CPU small, on a card in real shapes.

A difference of two logits is decided where it is larger than their noise: the root mean square error of transformers' own
bfloat16 run at that position, times ``SIGMAS``.
"""

from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from vllm_core import Engine, EngineConfig, RequestOutput, SamplingParams
from vllm_model.model_config import ModelConfig
from vllm_model.noise import gumbel_noise

SIGMAS = 6.0
"""For the difference of two logits in tens of thousands of places: 4.2 standard deviations."""
CPU = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1000,
    "tie_word_embeddings": False,
}
QWEN3 = {"head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936, "rope_theta": 1e6}
QWEN3_06B = QWEN3 | {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "tie_word_embeddings": True,
}
QWEN3_8B = QWEN3 | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
}


class Pair:
    """A random Qwen3 of transformers, its weights numbers of bfloat16, and ours with the same."""

    def __init__(self, device: str, shape: dict[str, Any]) -> None:
        import transformers

        self.device = device
        raw = shape | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "eos_token_id": None, "bos_token_id": None}
        settings = transformers.Qwen3Config(**raw, attn_implementation="eager")
        with torch.device(device):
            self.reference = transformers.Qwen3ForCausalLM(settings).float().eval()
        generator = torch.Generator(device).manual_seed(0)
        for name, parameter in self.reference.named_parameters():
            center, spread = (1.0, 0.1) if "norm" in name else (0.0, 0.02)
            parameter.data.normal_(center, spread, generator=generator)
            parameter.data = parameter.data.bfloat16().float()
        self.config = ModelConfig.from_hf(settings.to_dict() | {"architectures": ["Qwen3ForCausalLM"]})

    def ours(self, **settings: Any) -> Any:
        """A backend in bfloat16."""
        weights = {name: tensor.bfloat16() for name, tensor in self.reference.state_dict().items()}
        if self.config.tie_word_embeddings:
            del weights["lm_head.weight"]
        if self.device == "cpu":
            from vllm_model.backend import TorchBackend

            return TorchBackend(self.config, weights, **settings)
        from vllm_model.cuda_backend import CudaBackend

        return CudaBackend(self.config, weights, **settings)

    def logits(self, tokens: list[int], dtype: torch.dtype, last: int = 0) -> torch.Tensor:
        """Of transformers, float32 ``[last or len(tokens), vocab_size]``; buffers (rotary frequencies) stay as they are."""
        for parameter in self.reference.parameters():
            parameter.data = parameter.data.to(dtype)  # exact, both ways
        with torch.inference_mode():
            return self.reference(torch.tensor([tokens], device=self.device), logits_to_keep=last).logits[0].float()


@pytest.fixture
def make_pair() -> Iterator[Callable[..., Pair]]:
    yield Pair
    torch.cuda.empty_cache()


def recorded(backend: Any, prompt: list[int], num_tokens: int) -> tuple[torch.Tensor, list[int]]:
    """Our logits at every place of a prompt, run in chunks, and of what follows it token by token; and those tokens."""
    engine = Engine(backend, config=EngineConfig(max_num_seqs=4, max_num_batched_tokens=128, max_model_len=512, num_blocks=40))
    source, seen = backend.decoder if backend.device.type == "cpu" else backend.steps._forward, []
    steps = torch.empty(
        num_tokens + 8, backend.config.vocab_size, device=backend.device
    )  # and whatever graphs are captured with
    count = torch.zeros(1, dtype=torch.int64, device=backend.device)
    original = source.logits

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        """Also when it is captured and replayed."""
        out: torch.Tensor = original(hidden)
        if len(hidden) > 4:  # of a prompt
            seen.append(out.float())
        else:
            steps.index_copy_(0, count, out[:1].float())
            count.add_(1)
        return out

    source.logits = logits
    params = SamplingParams(temperature=0, max_tokens=num_tokens, prompt_logprobs=0, logprobs=0, ignore_eos=True)
    output = engine.add_request("a", prompt, params)
    while engine.has_unfinished_requests():
        engine.step()
    engine.close()
    rest = len(prompt) - sum(map(len, seen))  # the last token of the prompt, if it comes alone
    behind = steps[: int(count)][int(count) - num_tokens + 1 :]  # ahead of them is what a graph was captured with
    return torch.cat([*seen, steps[:rest], behind]), output.outputs[0].token_ids


def relative_error(logits: torch.Tensor, exact: torch.Tensor) -> float:
    return float((logits - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("device", "shape"),
    [
        ("cpu", CPU),
        pytest.param("cuda", QWEN3_06B, marks=pytest.mark.gpu),
        pytest.param("cuda", QWEN3_8B, marks=pytest.mark.gpu),
    ],
    ids=["small", "0.6B", "8B"],
)
def test_logits_are_as_close_to_float32_as_those_of_transformers(
    device: str, shape: dict[str, Any], make_pair: Callable[..., Pair], record_property: Callable[[str, object], None]
) -> None:
    pair = make_pair(device, shape)
    prompt = np.random.default_rng(0).integers(0, shape["vocab_size"], 300).tolist()
    ours, tokens = recorded(pair.ours(), prompt, 20)
    whole = prompt + tokens[:-1]
    assert len(ours) == len(whole)
    runs = {"bf16": ours}
    if device == "cuda":  # over the same tokens, whatever it would say itself
        runs["e4m3"] = recorded(pair.ours(kv_cache_dtype=torch.float8_e4m3fn), whole, 1)[0]
    exact, theirs = pair.logits(whole, torch.float32), pair.logits(whole, torch.bfloat16)
    errors = {name: relative_error(run, exact) for name, run in (runs | {"theirs": theirs}).items()}
    errors["decode"] = relative_error(ours[len(prompt) :], exact[len(prompt) :])
    record_property("relative errors", {name: f"{error:.2e}" for name, error in errors.items()})
    assert 0 < errors["bf16"] < 1.02 * errors["theirs"]  # the same operations in another order differ by a hundredth
    if device == "cuda":
        assert errors["bf16"] < errors["e4m3"] < 6 * errors["bf16"]


Load = list[tuple[list[int], SamplingParams]]


def requests(count: int, vocab_size: int, head: int, tail: int, longest: int) -> Load:
    """Prompts, most of them behind one beginning of ``head`` tokens or more, greedy and sampled by turns."""
    rng = np.random.default_rng(1)
    first, second = rng.integers(0, vocab_size, head).tolist(), rng.integers(0, vocab_size, head * 3 // 4).tolist()
    beginnings = [[], first, first, first + second]
    made = []
    for i in range(count):
        prompt = beginnings[i % 4] + rng.integers(0, vocab_size, int(rng.integers(1, tail))).tolist()
        params = SamplingParams(temperature=0.7 * (i % 2), seed=i, max_tokens=int(rng.integers(1, longest)), ignore_eos=True)
        made.append((prompt, params))
    return made


def crowd(engine: Engine, load: Load) -> list[RequestOutput]:
    """All at once; one is aborted every tenth step."""
    rng = np.random.default_rng(2)
    outputs = [engine.add_request(str(i), prompt, params) for i, (prompt, params) in enumerate(load)]
    steps = 0
    while engine.has_unfinished_requests():
        steps += 1
        if steps % 10 == 0:
            engine.abort(str(int(rng.integers(0, len(load)))))
        engine.step()
        if steps % 50 == 0:
            engine.check_integrity()
    return outputs


def alone(engine: Engine, prompt: list[int], params: SamplingParams, num_tokens: int) -> list[int]:
    output = engine.add_request("alone", prompt, msgspec.structs.replace(params, max_tokens=num_tokens))
    while engine.has_unfinished_requests():
        engine.step()
    return output.outputs[0].token_ids


def shortfall(scores: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """By how much each token's score is below the best."""
    return scores.amax(-1) - scores.gather(-1, torch.tensor(tokens, device=scores.device)[:, None])[:, 0]


@pytest.mark.parametrize(
    ("device", "shape", "load", "limits"),
    [
        (
            "cpu",
            CPU,
            (60, 1000, 20, 30, 60),
            {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 128, "num_blocks": 20},
        ),
        pytest.param(
            "cuda",
            QWEN3_06B | {"num_hidden_layers": 8},
            (1000, 151936, 640, 200, 60),
            {"max_num_seqs": 64, "max_num_batched_tokens": 2048, "max_model_len": 2048, "num_blocks": 400},
            marks=pytest.mark.gpu,
        ),
    ],
    ids=["small", "0.6B"],
)
def test_a_request_gives_alone_what_it_gives_in_a_crowd_or_float32_is_undecided(
    device: str,
    shape: dict[str, Any],
    load: tuple[int, int, int, int, int],
    limits: dict[str, int],
    make_pair: Callable[..., Pair],
    record_property: Callable[[str, object], None],
) -> None:
    """Behind shared prefixes, preempted and among aborted ones. Sums run in another order there, so near ties may fall the
    other way; after one the outputs go on apart, and then every token must be the best or as good as it for what is before it.
    """
    pair, rounded, work = make_pair(device, shape), make_pair(device, shape), requests(*load)
    engine = Engine(pair.ours(), config=EngineConfig(**limits))
    outputs = crowd(engine, work)
    assert engine.scheduler.num_preemptions > 0
    assert engine.scheduler.pool.num_free == limits["num_blocks"]
    assert sum(output.num_cached_tokens > 0 for output in outputs) > len(work) // 4
    assert any(output.outputs[0].finish_reason == "abort" for output in outputs)
    record_property("preemptions", engine.scheduler.num_preemptions)
    engine.close()
    engine = Engine(pair.ours(), config=EngineConfig(**limits, enable_prefix_caching=False))
    apart, worst, compared = 0, 0.0, 0
    for (prompt, params), output in zip(work, outputs, strict=True):
        tokens = output.outputs[0].token_ids
        compared += len(tokens)
        expected = alone(engine, prompt, params, len(tokens)) if tokens else []
        assert len(tokens) == params.max_tokens or output.outputs[0].finish_reason == "abort"
        if tokens == expected:
            continue
        apart += 1
        whole = prompt + tokens[:-1]
        exact, noisy = pair.logits(whole, torch.float32, len(tokens)), rounded.logits(whole, torch.bfloat16, len(tokens))
        noise = noisy - exact
        bound = SIGMAS * (noise - noise.mean(-1, keepdim=True)).square().mean(-1).sqrt()
        if params.temperature:
            seed = torch.tensor(params.seed, device=device)
            places = torch.arange(len(prompt), len(prompt) + len(tokens), device=device)[:, None]
            exact = exact / params.temperature + gumbel_noise(seed, places, torch.arange(exact.shape[1], device=device))
            bound = bound / params.temperature
        first = next(i for i, (ours, theirs) in enumerate(zip(tokens, expected, strict=True)) if ours != theirs)
        missing = torch.cat([shortfall(exact, tokens), shortfall(exact[first : first + 1], expected[first : first + 1])])
        ratio = float((missing / torch.cat([bound, bound[first : first + 1]])).max())
        assert ratio <= 1, f"request {output.request_id}, place {first}: {ratio:.1f} times the noise"
        worst = max(worst, ratio)
    record_property("requests, tokens", (len(work), compared))
    record_property("differ, largest difference over the bound", (apart, round(worst, 2)))
    assert apart < len(work) // 2
