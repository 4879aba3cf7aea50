"""The HTTP surface, row by row."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_server import build_app
from vllm_server.app import Service
from vllm_traits import Batch
from vllm_traits.errors import BackendError
from vllm_traits.fake_backend import FakeBackend, expected_tokens

Serve = Callable[..., None]
MakeService = Callable[..., Service]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "temperature": 0}
VOCABULARY = 262


def user(content: Any) -> dict[str, Any]:
    return HELLO | {"messages": [{"role": "user", "content": content}]}


def events_of(text: str) -> tuple[list[dict[str, Any]], bool]:
    """The JSON of each event, and whether the stream ended as it should."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    done = bool(lines) and lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[: -1 if done else None]], done


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        (CHAT, HELLO | {"temperature": "hot"}, "temperature", "temperature"),
        (CHAT, HELLO | {"temperature": -1}, "temperature", "[0, 100]"),
        (CHAT, HELLO | {"top_p": 0}, "top_p", "(0, 1]"),
        (CHAT, HELLO | {"n": 0}, "n", "[1, 128]"),
        (CHAT, HELLO | {"max_tokens": 0}, "max_tokens", "[1,"),
        (CHAT, HELLO | {"stop": ["x"] * 17}, "stop", "16"),
        (CHAT, HELLO | {"stop": ""}, "stop", "empty"),
        (CHAT, HELLO | {"top_logprobs": 3}, "top_logprobs", "logprobs"),
        (CHAT, HELLO | {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        (CHAT, HELLO | {"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        (CHAT, HELLO | {"logit_bias": {"9999": 1}}, "logit_bias", "9999"),
        (CHAT, HELLO | {"seed": 1.5}, "seed", "seed"),
        (CHAT, {}, "messages", "missing"),
        (CHAT, HELLO | {"messages": []}, "messages", "at least one"),
        (CHAT, HELLO | {"messages": ["x"]}, "messages[0]", "object"),
        (CHAT, HELLO | {"messages": [{"role": "king", "content": ""}]}, "messages[0].role", "role"),
        (CHAT, HELLO | {"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        (CHAT, user(5), "messages[0].content", "string"),
        (CHAT, user([{"type": "image_url"}]), "messages[0].content", "text"),
        (CHAT, HELLO | {"tools": [{}]}, "tools", "not supported"),
        (CHAT, HELLO | {"tool_choice": "required"}, "tool_choice", "not supported"),
        (CHAT, HELLO | {"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        (CHAT, HELLO | {"guided_json": {"a": 1}}, "guided_json", "not supported"),
        (CHAT, HELLO | {"chat_template": "x"}, "chat_template", "may not"),
        (CHAT, HELLO | {"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs", "enable_thinking"),
        (CHAT, user("x" * 600), "prompt", "This model's maximum context length is 512"),
        (COMPLETIONS, {"prompt": ""}, "prompt", "at least one"),
        (COMPLETIONS, {"prompt": []}, "prompt", "prompt"),
        (COMPLETIONS, {"prompt": ["a", 1]}, "prompt", "prompt"),
        (COMPLETIONS, {"prompt": [999]}, "prompt", "0 to 261"),
        (COMPLETIONS, {"prompt": {"a": 1}}, "prompt", "prompt"),
        (COMPLETIONS, {"prompt": "x", "suffix": "y"}, "suffix", "not supported"),
        (COMPLETIONS, {"prompt": "x", "best_of": 3}, "best_of", "not supported"),
        (COMPLETIONS, {"prompt": "x", "logprobs": 21}, "logprobs", "20"),
        (COMPLETIONS, {"prompt": "x", "bad_words": ["a"]}, "bad_words", "not supported"),
        ("/tokenize", {}, "prompt", "either"),
        ("/detokenize", {"tokens": [262]}, "tokens", "0 to 261"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_request_is_400_and_the_next_is_served(
    path: str, body: dict[str, Any], param: str | None, message: str, stream: bool, serve: Serve
) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        answer = await client.post(path, json=body | {"stream": stream})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["param"], error["type"]) == (param, "invalid_request_error")
        assert error["code"] == ("context_length_exceeded" if "context" in message else 400)
        assert message in error["message"]
        assert (await client.post(CHAT, json=HELLO)).status_code == 200

    serve(test)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", CHAT, HELLO | {"model": "nope"}, 404, "model_not_found"),
        ("GET", "/v1/models/a/b", None, 404, "model_not_found"),
        ("GET", "/nowhere", None, 404, 404),
        ("POST", "/health", {}, 405, 405),
    ],
)
def test_what_is_not_there(method: str, path: str, body: Any, status: int, code: int | str, serve: Serve) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        answer = await client.request(method, path, json=body)
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == code

    serve(test)


@pytest.mark.parametrize(
    ("headers", "content", "status"),
    [
        ({"content-type": "application/json"}, b"{broken", 400),
        ({"content-type": "text/plain"}, b"{}", 415),
        ({"content-type": "application/json", "content-encoding": "gzip"}, b"{}", 415),
        ({"content-type": "application/json"}, b'{"prompt": "' + b"x" * 3000 + b'"}', 413),
    ],
)
def test_bodies(headers: dict[str, str], content: bytes, status: int, serve: Serve) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        answer = await client.post(COMPLETIONS, content=content, headers=headers)
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == status

    serve(test, max_body_bytes=2000)


def test_keys(serve: Serve) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        for key, status in (("", 401), ("Bearer wrong", 401), ("Basic two", 401), ("Bearer one", 200), ("bearer two", 200)):
            for path in ("/v1/models", "/metrics", "/v1//models"):
                answer = await client.get(path, headers={"authorization": key} if key else {})
                assert answer.status_code == status
                assert status == 200 or answer.json()["error"]["code"] == "invalid_api_key"
        assert (await client.get("/health")).status_code == (await client.get("/ping")).status_code == 200

    serve(test, api_key=["one", "two"])


def test_a_chat_answer(serve: Serve) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        body = HELLO | {"logprobs": True, "top_logprobs": 2, "return_token_ids": True}
        answer = (await client.post(CHAT, json=body)).json()
        prompt = (await client.post("/tokenize", json={"messages": HELLO["messages"]})).json()["tokens"]
        choice = answer["choices"][0]
        assert answer["object"] == "chat.completion"
        assert choice["token_ids"] == expected_tokens(prompt, 5, VOCABULARY)
        assert choice["message"]["role"] == "assistant"
        assert choice["finish_reason"] == "length"
        assert [len(entry["top_logprobs"]) for entry in choice["logprobs"]["content"]] == [2] * 5
        assert answer["usage"] == {
            "prompt_tokens": len(prompt),
            "completion_tokens": 5,
            "total_tokens": len(prompt) + 5,
            "prompt_tokens_details": {"cached_tokens": 0},
        }

    serve(test)


def test_a_stream_has_its_parts(serve: Serve) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        body = HELLO | {"stream": True, "stream_options": {"include_usage": True}}
        chunks, done = events_of((await client.post(CHAT, json=body)).text)
        assert done
        *content, last, usage = chunks
        assert content[0]["choices"][0]["delta"]["role"] == "assistant"
        assert all("role" not in chunk["choices"][0]["delta"] for chunk in content[1:])
        assert all(chunk["choices"][0]["delta"]["content"] for chunk in content[1:])
        assert all(chunk["choices"][0]["finish_reason"] is None for chunk in content)
        assert all("logprobs" in chunk["choices"][0] and chunk["usage"] is None for chunk in content)
        assert last["choices"][0]["finish_reason"] == "length"
        assert usage["choices"] == []
        assert usage["usage"]["completion_tokens"] == 5
        assert len({chunk["id"] for chunk in chunks}) == 1
        body["stream_options"] = {"continuous_usage_stats": True}
        chunks, _ = events_of((await client.post(CHAT, json=body)).text)
        assert chunks[-1]["usage"]["completion_tokens"] == 5

    serve(test)


bodies = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 30), "temperature": st.sampled_from([0, 1]), "seed": st.integers(0, 9)},
    optional={
        "stop": st.lists(st.text("abcdefgh<|>", min_size=1, max_size=2), min_size=1, max_size=4),
        "n": st.integers(1, 3),
        "include_stop_str_in_output": st.booleans(),
        "logprobs": st.just(True),
    },
)


@settings(max_examples=40, deadline=None)
@given(bodies, st.text(min_size=1, max_size=10))
def test_stream_and_whole_say_the_same(serve: Serve, options: dict[str, Any], text: str) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        body = user(text) | options | {"return_token_ids": True}
        whole = (await client.post(CHAT, json=body)).json()
        streamed = body | {"stream": True, "stream_options": {"include_usage": True}}
        chunks, done = events_of((await client.post(CHAT, json=streamed)).text)
        assert done
        for choice in whole["choices"]:
            parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
            assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]
            assert parts[-1]["finish_reason"] == choice["finish_reason"]
            assert parts[-1]["stop_reason"] == choice["stop_reason"]
            assert [token for part in parts for token in part.get("token_ids", [])] == choice["token_ids"]
            if choice["logprobs"]:
                entries = [entry for part in parts for entry in (part["logprobs"] or {"content": []})["content"]]
                assert entries == choice["logprobs"]["content"]
        del whole["usage"]["prompt_tokens_details"], chunks[-1]["usage"]["prompt_tokens_details"]  # the second hits the first
        assert chunks[-1]["usage"] == whole["usage"]

    serve(test)


def test_completions_of_every_kind_of_prompt(serve: Serve) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        for prompt, num in (("ab", 1), (["ab", "c"], 2), ([1, 2], 1), ([[1, 2], [3]], 2)):
            body = {"prompt": prompt, "n": 2, "temperature": 0, "return_token_ids": True}
            answer = (await client.post(COMPLETIONS, json=body)).json()
            assert [choice["index"] for choice in answer["choices"]] == list(range(2 * num))
            assert all(len(choice["token_ids"]) == 16 for choice in answer["choices"])  # the default
        assert answer["choices"][2]["token_ids"] == expected_tokens([3], 16, VOCABULARY)
        chunks, done = events_of((await client.post(COMPLETIONS, json=body | {"stream": True})).text)
        assert done
        for index in range(4):
            parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == index]
            assert "".join(part["text"] for part in parts) == answer["choices"][index]["text"]

    serve(test)


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(stream: bool, serve: Serve) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        body = {"prompt": "abc", "echo": True, "logprobs": 2, "max_tokens": 2, "temperature": 0, "stream": stream}
        answer = await client.post(COMPLETIONS, json=body)
        whole = [{"choices": answer.json()["choices"]}] if not stream else events_of(answer.text)[0]
        choices = [choice for chunk in whole for choice in chunk["choices"]]
        assert "".join(choice["text"] for choice in choices).startswith("abc")
        logprobs = {key: [v for choice in choices for v in choice["logprobs"][key]] for key in choices[0]["logprobs"]}
        assert logprobs["tokens"][:3] == ["a", "b", "c"]
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        assert all(isinstance(value, float) for value in logprobs["token_logprobs"][1:])
        assert logprobs["text_offset"][:4] == [0, 1, 2, 3]
        assert {len(values) for values in logprobs.values()} == {5}

    serve(test)


def test_a_prefix_is_cached_and_counted(serve: Serve) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        body = {"prompt": "x" * 100, "max_tokens": 1}
        bodies = [body, body, body | {"cache_salt": "s"}]
        used = [(await client.post(COMPLETIONS, json=each)).json()["usage"] for each in bodies]
        assert [usage["prompt_tokens_details"]["cached_tokens"] for usage in used] == [0, 96, 0]

    serve(test)


def test_truncation(serve: Serve) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        for keep, expected in ((4, 4), (-1, 511)):
            body = {"prompt": "x" * 600, "max_tokens": 1, "truncate_prompt_tokens": keep}
            assert (await client.post(COMPLETIONS, json=body)).json()["usage"]["prompt_tokens"] == expected

    serve(test)


def test_models_versions_and_tokens(serve: Serve) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        card = (await client.get("/v1/models")).json()["data"][0]
        assert (card["id"], card["max_model_len"]) == ("fake", 512)
        assert (await client.get("/v1/models/fake")).json() == card
        assert (await client.get("/v1//models")).json()["data"] == [card]
        assert (await client.get("/version")).json() == {"version": "0"}
        assert (await client.get("/load")).json() == {"server_load": 0}
        tokens = (await client.post("/tokenize", json={"prompt": "héllo<|end|>", "return_token_strs": True})).json()
        assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"]) == 7
        assert (await client.post("/detokenize", json={"tokens": tokens["tokens"]})).json() == {"prompt": "héllo<|end|>"}

    serve(test)


def test_metrics_return_to_zero_and_unknown_fields_are_counted(serve: Serve) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        await client.post(CHAT, json=HELLO | {"surprise": 1})
        text = ""
        while 'finished_reason="length",model_name="fake"} 1.0' not in text:  # the engine may still be counting
            text = (await client.get("/metrics")).text
        for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            assert f'vllm:{gauge}{{engine="0",model_name="fake"}} 0.0' in text
        assert 'vllm:request_unknown_fields_total{field="surprise"} 1.0' in text
        assert 'http_requests_total{path="/v1/chat/completions",status="200"} 1.0' in text

    serve(test)


@pytest.mark.parametrize(("stream", "good_steps"), [(False, 0), (True, 0), (True, 40)])
def test_a_model_that_fails(stream: bool, good_steps: int, serve: Serve, make_service: MakeService) -> None:
    def fail(batch: Batch) -> Exception | None:
        return BackendError("secret of the inside") if batch.step_id > good_steps else None

    async def test(client: httpx.AsyncClient) -> None:
        answer = await client.post(CHAT, json=HELLO | {"stream": stream, "max_tokens": 400})
        assert "secret" not in answer.text
        if good_steps == 0:
            assert answer.status_code == 500
            assert answer.json()["error"]["type"] == "server_error"
        else:
            chunks, done = events_of(answer.text)
            assert not done
            assert chunks[-1]["error"]["type"] == "server_error"

    serve(test, make_service(FakeBackend(vocab_size=VOCABULARY, max_model_len=512, fail_result=fail)))


def test_a_full_queue_is_429(serve: Serve) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        answer = await client.post(COMPLETIONS, json={"prompt": ["x"] * 200, "n": 128, "max_tokens": 1})
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert (await client.post(CHAT, json=HELLO)).status_code == 200

    serve(test)


def test_draining_is_503(serve: Serve, make_service: MakeService) -> None:
    service = make_service()
    service.draining = True

    async def test(client: httpx.AsyncClient) -> None:
        answer = await client.post(CHAT, json=HELLO)
        assert answer.status_code == 503
        assert "retry-after" in answer.headers

    serve(test, service)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_aborts_its_request(stream: bool, make_service: MakeService) -> None:
    service = make_service()
    app = build_app(service)

    async def main() -> None:
        await service.engine.start()
        body = json.dumps(HELLO | {"stream": stream, "max_tokens": None}).encode()
        gone = asyncio.Event()
        incoming = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if incoming:
                return incoming.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            await asyncio.sleep(0)

        names = {"type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "query_string": b""}
        scope = {**names, "headers": [], "http_version": "1.1", "asgi": {"version": "3.0"}}
        task = asyncio.ensure_future(app(scope, receive, send))  # type: ignore[arg-type]
        while not service.engine.engine.scheduler.running:
            await asyncio.sleep(0.0005)
        gone.set()
        await task
        async with asyncio.timeout(5):
            while service.engine.engine.has_unfinished_requests():
                await asyncio.sleep(0.001)
        assert service.engine.engine.scheduler.pool.usage == 0
        assert service.num_active == 0
        await service.engine.shutdown()

    asyncio.run(main())
