# mypy: disable-error-code="no-untyped-call"
"""The model on a CUDA device: a decode step is one graph, from token ids to the sampled token.

What a running sequence needs stands in rows of device tensors, by slot: block table, last token, sampling parameters. A step
sends one small buffer from the host (which slots, how far each is, which blocks are new) and reads one back (the tokens), so
step N+1 is launched before step N has been read. Steps of single tokens, of a few tokens with guesses and of prompts replay a
graph of the next larger size, or two where a row is held to a grammar: the host finds what may come while the first runs the
model. What fits no graph launches the same kernels one by one. Only prompts that are scored, and very many
guesses with log-probabilities beside them, have their logits read by the host. :mod:`vllm_model.cuda` has the parts.
"""

import torch

from vllm_model.cuda.device import Device
from vllm_model.cuda.finish import RunningStep
from vllm_model.cuda.steps import MAX_DRAFT_TOKENS, Steps
from vllm_model.decoder import Decoder
from vllm_model.kv_cache import PagedKvCache
from vllm_model.model_config import ModelConfig
from vllm_model.structured import Grammars
from vllm_traits.backend import CompletedStep, KvCacheBudget, ModelSpec
from vllm_traits.batch import Batch, BatchState
from vllm_traits.errors import BackendError, BackendOutOfMemoryError, ConfigError


class CudaBackend:
    """Runs a :class:`Decoder`'s weights with Triton kernels.

    Args:
        config, weights, name, max_model_len, kv_cache_memory_bytes, gpu_memory_utilization, grammars: As of
            :class:`~vllm_model.backend.TorchBackend`.
        kv_cache_dtype: ``torch.float8_e4m3fn``, with scales that are measured at the start, or None: the weights'.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, torch.Tensor],
        *,
        name: str = "model",
        max_model_len: int | None = None,
        kv_cache_memory_bytes: int | None = None,
        gpu_memory_utilization: float = 0.9,
        kv_cache_dtype: torch.dtype | None = None,
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
            supports_overlap=True,
            max_draft_tokens=MAX_DRAFT_TOKENS,
            supports_structured_outputs=grammars is not None,
        )
        self.grammars = grammars
        self.decoder = Decoder(config, weights, self.spec.max_model_len)
        self.device = self.decoder.embedding.device
        self.dtype = self.decoder.embedding.dtype
        self.kv_cache_dtype = kv_cache_dtype or self.dtype
        self.steps: Steps | None = None
        self._device = Device(self.device)
        self._compiled = False
        self._kv_cache_memory_bytes = kv_cache_memory_bytes
        self._gpu_memory_utilization = gpu_memory_utilization

    def kv_cache_budget(self, *, block_size: int, max_num_seqs: int, max_num_batched_tokens: int) -> KvCacheBudget:
        """What the share of the device's memory leaves once the widest steps have been tried and measured."""
        config = self.config
        per_block = PagedKvCache.bytes_per_block(
            config.num_layers, config.num_kv_heads, block_size, config.head_dim, self.kv_cache_dtype
        )
        if self._kv_cache_memory_bytes is not None:
            return KvCacheBudget(available_bytes=self._kv_cache_memory_bytes, bytes_per_block=per_block)
        blocks, made = -(-self.spec.max_model_len // block_size), list[Steps]()
        try:
            with self._device.running():
                sizes = (max_num_seqs, blocks, max_num_batched_tokens)
                self._compile(block_size, *sizes)
                fixed, _ = self._device.taken_by(lambda: made.append(self._make_steps(self.decoder, block_size, 1, *sizes)))
                reserved = fixed + made[0].measure()
        except torch.OutOfMemoryError as error:
            raise BackendOutOfMemoryError("The widest step does not fit into the device's memory.") from error
        finally:
            made.clear()
            self._device.forget_graphs()
        free, total = torch.cuda.mem_get_info(self.device)
        available = int(free - total * (1 - self._gpu_memory_utilization)) - reserved
        return KvCacheBudget(available_bytes=available, bytes_per_block=per_block, reserved_bytes=reserved)

    def initialize(self, state: BatchState, *, num_blocks: int, max_num_batched_tokens: int) -> None:
        try:
            with self._device.running():
                sizes = (state.max_num_seqs, state.max_blocks_per_seq, max_num_batched_tokens)
                self._compile(state.block_size, *sizes)
                self.steps = self._make_steps(self.decoder, state.block_size, num_blocks, *sizes)
                self.steps.prepare()
        except torch.OutOfMemoryError as error:
            self.steps = None
            raise BackendOutOfMemoryError(f"{num_blocks} KV blocks do not fit into the device's memory.") from error

    def _compile(self, *sizes: int) -> None:
        """Compile what steps launch, once: in two layers, since those between launch what the last one does."""
        if not self._compiled:
            block_size, *others = sizes
            self._make_steps(self.decoder.cut(2), block_size, 1, *others).compile()
            self._compiled = True

    def _make_steps(
        self,
        decoder: Decoder,
        block_size: int,
        num_blocks: int,
        max_num_seqs: int,
        max_blocks: int,
        max_num_batched_tokens: int,
    ) -> Steps:
        config = decoder.config
        cache = PagedKvCache(
            num_layers=config.num_layers,
            num_blocks=num_blocks,
            num_kv_heads=config.num_kv_heads,
            block_size=block_size,
            head_dim=config.head_dim,
            dtype=self.kv_cache_dtype,
            device=self.device,
        )
        return Steps(
            self._device,
            decoder,
            cache,
            max_num_seqs=max_num_seqs,
            max_blocks=max_blocks,
            max_num_batched_tokens=max_num_batched_tokens,
            grammars=self.grammars,
        )

    def submit(self, batch: Batch) -> RunningStep | CompletedStep:
        assert self.steps is not None, "the backend is not initialized, or closed"
        try:
            with self._device.running():
                return self.steps.run(batch)
        except torch.OutOfMemoryError as error:
            self._device.reclaim()
            raise BackendOutOfMemoryError(f"A step of {batch.num_tokens} tokens ran out of device memory.") from error
        except RuntimeError as error:
            raise BackendError(f"A step of {batch.num_tokens} tokens failed: {error}") from error

    def close(self) -> None:
        self.steps = None
