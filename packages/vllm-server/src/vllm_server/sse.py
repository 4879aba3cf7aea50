"""Answers that end when the client goes away: one JSON object, or a stream of server-sent events."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from vllm_server.errors import to_http

logger = logging.getLogger(__name__)
PING_SECONDS = 15.0
SEND_SECONDS = 120.0
"""A client that takes nothing for so long is dropped."""
_encode = msgspec.json.Encoder().encode


class JsonAnswer(Response):
    """Computes its body when it is sent, and gives up when the client does.

    Args:
        compute: The body.
    """

    def __init__(self, compute: Callable[[], Awaitable[dict[str, Any]]]) -> None:
        self._compute = compute
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer() -> None:
            try:
                response: Response = Response(_encode(await self._compute()), media_type="application/json")
            except Exception as error:
                response = _failure(error)
            await response(scope, receive, send)

        await until_disconnect(receive, answer())


class EventStream(Response):
    """Server-sent events of JSON objects, ``[DONE]`` at the end. What fails before the first is a plain error answer.

    Args:
        events: The objects.
    """

    def __init__(self, events: AsyncIterator[dict[str, Any]]) -> None:
        self._events = events
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await until_disconnect(receive, self._run(scope, receive, send))

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def write(data: bytes, more: bool = True) -> None:
            async with asyncio.timeout(SEND_SECONDS):
                await send({"type": "http.response.body", "body": data, "more_body": more})

        async with aclosing(self._events) as events:  # type: ignore[type-var]
            coming: asyncio.Task[dict[str, Any]] | None = None
            try:
                while True:
                    coming = coming or asyncio.ensure_future(anext(events))
                    done, _ = await asyncio.wait({coming}, timeout=PING_SECONDS if started else None)
                    if not done:
                        await write(b": ping\n\n")
                        continue
                    event, coming = coming.result(), None
                    if not started:
                        started = True
                        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
                        await send({"type": "http.response.start", "status": 200, "headers": headers})
                    await write(b"data: " + _encode(event) + b"\n\n")
            except StopAsyncIteration:
                await write(b"data: [DONE]\n\n", more=False)
            except TimeoutError:
                logger.warning("A client read nothing for %.0f s and was dropped", SEND_SECONDS)
                raise
            except Exception as error:
                if not started:
                    await _failure(error)(scope, receive, send)
                    return
                _failure(error)
                await write(b"data: " + _encode(to_http(error).body) + b"\n\n", more=False)
            finally:
                if coming is not None:
                    coming.cancel()
                    await asyncio.gather(coming, return_exceptions=True)


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run ``work``; cancel it when the client goes away."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    worker, watcher = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        ended = worker.done()
        for task in (worker, watcher):
            task.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)
    if ended:
        worker.result()


def _failure(error: Exception) -> JSONResponse:
    http = to_http(error)
    if http.status == 500:
        logger.error("A request failed", exc_info=error)
    return http.response()
