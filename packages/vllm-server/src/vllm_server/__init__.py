"""The OpenAI API over HTTP for an engine of :mod:`vllm_core`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_server.app import build_app
    from vllm_server.config import ServerConfig

__version__ = "0.1.0"

__all__ = ["ServerConfig", "build_app"]


def __getattr__(name: str) -> Any:
    # Starlette and the engine are loaded by those who need them: `vllm-server --help` does not.
    if name == "build_app":
        from vllm_server.app import build_app

        return build_app
    if name == "ServerConfig":
        from vllm_server.config import ServerConfig

        return ServerConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
