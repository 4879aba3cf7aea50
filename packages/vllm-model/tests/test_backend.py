"""The torch backend keeps the contract, and its settings are checked."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_core import Engine, EngineConfig, SamplingParams
from vllm_model import load_backend
from vllm_model.backend import TorchBackend
from vllm_model.loaders import load_config, load_weights
from vllm_model.native_backend import NativeBackend
from vllm_model.quantization import QuantizedTensor
from vllm_traits import BatchState, conformance
from vllm_traits.errors import BackendOutOfMemoryError, ConfigError, KvCacheTooSmallError, UnsupportedModelError


@pytest.fixture(scope="module")
def folder(random_model: Callable[..., tuple[Path, Any]]) -> Path:
    return random_model("Qwen3ForCausalLM", head_dim=16)[0]


@pytest.mark.parametrize("law", conformance.LAWS, ids=lambda law: law.__name__)
def test_the_contract(law: Callable[..., None], folder: Path) -> None:
    law(lambda: load_backend(folder))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes_run(folder: Path, dtype: str) -> None:
    engine = Engine(load_backend(folder, dtype=dtype, kv_cache_memory_bytes=1 << 22))
    output = engine.add_request("a", [1, 2, 3], SamplingParams(temperature=0, max_tokens=5))
    while engine.has_unfinished_requests():
        engine.step()
    assert len(output.outputs[0].token_ids) == 5


@pytest.mark.parametrize(("name", "message"), [("fp8", "needs bfloat16 or float16 on"), ("int4", "must be one of auto, fp8")])
def test_a_kv_cache_that_is_not_there_is_refused(folder: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"kv_cache_dtype is '{name}'.*{message}"):
        load_backend(folder, device="cpu", kv_cache_dtype=name)


def test_a_seeded_request_gives_the_same_tokens_alone_and_among_others(folder: Path) -> None:
    def run(others: int) -> list[int]:
        engine = Engine(load_backend(folder), config=EngineConfig(max_num_batched_tokens=300))
        params = SamplingParams(seed=11, temperature=0.9, top_p=0.95, max_tokens=20)
        outputs = [engine.add_request("mine", list(range(30)), params)]
        for i in range(others):
            outputs.append(engine.add_request(str(i), [i] * (5 + i), SamplingParams(seed=i, max_tokens=25)))
        while engine.has_unfinished_requests():
            engine.step()
        return outputs[0].outputs[0].token_ids

    assert run(31) == run(0)


def test_memory_is_sized_and_too_little_is_refused(folder: Path) -> None:
    backend = load_backend(folder, kv_cache_memory_bytes=1 << 20)
    budget = backend.kv_cache_budget(block_size=16, max_num_seqs=256, max_num_batched_tokens=4096)
    assert budget.bytes_per_block == 3 * 2 * 2 * 16 * 16 * 4
    assert budget.num_blocks == (1 << 20) // budget.bytes_per_block
    with pytest.raises(KvCacheTooSmallError, match="Set max_model_len to 80 or less"):
        Engine(load_backend(folder, kv_cache_memory_bytes=5 * budget.bytes_per_block))
    unbounded = load_backend(folder)
    assert unbounded.kv_cache_budget(block_size=16, max_num_seqs=8, max_num_batched_tokens=64).available_bytes > 0
    with pytest.raises(BackendOutOfMemoryError):
        unbounded.initialize(BatchState(1, 16, 16), num_blocks=1 << 40, max_num_batched_tokens=16)


@pytest.mark.parametrize(("dtype", "quantization"), [("bfloat16", "int8"), ("bfloat16", "int4"), ("float32", "int4")])
@pytest.mark.parametrize("tied", [True, False])
def test_quantized_weights_run_the_contract_of_greedy_tokens(
    random_model: Callable[..., tuple[Path, Any]], dtype: str, quantization: Any, tied: bool
) -> None:
    """Widths of whole groups, biases, tied or not: the same tokens at once and in chunks."""
    changes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "tie_word_embeddings": tied}
    folder, _ = random_model("Qwen2ForCausalLM", **changes)
    outputs = []
    for most in (64, 5):
        engine = Engine(
            load_backend(folder, dtype=dtype, quantization=quantization, kv_cache_memory_bytes=1 << 22),
            config=EngineConfig(max_num_batched_tokens=most, max_num_seqs=2),
        )
        output = engine.add_request("a", list(range(40)), SamplingParams(temperature=0, max_tokens=5))
        while engine.has_unfinished_requests():
            engine.step()
        outputs.append(output.outputs[0].token_ids)
    assert outputs[0] == outputs[1]


def test_quantized_models_say_what_the_dequantized_ones_say(random_model: Callable[..., tuple[Path, Any]]) -> None:
    """Of one matrix of whole groups and others that have none."""
    folder, _ = random_model("LlamaForCausalLM", hidden_size=64, intermediate_size=80, num_attention_heads=4)
    config = load_config(folder)
    weights = load_weights(folder, config, dtype=torch.float32, quantization="int4")
    kinds = {name.split(".")[-2]: type(weight) for name, weight in weights.items()}
    assert kinds["up_proj"] is kinds["lm_head"] is QuantizedTensor
    assert kinds["down_proj"] is kinds["norm"] is torch.Tensor
    plain = {name: w.dequantize(torch.float32) if isinstance(w, QuantizedTensor) else w for name, w in weights.items()}
    prompt, logprobs = list(range(30)), []
    for kind, some in ((NativeBackend, weights), (TorchBackend, plain)):
        engine = Engine(kind(config, some, kv_cache_memory_bytes=1 << 22))
        output = engine.add_request("a", prompt, SamplingParams(temperature=0, max_tokens=8, logprobs=0))
        while engine.has_unfinished_requests():
            engine.step()
        assert output.outputs[0].logprobs is not None
        logprobs.append([entry.logprobs[0] for entry in output.outputs[0].logprobs])
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int3"}, "dtype"),
        ({"device": "tpu"}, "device"),
        ({"device": "cuda:7"}, "device"),
        ({"quantization": "int1"}, "quantization is 'int1'; it must be one of none, int8, int4"),
        ({"load_format": "pickle"}, "load_format"),
        ({"num_threads": 0}, "num_threads is 0; it must be 1 or more"),
        ({"max_model_len": 1000}, "max_model_len"),
        ({"gpu_memory_utilization": 0.0}, "gpu_memory_utilization"),
    ],
)
def test_wrong_settings_are_named(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_backend(folder, **settings)


def test_quantizing_for_a_gpu_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"'int4' needs the compiled kernels.*leave it out"):
        load_backend(folder, device="cuda", quantization="int4")


def test_an_unsupported_architecture_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    with pytest.raises(UnsupportedModelError, match=r"MambaForCausalLM.*LlamaForCausalLM"):
        load_backend(tmp_path)


def test_dummy_weights_need_no_weights(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    backend = load_backend(tmp_path, load_format="dummy")
    assert backend.dtype == torch.float32
