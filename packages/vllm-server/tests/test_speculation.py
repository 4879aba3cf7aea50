"""Several tokens at once: streams, stop strings, reports and usage are those of one token at a time."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from vllm_server.app import Service
from vllm_server.config import ServerConfig
from vllm_server.server import build_service
from vllm_traits.errors import ConfigError
from vllm_traits.fake_backend import FakeBackend

MakeService = Callable[..., Service]
Serve = Callable[..., None]
PROMPT = {"prompt": "abc", "max_tokens": 29, "temperature": 0, "return_token_ids": True}
BODIES: dict[str, dict[str, Any]] = {
    "plain": PROMPT,
    "sampled": PROMPT | {"temperature": 0.9, "seed": 4},
    "logprobs": PROMPT | {"logprobs": 2},
    "echo": PROMPT | {"logprobs": 1, "echo": True},
    "choices": PROMPT | {"n": 3, "seed": 1, "temperature": 1.0, "logprobs": 0},
    "prompts": PROMPT | {"prompt": ["abc", "xyz"]},
    "penalties": PROMPT | {"presence_penalty": 1.0},
}


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return {"choices": answer["choices"], "usage": answer["usage"]}


async def ask_streamed(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    """The stream put together, in the shape of the whole answer, and its longest chunk in tokens."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response = await client.post("/v1/completions", json=body | options)
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    *chunks, last = [json.loads(event) for event in events[:-1]]
    choices: dict[int, dict[str, Any]] = {}
    most = 0
    for chunk in chunks:
        (delta,) = chunk["choices"]
        most = max(most, len(delta["token_ids"]))
        whole = choices.setdefault(
            delta["index"], delta | {"text": "", "token_ids": [], "logprobs": None, "finish_reason": None}
        )
        assert whole["finish_reason"] is None
        whole["text"] += delta["text"]
        whole["token_ids"] += delta["token_ids"]
        whole["finish_reason"], whole["stop_reason"] = delta["finish_reason"], delta["stop_reason"]
        for key, values in (delta["logprobs"] or {}).items():
            whole["logprobs"] = whole["logprobs"] or {}
            whole["logprobs"].setdefault(key, []).extend(values)
    return {"choices": [choices[index] for index in sorted(choices)], "usage": last["usage"], "most": most}


def answers(serve: Serve, service: Service, bodies: list[dict[str, Any]], streamed: bool) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    async def test(client: httpx.AsyncClient) -> None:
        for body in bodies:
            found.append(await (ask_streamed if streamed else ask)(client, body))

    serve(test, service)
    return found


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_answers_are_those_without_guesses(streamed: bool, serve: Serve, make_service: MakeService) -> None:
    bodies = list(BODIES.values())
    expected = answers(serve, make_service(), bodies, streamed=False)
    service = make_service(num_guesses=6)
    got = answers(serve, service, bodies, streamed)
    several = [answer.pop("most", 2) > 1 for answer in got]
    for name, wanted, answer in zip(BODIES, expected, got, strict=True):
        assert answer == wanted, name
    assert any(several)
    assert service.engine.engine.metrics.spec_decode_num_accepted_tokens_per_pos[4] > 0


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("included", [False, True], ids=["cut", "included"])
def test_every_place_a_stop_string_can_be(included: bool, streamed: bool, serve: Serve, make_service: MakeService) -> None:
    """At each place of a text that comes several tokens at once, alone or across their borders."""
    (plain,) = answers(serve, make_service(), [PROMPT], streamed=False)
    text, ids = plain["choices"][0]["text"], plain["choices"][0]["token_ids"]
    letters = [i for i in range(len(text) - 1) if text[i : i + 2].isascii()]
    assert len(letters) > 3
    stops: list[dict[str, Any]] = [{"stop": [text[i : i + 2], "never"]} for i in letters]
    stops += [{"stop_token_ids": [ids[i]]} for i in (0, 3, 11)]
    bodies = [PROMPT | {"logprobs": 0, "include_stop_str_in_output": included} | stop for stop in stops]
    expected = answers(serve, make_service(), bodies, streamed=False)
    got = answers(serve, make_service(num_guesses=6), bodies, streamed)
    for body, wanted, answer in zip(bodies, expected, got, strict=True):
        answer.pop("most", None)
        assert answer == wanted, body
        (choice,) = answer["choices"]
        assert choice["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == len(choice["token_ids"]) == len(choice["logprobs"]["tokens"])


def test_the_metrics_count_guesses(serve: Serve, make_service: MakeService) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        await ask(client, PROMPT)
        text = (await client.get("/metrics")).text
        values = {line.split("{")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[:1] != "#"}
        assert values["vllm:spec_decode_num_drafts_total"] > 0
        assert values["vllm:spec_decode_num_accepted_tokens_total"] <= values["vllm:spec_decode_num_draft_tokens_total"]
        assert 'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="fake",position="0"}' in text

    serve(test, make_service(num_guesses=6))


@pytest.mark.parametrize(
    ("speculative", "proposers"),
    [
        ('{"method": ["ngram", "suffix"], "num_speculative_tokens": 5, "prompt_lookup_max": 3}', ["ngram", "suffix"]),
        ('{"method": ["draft_model", "ngram"], "model": "default", "num_speculative_tokens": 5}', ["ngram", "draft_model"]),
    ],
)
def test_the_setting_reaches_the_engine(speculative: str, proposers: list[str]) -> None:
    config = ServerConfig(speculative_config=speculative, max_model_len=128, kv_cache_memory_bytes=1 << 26, num_threads=1)
    engine = build_service(config, "0").engine.engine
    assert engine.max_draft_tokens == 5
    assert engine.scheduler.speculator is not None
    assert [proposer.name for proposer in engine.scheduler.speculator.proposers] == proposers
    engine.close()


def test_a_backend_that_cannot_verify_is_refused_by_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_server.server._factory", lambda name: lambda path: FakeBackend(vocab_size=49152))
    config = ServerConfig(speculative_config='{"method": "ngram"}', backend="their:own")
    with pytest.raises(ConfigError, match="num_speculative_tokens is 8; fake verifies no guesses"):
        build_service(config, "0")
