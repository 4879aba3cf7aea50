"""The engine behind asyncio."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from vllm_core import AsyncEngine, Engine, EngineConfig, SamplingParams
from vllm_traits import Batch
from vllm_traits.errors import EngineDeadError, InvalidRequestError
from vllm_traits.fake_backend import FakeBackend, expected_tokens

GREEDY = SamplingParams(temperature=0, max_tokens=20)


def with_engine(test: Callable[[AsyncEngine], Awaitable[None]], backend: FakeBackend | None = None) -> AsyncEngine:
    engine = AsyncEngine(Engine(backend or FakeBackend(), config=EngineConfig()))

    async def run() -> None:
        await engine.start()
        try:
            async with asyncio.timeout(20):
                await test(engine)
        finally:
            await engine.shutdown()

    asyncio.run(run())
    return engine


async def collect(engine: AsyncEngine, name: str, prompt: list[int], params: SamplingParams = GREEDY) -> list[int]:
    tokens: list[int] = []
    async for output in engine.generate(name, prompt, params):
        tokens = output.outputs[0].token_ids
    return tokens


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_concurrent_streams_each_equal_their_solo_run() -> None:
    async def test(engine: AsyncEngine) -> None:
        results = await asyncio.gather(*[collect(engine, str(i), [i, 1]) for i in range(32)])
        assert results == [expected_tokens([i, 1], 20, 256) for i in range(32)]

    engine = with_engine(test)
    assert engine.num_unfinished == 0


def test_a_refused_request_raises_and_the_next_is_served() -> None:
    async def test(engine: AsyncEngine) -> None:
        with pytest.raises(InvalidRequestError, match="at least one token"):
            await collect(engine, "a", [])
        assert await collect(engine, "a", [1]) == expected_tokens([1], 20, 256)

    with_engine(test)


def test_leaving_a_stream_aborts_its_request() -> None:
    async def test(engine: AsyncEngine) -> None:
        stream = engine.generate("a", [1], SamplingParams(max_tokens=4000, ignore_eos=True))
        await anext(stream)
        await stream.aclose()
        task = asyncio.create_task(collect(engine, "b", [1], SamplingParams(max_tokens=4000)))
        await until(lambda: engine.num_unfinished == 1)
        task.cancel()
        await until(lambda: not engine.engine.has_unfinished_requests())
        assert engine.engine.scheduler.pool.usage == 0

    with_engine(test)


def test_an_abort_from_elsewhere_ends_the_stream() -> None:
    async def test(engine: AsyncEngine) -> None:
        stream = engine.generate("a", [1], SamplingParams(max_tokens=4000))
        await anext(stream)
        await engine.abort("a")
        last = [output async for output in stream][-1]
        assert last.outputs[0].finish_reason == "abort"

    with_engine(test)


def test_a_slow_reader_finds_the_newest_state() -> None:
    async def test(engine: AsyncEngine) -> None:
        stream = engine.generate("a", [1], GREEDY)
        first = await anext(stream)
        await until(lambda: not engine.engine.has_unfinished_requests())
        rest = [output async for output in stream]
        assert len(rest) <= 1  # none if the reader was so slow that the first was the last
        output = [first, *rest][-1]
        assert output.finished
        assert output.outputs[0].token_ids == expected_tokens([1], 20, 256)

    with_engine(test)


def test_the_cache_can_be_reset() -> None:
    async def test(engine: AsyncEngine) -> None:
        await collect(engine, "a", list(range(40)))
        assert await engine.reset_prefix_cache()

    with_engine(test)


def test_a_priority_can_be_changed_and_a_wrong_one_harms_nobody() -> None:
    async def test(engine: AsyncEngine) -> None:
        release = threading.Event()
        engine.engine.target_model.on_submit = lambda batch: release.wait(0.01)  # type: ignore[attr-defined]
        stream = engine.generate("a", [1], SamplingParams(temperature=0, max_tokens=1000))
        await anext(stream)
        assert await engine.set_priority("a", 3)
        assert not await engine.set_priority("b", 3)
        with pytest.raises(InvalidRequestError, match="priority"):
            await engine.set_priority("a", "high")  # type: ignore[arg-type]
        release.set()
        assert await collect(engine, "c", [2]) == expected_tokens([2], 20, 256)

    with_engine(test)


def test_a_call_that_makes_no_sense_harms_nobody() -> None:
    async def test(engine: AsyncEngine) -> None:
        stream = engine.generate("a", [1], GREEDY)
        await engine.abort_choice("a", 99)
        await engine.abort(["a"])  # type: ignore[arg-type]  # cannot be a key
        assert [output.finished async for output in stream][-1]
        assert await collect(engine, "c", [2]) == expected_tokens([2], 20, 256)

    with_engine(test)


def test_who_comes_when_the_worker_has_ended_is_told() -> None:
    async def test(engine: AsyncEngine) -> None:
        engine._check_alive = lambda: None  # type: ignore[method-assign]  # it was alive a moment ago
        await engine.shutdown()
        with pytest.raises(EngineDeadError):
            await collect(engine, "a", [1])
        with pytest.raises(EngineDeadError):
            await engine.reset_prefix_cache()

    with_engine(test)


def test_shutdown_drains() -> None:
    release = threading.Event()

    def wait(batch: Batch) -> None:
        release.wait(10)

    async def test(engine: AsyncEngine) -> None:
        task = asyncio.create_task(collect(engine, "a", [1]))
        await until(lambda: engine.num_unfinished == 1)
        stop = asyncio.create_task(engine.shutdown(drain=10))
        release.set()
        assert await task == expected_tokens([1], 20, 256)
        await stop
        with pytest.raises(EngineDeadError):
            await collect(engine, "b", [1])

    with_engine(test, FakeBackend(on_submit=wait))


def test_shutdown_without_draining_tells_who_waits() -> None:
    async def test(engine: AsyncEngine) -> None:
        stream = engine.generate("a", [1], SamplingParams(max_tokens=4000))
        await anext(stream)
        await engine.shutdown()
        with pytest.raises(EngineDeadError):
            async for _ in stream:
                pass

    with_engine(test)


def test_an_engine_that_dies_tells_who_waits(caplog: pytest.LogCaptureFixture) -> None:
    class Dying(Engine):
        def step(self) -> Any:
            raise SystemError("broken")

    async def run() -> None:
        engine = AsyncEngine(Dying(FakeBackend()))
        await engine.start()
        with pytest.raises(EngineDeadError, match="broken"):
            await collect(engine, "a", [1])
        assert engine.errored
        assert not engine.is_running
        with pytest.raises(EngineDeadError, match="broken"):
            await collect(engine, "b", [1])
        await engine.shutdown()

    asyncio.run(run())
    assert "The engine stopped" in caplog.text
