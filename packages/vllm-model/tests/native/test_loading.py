"""Which kernels are used, what happens where there are none, and where memory runs out."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_core import Engine, SamplingParams
from vllm_model import load_backend
from vllm_model.backend import TorchBackend
from vllm_model.native import _warn_of_other_sources, build, load_kernels, load_variant
from vllm_model.native.build import VARIANTS, fingerprint, library_path, machine
from vllm_traits.errors import ConfigError

TOKENS = """
import json, sys
from vllm_core import Engine, SamplingParams
from vllm_model import load_backend
backend = load_backend(sys.argv[1], dtype="float32", kv_cache_memory_bytes=1 << 22)
engine = Engine(backend)
params = SamplingParams(temperature=0.8, seed=3, max_tokens=24, ignore_eos=True)
outputs = [engine.add_request(str(i), [(7 * j + i) % 97 for j in range(5 + 20 * i)], params) for i in range(3)]
while engine.has_unfinished_requests():
    engine.step()
print(json.dumps([type(backend).__name__, [output.outputs[0].token_ids for output in outputs]]))
"""
OUT_OF_MEMORY = """
import resource, sys
import numpy as np
from vllm_model import load_backend
from vllm_model.native_backend import NativeBackend
from vllm_traits import BatchState
from vllm_traits.conformance import batch_of
from vllm_traits.errors import BackendOutOfMemoryError
backend = load_backend(sys.argv[1], dtype="float32", num_threads=2)
assert isinstance(backend, NativeBackend)
state = BatchState(1, 8192, 16)
state.block_tables[0] = np.arange(512)
backend.initialize(state, num_blocks=512, max_num_batched_tokens=8192)
def step(tokens):
    state.num_tokens[0] = tokens
    return backend.submit(batch_of(state, [(0, 0)])).result().token_ids.tolist()
before = step(50)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (24 << 20),) * 2)
for _ in range(3):
    try:
        step(8000)
    except BackendOutOfMemoryError as error:
        assert "8000 tokens" in str(error)
    else:
        sys.exit("8000 tokens ran in 24 MB")
    assert step(50) == before
"""


@pytest.fixture(scope="module")
def folder(random_model: Callable[..., tuple[Path, Any]]) -> Path:
    return random_model("Qwen3ForCausalLM", head_dim=16)[0]


@pytest.fixture
def anew() -> Iterator[None]:
    """Libraries are looked for again, before and after."""
    functions = (load_kernels, load_variant, _warn_of_other_sources)
    for function in functions:
        function.cache_clear()
    yield
    for function in functions:
        function.cache_clear()


def run(program: str, *arguments: str, **environment: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", program, *arguments]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def needs_kernels() -> None:
    if load_kernels() is None:
        pytest.skip("there are no compiled kernels")


def test_the_same_tokens_on_every_set_of_instructions(folder: Path) -> None:
    needs_kernels()
    kind, tokens = json.loads(run(TOKENS, str(folder)))
    assert kind == "NativeBackend"
    assert json.loads(run(TOKENS, str(folder), VLLM_CPU_ISA="none")) == ["TorchBackend", tokens]
    if load_variant("avx2") is not None:
        assert json.loads(run(TOKENS, str(folder), VLLM_CPU_ISA="avx2")) == ["NativeBackend", tokens]


@pytest.mark.usefixtures("anew")
def test_an_unknown_set_of_instructions_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_ISA", "avx-2")
    with pytest.raises(ConfigError, match=r"VLLM_CPU_ISA is 'avx-2'; .* one of .*none"):
        load_backend(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited and read the Linux way")
def test_out_of_memory_ends_a_step_and_not_the_next(random_model: Callable[..., tuple[Path, Any]]) -> None:
    needs_kernels()
    changes = {"num_hidden_layers": 1, "intermediate_size": 2048, "max_position_embeddings": 8192}
    run(OUT_OF_MEMORY, str(random_model("LlamaForCausalLM", head_dim=16, **changes)[0]))


@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize("damage", ["other sources", "no library"])
def test_libraries_of_other_sources_are_refused_with_one_warning(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    needs_kernels()
    for name in VARIANTS[machine()]:
        library = library_path(name).read_bytes()
        old = library.replace(fingerprint().encode(), b"0123456789abcdef") if damage == "other sources" else b"no library"
        assert old != library
        library_path(name, tmp_path).write_bytes(old)
    monkeypatch.setattr("vllm_model.native.library_path", lambda name: library_path(name, tmp_path))
    load_kernels.cache_clear()
    load_variant.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert load_kernels() is None
    (record,) = caplog.records
    assert "build.py` builds them anew" in record.getMessage()


@pytest.mark.usefixtures("anew")
def test_without_a_library_it_runs_on_torch_and_packs_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_model.native.library_path", lambda name: library_path(name, tmp_path))
    backend = load_backend(folder, kv_cache_memory_bytes=1 << 22)
    assert type(backend) is TorchBackend
    engine = Engine(backend)
    output = engine.add_request("a", [1, 2, 3], SamplingParams(temperature=0.5, max_tokens=5, ignore_eos=True))
    while engine.has_unfinished_requests():
        engine.step()
    assert len(output.outputs[0].token_ids) == 5
    with pytest.raises(ConfigError, match=r"'int4' needs the compiled kernels.*there are none.*install a C compiler and run"):
        load_backend(folder, quantization="int4")


def test_a_shape_that_the_kernels_do_not_know_says_so(random_model: Callable[..., tuple[Path, Any]]) -> None:
    needs_kernels()
    folder, _ = random_model("LlamaForCausalLM", head_dim=8)
    assert type(load_backend(folder)) is TorchBackend
    with pytest.raises(ConfigError, match=r"'int8' needs the compiled kernels.*in auto on cpu cannot use: leave it out"):
        load_backend(folder, quantization="int8")
    with pytest.raises(ConfigError, match="in float16 on cpu cannot use"):
        load_backend(folder, quantization="int8", dtype="float16")


@pytest.mark.parametrize(("compiler", "said"), [("no-such-compiler", ""), ("false", "was not built")])
def test_no_compiler_and_one_that_fails(
    compiler: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CC", compiler)
    assert build.build(tmp_path) == []
    assert list(tmp_path.iterdir()) == []
    assert said in capsys.readouterr().err


def test_the_weights_bytes_are_counted(random_model: Callable[..., tuple[Path, Any]]) -> None:
    """What 4 bits save against bfloat16 of a model whose every matrix is whole groups; embedding and head have 8."""
    needs_kernels()
    changes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "vocab_size": 128}
    folder, _ = random_model("LlamaForCausalLM", head_dim=32, **changes)
    layer = 128 * (128 + 2 * 64 + 128 + 3 * 256)
    for quantization, bits in (("none", (32, 32)), ("int8", (8.5, 8.5)), ("int4", (5, 8.5))):
        backend: Any = load_backend(folder, dtype="float32", quantization=quantization)  # type: ignore[arg-type]
        expected = 3 * layer * bits[0] / 8 + 2 * 128 * 128 * bits[1] / 8
        assert backend._native.nbytes == expected + 64 * (3 * 5 + 2)  # five products a layer, each aligned
