"""``/v1/completions`` and ``/v1/chat/completions``: from a body to generations, and from deltas to OpenAI's objects."""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from vllm_model import Tokenizer
from vllm_server.generation import Delta, Generation, merged
from vllm_server.schemas import ChatRequest, CompletionRequest, Sampling
from vllm_traits.batch import TokenLogprobs


def usage(generations: Sequence[Generation]) -> dict[str, Any]:
    """Tokens in and out, so far."""
    prompt = sum(len(generation.prompt) for generation in generations)
    output = sum(generation.num_output_tokens for generation in generations)
    cached = sum(generation.num_cached_tokens for generation in generations)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class Answer:
    """The shape of one endpoint's answers.

    Args:
        request: What was asked.
        model: The name to answer with.
        tokenizer: For logprobs.
        generations: One a prompt.
    """

    prefix = "cmpl"
    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, request: Sampling, model: str, tokenizer: Tokenizer, generations: list[Generation]) -> None:
        self.tokenizer = tokenizer
        self.generations = generations
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        options = request.stream_options
        self.with_usage = options is not None and options.include_usage
        self.running_usage = options is not None and options.continuous_usage_stats
        self.with_ids = bool(request.return_token_ids)

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        parts: dict[int, Delta] = {}
        async with aclosing(merged(self.generations)) as deltas:  # type: ignore[type-var]
            async for delta in deltas:
                whole = parts.setdefault(delta.index, Delta(delta.index))
                whole.text += delta.text
                whole.token_ids += delta.token_ids
                whole.logprobs += delta.logprobs
                whole.finish_reason, whole.stop_reason = delta.finish_reason, delta.stop_reason
        choices = [self.choice(parts[index]) for index in sorted(parts)]
        return {**self.head, "object": self.object, "choices": choices, "usage": usage(self.generations)} | self.extra()

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The answer as events."""
        async with aclosing(merged(self.generations)) as deltas:  # type: ignore[type-var]
            async for delta in deltas:
                for choice in self.chunk_choices(delta):
                    yield self._chunk([choice], self.running_usage)
        if self.with_usage:
            yield self._chunk([], True)

    def _chunk(self, choices: list[dict[str, Any]], with_usage: bool) -> dict[str, Any]:
        chunk = {**self.head, "object": self.chunk_object, "choices": choices}
        if with_usage or self.with_usage:
            chunk["usage"] = usage(self.generations) if with_usage else None
        return chunk

    def choice(self, delta: Delta) -> dict[str, Any]:
        """One whole choice."""
        raise NotImplementedError

    def chunk_choices(self, delta: Delta) -> list[dict[str, Any]]:
        """The choices of the chunks that one delta makes."""
        raise NotImplementedError

    def extra(self) -> dict[str, Any]:
        """Further keys of the whole answer."""
        if self.generations[0].params.prompt_logprobs is None or len(self.generations) != 1:
            return {}
        output = self.generations[0].output
        entries = output.prompt_logprobs if output is not None else None
        return {"prompt_logprobs": entries and [entry and self._by_id(entry) for entry in entries]}

    def _by_id(self, entry: TokenLogprobs) -> dict[str, Any]:
        pairs = list(zip(entry.token_ids, entry.logprobs, strict=True))
        return {str(token): {"logprob": value, "decoded_token": self.piece(token)} for token, value in pairs}

    def piece(self, token: int) -> str:
        """A token's own text."""
        return self.tokenizer.decode([token], skip_special_tokens=False)

    def ids(self, delta: Delta) -> dict[str, Any]:
        """The key ``token_ids``, if asked for."""
        return {"token_ids": delta.token_ids} if self.with_ids else {}


