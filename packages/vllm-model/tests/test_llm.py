"""Text in, text out, with the default model."""

import pytest

from vllm_core import SamplingParams
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


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="speculative"):
        LLM("default", speculative={"method": "ngram"})  # type: ignore[arg-type]
