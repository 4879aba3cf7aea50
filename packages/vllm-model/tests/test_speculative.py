"""What is said about speculation is checked key by key."""

from typing import Any

import pytest

from vllm_core import EngineConfig
from vllm_model import SpeculativeConfig
from vllm_traits.backend import ModelSpec
from vllm_traits.errors import ConfigError

TARGET = ModelSpec(name="target", vocab_size=10, max_model_len=64, max_draft_tokens=16)


@pytest.mark.parametrize(
    ("value", "proposers", "lookup"),
    [
        ({"method": "ngram"}, ("ngram",), (2, 4)),
        ({"method": ["suffix", "ngram"]}, ("suffix", "ngram"), (2, 4)),
        ({"method": "ngram", "prompt_lookup_min": 6}, ("ngram",), (6, 6)),
        ({"method": "ngram", "prompt_lookup_max": 1}, ("ngram",), (1, 1)),
        ({"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 9}, ("ngram",), (1, 9)),
        ({"method": ["draft_model", "ngram"], "model": "somewhere"}, ("ngram",), (2, 4)),
        ({"model": "somewhere"}, (), (2, 4)),
        ('{"method": "suffix", "num_speculative_tokens": 8}', ("suffix",), (2, 4)),
        (SpeculativeConfig(method="ngram"), ("ngram",), (2, 4)),
    ],
)
def test_what_the_engine_gets(value: Any, proposers: tuple[str, ...], lookup: tuple[int, int]) -> None:
    parsed = SpeculativeConfig.parse(value)
    config = parsed.applied_to(EngineConfig(max_num_seqs=3), TARGET)
    assert (config.max_num_seqs, config.max_draft_tokens) == (3, 8)
    assert config.proposers == proposers
    assert (config.prompt_lookup_min, config.prompt_lookup_max) == lookup
    if parsed.model is None:
        assert parsed.load_draft() is None
    else:
        assert "draft_model" in parsed.methods


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nonsense", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ({}, "method is missing; it must be ngram, suffix or draft_model"),
        ({"method": []}, "method is missing"),
        ({"method": "eagle"}, "method is 'eagle'; it must be ngram, suffix or draft_model"),
        ({"method": ["ngram", 3]}, "method is 3"),
        ({"method": ["ngram", "ngram"]}, "holds 'ngram' twice"),
        ({"method": "draft_model"}, "model is missing"),
        ({"method": "ngram", "model": "x"}, "model needs the method draft_model"),
        ({"method": "draft_model", "model": 3}, "model: expected `str | null`, got `int`"),
        ({"method": "ngram", "num_speculative_token": 3}, "num_speculative_token is not known. Did you mean num_spec"),
        ({"method": "ngram", "quantization": "x"}, "quantization is not known. Known are method"),
        ({"method": "ngram", "num_speculative_tokens": 0}, "num_speculative_tokens is 0; it must be at least 1"),
        ({"method": "ngram", "num_speculative_tokens": "5"}, "num_speculative_tokens: expected `int`"),
        ({"method": "ngram", "num_speculative_tokens": True}, "num_speculative_tokens: expected `int`"),
        ({"method": "ngram", "prompt_lookup_min": 0}, "prompt_lookup_min is 0"),
        ({"method": "ngram", "prompt_lookup_min": 5, "prompt_lookup_max": 4}, r"prompt_lookup_min \(5\) must be at most"),
        ({"method": "suffix", "prompt_lookup_max": 4}, "prompt_lookup_max needs the method ngram"),
    ],
)
def test_what_cannot_be_is_named(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"speculative_config.*{message}"):
        SpeculativeConfig.parse(value)


@pytest.mark.parametrize(
    ("most", "message"), [(4, "is 8; target verifies at most 4 guesses"), (0, "is 8; target verifies no guesses")]
)
def test_the_target_must_verify_so_many(most: int, message: str) -> None:
    target = ModelSpec(name="target", vocab_size=10, max_model_len=64, max_draft_tokens=most)
    with pytest.raises(ConfigError, match=message):
        SpeculativeConfig(method="ngram").applied_to(EngineConfig(), target)
