"""A configuration that cannot work says so."""

from typing import Any

import pytest

from vllm_core import Engine, EngineConfig
from vllm_traits.errors import ConfigError, KvCacheTooSmallError
from vllm_traits.fake_backend import FakeBackend


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"block_size": 0}, "block_size"),
        ({"max_num_batched_tokens": 8}, "max_num_batched_tokens"),
        ({"max_model_len": 0}, "max_model_len"),
        ({"long_prefill_token_threshold": -1}, "long_prefill_token_threshold"),
        ({"scheduling_policy": "lottery"}, "scheduling_policy"),
    ],
)
def test_a_wrong_value_is_named(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        EngineConfig(**settings)


def test_a_context_beyond_the_models_is_refused() -> None:
    with pytest.raises(ConfigError, match="4096 at most"):
        Engine(FakeBackend(), config=EngineConfig(max_model_len=5000))


def test_too_little_memory_names_the_one_number_to_change() -> None:
    with pytest.raises(KvCacheTooSmallError, match="Set max_model_len to 160 or less"):
        Engine(FakeBackend(num_blocks=10))


@pytest.mark.parametrize(
    ("draft", "changes", "message"),
    [
        (FakeBackend(), {}, "max_draft_tokens is 0; it must be at least 1"),
        (None, {"max_draft_tokens": 2}, "must be 0 without a draft model or proposers"),
        (FakeBackend(), {"max_draft_tokens": 9}, "fake verifies 4 at most"),
        (FakeBackend(vocab_size=255), {"max_draft_tokens": 2}, "255 tokens, fake has 256"),
        (FakeBackend(max_model_len=100), {"max_draft_tokens": 2}, "allows 100 tokens, less than max_model_len 4096"),
        (None, {"proposers": ("magic",)}, "it may hold ngram and suffix"),
        (None, {"prompt_lookup_min": 3, "prompt_lookup_max": 2}, "the first at most the second"),
    ],
)
def test_speculation_that_cannot_work_is_refused(draft: FakeBackend | None, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Engine(FakeBackend(max_draft_tokens=4), draft, config=EngineConfig(**changes))


def test_the_cache_is_sized_from_the_memory() -> None:
    engine = Engine(FakeBackend(num_blocks=1024))
    assert engine.num_blocks == 1024
    assert engine.kv_cache_summary() == "KV cache: 1,024 blocks of 16 tokens = 16,384 tokens, 4.0 requests of 4,096 tokens"
