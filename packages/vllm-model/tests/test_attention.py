"""Paged attention against float64 attention over plain tensors."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_model.attention import GqaAttention, plan_attention
from vllm_model.kv_cache import PagedKvCache
from vllm_traits import BatchState
from vllm_traits.conformance import batch_of


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int) -> torch.Tensor:
    """q ``[tokens, heads, dim]`` at positions from ``start``; k, v ``[length, kv_heads, dim]``, float64."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    hidden = torch.arange(len(k)) > torch.arange(start, start + len(q))[:, None]
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 70), st.integers(1, 20)), min_size=1, max_size=5),
    st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    st.integers(0, 2**31),
)
def test_rows_of_any_lengths(rows: list[tuple[int, int]], heads: tuple[int, int], seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads, dim, size = *heads, 16, 4
    state = BatchState(len(rows), 100, size)
    num_blocks = sum(-(-(start + new) // size) for start, new in rows)
    cache = PagedKvCache(
        num_layers=1,
        num_blocks=num_blocks,
        num_kv_heads=num_kv_heads,
        block_size=size,
        head_dim=dim,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    free = torch.randperm(num_blocks, generator=rng).tolist()
    keys, values = [], []
    for slot, (start, new) in enumerate(rows):
        state.num_tokens[slot] = start + new
        blocks = [free.pop() for _ in range(-(-(start + new) // size))]
        state.block_tables[slot, : len(blocks)] = blocks
        keys.append(torch.randn(start + new, num_kv_heads, dim, generator=rng))
        values.append(torch.randn(start + new, num_kv_heads, dim, generator=rng))
        position = torch.arange(start)
        index = cache.write_index(torch.tensor(blocks)[position // size], position % size)
        cache.write(0, index, keys[-1][:start], values[-1][:start])
    batch = batch_of(state, [(slot, start) for slot, (start, _) in enumerate(rows)])
    q = torch.randn(batch.num_tokens, num_heads, dim, generator=rng)
    new_keys = torch.cat([key[start:] for key, (start, _) in zip(keys, rows, strict=True)])
    new_values = torch.cat([value[start:] for value, (start, _) in zip(values, rows, strict=True)])
    plan = plan_attention(batch, cache, torch.device("cpu"))
    out = GqaAttention(0, num_heads, cache)(q, new_keys, new_values, plan)
    expected = torch.cat(
        [
            reference(q[batch.query_start[i] : batch.query_start[i + 1]], keys[i], values[i], start)
            for i, (start, _) in enumerate(rows)
        ]
    )
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_what_is_written_is_read(num_tokens: int) -> None:
    cache = PagedKvCache(
        num_layers=2,
        num_blocks=3,
        num_kv_heads=2,
        block_size=4,
        head_dim=8,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    assert PagedKvCache.bytes_per_block(2, 2, 4, 8, torch.bfloat16) * 3 == sum(layer.nbytes for layer in cache.layers)
    table = np.array([2, 0])
    position = torch.arange(num_tokens)
    keys, values = torch.randn(2, num_tokens, 2, 8).bfloat16()
    cache.write(1, cache.write_index(torch.from_numpy(table)[position // 4], position % 4), keys, values)
    read_keys, read_values = cache.read(1, cache.read_index(torch.from_numpy(table)[None]), 1)
    assert torch.equal(read_keys[0, :, :num_tokens].transpose(0, 1), keys)
    assert torch.equal(read_values[0, :, :num_tokens].transpose(0, 1), values)
    assert not cache.layers[0].any()
