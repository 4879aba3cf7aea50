"""A server with a fake model, whose answers are known, in front of a client without a network."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from vllm_core import AsyncEngine, Engine, EngineConfig
from vllm_model import ChatTemplate, Tokenizer
from vllm_server import ServerConfig
from vllm_server.app import Service, build_app
from vllm_traits.fake_backend import FakeBackend

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|user|>", "<|system|>", "<|assistant|>", "<|tool|>", "<|developer|>"]
MakeService = Callable[..., Service]
Serve = Callable[..., None]


def byte_tokenizer() -> Tokenizer:
    """One token a byte, then the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = RustTokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return Tokenizer(tokenizer, eos_token="<|end|>", chat_template=TEMPLATE)


@pytest.fixture(scope="session")
def make_service() -> MakeService:
    """Makes a service that is not started yet."""

    def make(backend: FakeBackend | None = None, **settings: Any) -> Service:
        tokenizer = byte_tokenizer()
        backend = backend or FakeBackend(vocab_size=tokenizer.vocab_size, max_model_len=512)
        engine = AsyncEngine(Engine(backend, config=EngineConfig(num_blocks=256), model_name="fake"))
        config = replace(ServerConfig(), **settings)
        return Service(engine, tokenizer, ChatTemplate.of(tokenizer), config, name="fake", version="0")

    return make


@pytest.fixture(scope="session")
def serve(make_service: MakeService) -> Serve:
    """Runs a coroutine function with a client on a started service, given as is or by its settings."""

    def run(test: Callable[..., Awaitable[None]], service: Service | None = None, **settings: Any) -> None:
        chosen = service or make_service(**settings)

        async def main() -> None:
            await chosen.engine.start()
            try:
                transport = httpx.ASGITransport(build_app(chosen))
                async with httpx.AsyncClient(transport=transport, base_url="http://test") as client, asyncio.timeout(30):
                    await test(client)
            finally:
                await chosen.engine.shutdown()

        asyncio.run(main())

    return run
