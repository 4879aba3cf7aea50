"""Grouped-query attention over the paged cache, in torch.

A step's rows are split once, for all layers: rows of one token (decode) or a few (a token and guesses) are batched by similar
length, longer rows run one by one.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from vllm_model.kv_cache import PagedKvCache
from vllm_traits.batch import Batch

FEW_TOKENS = 17
"""Rows of at most so many tokens are batched: a token and 16 guesses."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Rows of few tokens with similar lengths. A row with fewer tokens than ``width`` repeats its last one::

        token_ids   a0 a1 a2 | b0 b1        gather    0 1 2 3 4 4        what attends, [num_seqs * width]
        width 3                             places    0 1 2 3 4          where the tokens' results are among those

    Attributes:
        tokens: int64 ``[num_tokens]``, the tokens' places in the step; None: all of them in order.
        num_seqs, width: As above.
        gather: int64 ``[num_seqs * width]``, places in the step; None: ``tokens``.
        places: int64 ``[num_tokens]``; None: all of them in order.
        index: Of :meth:`PagedKvCache.read_index`.
        mask: bool ``[num_seqs, 1, width, 1, length]``, true where a token sees.
    """

    tokens: torch.Tensor | None
    num_seqs: int
    width: int
    gather: torch.Tensor | None
    places: torch.Tensor | None
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
    few = np.flatnonzero(lens <= FEW_TOKENS)
    # Within a factor of two of each other, in length and in tokens.
    kinds = np.stack([np.frexp(num_blocks[few].astype(np.float64))[1], np.frexp(lens[few] - 0.5)[1]], axis=1)
    decode = []
    for kind in np.unique(kinds, axis=0):
        members = few[(kinds == kind).all(axis=1)]
        decode.append(_decode_group(batch, cache, device, members))
    prefill = []
    for row in np.flatnonzero(lens > FEW_TOKENS).tolist():
        index = mask_ = None
        if batch.num_computed[row]:
            index = cache.read_index(_tensor(tables[batch.slots[row], : num_blocks[row]][None], device))
            seen = np.arange(num_blocks[row] * size) <= np.arange(batch.num_computed[row], lengths[row])[:, None]
            mask_ = torch.from_numpy(seen).to(device)
        prefill.append(PrefillRow(int(batch.query_start[row]), int(batch.query_start[row + 1]), index, mask_))
    return AttentionPlan(write_index, decode, prefill)


def _decode_group(batch: Batch, cache: PagedKvCache, device: torch.device, members: npt.NDArray[np.intp]) -> DecodeGroup:
    tables, size = batch.state.block_tables, cache.block_size
    lens, starts, computed = batch.query_lens[members], batch.query_start[members], batch.num_computed[members]
    num_blocks = -(-(computed + lens) // size)
    most, width = int(num_blocks.max()), int(lens.max())
    table = np.where(np.arange(most) < num_blocks[:, None], tables[batch.slots[members], :most], 0)
    place = np.minimum(np.arange(width), lens[:, None] - 1)  # [num_seqs, width], the last one repeated
    gather = starts[:, None] + place
    mask = np.arange(most * size) <= (computed[:, None] + place)[:, :, None]  # [num_seqs, width, length]
    real = np.arange(width) < lens[:, None]
    tokens = gather[real]
    padded = not real.all()
    everything = len(tokens) == batch.num_tokens
    return DecodeGroup(
        tokens=None if everything else _tensor(tokens, device),
        num_seqs=len(members),
        width=width,
        gather=_tensor(gather.reshape(-1), device) if padded else None,
        places=_tensor(np.flatnonzero(real), device) if padded else None,
        index=cache.read_index(_tensor(table, device)),
        mask=torch.from_numpy(mask).to(device)[:, None, :, None, :],
    )


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
            if group.tokens is None:
                return self.forward_decode(q, group)
            out[group.tokens] = self.forward_decode(q, group)
        for row in plan.prefill:
            part = slice(row.start, row.end)
            out[part] = self.forward_prefill(q[part], k[part], v[part], row)
        return out

    def forward_decode(self, q: torch.Tensor, group: DecodeGroup) -> torch.Tensor:
        """The group's tokens among the step's: q ``[step, num_heads, head_dim]`` to ``[num_tokens, num_heads * head_dim]``."""
        keys, values = self.cache.read(self.layer, group.index, group.num_seqs)
        gather = group.tokens if group.gather is None else group.gather
        if gather is not None:
            q = q[gather]
        # The query heads of a group and the tokens of a sequence are rows of one product with its keys.
        grouped = q.view(group.num_seqs, group.width, self.num_kv_heads, self.group, -1).transpose(1, 2).flatten(2, 3)
        mask = group.mask.expand(-1, -1, -1, self.group, -1).flatten(2, 3)  # [num_seqs, 1, width * group, length]
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
        out = out.view(group.num_seqs, self.num_kv_heads, group.width, self.group, -1).transpose(1, 2)
        out = out.reshape(group.num_seqs * group.width, -1)
        return out if group.places is None else out[group.places]

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


def _tensor(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.int64)).to(device)
