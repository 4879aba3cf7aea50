"""The model behind the engine's protocol, in torch."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np
import torch

from vllm_model.attention import plan_attention
from vllm_model.decoder import Decoder
from vllm_model.host_sampling import PIECE, sample_in_pieces, wanted_tokens
from vllm_model.hub import resolve_model
from vllm_model.kv_cache import PagedKvCache
from vllm_model.loaders import LoadFormat, load_config, load_weights
from vllm_model.machine import free_memory_bytes, usable_cores
from vllm_model.model_config import ModelConfig
from vllm_model.native import build, load_kernels
from vllm_model.quantization import Quantization, Weight
from vllm_model.structured import Grammars, HeldRows
from vllm_model.verifier import Indices
from vllm_traits.backend import CompletedStep, KvCacheBudget, ModelBackend, ModelSpec
from vllm_traits.batch import Batch, BatchOutput, BatchState
from vllm_traits.errors import BackendError, BackendOutOfMemoryError, ConfigError

if TYPE_CHECKING:
    from vllm_model.cuda_backend import CudaBackend

KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3")
"""What the KV cache may hold: what is computed in, or numbers of eight bits."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MAX_DRAFT_TOKENS = 16
"""Most guesses in a row; beyond it even free guesses that are mostly right no longer pay."""
CPU_KV_CACHE_BYTES = 4 << 30
"""Most that the KV cache takes of main memory unless told otherwise."""


