"""The Starlette application: routes, and what all of them share."""

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from hashlib import sha256
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, Counter, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_core import AsyncEngine, SamplingParams
from vllm_model import ChatTemplate, Tokenizer, encode_chat
from vllm_server.body import decode, read_body
from vllm_server.completions import Answer, ChatAnswer, CompletionAnswer
from vllm_server.config import ServerConfig
from vllm_server.errors import HttpError, to_http, unavailable
from vllm_server.generation import Generation
from vllm_server.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Sampling,
    TokenizeRequest,
    check_messages,
    refuse_unsupported,
    template_variables,
    unknown_fields,
)
from vllm_server.sse import EventStream, JsonAnswer
from vllm_traits.errors import VllmError

logger = logging.getLogger(__name__)
OPEN_PATHS = frozenset({"/health", "/ping"})


class Service:
    """What the routes work with.

    Args:
        engine: Not yet started.
        tokenizer, template: The model's.
        config: Keys and limits.
        name: The model's, as clients ask for it.
        version: Of the server.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        config: ServerConfig,
        *,
        name: str,
        version: str,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.template = template
        self.config = config
        self.name = name
        self.version = version
        self.draining = False
        self.num_active = 0
        """Requests that are being answered."""
        registry = engine.engine.metrics.registry
        self.responses = Counter("http_requests", "Answers by route and status", ["path", "status"], registry=registry)
        self.ignored = Counter(
            "vllm:request_unknown_fields", "Fields of bodies that were ignored", ["field"], registry=registry
        )
        self._ignored_names: set[str] = set()

    # --- completions ---

    async def completions(self, request: Request) -> Response:
        body = await self._body(request)
        refuse_unsupported(body)
        asked = decode(body, CompletionRequest)
        self._count_unknown(body, CompletionRequest)
        self._check_model(asked.model)
        params = asked.sampling_params(
            max_tokens=16 if asked.max_tokens is None else 1 if asked.score_only else asked.max_tokens,
            logprobs=asked.logprobs,
            prompt_logprobs=asked.logprobs if asked.echo else asked.prompt_logprobs,
        )
        prompts, texts = await asyncio.to_thread(self._encode_prompts, asked)
        generations = self._generations(prompts, params, asked)
        return self._answer(asked, CompletionAnswer(asked, self.name, self.tokenizer, generations, texts))

    async def chat(self, request: Request) -> Response:
        body = await self._body(request)
        refuse_unsupported(body)
        asked = decode(body, ChatRequest)
        self._count_unknown(body, ChatRequest)
        self._check_model(asked.model)
        check_messages(asked.messages)
        if asked.top_logprobs is not None and not asked.logprobs:
            raise HttpError(400, "top_logprobs needs logprobs to be true.", param="top_logprobs")
        params = asked.sampling_params(
            max_tokens=asked.most_tokens,
            logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
            prompt_logprobs=asked.prompt_logprobs,
        )
        opens = not asked.continue_final_message if asked.add_generation_prompt is None else asked.add_generation_prompt
        prompt = await asyncio.to_thread(
            encode_chat,
            self.tokenizer,
            self.template,
            asked.messages,
            add_generation_prompt=opens,
            continue_final_message=asked.continue_final_message,
            **template_variables(asked),
        )
        generations = self._generations([self._truncated(prompt, asked)], params, asked)
        return self._answer(asked, ChatAnswer(asked, self.name, self.tokenizer, generations))

    def _answer(self, asked: Sampling, answer: Answer) -> Response:
        return EventStream(answer.chunks()) if asked.stream else JsonAnswer(answer.whole)

    def _encode_prompts(self, asked: CompletionRequest) -> tuple[list[list[int]], list[str]]:
        prompts, texts = [], []
        for prompt in asked.prompts():
            ids = self.tokenizer.encode(prompt, asked.add_special_tokens) if isinstance(prompt, str) else prompt
            if asked.echo and not isinstance(prompt, str):
                self._check_ids(ids, "prompt")
                prompt = self.tokenizer.decode(ids, skip_special_tokens=False)
            prompts.append(self._truncated(ids, asked))
            texts.append(prompt if isinstance(prompt, str) else "")
        return prompts, texts

    def _truncated(self, ids: list[int], asked: Sampling) -> list[int]:
        """The last ``truncate_prompt_tokens`` (-1: as many as fit with a token of output)."""
        if asked.truncate_prompt_tokens is None:
            return ids
        keep = asked.truncate_prompt_tokens
        return ids[-(self.max_model_len - 1 if keep == -1 else keep) :] if keep else []

    def _generations(self, prompts: list[list[int]], params: SamplingParams, asked: Sampling) -> list[Generation]:
        return [
            Generation(
                self.engine,
                self.tokenizer,
                prompt,
                params,
                first_index=place * params.n,
                priority=asked.priority,
                cache_salt=asked.cache_salt,
                score_only=asked.score_only,
            )
            for place, prompt in enumerate(prompts)
        ]

    # --- the rest ---

    async def models(self, request: Request) -> Response:
        card = self._card()
        if "model" not in request.path_params:
            return JSONResponse({"object": "list", "data": [card]})
        self._check_model(request.path_params["model"])
        return JSONResponse(card)

    async def tokenize(self, request: Request) -> Response:
        asked = decode(await self._body(request), TokenizeRequest)
        self._check_model(asked.model)
        if (asked.prompt is None) == (asked.messages is None):
            raise HttpError(400, "Give either prompt or messages.", param="prompt")
        if asked.messages is not None:
            check_messages(asked.messages)
            opens = asked.add_generation_prompt
            ids = await asyncio.to_thread(
                encode_chat, self.tokenizer, self.template, asked.messages, add_generation_prompt=opens
            )
        else:
            assert asked.prompt is not None
            ids = await asyncio.to_thread(self.tokenizer.encode, asked.prompt, asked.add_special_tokens)
        strings = [self.tokenizer.id_to_token(token) for token in ids] if asked.return_token_strs else None
        return JSONResponse({"count": len(ids), "max_model_len": self.max_model_len, "tokens": ids, "token_strs": strings})

    async def detokenize(self, request: Request) -> Response:
        asked = decode(await self._body(request), DetokenizeRequest)
        self._check_model(asked.model)
        self._check_ids(asked.tokens, "tokens")
        return JSONResponse({"prompt": await asyncio.to_thread(self.tokenizer.decode, asked.tokens, False)})

    async def health(self, request: Request) -> Response:
        return Response(status_code=200 if self.engine.is_running else 503)

    async def show_version(self, request: Request) -> Response:
        return JSONResponse({"version": self.version})

    async def load(self, request: Request) -> Response:
        return JSONResponse({"server_load": self.engine.num_unfinished})

    async def metrics(self, request: Request) -> Response:
        return Response(generate_latest(self.engine.engine.metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    # --- shared ---

    @property
    def max_model_len(self) -> int:
        """Longest request in tokens."""
        return self.engine.engine.max_model_len

    async def _body(self, request: Request) -> dict[str, Any]:
        if self.draining:
            raise unavailable("The server is shutting down.")
        return await read_body(request, self.config.max_body_bytes)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.name:
            raise HttpError(
                404, f"The model {name!r} does not exist; this server has {self.name!r}.", param="model", code="model_not_found"
            )

    def _check_ids(self, ids: Sequence[int], param: str) -> None:
        size = self.engine.engine.target_model.spec.vocab_size
        if any(not 0 <= token < size for token in ids):
            raise HttpError(400, f"{param} holds a token id outside 0 to {size - 1}.", param=param)

    def _count_unknown(self, body: dict[str, Any], kind: type[Sampling]) -> None:
        for name in unknown_fields(body, kind):
            if len(self._ignored_names) >= 100:  # names come from clients: bounded
                name = name if name in self._ignored_names else "other"
            self._ignored_names.add(name)
            self.ignored.labels(field=name[:64]).inc()

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": 0,
            "owned_by": "vllm-lite",
            "root": self.config.model,
            "parent": None,
            "max_model_len": self.max_model_len,
            "permission": [],
        }


def build_app(service: Service) -> ASGIApp:
    """The application; its lifespan starts and stops the engine."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await service.engine.start()
        try:
            yield
        finally:
            await service.engine.shutdown()

    def route(path: str, endpoint: Callable[[Request], Awaitable[Response]], method: str = "GET") -> Route:
        return Route(path, endpoint, methods=[method])

    app = Starlette(
        routes=[
            route("/v1/models", service.models),
            route("/v1/models/{model:path}", service.models),
            route("/v1/completions", service.completions, "POST"),
            route("/v1/chat/completions", service.chat, "POST"),
            route("/tokenize", service.tokenize, "POST"),
            route("/detokenize", service.detokenize, "POST"),
            route("/health", service.health),
            route("/ping", service.health),
            route("/version", service.show_version),
            route("/load", service.load),
            route("/metrics", service.metrics),
        ],
        exception_handlers={HTTPException: _http_exception, HttpError: _error, VllmError: _error, Exception: _error},  # type: ignore[dict-item]
        lifespan=lifespan,
    )
    return Gate(app, service)


