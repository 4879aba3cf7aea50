"""Continuous batching, paged KV blocks and prefix caching over any :class:`~vllm_traits.ModelBackend`."""

from vllm_core.async_engine import AsyncEngine
from vllm_core.engine import Engine
from vllm_core.engine_config import EngineConfig
from vllm_core.metrics import EngineMetrics
from vllm_core.outputs import CompletionOutput, RequestMetrics, RequestOutput
from vllm_traits.sampling_params import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "AsyncEngine",
    "CompletionOutput",
    "Engine",
    "EngineConfig",
    "EngineMetrics",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
]