class TorchBackend:
    """Runs a :class:`Decoder` step by step; ``submit`` returns when the step is done.

    Args:
        config: The model's shape.
        weights: By Hugging Face's names; emptied.
        name: For logs and metrics.
        max_model_len: Longest sequence; None: the model's own.
        kv_cache_memory_bytes: For the KV cache; None: what is free, up to a bound.
        gpu_memory_utilization: Share of a GPU's memory to use in all.
        grammars: For rows that are held to one; None: there are none.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Weight],
        *,
        name: str = "model",
        max_model_len: int | None = None,
        kv_cache_memory_bytes: int | None = None,
        gpu_memory_utilization: float = 0.9,
        grammars: Grammars | None = None,
    ) -> None:
        if max_model_len is not None and not 2 <= max_model_len <= config.max_model_len:
            raise ConfigError(f"max_model_len is {max_model_len}; this model allows 2 to {config.max_model_len}.")
        self.config = config
        self.spec = ModelSpec(
            name=name,
            vocab_size=config.vocab_size,
            max_model_len=max_model_len or config.max_model_len,
            eos_token_ids=config.eos_token_ids,
            max_draft_tokens=MAX_DRAFT_TOKENS,
            supports_structured_outputs=grammars is not None,
        )
        self.grammars = grammars
        self._held = None if grammars is None else HeldRows(grammars)
        self._take_weights(weights)
        self._kv_cache_memory_bytes = kv_cache_memory_bytes
        self._gpu_memory_utilization = gpu_memory_utilization
        self._cache: PagedKvCache | None = None

    def _take_weights(self, weights: dict[str, Weight]) -> None:
        floats = cast("dict[str, torch.Tensor]", weights)  # load_backend has them dequantized
        self.decoder: Decoder | None = Decoder(self.config, floats, self.spec.max_model_len)
        self.device = self.decoder.embedding.device
        self.dtype = self.decoder.embedding.dtype

    def kv_cache_budget(self, *, block_size: int, max_num_seqs: int, max_num_batched_tokens: int) -> KvCacheBudget:
        config = self.config
        per_block = PagedKvCache.bytes_per_block(
            config.num_layers, config.num_kv_heads, self._stored_tokens(block_size), config.head_dim, self.dtype
        )
        available = self._kv_cache_memory_bytes
        if available is None:
            # The largest step: a few wide activations of each token, and float32 logits with two copies for sampling.
            width = 4 * config.hidden_size + 3 * config.intermediate_size
            most = min(PIECE, max_num_batched_tokens)
            step = max_num_batched_tokens * width * 4 + most * config.vocab_size * 16
            if self.device.type == "cuda":
                free, total = torch.cuda.mem_get_info(self.device)
                available = int(free - total * (1 - self._gpu_memory_utilization)) - step
            else:
                available = min(free_memory_bytes() // 2 - step, CPU_KV_CACHE_BYTES)
        return KvCacheBudget(available_bytes=max(0, available), bytes_per_block=per_block)

    def initialize(self, state: BatchState, *, num_blocks: int, max_num_batched_tokens: int) -> None:
        config = self.config
        try:
            self._cache = PagedKvCache(
                num_layers=config.num_layers,
                num_blocks=num_blocks,
                num_kv_heads=config.num_kv_heads,
                block_size=self._stored_tokens(state.block_size),
                head_dim=config.head_dim,
                dtype=self.dtype,
                device=self.device,
            )
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise BackendOutOfMemoryError(f"{num_blocks} KV blocks do not fit into memory.") from error
        self._attach(self._cache, state.block_size)

    def submit(self, batch: Batch) -> CompletedStep:
        try:
            with torch.inference_mode():
                return CompletedStep(self._run(batch))
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise BackendOutOfMemoryError(f"A step of {batch.num_tokens} tokens ran out of memory.") from error
        except RuntimeError as error:
            raise BackendError(f"A step of {batch.num_tokens} tokens failed: {error}") from error

    def close(self) -> None:
        self.decoder = self._cache = self._held = None

    def _run(self, batch: Batch) -> BatchOutput:
        wanted, first = wanted_tokens(batch)
        hidden = self._hidden(batch, wanted)

        def logits_of(places: Indices) -> torch.Tensor:
            return self._logits(hidden if len(places) == len(hidden) else hidden[torch.from_numpy(places).to(self.device)])

        return sample_in_pieces(batch, logits_of, len(wanted), first, held=self._held)

    def _stored_tokens(self, block_size: int) -> int:
        """Tokens that a block has room for."""
        return block_size

    def _attach(self, cache: PagedKvCache, block_size: int) -> None:
        assert self.decoder is not None, "the backend is closed"
        self.decoder.attach(cache)

    def _hidden(self, batch: Batch, wanted: Indices) -> torch.Tensor:
        """The last hidden states of the wanted tokens: ``[len(wanted), hidden_size]``."""
        assert self.decoder is not None
        assert self._cache is not None
        positions = np.arange(batch.num_tokens) + np.repeat(batch.num_computed - batch.query_start[:-1], batch.query_lens)
        return self.decoder.hidden(
            torch.from_numpy(batch.token_ids.astype(np.int64)).to(self.device),
            torch.from_numpy(positions).to(self.device),
            plan_attention(batch, self._cache, self.device),
            None if len(wanted) == batch.num_tokens else torch.from_numpy(wanted).to(self.device),
        )

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self.decoder is not None
        return self.decoder.logits(hidden)


def load_backend(
    model: str | Path | None = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    load_format: LoadFormat = "auto",
    quantization: Quantization | None = None,
    max_model_len: int | None = None,
    kv_cache_memory_bytes: int | None = None,
    gpu_memory_utilization: float = 0.9,
    kv_cache_dtype: str = "auto",
    seed: int = 0,
    num_threads: int | None = None,
    revision: str | None = None,
) -> ModelBackend:
    """Load a model.

    Args:
        model: A folder, a ``.gguf`` file, a Hugging Face id, or None for the default model.
        dtype: ``auto``, ``bfloat16``, ``float16`` or ``float32``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        load_format: ``dummy`` makes random weights from the configuration alone.
        quantization: None: packed weights of a GGUF file stay packed where there are compiled kernels for the CPU, elsewhere
            they are dequantized. ``none``: dequantized everywhere. ``int8``, ``int4``: weights are quantized as they are
            loaded, with compiled kernels only.
        kv_cache_dtype: ``auto``: what is computed in; ``fp8`` or ``fp8_e4m3``: e4m3 with a scale a head, half the memory, in
            half precision on a CUDA device that knows it.
        seed: Of dummy weights.
        num_threads: On the CPU; None: the physical cores that this process may use.

    Raises:
        ConfigError: A setting is wrong.
        ModelLoadError: The model cannot be read.
    """
    if quantization is not None and quantization not in get_args(Quantization):
        known = ", ".join(get_args(Quantization))
        raise ConfigError(f"quantization is {quantization!r}; it must be one of {known}, or None: as the file stores it.")
    if not 0 < gpu_memory_utilization <= 1:
        raise ConfigError(f"gpu_memory_utilization is {gpu_memory_utilization}; it must be above 0 and at most 1.")
    if num_threads is not None and num_threads < 1:
        raise ConfigError(f"num_threads is {num_threads}; it must be 1 or more.")
    if kv_cache_dtype not in KV_CACHE_DTYPES:
        raise ConfigError(f"kv_cache_dtype is {kv_cache_dtype!r}; it must be one of {', '.join(KV_CACHE_DTYPES)}.")
    path = resolve_model(model, revision=revision)
    config = load_config(path)
    where = _device(device)
    if where.type == "cpu":
        _set_threads(num_threads or usable_cores())
    computed = _dtype(dtype, config, where)
    settings: dict[str, Any] = {
        "name": path.stem if path.suffix == ".gguf" else path.name,
        "max_model_len": max_model_len,
        "kv_cache_memory_bytes": kv_cache_memory_bytes,
        "gpu_memory_utilization": gpu_memory_utilization,
        "grammars": Grammars.of(path, config.vocab_size, config.eos_token_ids),
    }
    native = where.type == "cpu" and can_run_native(config, computed)
    if not native:
        if quantization in ("int8", "int4"):
            why = f", which {path.name} in {dtype} on {where} cannot use: leave it out."
            if where.type == "cpu" and load_kernels() is None:
                why = f"; there are none: install a C compiler and run `python {build.__file__}`, or leave it out."
            raise ConfigError(f"quantization {quantization!r} needs the compiled kernels of the CPU{why}")
        quantization = "none"
    backend = _backend_class(config, where, computed)
    if kv_cache_dtype != "auto":
        # Triton converts to and from e4m3 from this capability on.
        if where.type != "cuda" or computed == torch.float32 or torch.cuda.get_device_capability(where) < (8, 9):
            raise ConfigError(
                f"kv_cache_dtype is {kv_cache_dtype!r}, which needs bfloat16 or float16 on a CUDA device of compute capability "
                f"8.9 or more; for {settings['name']} on {where} there is only auto."
            )
        settings["kv_cache_dtype"] = torch.float8_e4m3fn
    weights = load_weights(
        path, config, dtype=computed, device=where, load_format=load_format, quantization=quantization, seed=seed
    )
    if native:
        from vllm_model.native_backend import NativeBackend

        return NativeBackend(config, weights, **settings)
    return backend(config, cast("Any", weights), **settings)  # none of them quantized


def runs_on_kernels(config: ModelConfig) -> bool:
    """Whether our kernels for CUDA devices take heads of this size."""
    return 16 <= config.head_dim <= 256


def _backend_class(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> "type[TorchBackend] | type[CudaBackend]":
    """Our kernels where they run: half precision on a CUDA device with Triton."""
    half = device.type == "cuda" and dtype != torch.float32
    if half and runs_on_kernels(config) and importlib.util.find_spec("triton") is not None:
        from vllm_model.cuda_backend import CudaBackend
        from vllm_model.kernels._compilers import prepare

        prepare()  # while weights are loaded
        return CudaBackend
    return TorchBackend


def _set_threads(num_threads: int) -> None:
    """Of torch, and of the compiled kernels where there are any."""
    torch.set_num_threads(num_threads)
    kernels = load_kernels()
    if kernels is not None:
        kernels.set_threads(num_threads)


def can_run_native(config: ModelConfig, dtype: torch.dtype) -> bool:
    """Whether there are compiled kernels, and for this shape and dtype."""
    if load_kernels() is None:
        return False
    widths = (config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim)
    # MOST_HEAD_DIM and MOST_QUERY_ROWS of native/attention.h; sixteen outputs are a panel.
    fits = config.head_dim % 16 == 0 and config.head_dim <= 256 and config.num_heads // config.num_kv_heads <= 64
    return fits and all(width % 16 == 0 for width in widths) and dtype in (torch.float32, torch.bfloat16)


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device is {device!r}; it must be auto, cpu, cuda or cuda:N.") from error
    if chosen.type not in ("cpu", "cuda") or (chosen.type == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"device is {device!r}, which is not there; cpu is.")
    return chosen


def _dtype(dtype: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ConfigError(f"dtype is {dtype!r}; it must be auto, {', '.join(DTYPES)}.")
        return DTYPES[dtype]
    if config.dtype == "float32":
        return torch.float32
    if device.type == "cuda":
        return DTYPES.get(config.dtype or "bfloat16", torch.bfloat16)
    # Without the instructions for it, bfloat16 on a CPU is slower than float32.
    fast = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.bfloat16 if fast else torch.float32
