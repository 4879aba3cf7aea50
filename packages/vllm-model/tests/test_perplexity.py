"""What quantized weights cost on the default model, by the perplexity of a fixed text."""

import importlib.util
from pathlib import Path

import pytest
import torch

from vllm_model import Tokenizer, load_backend, resolve_model

_spec = importlib.util.spec_from_file_location("perplexity", Path(__file__).parents[3] / "benchmarks" / "perplexity.py")
assert _spec is not None
assert _spec.loader is not None
bench = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bench)


@pytest.fixture(scope="module")
def model() -> Path:
    return resolve_model("default")


@pytest.fixture(scope="module")
def tokens(model: Path) -> list[int]:
    return Tokenizer.from_pretrained(model).encode(bench.TEXT.read_text())[:300]


@pytest.fixture(scope="module")
def reference(model: Path, tokens: list[int]) -> float:
    value = bench.perplexity(load_backend(model, dtype="float32", device="cpu", quantization="none", num_threads=1), tokens)
    assert 10 < value < 60
    return float(value)


@pytest.mark.parametrize("rows", [300, 16])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("bfloat16", 0.02)])
def test_packed_weights_of_the_file_cost_nothing(
    model: Path, tokens: list[int], reference: float, dtype: str, bound: float, rows: int
) -> None:
    value = bench.perplexity(load_backend(model, dtype=dtype, device="cpu", num_threads=1), tokens, rows=rows)
    assert value == pytest.approx(reference, rel=bound)


@pytest.mark.parametrize(("quantization", "bound"), [("none", 1e-4), ("int8", 0.01), ("int4", 0.3)])
def test_weights_quantized_at_load(model: Path, tokens: list[int], reference: float, quantization: str, bound: float) -> None:
    """4 bits are much for so small a model, whose weights were rounded to 4 bits once before."""
    backend = bench.shuffled_backend(model, dtype=torch.float32, quantization=quantization)
    assert bench.perplexity(backend, tokens) <= reference * (1 + bound)
