"""Grouped-query attention over the paged cache, in torch.

A step's rows are split once, for all layers: rows of one token (decode) are batched by similar length, longer rows run one by
one.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from vllm_model.kv_cache import PagedKvCache
from vllm_traits.batch import Batch


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Rows of one token with similar lengths.

    Attributes:
        tokens: int64 ``[num_seqs]``, their places among the step's tokens; None: all of them in order.
        index: Of :meth:`PagedKvCache.read_index`.
        mask: bool ``[num_seqs, 1, 1, length]``, true where a sequence has a token.
    """

    tokens: torch.Tensor | None
    num_seqs: int
    index: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """A row of several tokens, ``[start, end)`` of the step's.

    Attributes:
        index: Of :meth:`PagedKvCache.read_index`; None if nothing of the sequence is cached.
        mask: bool ``[end - start, length]``, lower right triangle; None likewise.
    """

    start: int
    end: int
    index: torch.Tensor | None
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Where a step's tokens go in the cache, and what each attends to; the same for every layer."""

    write_index: torch.Tensor
    decode: list[DecodeGroup]
    prefill: list[PrefillRow]


def plan_attention(batch: Batch, cache: PagedKvCache, device: torch.device) -> AttentionPlan:
    """Split a step's rows. Reads the batch's state."""
    size = cache.block_size
    lens = batch.query_lens
    rows = np.repeat(np.arange(batch.num_rows), lens)
    positions = np.arange(batch.num_tokens) - batch.query_start[rows] + batch.num_computed[rows]
    tables = batch.state.block_tables
    blocks = tables[batch.slots[rows], positions // size]
    write_index = cache.write_index(_tensor(blocks, device), _tensor(positions % size, device))
    lengths = batch.num_computed + lens
    num_blocks = -(-lengths // size)
    single = np.flatnonzero(lens == 1)
    buckets = np.frexp(num_blocks[single].astype(np.float64))[1]  # within a factor of two of each other
    decode = []
    for bucket in np.unique(buckets):
        members = single[buckets == bucket]
        most = int(num_blocks[members].max())
        table = np.where(np.arange(most) < num_blocks[members][:, None], tables[batch.slots[members], :most], 0)
        mask = np.arange(most * size) < lengths[members][:, None]  # [num_seqs, length]
        everything = len(members) == batch.num_tokens
        decode.append(
            DecodeGroup(
                tokens=None if everything else _tensor(batch.query_start[members], device),
                num_seqs=len(members),
                index=cache.read_index(_tensor(table, device)),
                mask=torch.from_numpy(mask).to(device)[:, None, None, :],
            )
        )
    prefill = []
    for row in np.flatnonzero(lens > 1).tolist():
        index = mask_ = None
        if batch.num_computed[row]:
            index = cache.read_index(_tensor(tables[batch.slots[row], : num_blocks[row]][None], device))
            seen = np.arange(num_blocks[row] * size) <= np.arange(batch.num_computed[row], lengths[row])[:, None]
            mask_ = torch.from_numpy(seen).to(device)
        prefill.append(PrefillRow(int(batch.query_start[row]), int(batch.query_start[row + 1]), index, mask_))
    return AttentionPlan(write_index, decode, prefill)


class GqaAttention:
    """Attention in which ``num_heads / num_kv_heads`` query heads share one head of keys and values.

    Heads are never repeated in memory: the query heads of a group are rows of one product.

    Args:
        layer: Which layer of the cache.
        num_heads, cache: As named.
    """

    def __init__(self, layer: int, num_heads: int, cache: PagedKvCache) -> None:
        self.layer = layer
        self.cache = cache
        self.num_heads = num_heads
        self.num_kv_heads = cache.num_kv_heads
        self.group = num_heads // cache.num_kv_heads

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        """Store a step's keys and values, and attend.

        Args:
            q: ``[num_tokens, num_heads, head_dim]``.
            k, v: ``[num_tokens, num_kv_heads, head_dim]``.

        Returns:
            ``[num_tokens, num_heads * head_dim]``.
        """
        self.cache.write(self.layer, plan.write_index, k, v)
        if not plan.prefill and len(plan.decode) == 1:
            return self.forward_decode(q, plan.decode[0])
        out = torch.empty(len(q), self.num_heads * self.cache.head_dim, dtype=q.dtype, device=q.device)
        for group in plan.decode:
            out[group.tokens] = self.forward_decode(q[group.tokens], group)
        for row in plan.prefill:
            part = slice(row.start, row.end)
            out[part] = self.forward_prefill(q[part], k[part], v[part], row)
        return out

    def forward_decode(self, q: torch.Tensor, group: DecodeGroup) -> torch.Tensor:
        """One token of each sequence: q ``[num_seqs, num_heads, head_dim]`` to ``[num_seqs, num_heads * head_dim]``."""
        keys, values = self.cache.read(self.layer, group.index, group.num_seqs)
        grouped = q.view(group.num_seqs, self.num_kv_heads, self.group, -1)
        return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=group.mask).reshape(group.num_seqs, -1)

    def forward_prefill(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, row: PrefillRow) -> torch.Tensor:
        """Several tokens of one sequence: q ``[num_tokens, num_heads, head_dim]`` to ``[num_tokens, num_heads * head_dim]``."""
        num_tokens = len(q)
        grouped = q.view(num_tokens, self.num_kv_heads, self.group, -1).permute(1, 2, 0, 3)  # [kv, group, tokens, dim]
        if row.index is None:
            keys, values = k.transpose(0, 1), v.transpose(0, 1)  # [kv, tokens, dim]
        else:
            keys, values = (both[0] for both in self.cache.read(self.layer, row.index, 1))  # [kv, length, dim]
        # Expanding sets a stride to zero: no copy.
        keys = keys[:, None].expand(-1, self.group, -1, -1)
        values = values[:, None].expand(-1, self.group, -1, -1)
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=row.mask, is_causal=row.mask is None)
        return out.permute(2, 0, 1, 3).reshape(num_tokens, -1)


def _tensor(array: "np.typing.NDArray[np.generic]", device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.int64)).to(device)