class CompletionAnswer(Answer):
    """Of ``/v1/completions``."""

    def __init__(
        self, request: CompletionRequest, model: str, tokenizer: Tokenizer, generations: list[Generation], texts: list[str]
    ) -> None:
        super().__init__(request, model, tokenizer, generations)
        self._request = request
        self._texts = texts  # of the prompts, for echo
        self._offsets: dict[int, int] = {}

    def choice(self, delta: Delta) -> dict[str, Any]:
        logprobs = self._logprobs(delta, first=True)
        text = self._prompt_text(delta) + delta.text
        return self._choice(delta, text, logprobs, first=True)

    def chunk_choices(self, delta: Delta) -> list[dict[str, Any]]:
        first = delta.index not in self._offsets
        logprobs = self._logprobs(delta, first)
        text = (self._prompt_text(delta) if first else "") + delta.text
        return [self._choice(delta, text, logprobs, first)]

    def extra(self) -> dict[str, Any]:
        return {} if self._request.prompt_logprobs is None else super().extra()

    def _choice(self, delta: Delta, text: str, logprobs: dict[str, Any] | None, first: bool) -> dict[str, Any]:
        return {
            "index": delta.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
            **self.ids(delta),
            **self._prompt_ids(delta, first),
        }

    def _prompt_ids(self, delta: Delta, first: bool) -> dict[str, Any]:
        """The key ``prompt_token_ids``, once a choice, if ids were asked for."""
        if not (self.with_ids and first):
            return {}
        return {"prompt_token_ids": list(self.generations[self._prompt_of(delta)].prompt)}

    def _prompt_text(self, delta: Delta) -> str:
        return self._texts[self._prompt_of(delta)] if self._request.echo else ""

    def _prompt_of(self, delta: Delta) -> int:
        return delta.index // self.generations[0].params.n

    def _logprobs(self, delta: Delta, first: bool) -> dict[str, Any] | None:
        """OpenAI's four lists; with ``echo`` the prompt's tokens come first, and the very first has no probability."""
        offset = self._offsets.get(delta.index, 0)
        if self._request.logprobs is None:
            self._offsets[delta.index] = offset
            return None
        entries: list[tuple[int, TokenLogprobs | None]] = []
        if first and self._request.echo:
            generation = self.generations[self._prompt_of(delta)]
            known = (generation.output.prompt_logprobs if generation.output else None) or [None] * len(generation.prompt)
            entries = list(zip(generation.prompt, known, strict=True))
        entries += list(zip(delta.token_ids, delta.logprobs, strict=False))
        tokens, values, tops, offsets = [], [], [], []
        for token, entry in entries:
            text = self.piece(token)
            tokens.append(text)
            values.append(entry.logprobs[0] if entry else None)
            tops.append({self.piece(t): v for t, v in zip(entry.token_ids, entry.logprobs, strict=True)} if entry else None)
            offsets.append(offset)
            offset += len(text)
        self._offsets[delta.index] = offset
        return {"text_offset": offsets, "token_logprobs": values, "tokens": tokens, "top_logprobs": tops}


class ChatAnswer(Answer):
    """Of ``/v1/chat/completions``."""

    prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, request: ChatRequest, model: str, tokenizer: Tokenizer, generations: list[Generation]) -> None:
        super().__init__(request, model, tokenizer, generations)
        self._with_logprobs = bool(request.logprobs)
        self._opened: set[int] = set()

    def extra(self) -> dict[str, Any]:
        ids = {"prompt_token_ids": list(self.generations[0].prompt)} if self.with_ids else {}
        return super().extra() | ids

    def choice(self, delta: Delta) -> dict[str, Any]:
        message = {"role": "assistant", "content": delta.text}
        return self._finished(delta) | {"message": message, "logprobs": self._logprobs(delta)} | self.ids(delta)

    def chunk_choices(self, delta: Delta) -> list[dict[str, Any]]:
        choices = []
        if delta.text or delta.index not in self._opened:
            content: dict[str, Any] = {"content": delta.text}
            if delta.index not in self._opened:
                self._opened.add(delta.index)
                content = {"role": "assistant", **content}
            choices.append(
                {"index": delta.index, "delta": content, "logprobs": self._logprobs(delta), "finish_reason": None}
                | self.ids(delta)
            )
        if delta.finish_reason is not None:
            # Tokens without text, such as the last, come with the end.
            rest = {"logprobs": None} if choices else {"logprobs": self._logprobs(delta)} | self.ids(delta)
            choices.append(self._finished(delta) | {"delta": {}} | rest)
        return choices

    def _finished(self, delta: Delta) -> dict[str, Any]:
        return {"index": delta.index, "finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        return {"content": [self._entry(entry) for entry in delta.logprobs]}

    def _entry(self, entry: TokenLogprobs) -> dict[str, Any]:
        own, *top = [
            {"token": self.piece(token), "logprob": value, "bytes": list(self.piece(token).encode())}
            for token, value in zip(entry.token_ids, entry.logprobs, strict=True)
        ]
        return {**own, "top_logprobs": top}
