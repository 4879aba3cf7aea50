from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from vllm_model.kernels.library_prefill import LEAST, can_use_library, library_prefill, library_prefill_reference, padded


def test_lengths_are_rounded_up_to_few() -> None:
    assert [padded(length) for length in (1, 256, 257, LEAST, LEAST + 1)] == [256, 256, 512, LEAST, LEAST + 256]


def test_it_is_for_half_precision_on_the_card() -> None:
    assert not can_use_library(torch.device("cpu"), torch.bfloat16, 128)
    if torch.cuda.is_available():
        assert not can_use_library(torch.device("cuda"), torch.float32, 128)


def test_the_reference_is_causal_attention(device: str) -> None:
    q, k, v = (torch.randn(40, heads, 16, device=device, dtype=torch.float64) for heads in (6, 2, 2))
    expected = F.scaled_dot_product_attention(
        *(part[:33].transpose(0, 1)[None] for part in (q, k, v)), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(library_prefill_reference(q, k, v, 33), expected[0].transpose(0, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("length", [LEAST, LEAST + 1, 3000, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(16, 8, 128), (32, 8, 128), (9, 3, 64), (4, 4, 64)])
def test_on_the_card(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, length: int, device: str, check: Callable[..., None]
) -> None:
    """Heads as parts of one QKV, whatever lies past the prompt's end."""
    if not can_use_library(torch.device(device), dtype, head_dim):
        pytest.skip("the library's attention is for Hopper")
    qkv = torch.randn(padded(length), heads + 2 * kv_heads, head_dim, device=device).to(dtype)
    qkv[length:] *= 100
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    out = library_prefill(q, k, v, length)
    check(out, library_prefill_reference(q.float(), k.float(), v.float(), length), 1e-2)
