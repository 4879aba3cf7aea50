import pytest
import torch

from vllm_model.kernels.accept import accept
from vllm_model.verifier import accept_guesses


@pytest.mark.parametrize("width", [2, 5, 9])
def test_it_accepts_what_the_reference_does(width: int, device: str) -> None:
    """Rows of any length with any number of guesses, beside known tokens; half of the guesses are right."""
    rows = 13
    slots = torch.randperm(rows + 3)[:rows].int()
    counts = torch.randint(0, width + 1, (rows,)).int()
    slots[4] = -1
    counts[5] = 0
    first = (torch.rand(rows) * (width + 1 - counts)).int()
    sampled = torch.randint(0, 50, (rows, width)).int()
    tokens = torch.randint(50, 99, (rows, width)).int()
    expected = torch.full((rows, width), -1, dtype=torch.int32)
    last = torch.full((rows + 3,), -7, dtype=torch.int32)
    expected_last = last.clone()
    for row, (start, count) in enumerate(zip(first.tolist(), counts.tolist(), strict=True)):
        for j in range(start, start + count - 1):
            if torch.rand(()) < 0.7:
                tokens[row, j + 1] = sampled[row, j]
        if count and slots[row] >= 0:
            mine, guesses = sampled[row, start : start + count], tokens[row, start + 1 : start + count]
            expected[row, :count] = accept_guesses(mine[None], guesses[None])[0]
            expected_last[slots[row]] = expected[row][expected[row] >= 0][-1]
    last = last.to(device)
    got = accept(*(each.to(device) for each in (sampled, tokens, slots, first, counts)), last)
    assert torch.equal(got.cpu(), expected)
    assert torch.equal(last.cpu(), expected_last)
