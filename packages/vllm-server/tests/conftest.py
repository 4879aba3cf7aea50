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
from vllm_core.proposer import DraftRows
from vllm_model import ChatTemplate, Tokenizer
from vllm_server import ServerConfig
from vllm_server.app import Service, build_app
from vllm_traits import BatchState
from vllm_traits.fake_backend import FakeBackend
from vllm_traits.fake_model import Choice, mix, tag_of

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


class Oracle:
    """Knows what the fake backend will say, but for the last guess now and then.

    Args:
        vocab_size: The backend's.
    """

    name = "oracle"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def propose(self, rows: DraftRows) -> list[list[int]]:
        return [
            self._guesses(rows.state, slot, num)
            for slot, num in zip(rows.slots.tolist(), rows.num_wanted.tolist(), strict=True)
        ]

    def _guesses(self, state: BatchState, slot: int, num: int) -> list[int]:
        known = state.token_ids[slot, : state.num_tokens[slot]].tolist()
        choice, tag = Choice.of_slot(state, slot, self.vocab_size), tag_of(known)
        said, guesses = known[state.num_prompt_tokens[slot] :], list[int]()
        for _ in range(num):
            guesses.append(choice.next_token(tag, [*said, *guesses]))
            tag = mix(tag, guesses[-1])
        if len(known) % 4 == 3:
            guesses[-1] = (guesses[-1] + 1) % self.vocab_size
        return guesses

    def forget(self, state: BatchState, slot: int, root: bytes) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture(scope="session")
def make_service() -> MakeService:
    """Makes a service that is not started yet; with ``num_guesses`` up to that many tokens and one more come at once."""

    def make(backend: FakeBackend | None = None, *, num_guesses: int = 0, **settings: Any) -> Service:
        tokenizer = byte_tokenizer()
        like = {"vocab_size": tokenizer.vocab_size, "max_model_len": 512}
        backend = backend or FakeBackend(**like, max_draft_tokens=num_guesses)
        limits = EngineConfig(num_blocks=256, max_draft_tokens=num_guesses)
        proposers = [Oracle(backend.vocab_size)] if num_guesses else []
        engine = AsyncEngine(Engine(backend, config=limits, proposers=proposers, model_name="fake"))
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
