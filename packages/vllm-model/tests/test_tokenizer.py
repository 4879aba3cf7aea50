"""Tokenizers from folders and GGUF files."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vllm_model import Tokenizer, resolve_model
from vllm_model import tokenizer as module
from vllm_traits.errors import ModelLoadError, UnsupportedModelError


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return Tokenizer.from_pretrained(resolve_model("default"))


def test_the_default_models_tokens(smollm2: Tokenizer) -> None:
    """The ids that the model was trained with, as its authors publish them."""
    assert smollm2.vocab_size == 49152
    assert smollm2.encode("<|im_start|>user\nHi<|im_end|>") == [1, 4093, 198, 26843, 2]
    assert (smollm2.bos_token, smollm2.eos_token, smollm2.eos_token_id) == ("<|im_start|>", "<|im_end|>", 2)
    assert smollm2.chat_template is not None
    assert smollm2.is_byte_level


def test_digits_stand_alone(smollm2: Tokenizer) -> None:
    assert [smollm2.decode([token]) for token in smollm2.encode("a1234")] == ["a", "1", "2", "3", "4"]


def test_special_tokens_are_text_where_asked(smollm2: Tokenizer) -> None:
    ids = smollm2.encode_ordinary("<|im_start|>x")
    assert not smollm2.all_special_ids.intersection(ids)
    assert smollm2.decode(ids) == "<|im_start|>x"
    assert smollm2.decode([1, *smollm2.encode("x"), 2]) == "x"
    assert smollm2.decode([1, 2], skip_special_tokens=False) == "<|im_start|><|im_end|>"


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_text_survives(text: str) -> None:
    tokenizer, known = _default()
    assume(all(bytes([byte]) in known for byte in text.encode()))  # its vocabulary lacks a few
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode_ordinary(text))) == text.encode()


@cache
def _default() -> tuple[Tokenizer, set[bytes]]:
    """With the byte strings of its tokens."""
    tokenizer = Tokenizer.from_pretrained(resolve_model("default"))
    return tokenizer, {tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)}


def test_a_folder_gives_the_same_as_its_gguf(smollm2: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(smollm2._tokenizer.to_str())
    config = {
        "bos_token": {"content": "<|im_start|>"},
        "eos_token": "<|im_end|>",
        "chat_template": [{"name": "default", "template": "T"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    folder = Tokenizer.from_pretrained(tmp_path)
    assert (folder.bos_token_id, folder.eos_token_id, folder.chat_template) == (1, 2, "T")
    assert folder.encode("Grüße <|im_end|> 42") == smollm2.encode("Grüße <|im_end|> 42")
    (tmp_path / "chat_template.jinja").write_text("J")
    assert Tokenizer.from_pretrained(tmp_path).chat_template == "J"


BYTES = [chr(byte) for byte in range(0x21, 0x7F)] + ["Ġ", "Ċ"]
METADATA: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "qwen2",
    "tokenizer.ggml.tokens": [*BYTES, "ab", "<s>", "<user>"],
    "tokenizer.ggml.token_type": [1] * (len(BYTES) + 1) + [3, 4],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": len(BYTES) + 1,
    "tokenizer.ggml.add_bos_token": True,
}


@pytest.mark.parametrize(
    ("pre", "expected"),
    [("gpt-2", ["12345", "Ġab"]), ("qwen2", ["1", "2", "3", "4", "5", "Ġab"]), ("llama-bpe", ["123", "45", "Ġab"])],
)
def test_gguf_pre_tokenizers(pre: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = [*BYTES, "ab", "<s>", "<user>", "12", "123", "1234", "12345", "45", "Ġab"]
    merges = ["a b", "1 2", "12 3", "123 4", "1234 5", "4 5", "Ġ ab"]
    metadata = METADATA | {"tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges}
    monkeypatch.setattr(module, "read_gguf_metadata", lambda path: metadata)
    tokenizer = Tokenizer.from_pretrained("x.gguf")
    bos, *ids = tokenizer.encode("12345 ab")
    assert bos == tokenizer.bos_token_id == tokenizer.special_tokens["<s>"]
    assert [tokenizer.id_to_token(token) for token in ids] == expected
    user = tokenizer.encode("<user>", add_special_tokens=False)
    assert [tokenizer.id_to_token(token) for token in user] == ["<user>"]
    assert user[0] not in tokenizer.all_special_ids


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokenizer.ggml.model": "llama"}, UnsupportedModelError, "'llama'.*gpt2"),
        ({"tokenizer.ggml.pre": "viking"}, UnsupportedModelError, "'viking'.*qwen2"),
        ({"tokenizer.ggml.tokens": []}, ModelLoadError, "no vocabulary"),
    ],
)
def test_other_gguf_tokenizers_are_refused_by_name(
    change: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "read_gguf_metadata", lambda path: METADATA | change)
    with pytest.raises(error, match=message):
        Tokenizer.from_pretrained("x.gguf")


def test_a_missing_or_broken_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)
