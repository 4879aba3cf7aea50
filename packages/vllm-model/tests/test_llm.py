"""Text in, text out, with the default model."""

from typing import Any

import pytest

from vllm_core import RequestOutput, SamplingParams
from vllm_model import LLM
from vllm_traits.errors import ConfigError, InvalidRequestError

GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("default", max_model_len=512)


def test_prompts_of_every_kind_keep_their_order(llm: LLM) -> None:
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode("The sky is")
    alone = llm.generate("The sky is", GREEDY, use_tqdm=False)[0].outputs[0].text
    mixed = llm.generate(["Once upon", ids, {"prompt": "The sky is"}, {"prompt_token_ids": ids}], GREEDY, use_tqdm=False)
    assert [output.outputs[0].text for output in mixed[1:]] == [alone] * 3
    assert mixed[0].prompt_token_ids == llm.tokenizer.encode("Once upon")
    assert llm.generate(ids, GREEDY, use_tqdm=False)[0].outputs[0].text == alone


def test_one_set_of_parameters_each(llm: LLM) -> None:
    lengths = [1, 5, 3]
    params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in lengths]
    outputs = llm.generate(["a", "b", "c"], params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
    with pytest.raises(InvalidRequestError, match="3 prompts but 2"):
        llm.generate(["a", "b", "c"], params[:2])


def test_the_longest_are_begun_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at once, 4, 4 and 12 tokens: 12 steps instead of the 16 that the order of the prompts would take."""
    llm = LLM("default", max_model_len=64, max_num_seqs=2)
    step, steps = llm.engine.step, 0

    def counted() -> list[RequestOutput]:
        nonlocal steps
        steps += 1
        return step()

    monkeypatch.setattr(llm.engine, "step", counted)
    params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in (4, 4, 12)]
    outputs = llm.generate(["a", "b", "c"], params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [4, 4, 12]
    assert steps <= 14
    llm.close()


def test_stop_strings_cut_text_and_tokens(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=40, stop=["seven"])
    output = llm.generate("One, two, three,", params, use_tqdm=False)[0].outputs[0]
    assert output.text == " four, five, six, "
    assert (output.finish_reason, output.stop_reason) == ("stop", "seven")
    assert llm.tokenizer is not None
    assert llm.tokenizer.decode(output.token_ids) == " four, five, six, seven"


def test_choices_and_bar(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = llm.generate("Tell me:", SamplingParams(n=3, seed=1, max_tokens=8))
    assert len({choice.text for choice in outputs[0].outputs}) == 3
    assert "1/1" in capsys.readouterr().err


def test_a_bad_prompt_runs_nothing_and_the_next_is_served(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="maximum context length"):
        llm.generate(["fine", "x " * 600], GREEDY, use_tqdm=False)
    assert not llm.engine.has_unfinished_requests()
    assert llm.generate("fine", GREEDY, use_tqdm=False)[0].finished


def test_without_a_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    llm = LLM("default", max_model_len=128, skip_tokenizer_init=True, num_blocks=64)
    assert "64 blocks of 16 tokens = 1,024 tokens, 8.0 requests of 128 tokens" in capsys.readouterr().err
    output = llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)[0].outputs[0]
    assert output.text == ""
    assert output.token_ids
    for call in (lambda: llm.generate("x", GREEDY), lambda: llm.chat([{"role": "user", "content": "x"}], GREEDY)):
        with pytest.raises(InvalidRequestError, match="tokenizer"):
            call()
    with pytest.raises(InvalidRequestError, match="stop strings"):
        llm.generate([[1]], SamplingParams(stop="x"), use_tqdm=False)
    llm.close()


TEXT = "The quick brown fox jumps over the lazy dog near the river bank on a sunny day."
REPEAT = f"Repeat: {TEXT}\nRepeated: {TEXT}\nRepeat: {TEXT}\nRepeated:"


@pytest.mark.parametrize(
    "speculative",
    [
        {"method": "ngram", "num_speculative_tokens": 6},
        {"method": ["ngram", "suffix"]},
        {"method": "draft_model", "model": "default", "num_speculative_tokens": 3},
    ],
    ids=["ngram", "ngram and suffix", "draft"],
)
def test_speculation_changes_the_speed_only(speculative: dict[str, Any]) -> None:
    """Greedy and sampled, cut at a stop string and at a length, with reports: all as without."""
    params = [
        SamplingParams(temperature=0, max_tokens=40, logprobs=1),
        SamplingParams(temperature=0.7, seed=3, max_tokens=24, top_p=0.9, frequency_penalty=0.1),
        SamplingParams(temperature=0, max_tokens=40, stop=["lazy do"], logprobs=0),
        SamplingParams(temperature=0, max_tokens=3),
    ]
    prompts = [REPEAT, "Once upon a time", REPEAT, REPEAT]
    outputs = []
    for guesses in (None, speculative):
        llm = LLM("default", dtype="float32", max_model_len=256, speculative=guesses, kv_cache_memory_bytes=1 << 28)
        outputs.append(llm.generate(prompts, params, use_tqdm=False))
        engine = llm.engine
    assert engine.metrics.spec_decode_num_drafts > 0
    assert engine.metrics.spec_decode_num_accepted_tokens_per_pos.sum() > 15
    for plain, guessed in zip(*(output for output in outputs), strict=True):
        one, other = plain.outputs[0], guessed.outputs[0]
        assert (one.text, one.token_ids) == (other.text, other.token_ids)
        assert (one.finish_reason, one.stop_reason) == (other.finish_reason, other.stop_reason)
        if one.logprobs is not None:
            assert other.logprobs is not None
            assert [entry.token_ids for entry in one.logprobs] == [entry.token_ids for entry in other.logprobs]
            assert len(one.logprobs) == len(one.token_ids)
            assert one.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=1e-3)
    assert outputs[0][2].outputs[0].text == " The quick brown fox jumps over the "


def test_a_draft_shares_the_memory() -> None:
    memory = 1 << 26
    alone = LLM("default", max_model_len=256, kv_cache_memory_bytes=memory, skip_tokenizer_init=True)
    draft = {"model": "default", "num_speculative_tokens": 2}
    both = LLM("default", max_model_len=256, kv_cache_memory_bytes=memory, skip_tokenizer_init=True, speculative=draft)
    assert both.engine.num_blocks == alone.engine.num_blocks // 2


@pytest.mark.parametrize(
    ("speculative", "message"),
    [
        ({"method": "ngram", "num_speculative_tokens": 99}, "num_speculative_tokens is 99; .* at most 16 guesses"),
        ({"metod": "ngram"}, "metod is not known. Did you mean method"),
        ({"method": "draft_model"}, "model is missing"),
    ],
)
def test_speculation_that_cannot_be_is_refused(speculative: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM("default", max_model_len=256, speculative=speculative)
