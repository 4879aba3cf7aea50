from collections.abc import Callable

import pytest
import torch

from vllm_model.kernels.logprobs import token_logprobs, token_logprobs_reference
from vllm_model.kernels.sampling import SamplerWorkspace

Check = Callable[..., None]
VOCABS = [100, 3000, pytest.param(151936, marks=pytest.mark.gpu)]
ROWS = 6


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logprobs(vocab: int, dtype: torch.dtype, device: str, check: Check) -> None:
    logits = (torch.randn(ROWS, vocab, device=device) * 3).to(dtype)
    logits[:, 1::7] = float("-inf")
    tokens = torch.randint(0, vocab // 7, (ROWS,), device=device).int() * 7
    workspace = SamplerWorkspace(ROWS, device)
    logprobs, ranks = token_logprobs(logits, tokens, workspace)
    expected, expected_ranks = token_logprobs_reference(logits.double(), tokens)
    check(logprobs, expected, 1e-5)
    assert torch.equal(ranks, expected_ranks.int())
    tokens[0] = -1
    logprobs, ranks = token_logprobs(logits, tokens, workspace)
    assert (logprobs[0], ranks[0]) == (0.0, 0)
    assert not workspace.counts.any()


def test_the_workspace_bounds_the_rows(device: str) -> None:
    logits = torch.zeros(2, 8, device=device)
    with pytest.raises(ValueError, match="2 rows"):
        token_logprobs(logits, torch.zeros(2, dtype=torch.int32, device=device), SamplerWorkspace(1, device))
