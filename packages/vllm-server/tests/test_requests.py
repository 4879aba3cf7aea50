"""Corners of requests: what names a field, what is too much, what is scored and not said."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from vllm_server.config import parse_config
from vllm_traits.fake_backend import expected_tokens

Serve = Callable[..., None]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {}, "prompt"),
        (CHAT, {"messages": HELLO, "max_completion_tokens": 0}, "max_completion_tokens"),
        (CHAT, {"messages": HELLO, "max_completion_tokens": 2**40}, "max_completion_tokens"),
        (CHAT, {"messages": HELLO, "stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ],
)
def test_the_field_is_named_as_the_client_spelt_it(path: str, body: dict[str, Any], param: str, serve: Serve) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        response = await client.post(path, json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
        assert param in response.json()["error"]["message"]

    serve(test)


@pytest.mark.parametrize("value", ["1e999", "-1e999", "[1, " + "[" * 80 + "]" * 80 + "]"])
def test_bounds_hold_in_unknown_fields_and_behind_other_items(value: str, serve: Serve) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        body = f'{{"prompt": "a", "max_tokens": 1, "x": {value}}}'
        response = await client.post(COMPLETIONS, content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 400

    serve(test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_scored_without_a_new_token(stream: bool, serve: Serve) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        body = {"prompt": "abc", "echo": True, "logprobs": 1, "max_tokens": 0, "stream": stream}
        response = await client.post(COMPLETIONS, json=body)
        if stream:
            assert response.text.count("data: ") == 2
            assert '"text":"abc"' in response.text
            return
        (choice,) = response.json()["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
        assert {len(values) for values in choice["logprobs"].values()} == {3}
        assert response.json()["usage"]["completion_tokens"] == 0

    serve(test)


def test_token_ids_of_prompt_and_answer(serve: Serve) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        body = {"prompt": [[5, 6], [7]], "temperature": 0, "max_tokens": 8, "return_token_ids": True}
        first, second = (await client.post(COMPLETIONS, json=body)).json()["choices"]
        assert (first["prompt_token_ids"], second["prompt_token_ids"]) == ([5, 6], [7])
        assert first["token_ids"] == expected_tokens([5, 6], 8, 262)
        chat = (await client.post(CHAT, json={"messages": HELLO, "max_tokens": 2, "return_token_ids": True})).json()
        assert len(chat["prompt_token_ids"]) == chat["usage"]["prompt_tokens"]

    serve(test)


def test_an_unknown_flag_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(["--max-model-length", "3"], {}, "1")
    assert "did you mean --max-model-len?" in capsys.readouterr().err