class Gate:
    """What comes before every route: keys, tidy paths, counting. Pure ASGI, so streams pass untouched.

    Args:
        app: What it guards.
        service: Whose keys, and who counts.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._digests = [sha256(key.encode()).digest() for key in service.config.api_key]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        while "//" in scope["path"]:
            scope = {**scope, "path": scope["path"].replace("//", "/")}
        status = 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._service.num_active += 1
        try:
            if self._admits(scope):
                await self._app(scope, receive, counted)
            else:
                refusal = HttpError(
                    401, "The API key is missing or wrong.", type="authentication_error", code="invalid_api_key"
                )
                await refusal.response()(scope, receive, counted)
        finally:
            self._service.num_active -= 1
            path = getattr(scope.get("route"), "path", "other")
            self._service.responses.labels(path=path, status=str(status)).inc()

    def _admits(self, scope: Scope) -> bool:
        if not self._digests or scope["path"] in OPEN_PATHS:
            return True
        header = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = header.partition(b" ")
        digest = sha256(key.strip()).digest()
        # Every key is compared, in constant time.
        return scheme.lower() == b"bearer" and sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


async def _http_exception(request: Request, error: HTTPException) -> Response:
    message = {404: f"There is no {request.url.path}.", 405: f"{request.url.path} does not take {request.method}."}
    return HttpError(
        error.status_code, message.get(error.status_code, error.detail), headers=dict(error.headers or {})
    ).response()


async def _error(request: Request, error: Exception) -> Response:
    http = to_http(error)
    if http.status == 500:
        logger.error("A request failed", exc_info=error)
    return http.response()
