"""Text that comes in pieces is the text that comes at once, and never shows part of a character or of a stop string."""

from functools import cache
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as RustTokenizer

from vllm_core import SamplingParams
from vllm_model import IncrementalDetokenizer, Tokenizer, resolve_model

ids = st.lists(st.integers(0, 49151), max_size=30)
cuts = st.lists(st.integers(0, 30), max_size=6)


@cache
def load() -> Tokenizer:
    return Tokenizer.from_pretrained(resolve_model("default"))


def pieces(
    tokenizer: Tokenizer, tokens: list[int], at: list[int], params: SamplingParams
) -> tuple[list[str], IncrementalDetokenizer]:
    detokenizer = IncrementalDetokenizer(tokenizer, [], params)
    bounds = [0, *sorted(min(cut, len(tokens)) for cut in at), len(tokens)]
    texts = [detokenizer.push(tokens[a:b]) for a, b in pairwise(bounds)]
    return [*texts, detokenizer.push([], finished=True)], detokenizer


@settings(max_examples=200, deadline=None)
@given(ids, cuts, st.booleans())
def test_pieces_join_to_the_whole(tokens: list[int], at: list[int], skip: bool) -> None:
    texts, detokenizer = pieces(load(), tokens, at, SamplingParams(skip_special_tokens=skip))
    assert "".join(texts) == detokenizer.text == load().decode(tokens, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(st.text(), cuts)
def test_no_piece_ends_inside_a_character(text: str, at: list[int]) -> None:
    tokens = load().encode_ordinary(text)
    assume(load().decode(tokens) == text)  # its vocabulary lacks a few bytes
    texts, _ = pieces(load(), tokens, at, SamplingParams())
    assert "\ufffd" not in "".join(texts).replace("\ufffd", "", text.count("\ufffd"))
    assert "".join(texts) == text


@settings(max_examples=300, deadline=None)
@given(
    st.text("abc ", max_size=30), cuts, st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3), st.booleans()
)
def test_stop_strings_cut_wherever_the_pieces_end(text: str, at: list[int], stops: list[str], include: bool) -> None:
    params = SamplingParams(stop=stops, include_stop_str_in_output=include)
    tokens = [token for char in text for token in load().encode_ordinary(char)]
    texts, detokenizer = pieces(load(), tokens, at, params)
    # The stop that is complete first wins; of those that end together, the longest.
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not ends:
        assert "".join(texts) == text
        assert detokenizer.stopped is None
        return
    end, minus_length, stop = min(ends)
    assert detokenizer.stopped == stop
    assert "".join(texts) == text[: end if include else end + minus_length]
    assert detokenizer.num_tokens == end  # one token a character here


def test_minimum_length_holds_stop_strings_back() -> None:
    tokenizer = load()
    tokens = [tokenizer.encode_ordinary(char)[0] for char in "xaxax"]
    texts, detokenizer = pieces(tokenizer, tokens, [1, 2, 3, 4], SamplingParams(stop="a", min_tokens=3))
    assert "".join(texts) == "xax"
    assert detokenizer.stopped == "a"


def test_the_token_that_ended_it_is_no_text() -> None:
    tokenizer = load()
    tokens = tokenizer.encode_ordinary("hi.")
    assert IncrementalDetokenizer(tokenizer, [], SamplingParams()).push(tokens, finished=True, drop_last=True) == "hi"
    kept = SamplingParams(include_stop_str_in_output=True)
    assert IncrementalDetokenizer(tokenizer, [], kept).push(tokens, finished=True, drop_last=True) == "hi."


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """Words with a leading mark and bytes as tokens of their own, like Llama 2's and Mistral's."""
    words = ["<unk>", "<s>", "▁Hello", "▁world", "!", "▁", "é"]
    vocabulary = [(word, -float(i)) for i, word in enumerate(words)] + [(f"<0x{byte:02X}>", -100.0) for byte in range(256)]
    tokenizer = RustTokenizer(models.Unigram(vocabulary, 0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return Tokenizer(tokenizer)


@pytest.mark.parametrize("text", ["Hello world!", "Hello 世界 é", "👍 Hello"])
def test_tokens_that_depend_on_their_neighbours(sentencepiece: Tokenizer, text: str) -> None:
    assert not sentencepiece.is_byte_level
    prompt, tokens = sentencepiece.encode("Hello"), sentencepiece.encode(text)
    detokenizer = IncrementalDetokenizer(sentencepiece, prompt, SamplingParams())
    shown = [detokenizer.push([token]) for token in tokens]
    shown.append(detokenizer.push([], finished=True))
    assert "".join(shown) == " " + text  # a word after the prompt's
    assert not any("\ufffd" in piece for piece in shown)
