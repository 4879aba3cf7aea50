"""From settings to a running server, and to its end."""

import asyncio
import importlib
import importlib.metadata
import logging
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypercorn
import hypercorn.asyncio

from vllm_core import AsyncEngine, Engine, EngineConfig
from vllm_model import ChatTemplate, SpeculativeConfig, Tokenizer, load_backend, resolve_model
from vllm_server.app import Service, build_app
from vllm_server.config import ServerConfig
from vllm_traits import ModelBackend
from vllm_traits.errors import ConfigError

logger = logging.getLogger(__name__)
LAST_WRITES_SECONDS = 2.0


def build_service(config: ServerConfig, version: str) -> Service:
    """Load the model and put an engine around it.

    Raises:
        ConfigError, ModelLoadError: What is wrong, in one sentence.
    """
    path = resolve_model(config.model, revision=config.revision)
    backend = _backend(config, path)
    settings = EngineConfig(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        block_size=config.block_size,
        max_model_len=config.max_model_len,
        enable_prefix_caching=config.enable_prefix_caching,
        max_num_waiting=config.max_num_waiting,
        priority_aging=config.priority_aging,
        scheduling_policy=config.scheduling_policy,  # type: ignore[arg-type]  # one of the choices
        long_prefill_token_threshold=config.long_prefill_token_threshold,
        seed=config.seed,
    )
    draft = None
    if config.speculative_config is not None:
        speculation = SpeculativeConfig.parse(config.speculative_config)
        settings = speculation.applied_to(settings, backend.spec)
        draft = speculation.load_draft(**_hardware(config))
    engine = Engine(backend, draft, config=settings, model_name=_name(config, path))
    logger.info("%s: %s", backend.spec.name, engine.kv_cache_summary())
    tokenizer = Tokenizer.from_pretrained(path)
    return Service(
        AsyncEngine(engine), tokenizer, _template(config, tokenizer), config, name=_name(config, path), version=version
    )


def run(service: Service) -> None:
    """Serve until SIGINT or SIGTERM: then refuse what is new, finish what runs, and return. A second signal ends at once."""
    import uvloop

    listener = _listen(service.config)
    uvloop.run(_serve(service, listener))


async def _serve(service: Service, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    config = hypercorn.Config()
    config.bind = [f"fd://{listener.detach()}"]  # which it closes
    config.graceful_timeout = LAST_WRITES_SECONDS
    config.h11_max_incomplete_size = 64 << 10
    config.alpn_protocols = ["http/1.1"]
    config.loglevel = "WARNING"
    config.accesslog = None
    signalled = asyncio.Event()

    def on_signal() -> None:
        if signalled.is_set():
            os._exit(130)
        signalled.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    logger.info("Serving %s on http://%s:%d", service.name, host, port)

    async def until_drained() -> None:
        await signalled.wait()
        service.draining = True
        logger.info("Finishing %d requests", service.num_active)
        end = loop.time() + service.config.shutdown_timeout
        while service.num_active and loop.time() < end:
            await asyncio.sleep(0.02)

    await hypercorn.asyncio.serve(build_app(service), config, shutdown_trigger=until_drained)  # type: ignore[arg-type]


def _listen(config: ServerConfig) -> socket.socket:
    """Listen before the event loop starts, so that a port that is taken is one clear message."""
    try:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.host, config.port))
    except OSError as error:
        raise ConfigError(
            f"Cannot listen on {config.host}:{config.port}: {error.strerror or error}. Choose another --port."
        ) from error
    listener.set_inheritable(True)
    return listener


def _backend(config: ServerConfig, path: Path) -> ModelBackend:
    if config.backend is None:
        return load_backend(
            path,
            dtype=config.dtype,
            load_format=config.load_format,  # type: ignore[arg-type]  # one of the choices
            quantization=config.quantization,  # type: ignore[arg-type]  # likewise
            max_model_len=config.max_model_len,
            seed=config.seed,
            **_hardware(config),
        )
    backend = _factory(config.backend)(path)
    if not isinstance(backend, ModelBackend):
        raise ConfigError(f"backend {config.backend!r} made a {type(backend).__name__}, which is no ModelBackend.")
    return backend


def _hardware(config: ServerConfig) -> dict[str, Any]:
    """What the model and its draft share."""
    names = ("device", "kv_cache_memory_bytes", "gpu_memory_utilization", "kv_cache_dtype", "num_threads")
    return {name: getattr(config, name) for name in names}


def _factory(name: str) -> Callable[[Path], object]:
    module, colon, attribute = name.partition(":")
    try:
        if colon:
            factory = getattr(importlib.import_module(module), attribute)
        else:
            (entry,) = importlib.metadata.entry_points(group="vllm.backends", name=name)
            factory = entry.load()
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"backend {name!r} cannot be found: give package.module:factory or an entry point's name.") from error
    if not callable(factory):
        raise ConfigError(f"backend {name!r} is not callable.")
    return factory  # type: ignore[no-any-return]


def _template(config: ServerConfig, tokenizer: Tokenizer) -> ChatTemplate | None:
    if config.chat_template is None:
        return ChatTemplate.of(tokenizer)
    try:
        source = Path(config.chat_template).read_text()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"Cannot read chat_template {config.chat_template!r}: {error}.") from error
    return ChatTemplate(source, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)


def _name(config: ServerConfig, path: Path) -> str:
    if config.served_model_name is not None:
        return config.served_model_name
    if config.model == "default":
        return "SmolLM2-135M-Instruct"
    if not Path(config.model).exists():
        return config.model  # a Hugging Face id
    return path.stem if path.suffix == ".gguf" else path.resolve().name
