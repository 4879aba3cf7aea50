"""The model on the CPU in compiled kernels."""

import torch

from vllm_model.backend import TorchBackend
from vllm_model.kv_cache import PagedKvCache
from vllm_model.native import load_kernels
from vllm_model.native_decoder import NativeDecoder
from vllm_model.quantization import Weight
from vllm_model.verifier import Indices
from vllm_traits.batch import Batch


class NativeBackend(TorchBackend):
    """Runs a :class:`NativeDecoder`. Arguments as :class:`~vllm_model.backend.TorchBackend`."""

    def _take_weights(self, weights: dict[str, Weight]) -> None:
        kernels = load_kernels()
        assert kernels is not None
        norm = weights["model.norm.weight"]
        assert isinstance(norm, torch.Tensor)
        self.device = torch.device("cpu")
        self._native: NativeDecoder | None = NativeDecoder(kernels, self.config, weights, self.spec.max_model_len, norm.dtype)
        self.dtype = self._native.dtype

    def close(self) -> None:
        if self._native is not None:
            self._native.release()
        self._native = self._cache = self._held = None

    def _stored_tokens(self, block_size: int) -> int:
        return NativeDecoder.stored_tokens(block_size)

    def _attach(self, cache: PagedKvCache, block_size: int) -> None:
        assert self._native is not None, "the backend is closed"
        self._native.attach(cache, block_size)

    def _hidden(self, batch: Batch, wanted: Indices) -> torch.Tensor:
        assert self._native is not None
        return self._native.hidden(batch, wanted)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self._native is not None
        return self._native.logits(hidden)
