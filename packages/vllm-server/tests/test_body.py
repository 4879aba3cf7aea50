"""Only strict JSON comes in."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_server.body import parse_object
from vllm_server.errors import HttpError


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"a": 1, "a": 2}',
        b'{"x": {"a": 1, "a": 2}}',
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 9223372036854775808}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": "\\ud800"}',
        b'{"a": "\xff"}',
        b'{"a": ' + b"[" * 65 + b"]" * 65 + b"}",
        b'{"a":' * 100_000,
        b"\xef\xbb\xbf{}",
    ],
    ids=range(15),
)
def test_anything_else_is_400(data: bytes) -> None:
    with pytest.raises(HttpError) as caught:
        parse_object(data)
    assert caught.value.status == 400


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), json_values, max_size=4), st.booleans())
def test_all_of_json_comes_through(value: dict[str, object], ascii_only: bool) -> None:
    assert parse_object(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@given(st.binary(max_size=40))
def test_rubbish_is_never_more_than_400(data: bytes) -> None:
    try:
        parse_object(data)
    except HttpError as error:
        assert error.status == 400  # noqa: PT017 - most bytes are rubbish, some are not
