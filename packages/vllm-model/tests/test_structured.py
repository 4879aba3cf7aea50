"""Rows that are held to a grammar, on the CPU: by a random model, which would say anything."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_core import Engine, EngineConfig, RequestOutput, SamplingParams
from vllm_model import LLM, load_backend, structured
from vllm_model.structured import Grammars, StepMasks
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


def test_any_of_the_models_ends_may_come(
    random_model: Callable[..., tuple[Path, Any]], write_tokenizer: Callable[[Path], int]
) -> None:
    """95 is the tokenizer's, 96 another: either where the text may end, none before."""
    made, _ = random_model("Qwen3ForCausalLM", eos_token_id=[95, 96])
    write_tokenizer(made)
    llm = LLM(made, device="cpu", max_num_seqs=16)
    bias = dict.fromkeys([95, 96], 100.0)
    outputs = say(llm, Held(regex="[ab]{2}[ab]*"), 12, logit_bias=bias, ignore_eos=True, max_tokens=6)
    assert all(re.fullmatch("[ab]{2}", output.outputs[0].text) for output in outputs)
    ends = {token for output in outputs for token in output.outputs[0].token_ids[2:]}
    assert ends == {95, 96}


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


@pytest.mark.parametrize(
    "held",
    [
        Held(json={"type": "array", "minItems": 10**9}),
        Held(grammar="root ::= a0\n" + "".join(f"a{i} ::= a{i + 1}\n" for i in range(9000)) + 'a9000 ::= "x"'),
        Held(json={"$ref": "#"}),
        Held(json="[" * 5000),
        Held(json=object()),
        Held(regex="\ud800"),
        Held(regex="[a&&b]"),
    ],
    ids=["count", "long", "itself", "deep", "object", "surrogate", "nothing"],
)
def test_what_would_take_too_much_is_refused(held: Held, llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match=r"structured_outputs: ."):
        say(llm, held, 1)


def test_a_chain_of_rules_does_not_exhaust_the_stack(llm: LLM) -> None:
    rules = "".join(f"a{i}: a{i + 1}\n" for i in range(5000))
    assert say(llm, Held(grammar=f'start: a0\n{rules}a5000: "x"'), 1)[0].outputs[0].text == "x"


def test_what_takes_too_much_later_is_given_up_alone(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=40, seed=1, ignore_eos=True)] * 2
    params.append(SamplingParams(max_tokens=40, structured_outputs=Held(regex="a{1000000000}")))
    outputs = [output.outputs[0] for output in llm.generate(["a", "b", "c"], params, use_tqdm=False)]
    assert [output.finish_reason for output in outputs[:2]] == ["length"] * 2
    assert outputs[2].finish_reason not in ("stop", "length")


def test_where_nothing_may_come_the_request_is_given_up(llm: LLM) -> None:
    output = say(llm, Held(regex="[0-9]{2}"), 1, allowed_token_ids=[ord("7") - 32])[0].outputs[0]
    assert output.text == "77"
    assert output.finish_reason not in ("stop", "length")


def test_part_of_a_steps_masks() -> None:
    bits = np.arange(12, dtype=np.int32).reshape(4, 3)
    masks = StepMasks(np.array([1, 4, 5, 9]), bits)
    part = masks.part(slice(4, 8))
    assert part.entries.tolist() == [0, 1]
    assert part.bits.tolist() == bits[1:3].tolist()


def test_rows_beside_each_other_wait_for_no_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of one compiled grammar share a lock: there are as many as threads, unless compiling takes long."""
    grammars = Grammars.of(folder, 97, (95,))
    assert grammars is not None
    monkeypatch.setattr(grammars, "_threads", 3)
    monkeypatch.setattr(structured, "QUICK_SECONDS", math.inf)
    used, held = Counter[structured.Original](), Held(regex=REGEX)
    for _ in range(11):
        used[grammars.original(held, used)] += 1
    assert sorted(used.values()) == [3, 4, 4]
    assert grammars.original(held, Counter(list(used)[:2])) is list(used)[2]
    monkeypatch.setattr(structured, "QUICK_SECONDS", 0.0)
    slow = Held(regex="[ab]*")
    assert grammars.original(slow, {grammars.original(slow): 5}) is grammars.original(slow)


def test_rows_that_have_left_are_beside_nobody(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = list[str]()
    compile_ = Grammars._compile
    monkeypatch.setattr(
        Grammars, "_compile", lambda self, words, source: compiled.append(source) or compile_(self, words, source)
    )
    monkeypatch.setattr(structured, "usable_cores", lambda: 8)
    driver = conformance.Driver(load_backend(folder, device="cpu"), max_num_seqs=8)
    for slot in range(8):
        driver.place(slot, [1, 2, 3], [4 + slot], SamplingParams(seed=slot, structured_outputs=Held(regex="[a-z]*")))
        driver.generate(slot, 2)
        driver.state.params[slot] = None
    assert len(compiled) == 1


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
@pytest.mark.parametrize("regex", [r"(ab|[c-z]+ ){4,9}", "(ab|c){2}"], ids=["long", "ends"])
def test_guesses_change_nothing(regex: str, num_right: int, folder: Path) -> None:
    """Right ones, wrong ones, ones that the grammar forbids, and ends."""
    params = SamplingParams(temperature=0.9, seed=5, structured_outputs=Held(regex=regex), ignore_eos=True)
    prompt = [(7 * i + 3) % 95 for i in range(19)]
    driver = conformance.Driver(load_backend(folder, device="cpu"))
    driver.place(0, prompt, [3, 9], params)
    truth = driver.generate(0, 10)
    text = "".join(chr(32 + token) for token in truth if token != 95)
    assert re.match(r"(ab|[c-z]+ |[c-z])", text)
    assert (95 in truth) == (regex == "(ab|c){2}")
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
    scheduler = other.engine.scheduler
    assert scheduler.num_draft_tokens > 0
    if method == "draft":  # the same model: wrong only where it is not held
        assert sum(scheduler.num_accepted_per_pos) >= 0.9 * scheduler.num_draft_tokens


def test_a_row_that_had_to_make_room_goes_on(folder: Path, llm: LLM) -> None:
    """Preempted rows run their output again, in another slot."""
    small = LLM(folder, device="cpu", max_num_seqs=8, max_num_batched_tokens=64, num_blocks=18)
    held = Held(regex=r"([a-f]{3}|[0-9]{2} ){8,20}")
    expected, got = (say(each, held, 8, max_tokens=40) for each in (llm, small))
    assert [output.outputs[0].token_ids for output in got] == [output.outputs[0].token_ids for output in expected]
    assert sum(output.metrics.num_preemptions for output in got) > 0
