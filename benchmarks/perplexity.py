"""Perplexity of a fixed text, to compare dtypes and quantizations of one model on the CPU.

python benchmarks/perplexity.py default --dtype bfloat16 --quantization int8
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_core import Engine, EngineConfig, SamplingParams
from vllm_model import Tokenizer, load_backend, resolve_model
from vllm_model.backend import TorchBackend
from vllm_model.loaders import load_config, load_weights
from vllm_model.model_config import ModelConfig
from vllm_model.quantization import as_asked
from vllm_traits import ModelBackend

TEXT = Path(__file__).parents[1] / "packages/vllm-model/tests/data/persuasion_chapter_1.txt"


def perplexity(backend: ModelBackend, tokens: Sequence[int], *, rows: int = 512) -> float:
    """``exp`` of the mean negative log-probability of each token but the first; ``rows`` tokens run in a step."""
    config = EngineConfig(max_num_seqs=1, max_num_batched_tokens=rows, enable_prefix_caching=False)
    engine = Engine(backend, config=config)
    output = engine.add_request("text", tokens, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
    while engine.has_unfinished_requests():
        engine.step()
    engine.close()
    assert output.prompt_logprobs is not None
    return math.exp(-sum(entry.logprobs[0] for entry in output.prompt_logprobs if entry) / (len(tokens) - 1))


def shuffled_backend(path: Path, *, dtype: torch.dtype, quantization: Any, seed: int = 0) -> TorchBackend:
    """The same function with its channels in another order, quantized after that.

    A file of 4 bits dequantized and quantized again would meet its own steps and lose nothing. In another order 32 neighbours
    come from as many groups of the file, and are rounded as any weights would be.
    """
    config = load_config(path)
    plain = load_weights(path, config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    weights = {name: weight for name, weight in plain.items() if isinstance(weight, torch.Tensor)}
    hidden = torch.randperm(config.hidden_size, generator=generator)
    for name in weights:
        part = name.split(".")[-2]
        if part in ("o_proj", "down_proj", "input_layernorm", "post_attention_layernorm", "norm"):
            weights[name] = weights[name][hidden]
        elif weights[name].dim() == 2:
            weights[name] = weights[name][:, hidden]
    for layer in range(config.num_layers):
        _shuffle_inside(weights, f"model.layers.{layer}", config, generator)
    return TorchBackend(config, {name: as_asked(name, weight, quantization, dtype) for name, weight in weights.items()})


def _shuffle_inside(weights: dict[str, torch.Tensor], prefix: str, config: ModelConfig, generator: torch.Generator) -> None:
    """Channels between gate, up and down, and within each head's values."""
    inner = torch.randperm(config.intermediate_size, generator=generator)
    for name in ("gate", "up"):
        weights[f"{prefix}.mlp.{name}_proj.weight"] = weights[f"{prefix}.mlp.{name}_proj.weight"][inner]
    weights[f"{prefix}.mlp.down_proj.weight"] = weights[f"{prefix}.mlp.down_proj.weight"][:, inner]
    dims = torch.randperm(config.head_dim, generator=generator)
    for name, heads, axis in (("v", config.num_kv_heads, 0), ("o", config.num_heads, 1)):
        index = (torch.arange(heads)[:, None] * config.head_dim + dims).flatten()
        key = f"{prefix}.self_attn.{name}_proj.weight"
        weights[key] = weights[key].index_select(axis, index)


def main() -> None:
    """Print one perplexity."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="default")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--quantization", choices=("none", "int8", "int4"))
    parser.add_argument("--shuffle", action="store_true", help="channels in another order: see shuffled_backend")
    parser.add_argument("--rows", type=int, default=512, help="tokens in a step: few take the packed products")
    parser.add_argument("--tokens", type=int, help="only so many tokens of the text")
    args = parser.parse_args()
    path = resolve_model(args.model)
    tokens = Tokenizer.from_pretrained(path).encode(TEXT.read_text())[: args.tokens]
    backend: ModelBackend
    if args.shuffle:
        backend = shuffled_backend(path, dtype=getattr(torch, args.dtype), quantization=args.quantization)
    else:
        backend = load_backend(path, dtype=args.dtype, device="cpu", quantization=args.quantization)
    print(f"{perplexity(backend, tokens, rows=args.rows):.4f} of {len(tokens)} tokens: {vars(args)}")


if __name__ == "__main__":
    main()
