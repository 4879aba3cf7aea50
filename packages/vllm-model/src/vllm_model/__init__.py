"""Qwen3, Qwen2, Llama and Mistral with grouped-query attention over a paged KV cache, and what turns text into tokens."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_model.backend import load_backend
    from vllm_model.chat_template import ChatTemplate, encode_chat
    from vllm_model.detokenizer import IncrementalDetokenizer
    from vllm_model.hub import resolve_model
    from vllm_model.llm import LLM
    from vllm_model.speculative import SpeculativeConfig
    from vllm_model.tokenizer import Tokenizer

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "ChatTemplate",
    "IncrementalDetokenizer",
    "SpeculativeConfig",
    "Tokenizer",
    "encode_chat",
    "load_backend",
    "resolve_model",
]

_MODULES = {
    "LLM": "llm",
    "ChatTemplate": "chat_template",
    "IncrementalDetokenizer": "detokenizer",
    "SpeculativeConfig": "speculative",
    "Tokenizer": "tokenizer",
    "encode_chat": "chat_template",
    "load_backend": "backend",
    "resolve_model": "hub",
}


def __getattr__(name: str) -> Any:
    """Import on first use: torch takes a second, and a tokenizer does not need it."""
    from importlib import import_module

    if name in _MODULES:
        return getattr(import_module(f"vllm_model.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'vllm_model' has no attribute {name!r}")
