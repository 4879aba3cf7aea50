"""An OpenAI-compatible HTTP server for local language models."""

from typing import TYPE_CHECKING, Any

from vllm_server.config import ServerConfig

if TYPE_CHECKING:
    from vllm_server.app import build_app

__version__ = "0.1.0"

__all__ = ["ServerConfig", "build_app"]


def __getattr__(name: str) -> Any:
    """Import on first use: the command line does not need the application to print its help."""
    if name == "build_app":
        from vllm_server.app import build_app

        return build_app
    raise AttributeError(f"module 'vllm_server' has no attribute {name!r}")
