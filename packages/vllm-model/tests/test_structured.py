"""Rows that are held to a grammar, on the CPU: by a random model, which would say anything."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_core import Engine, EngineConfig, RequestOutput, SamplingParams
from vllm_model import LLM, load_backend
from vllm_model.structured import Grammars
from vllm_traits import conformance
from vllm_traits.errors import InvalidRequestError
from vllm_traits.sampling_params import StructuredOutputsParams

Held = StructuredOutputsParams
REGEX = r"(ab|cd){1,3}-[0-9]{2,4}"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folder(random_model: Callable[..., tuple[Path, Any]], write_tokenizer: Callable[[Path], int]) -> Path:
    made, _ = random_model("Qwen3ForCausalLM", head_dim=16, num_attention_heads=4, eos_token_id=95)
    write_tokenizer(made)
    return made


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, device="cpu", max_num_seqs=16, max_num_batched_tokens=64)


def say(llm: LLM, held: Held | None, number: int = 12, **params: Any) -> list[RequestOutput]:
    options = {"temperature": 1.0, "max_tokens": 100} | params
    wanted = [SamplingParams(**options, seed=seed, structured_outputs=held) for seed in range(number)]
    return llm.generate([f"Say {seed}" for seed in range(number)], wanted, use_tqdm=False)


def is_person(text: str) -> bool:
    person = json.loads(text)
    return list(person) == ["name", "age"] and len(person["name"]) <= 5 and person["age"] <= 99


TIGHT = {"x-guidance": {"whitespace_flexible": False}}


@pytest.mark.parametrize(
    ("held", "keeps"),
    [
        (Held(regex=REGEX), lambda text: re.fullmatch(REGEX, text)),
        (Held(choice=["yes", "no", "not yet"]), lambda text: text in ("yes", "no", "not yet")),
        (Held(json=SCHEMA | TIGHT), is_person),
        (Held(json=json.dumps(SCHEMA | TIGHT)), is_person),
        (Held(grammar='root ::= "a" b\nb ::= [0-9] | "(" b ")"'), lambda text: re.fullmatch(r"a(\(*)[0-9](\)*)", text)),
    ],
    ids=["regex", "choice", "schema", "schema as text", "grammar"],
)
def test_what_ends_keeps_the_grammar(held: Held, keeps: Callable[[str], Any], llm: LLM) -> None:
    outputs = [output.outputs[0] for output in say(llm, held)]
    ended = [output for output in outputs if output.finish_reason == "stop"]
    assert len(ended) >= 10
    for output in ended:
        assert keeps(output.text), output.text
    assert len({output.text for output in ended}) > 1


def test_any_object(llm: LLM) -> None:
    outputs = [output.outputs[0] for output in say(llm, Held(json_object=True), max_tokens=60)]
    assert all(output.text.startswith("{") for output in outputs)
    assert all(isinstance(json.loads(output.text), dict) for output in outputs if output.finish_reason == "stop")


def test_others_are_as_without_such_rows(llm: LLM) -> None:
    alone = [output.outputs[0].token_ids for output in say(llm, None, 4, max_tokens=20)]
    params = [SamplingParams(temperature=1.0, seed=seed, max_tokens=20) for seed in range(4)]
    held = [SamplingParams(max_tokens=20, structured_outputs=Held(regex=REGEX))] * 4
    prompts = [f"Say {seed}" for seed in range(4)]
    mixed = llm.generate([*prompts, *prompts], [*params, *held], use_tqdm=False)
    assert [output.outputs[0].token_ids for output in mixed[:4]] == alone


def test_it_goes_with_what_else_changes_logits(llm: LLM) -> None:
    digits = [ord(digit) - 32 for digit in "0123456789"]
    bias = dict.fromkeys(digits[:9], -100.0)
    for output in say(
        llm, Held(regex=r"[0-9a-z]{4}"), logit_bias=bias, allowed_token_ids=[*digits, 95], repetition_penalty=1.1
    ):
        assert output.outputs[0].text == "9999"
    reported = say(llm, Held(choice=["yes"]), 1, logprobs=2)[0].outputs[0]
    assert reported.logprobs is not None
    assert len(reported.logprobs) == len(reported.token_ids) == 4


def test_behind_its_end_only_the_end_comes(llm: LLM) -> None:
    output = say(llm, Held(choice=["yes"]), 1, ignore_eos=True, max_tokens=9)[0].outputs[0]
    assert list(output.token_ids)[3:] == [95] * 6


@pytest.mark.parametrize(
    "held",
    [
        Held(),
        Held(regex="a", choice=["b"]),
        Held(regex="((("),
        Held(json="{"),
        Held(json={"type": "foo"}),
        Held(json=3),
        Held(choice=[]),
        Held(choice="abc"),  # type: ignore[arg-type]
        Held(grammar="[[["),
    ],
    ids=str,
)
def test_no_grammar_is_refused_by_name(held: Held, llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match=r"structured_outputs: .") as error:
        say(llm, held, 1)
    assert error.value.param == "structured_outputs"
    assert len(say(llm, Held(choice=["yes"]), 1)[0].outputs[0].token_ids) == 4


def test_a_least_length_is_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="min_tokens must be 0") as error:
        say(llm, Held(regex="a*"), 1, min_tokens=3)
    assert error.value.param == "min_tokens"


def test_an_engine_that_was_not_asked_gives_up_that_request_alone(folder: Path) -> None:
    engine = Engine(load_backend(folder, device="cpu"), config=EngineConfig(max_num_seqs=4, max_num_batched_tokens=64))
    params = SamplingParams(max_tokens=30, seed=1, ignore_eos=True)
    good = engine.add_request("good", [1, 2, 3], params)
    bad = engine.add_request("bad", [1, 2, 3], SamplingParams(structured_outputs=Held(regex="(((")))
    while engine.has_unfinished_requests():
        engine.step()
    assert len(good.outputs[0].token_ids) == 30
    assert bad.outputs[0].finish_reason not in ("stop", "length")


def test_without_a_tokenizer_there_are_none(random_model: Callable[..., tuple[Path, Any]]) -> None:
    bare, _ = random_model("Qwen3ForCausalLM", eos_token_id=95)
    llm = LLM(bare, device="cpu", skip_tokenizer_init=True)
    with pytest.raises(InvalidRequestError, match="not supported by this model's backend"):
        llm.generate([[1, 2]], SamplingParams(structured_outputs=Held(regex="a")), use_tqdm=False)
    assert Grammars.of(bare, 97, (95,)) is None


@pytest.mark.parametrize("num_right", [0, 2, 16])
def test_guesses_change_nothing(num_right: int, folder: Path) -> None:
    """Right ones, wrong ones, and ones that the grammar forbids."""
    params = SamplingParams(temperature=0.9, seed=5, structured_outputs=Held(regex=r"(ab|[c-z]+ ){4,9}"))
    prompt = [(7 * i + 3) % 95 for i in range(19)]
    driver = conformance.Driver(load_backend(folder, device="cpu"))
    driver.place(0, prompt, [3, 9], params)
    truth = driver.generate(0, 10)
    assert re.match(r"(ab|[c-z]+ |[c-z])", "".join(chr(32 + token) for token in truth))
    conformance._guess(load_backend(folder, device="cpu"), prompt, params, truth, num_right)


@pytest.mark.parametrize("method", ["draft", "ngram", "suffix"])
def test_whoever_guesses(method: str, folder: Path, llm: LLM) -> None:
    """A draft model is held to the grammar too, and goes back where its guess was wrong."""
    speculative: dict[str, Any] = {"method": method, "num_speculative_tokens": 3}
    if method == "draft":
        speculative = {"model": str(folder), "num_speculative_tokens": 3}
    other = LLM(folder, device="cpu", max_num_seqs=16, max_num_batched_tokens=64, speculative=speculative)
    held = Held(regex=r"([ab]{2}|[0-9]{3}){4,20}")
    expected, got = ([output.outputs[0].token_ids for output in say(each, held, 6)] for each in (llm, other))
    assert got == expected
    assert other.engine.scheduler.num_draft_tokens > 0


def test_a_row_that_had_to_make_room_goes_on(folder: Path, llm: LLM) -> None:
    """Preempted rows run their output again, in another slot."""
    small = LLM(folder, device="cpu", max_num_seqs=8, max_num_batched_tokens=64, num_blocks=18)
    held = Held(regex=r"([a-f]{3}|[0-9]{2} ){8,20}")
    expected, got = (say(each, held, 8, max_tokens=40) for each in (llm, small))
    assert [output.outputs[0].token_ids for output in got] == [output.outputs[0].token_ids for output in expected]
    assert sum(output.metrics.num_preemptions for output in got) > 0
