"""Request bodies: bounded in size and time, strict JSON, decoded into typed structs."""

import asyncio
import json
import math
import re
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from vllm_server.errors import HttpError

BODY_SECONDS = 60.0
MAX_INTEGER = 2**63
MAX_DEPTH = 64
_MISSING = re.compile(r"Object missing required field `(\w+)`")
T = TypeVar("T", bound=msgspec.Struct)


async def read_body(request: Request, max_bytes: int) -> dict[str, Any]:
    """The request's JSON object.

    Raises:
        HttpError: 408 too slow, 413 too large, 415 not plain JSON, 400 not valid.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise HttpError(415, f"Content-Type is {kind!r}; it must be application/json.")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HttpError(415, "Content-Encoding is not supported: send the body as it is.")
    chunks, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size > max_bytes:
                    raise HttpError(413, f"The body is larger than {max_bytes} bytes.")
                chunks.append(chunk)
    except TimeoutError as error:
        raise HttpError(408, f"The body did not arrive within {BODY_SECONDS:.0f} s.") from error
    except ClientDisconnect as error:
        raise HttpError(400, "The body ended early.") from error
    return parse_object(b"".join(chunks))


def parse_object(data: bytes) -> dict[str, Any]:
    """Strict JSON: UTF-8, no key twice, no NaN, no integer beyond 64 bits, no lone surrogate, bounded depth.

    Raises:
        HttpError: 400 with what is wrong.
    """
    try:
        value = json.loads(
            data.decode(), object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_integer
        )
        _check_depth(value, 0)
        if b"\\u" in data:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise HttpError(400, "The body is not valid UTF-8.") from error
    except RecursionError as error:
        raise HttpError(400, "The body is nested too deeply.") from error
    except json.JSONDecodeError as error:
        raise HttpError(400, f"The body is not valid JSON: {error.msg} at character {error.pos}.") from error
    if not isinstance(value, dict):
        raise HttpError(400, "The body must be a JSON object.")
    return value


def decode(value: dict[str, Any], kind: type[T]) -> T:
    """``value`` as a struct; unknown fields are left out.

    Raises:
        HttpError: 400 that names the field.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$")
        param = path.rstrip("`").lstrip(".") or None
        missing = _MISSING.match(text)
        if missing is not None:
            param = missing[1] if param is None else f"{param}.{missing[1]}"
            raise HttpError(400, f"{param} is missing.", param=param) from error
        where = f"{param}: " if param else ""
        raise HttpError(400, f"{where}{text[:1].lower() + text[1:]}.", param=param) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise HttpError(400, "The body has an object with the same key twice.")
    return result


def _constant(name: str) -> Any:
    raise HttpError(400, f"The body holds {name}, which is not JSON.")


def _integer(text: str) -> int:
    if len(text) > 20 or not -MAX_INTEGER <= int(text) < MAX_INTEGER:
        raise HttpError(400, "The body holds an integer beyond 64 bits.")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise HttpError(400, "The body holds a number beyond double precision.")
    return value


def _check_depth(value: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise HttpError(400, f"The body is nested deeper than {MAX_DEPTH} levels.")
    if isinstance(value, dict):
        for item in value.values():
            _check_depth(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, dict | list):  # a list of a million ids costs no calls
                _check_depth(item, depth + 1)
