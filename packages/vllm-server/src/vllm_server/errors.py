"""From typed errors to OpenAI's error JSON."""

import math
from typing import Any

import msgspec

from vllm_traits.errors import (
    BackendError,
    ContextLengthError,
    EngineDeadError,
    InvalidRequestError,
    QueueFullError,
    RequestNotFoundError,
    VllmError,
)


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status.
        message: One readable sentence.
        param: The field at fault.
        code: OpenAI's code; None gives the status as a number, as vLLM does.
        kind: The envelope's ``type``.
        headers: Sent with the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.kind = kind
        self.headers = headers or {}

    def envelope(self) -> dict[str, Any]:
        """``{"error": {...}}``."""
        code = self.status if self.code is None else self.code
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": code}}

    def body(self) -> bytes:
        """The envelope as JSON."""
        return msgspec.json.encode(self.envelope())


def bad_request(message: str, param: str | None = None, *, code: str | None = None) -> ApiError:
    """What the client sent is wrong."""
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, retry_after: float = 1.0) -> ApiError:
    """Not now; the client may try again."""
    return ApiError(503, message, kind="service_unavailable_error", headers={"retry-after": _seconds(retry_after)})


def to_api_error(error: BaseException) -> ApiError:
    """The answer to a request that failed with ``error``; what is unexpected becomes a 500 that tells nothing."""
    match error:
        case ApiError():
            return error
        case ContextLengthError():
            return bad_request(error.message, error.param, code="context_length_exceeded")
        case InvalidRequestError():
            return bad_request(error.message, error.param)
        case QueueFullError():
            headers = {"retry-after": _seconds(error.retry_after)}
            return ApiError(429, error.message, code="queue_full", kind="rate_limit_error", headers=headers)
        case RequestNotFoundError():
            return ApiError(404, error.message, code="not_found")
        case EngineDeadError():
            return unavailable("The engine has stopped; try again later.", 5.0)
        case BackendError():
            return ApiError(500, "The model failed while it ran this request.", kind="server_error")
        case VllmError():
            return ApiError(500, error.message, kind="server_error")
        case _:
            return ApiError(500, "The server made a mistake; its log says more.", kind="server_error")


def _seconds(value: float) -> str:
    return str(max(1, math.ceil(value)))
