"""One prompt's way through the engine, as pieces of text."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from vllm_core import AsyncEngine, RequestOutput, SamplingParams
from vllm_model import IncrementalDetokenizer, Tokenizer
from vllm_server.errors import HttpError
from vllm_traits.batch import TokenLogprobs


@dataclass(slots=True)
class Delta:
    """What one choice has more.

    Attributes:
        index: Of the choice, over all prompts of the request.
        text: Not empty, unless the choice has ended.
        token_ids, logprobs: Of the tokens since the last delta.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Generation:
    """Runs ``params.n`` choices for one prompt.

    Args:
        engine, tokenizer: The server's.
        prompt: Token ids.
        params: What to do with it.
        first_index: Of its first choice among all of the request.
        score_only: Only the prompt's probabilities are wanted: the engine makes one token, which is not shown.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        first_index: int = 0,
        priority: int = 0,
        cache_salt: str | None = None,
        score_only: bool = False,
    ) -> None:
        self.prompt = prompt
        self.params = params
        self.output: RequestOutput | None = None
        self._engine = engine
        self._first_index = first_index
        self._score_only = score_only
        self._priority, self._cache_salt = priority, cache_salt
        self._request_id = uuid.uuid4().hex
        self._texts = [IncrementalDetokenizer(tokenizer, prompt, params) for _ in range(params.n)]
        self._pending = [Delta(first_index + i) for i in range(params.n)]
        self._ended = [False] * params.n
        eos = () if params.ignore_eos else engine.engine.target_model.spec.eos_token_ids
        self._stop_token_ids = frozenset((*eos, *(params.stop_token_ids or ())))

    @property
    def num_output_tokens(self) -> int:
        """Over all choices, so far."""
        return 0 if self._score_only else sum(text.num_tokens for text in self._texts)

    @property
    def num_cached_tokens(self) -> int:
        """Of the prompt."""
        return self.output.num_cached_tokens if self.output is not None else 0

    async def deltas(self) -> AsyncIterator[Delta]:
        """Pieces as they come; closing the iterator aborts the request.

        Raises:
            VllmError: As :meth:`AsyncEngine.generate`.
            HttpError: The model failed on this request.
        """
        stream = self._engine.generate(
            self._request_id, self.prompt, self.params, priority=self._priority, cache_salt=self._cache_salt
        )
        async with aclosing(stream):
            async for output in stream:
                self.output = output
                for place in range(self.params.n):
                    delta = await self._advance(output, place)
                    if delta is not None:
                        yield delta
                if all(self._ended):
                    return

    async def _advance(self, output: RequestOutput, place: int) -> Delta | None:
        if self._ended[place]:
            return None
        choice, text, delta = output.outputs[place], self._texts[place], self._pending[place]
        # The engine's thread goes on meanwhile: the reason is set last there, so it is read first here.
        reason, stop_reason = choice.finish_reason, choice.stop_reason
        end = len(choice.token_ids) if choice.logprobs is None else len(choice.logprobs)
        start = text.num_tokens
        if reason is None and end > start and choice.token_ids[end - 1] in self._stop_token_ids:
            end -= 1  # it has ended the output, and the reason is about to say so: then it is no text
        if reason == "abort":
            if stop_reason == "backend_error":
                raise HttpError(500, "The model failed on this request.", type="server_error")
            raise HttpError(503, "The request was aborted.", type="server_error", code="aborted")
        if self._score_only:
            self._ended[place] = reason is not None
            return None if reason is None else Delta(delta.index, finish_reason="length")
        tokens = choice.token_ids[start:end]
        delta.text += text.push(tokens, finished=reason is not None, drop_last=reason == "stop")
        if text.stopped is not None:
            reason, stop_reason = "stop", text.stopped
            await self._engine.abort_choice(self._request_id, place, stop_reason=text.stopped)
        taken = text.num_tokens
        delta.token_ids.extend(choice.token_ids[start:taken])
        if choice.logprobs is not None:
            delta.logprobs.extend(choice.logprobs[start:taken])
        if not delta.text and reason is None:
            return None
        delta.finish_reason, delta.stop_reason = reason, stop_reason
        self._ended[place] = reason is not None
        self._pending[place] = Delta(self._first_index + place)
        return delta


async def merged(generations: Sequence[Generation]) -> AsyncIterator[Delta]:
    """The deltas of several generations as they come. The first failure ends all of them."""
    if len(generations) == 1:
        async with aclosing(generations[0].deltas()) as deltas:  # type: ignore[type-var]
            async for delta in deltas:
                yield delta
        return
    queue: asyncio.Queue[Delta | BaseException | None] = asyncio.Queue(maxsize=len(generations))

    async def feed(generation: Generation) -> None:
        try:
            async with aclosing(generation.deltas()) as deltas:  # type: ignore[type-var]
                async for delta in deltas:
                    await queue.put(delta)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(feed(generation)) for generation in generations]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if item is None:
                left -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
