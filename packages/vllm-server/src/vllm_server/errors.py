"""OpenAI's error envelope, and which error of ours becomes which."""

from typing import Any

from starlette.responses import JSONResponse

from vllm_traits.errors import (
    BackendError,
    ContextLengthError,
    EngineDeadError,
    InvalidRequestError,
    QueueFullError,
    VllmError,
)


class HttpError(Exception):
    """An answer other than success.

    Args:
        status: Of HTTP.
        message: One sentence for whoever sent the request.
        type: OpenAI's kind.
        param: The field at fault.
        code: OpenAI's code, the status if there is none.
        headers: Further ones.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",  # noqa: A002 - the envelope's own name
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self.body: dict[str, Any] = {
            "error": {"message": message, "type": type, "param": param, "code": code if code is not None else status}
        }

    def response(self) -> JSONResponse:
        """As a response."""
        return JSONResponse(self.body, self.status, headers=self.headers)


def to_http(error: BaseException) -> HttpError:
    """What a client is told about ``error``; nothing of the inside for what is not its fault."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, ContextLengthError):
        return HttpError(400, error.message, param=error.param, code="context_length_exceeded")
    if isinstance(error, InvalidRequestError):
        return HttpError(400, error.message, param=error.param)
    if isinstance(error, QueueFullError):
        retry = {"Retry-After": str(max(1, round(error.retry_after)))}
        return HttpError(429, error.message, type="rate_limit_error", code="queue_full", headers=retry)
    if isinstance(error, EngineDeadError):
        return unavailable("The engine is not running.")
    if isinstance(error, BackendError):
        return HttpError(500, "The model failed on this request.", type="server_error")
    if isinstance(error, VllmError):
        return HttpError(500, error.message, type="server_error")
    return HttpError(500, "Internal error.", type="server_error")


def unavailable(message: str) -> HttpError:
    """503, to be tried again."""
    return HttpError(503, message, type="server_error", code="unavailable", headers={"Retry-After": "5"})
