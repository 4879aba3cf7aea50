"""The engine behind asyncio: one worker thread owns it, requests and outputs cross by queues."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from vllm_core.engine import Engine
from vllm_core.outputs import RequestOutput
from vllm_traits.errors import EngineDeadError
from vllm_traits.sampling_params import SamplingParams

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Stream:
    """What one ``generate`` waits on. Wake-ups coalesce: a slow reader finds the newest state, never a backlog."""

    event: asyncio.Event = field(default_factory=asyncio.Event)
    output: RequestOutput | None = None
    error: BaseException | None = None


class AsyncEngine:
    """Serves many coroutines of one event loop from one :class:`~vllm_core.Engine`.

    Args:
        engine: Owned by the worker thread from ``start`` until ``shutdown`` returns; read its metrics from anywhere.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._streams: dict[str, _Stream] = {}
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._lock = threading.Lock()
        self._closed = False  # the inbox, under the lock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def is_running(self) -> bool:
        """Whether requests are taken and answered."""
        return self._thread is not None and self._thread.is_alive() and not self._stopping and not self.errored

    @property
    def errored(self) -> bool:
        """Whether the worker thread ended by an error of its own."""
        return self._failure is not None

    @property
    def num_unfinished(self) -> int:
        """Requests that somebody waits for."""
        return len(self._streams)

    async def start(self) -> None:
        """Start the worker thread, for the running event loop."""
        assert self._thread is None, "an AsyncEngine starts once"
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="vllm-engine", daemon=True)
        self._thread.start()

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling_params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Run one request. Closing the generator, or cancelling who waits for it, aborts the request.

        Yields:
            Its output, always the same object, whenever it has grown; the last time ``finished``. It goes on growing
            while it is read, so take what is new by length.

        Raises:
            InvalidRequestError, QueueFullError: As :meth:`Engine.add_request`, before anything is yielded.
            EngineDeadError: The engine is stopped or stopped meanwhile.
        """
        self._check_alive()
        stream = _Stream()

        def add() -> None:
            try:
                stream.output = self.engine.add_request(
                    request_id, prompt_token_ids, sampling_params, priority=priority, cache_salt=cache_salt
                )
            except Exception as error:  # belongs to who asked
                stream.error = error
                self._notify([stream])
                return
            self._streams[request_id] = stream

        self._post(add)
        self._check_posted()
        finished = False
        try:
            while not finished:
                await stream.event.wait()
                stream.event.clear()
                if stream.error is not None:
                    finished = True
                    raise stream.error
                assert stream.output is not None
                finished = stream.output.finished
                yield stream.output
        finally:
            if not finished:
                self._post(lambda: self._abort(request_id, stream))

    async def abort(self, request_id: str) -> None:
        """End a request; its generator yields it once more, finished."""
        self._post(lambda: self._abort(request_id, None))

    async def abort_choice(self, request_id: str, index: int, *, stop_reason: str | None = None) -> None:
        """End one choice, as :meth:`Engine.abort_choice`."""

        def abort() -> None:
            stream = self._streams.get(request_id)
            if self.engine.abort_choice(request_id, index, stop_reason=stop_reason) and stream is not None:
                self._deliver([stream])

        self._post(abort)

    async def set_priority(self, request_id: str, priority: int) -> bool:
        """As :meth:`Engine.set_priority`."""
        return await self._call(lambda: self.engine.set_priority(request_id, priority))

    async def reset_prefix_cache(self) -> bool:
        """As :meth:`Engine.reset_prefix_cache`."""
        return await self._call(self.engine.reset_prefix_cache)

    async def shutdown(self, drain: float | None = None) -> None:
        """Stop: wait for what runs for at most ``drain`` seconds (None: do not wait), abort the rest, close the engine."""
        if self._thread is None:
            self.engine.close()
            return
        deadline = None if drain is None else asyncio.get_running_loop().time() + drain
        while deadline is not None and self._streams and self._thread.is_alive():
            if asyncio.get_running_loop().time() >= deadline:
                break
            await asyncio.sleep(0.02)
        self._stopping = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join)

    # --- towards the worker ---

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineDeadError(f"The engine stopped: {self._failure}")
        if self._thread is None or self._stopping or not self._thread.is_alive():
            raise EngineDeadError("The engine is not running.")

    def _check_posted(self) -> None:
        """After a post: if the inbox was closed by then, nobody would answer."""
        if self._closed:
            raise EngineDeadError("The engine is not running.")

    def _post(self, action: Callable[[], None]) -> None:
        """Have the worker run this; what comes after its end is not run."""
        with self._lock:
            if not self._closed:
                self._inbox.append(action)
        self._wake.set()

    async def _call(self, function: Callable[[], bool]) -> bool:
        self._check_alive()
        loop, done = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

        def run() -> None:
            result, failure = False, None
            try:
                result = function()
            except Exception as error:  # belongs to who asked
                failure = error

            def resolve() -> None:
                if done.cancelled():
                    return
                if failure is None:
                    done.set_result(result)
                else:
                    done.set_exception(failure)

            loop.call_soon_threadsafe(resolve)

        self._post(run)
        self._check_posted()
        return bool(await done)

    # --- in the worker ---

    def _work(self) -> None:
        try:
            while not self._stopping:
                self._wake.clear()
                while self._inbox:
                    self._act(self._inbox.popleft())
                if not self.engine.has_unfinished_requests():
                    if not self._stopping and not self._inbox:
                        self._wake.wait()
                    continue
                outputs = self.engine.step()
                streams = [self._streams.get(output.request_id) for output in outputs]
                self._deliver([stream for stream in streams if stream is not None])
        except BaseException as error:  # whoever waits must be told, whatever it was
            logger.exception("The engine stopped")
            self._failure = error
        self._end()

    def _act(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception:  # who asked for it has made a mistake; nobody else shall pay
            logger.exception("A call into the engine failed")

    def _abort(self, request_id: str, stream: _Stream | None) -> None:
        """Abort a request if ``stream`` is the one that added it (None: whichever did)."""
        current = self._streams.get(request_id)
        if current is None or (stream is not None and current is not stream):
            return
        self.engine.abort(request_id)
        self._deliver([current])

    def _deliver(self, streams: list[_Stream]) -> None:
        for stream in streams:
            if stream.output is not None and stream.output.finished:
                self._streams.pop(stream.output.request_id, None)
        self._notify(streams)

    def _notify(self, streams: list[_Stream]) -> None:
        """Wake all of them with one call into the loop."""

        def set_all() -> None:
            for stream in streams:
                stream.event.set()

        assert self._loop is not None
        if streams and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(set_all)

    def _end(self) -> None:
        try:
            self.engine.close()
        except Exception:
            logger.exception("Closing the engine failed")
        self._stopping = True
        with self._lock:
            self._closed = True
        while self._inbox:  # added too late to be served
            self._act(self._inbox.popleft())
        reason = "stopped" if self._failure is None else f"stopped: {self._failure}"
        left = list(self._streams.values())
        self._streams.clear()
        for stream in left:
            stream.error = EngineDeadError(f"The engine {reason}")
        self._notify(left)
