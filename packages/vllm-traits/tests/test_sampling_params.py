"""A value out of range is refused with the field's name."""

from typing import Any

import pytest

from vllm_traits import SamplingParams
from vllm_traits.errors import InvalidRequestError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 129),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -2),
        ("min_p", 1.5),
        ("seed", 2**63),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("stop_token_ids", [0] * 1025),
        ("logit_bias", {1: 101.0}),
        ("allowed_token_ids", []),
    ],
)
def test_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field
    assert field in caught.value.message


def test_min_tokens_above_max_tokens_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="at most max_tokens"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="0 to 99") as caught:
        SamplingParams(logit_bias={100: 1.0}).check_vocabulary(100)
    assert caught.value.param == "logit_bias"


def test_the_limits_themselves_are_allowed() -> None:
    SamplingParams(n=128, temperature=0.0, top_p=1.0, top_k=-1, min_p=1.0, seed=-(2**63), max_tokens=None, logprobs=20)


def test_stop_is_a_string_or_a_list() -> None:
    assert SamplingParams(stop="a").stop_strings == ["a"]
    assert SamplingParams(stop=["a", "b"]).stop_strings == ["a", "b"]
    assert SamplingParams().stop_strings == []
