"""The main job: the default model behind HTTP, asked by the openai client."""

import asyncio
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

KEY = "secret"
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # In float32: in bfloat16 this question's first token is a tie on some processors, and a cached prefix decides it otherwise.
    command = [sys.executable, "-m", "vllm_server.cli", "--port", str(port), "--api-key", KEY, "--dtype", "float32"]
    process = subprocess.Popen(command)
    base = f"http://127.0.0.1:{port}"
    try:
        for _ in range(2400):
            assert process.poll() is None, "the server ended"
            try:
                urllib.request.urlopen(f"{base}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.05)
        yield base
    finally:
        process.terminate()
        assert process.wait(60) == 0


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def test_the_capital_of_france(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=model(client), messages=QUESTION, temperature=0)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    stream = client.chat.completions.create(model=model(client), messages=QUESTION, temperature=0, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == answer.choices[0].message.content


def test_32_streams_at_once_each_equal_their_solo_run(url: str) -> None:
    prompts = [f"Count from {i} to {i + 3}: {i}," for i in range(32)]

    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
            name = (await client.models.list()).data[0].id

            async def ask(prompt: str) -> str:
                stream = await client.completions.create(model=name, prompt=prompt, temperature=0, max_tokens=12, stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])

            together = await asyncio.gather(*map(ask, prompts))
            alone = [await ask(prompt) for prompt in prompts[:8]]
            assert together[:8] == alone
            assert all(together)

    asyncio.run(main())


def test_errors_have_their_envelope_and_the_next_request_is_served(client: openai.OpenAI, url: str) -> None:
    name = model(client)
    with pytest.raises(openai.BadRequestError, match="This model's maximum context length is 8192") as too_long:
        client.completions.create(model=name, prompt="word " * 9000, stream=True)
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-5", messages=QUESTION)
    assert unknown.value.code == "model_not_found"
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError) as key,
    ):
        stranger.models.list()
    assert key.value.code == "invalid_api_key"
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    broken = httpx.post(f"{url}/v1/chat/completions", content=b'{"messages": [', headers=headers)
    assert broken.status_code == 400
    assert set(broken.json()["error"]) == {"message", "type", "param", "code"}
    again = client.chat.completions.create(model=name, messages=QUESTION, temperature=0, max_tokens=16)
    assert "Paris" in (again.choices[0].message.content or "")


def test_leaving_a_stream_frees_the_engine(client: openai.OpenAI, url: str) -> None:
    for _ in range(3):
        stream = client.completions.create(model=model(client), prompt="Once", max_tokens=4000, stream=True)
        next(iter(stream))
        stream.close()
    headers = {"authorization": f"Bearer {KEY}"}
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        text = httpx.get(f"{url}/metrics", headers=headers).text
        values = [
            line.rsplit(" ", 1)[1]
            for line in text.splitlines()
            if line.startswith(("vllm:num_requests_", "vllm:kv_cache_usage"))
        ]
        if values == ["0.0"] * 3:
            return
        time.sleep(0.05)
    pytest.fail(f"requests still run: {values}")
