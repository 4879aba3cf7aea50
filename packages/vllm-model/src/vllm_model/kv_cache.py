"""Keys and values in blocks."""

import numpy as np
import torch


class PagedKvCache:
    """One pool of blocks for all layers; a sequence's block table says which are its own.

    Args:
        num_layers, num_blocks, num_kv_heads, block_size, head_dim: Its shape.
        dtype, device: Of the tensors; e4m3 for kernels that know it.

    Attributes:
        layers: By layer ``[num_blocks, num_kv_heads, 2, block_size, head_dim]``: the keys (0) and values (1) of one head of
            one block lie together.
        scales: Of an e4m3 cache, which holds keys and values divided by them: float32 ``[num_layers, 2, num_kv_heads]``, at
            first ones.
        k_scales, v_scales: By layer ``[num_kv_heads]``, views of ``scales``, or None.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        shape = (num_blocks, num_kv_heads, 2, block_size, head_dim)
        self.layers = [_zeros(shape, dtype, device) for _ in range(num_layers)]
        self.scales: torch.Tensor | None = None
        self.k_scales: list[torch.Tensor | None] = [None] * num_layers
        self.v_scales: list[torch.Tensor | None] = [None] * num_layers
        if dtype == torch.float8_e4m3fn:
            self.scales = torch.ones(num_layers, 2, num_kv_heads, dtype=torch.float32, device=device)
            self.k_scales, self.v_scales = [*self.scales[:, 0]], [*self.scales[:, 1]]

    @staticmethod
    def bytes_per_block(num_layers: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype) -> int:
        """Over all layers."""
        return num_layers * num_kv_heads * 2 * block_size * head_dim * dtype.itemsize

    def write_index(self, block_ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Where tokens go.

        Args:
            block_ids, offsets: int64 ``[num_tokens]``.

        Returns:
            int64 ``[2, num_tokens * num_kv_heads]``, rows of a layer seen as ``[-1, head_dim]``, of keys and of values.
        """
        heads = torch.arange(self.num_kv_heads, device=block_ids.device)
        pages = (block_ids[:, None] * self.num_kv_heads + heads) * 2  # [num_tokens, num_kv_heads]
        keys = (pages * self.block_size + offsets[:, None]).reshape(-1)
        return torch.stack((keys, keys + self.block_size))

    def write(self, layer: int, index: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store ``[num_tokens, num_kv_heads, head_dim]`` at ``write_index``."""
        rows = self.layers[layer].view(-1, self.head_dim)
        rows.index_copy_(0, index[0], keys.reshape(-1, self.head_dim))
        rows.index_copy_(0, index[1], values.reshape(-1, self.head_dim))

    def read_index(self, tables: torch.Tensor) -> torch.Tensor:
        """Which pages ``[block, head, keys or values]`` hold these sequences.

        Args:
            tables: int64 ``[num_seqs, num_blocks]``.

        Returns:
            int64 ``[2 * num_seqs * num_kv_heads * num_blocks]``.
        """
        heads = torch.arange(self.num_kv_heads, device=tables.device)[:, None]
        pages = (tables[:, None, :] * self.num_kv_heads + heads) * 2  # [num_seqs, num_kv_heads, num_blocks]
        return torch.stack((pages, pages + 1)).reshape(-1)

    def read(self, layer: int, index: torch.Tensor, num_seqs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[num_seqs, num_kv_heads, num_blocks * block_size, head_dim]`` of ``read_index``."""
        pages = self.layers[layer].view(-1, self.block_size * self.head_dim)
        both = pages.index_select(0, index).view(2, num_seqs, self.num_kv_heads, -1, self.head_dim)
        return both[0], both[1]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros, because masked positions must hold numbers; on the CPU the pages are mapped on first touch."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(shape)
