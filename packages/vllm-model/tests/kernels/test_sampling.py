from collections.abc import Callable

import pytest
import torch

from vllm_model.kernels.sampling import SamplerWorkspace, filter_reference, sample, sample_reference
from vllm_model.noise import gumbel_noise

Check = Callable[..., None]
VOCABS = [100, 3000, pytest.param(151936, marks=pytest.mark.gpu)]
ROWS = 6


def parameters(device: str, **values: float) -> dict[str, torch.Tensor]:
    """Per-slot arrays of one value each, for ROWS + 2 slots."""
    kinds = {
        "temperature": torch.float32,
        "seed": torch.int64,
        "top_k": torch.int32,
        "top_p": torch.float32,
        "min_p": torch.float32,
    }
    return {name: torch.full((ROWS + 2,), values[name], dtype=kinds[name], device=device) for name in values}


def rows_of(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    slots = torch.randperm(ROWS + 2)[:ROWS].int().to(device)
    return slots, torch.randint(0, 1000, (ROWS,), dtype=torch.int32, device=device)


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_greedy_takes_the_first_of_the_greatest(vocab: int, dtype: torch.dtype, device: str) -> None:
    logits = torch.randn(ROWS, vocab, device=device).to(dtype)
    slots, positions = rows_of(device)
    slots[2] = -1
    p = parameters(device, temperature=0.0, seed=3)
    workspace = SamplerWorkspace(ROWS, device)
    # argmax of torch does not promise the first of equals
    expected = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1).int()
    expected[2] = -1
    for greedy in (True, False):
        out = torch.full((ROWS,), -7, dtype=torch.int32, device=device)
        assert torch.equal(sample(logits, slots, positions, **p, workspace=workspace, greedy=greedy, out=out), expected)
    assert not workspace.counts.any()


@pytest.mark.parametrize("vocab", VOCABS)
def test_noise_is_the_reference(vocab: int, device: str) -> None:
    """Equal logits: the token with the most noise wins, so the kernel's noise orders tokens as the reference's does."""
    slots, positions = rows_of(device)
    p = parameters(device, temperature=1.0, seed=0)
    p["seed"] = torch.randint(-(2**62), 2**62, (ROWS + 2,), device=device)
    logits = torch.zeros(ROWS, vocab, device=device)
    got = sample(logits, slots, positions, **p, workspace=SamplerWorkspace(ROWS, device)).long()
    noise = gumbel_noise(p["seed"][slots.long()][:, None], positions[:, None], torch.arange(vocab, device=device)[None])
    best = noise.amax(-1)
    assert (noise.gather(1, got[:, None])[:, 0] >= best - 1e-5).all()


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("spread", [0.0, 0.5, 5.0, 300.0])
def test_no_token_that_wins_is_passed_over(vocab: int, spread: float, device: str) -> None:
    """Most are decided by a part of their hash: whatever the temperature, what is drawn has the greatest sum."""
    slots, positions = rows_of(device)
    p = parameters(device, temperature=1.0, seed=0)
    p["temperature"] = torch.tensor([0.6, 1.0, 0.01, 40.0, 0.7, 2.0, 1e-3, 1.3], device=device)
    p["seed"] = torch.randint(-(2**62), 2**62, (ROWS + 2,), device=device)
    logits = (torch.randn(ROWS, vocab, device=device) * spread).bfloat16()
    workspace = SamplerWorkspace(ROWS, device)
    got = sample(logits, slots, positions, **p, workspace=workspace).long()
    by_row = {name: value[slots.long()][:, None] for name, value in p.items()}
    noise = gumbel_noise(by_row["seed"], positions[:, None], torch.arange(vocab, device=device)[None])
    total = logits.double() / by_row["temperature"].double() + noise
    best = total.amax(-1)
    assert (total.gather(1, got[:, None])[:, 0] >= best - 1e-5 - 3e-7 * best.abs()).all()
    assert (workspace.bounds == workspace.LEAST).all()


def test_without_noise_to_speak_of_the_first_of_the_greatest_is_drawn(device: str) -> None:
    """Also of infinite logits."""
    slots, positions = rows_of(device)
    p = parameters(device, temperature=0.5, seed=9)
    logits = torch.full((ROWS, 3000), float("-inf"), device=device)
    logits[0, [700, 2900]] = float("inf")
    logits[1, 2999] = -7.0
    logits[2, 2], logits[2, 1000] = 1e5, 1.1e5
    got = sample(logits, slots, positions, **p, workspace=SamplerWorkspace(ROWS, device))
    assert got[:3].tolist() == [700, 2999, 1000]
    assert ((got >= 0) & (got < 3000)).all()


CASES = [
    {"top_k": 0, "top_p": 1.0, "min_p": 0.0},
    {"top_k": 7, "top_p": 1.0, "min_p": 0.0},
    {"top_k": 1, "top_p": 0.5, "min_p": 0.0},
    {"top_k": 0, "top_p": 0.3, "min_p": 0.0},
    {"top_k": 0, "top_p": 1e-6, "min_p": 0.0},
    {"top_k": 0, "top_p": 1.0, "min_p": 0.2},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.01},
]


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_filters(vocab: int, case: dict[str, float], dtype: torch.dtype, device: str) -> None:
    slots, positions = rows_of(device)
    p = parameters(device, temperature=0.7, seed=5, **case)
    workspace = SamplerWorkspace(ROWS, device)
    logits = (torch.randn(ROWS, vocab, device=device) * 3).to(dtype)
    logits[:, ::5] = float("-inf")
    by_row = {name: value[slots.long()] for name, value in p.items()}
    keep = filter_reference(logits, by_row["temperature"], by_row["top_k"], by_row["top_p"], by_row["min_p"])
    got = sample(logits, slots, positions, **p, workspace=workspace)
    if case != CASES[0]:
        threshold = workspace.thresholds[:, None]
        kept = logits.float() / 0.7 >= threshold
        assert ((kept != keep).sum(-1) <= 1).all()  # a float32 sum may fall on the other side of top_p
    assert keep.gather(1, got.long()[:, None]).all()
    agree = sample_reference(logits, positions, **by_row) == got
    assert agree.sum() >= ROWS - 1  # two tokens within rounding of each other


def test_the_distribution_is_the_softmax(device: str) -> None:
    vocab, draws = 8, 2048 if device == "cuda" else 512
    logits = (2 * torch.rand(1, vocab, device=device)).repeat(draws, 1)  # so that no token is rare
    slots = torch.zeros(draws, dtype=torch.int32, device=device)
    p = parameters(device, temperature=0.8, seed=11)
    got = sample(logits, slots, torch.arange(draws, device=device), **p, workspace=SamplerWorkspace(draws, device))
    expected = (logits[0].double() / 0.8).softmax(-1).cpu() * draws
    counts = torch.bincount(got.long().cpu(), minlength=vocab).double()
    assert ((counts - expected) ** 2 / expected).sum() < 40  # 7 degrees of freedom


def test_a_row_is_the_same_alone_and_in_a_crowd(device: str) -> None:
    logits = torch.randn(ROWS, 3000, device=device)
    slots, positions = rows_of(device)
    p = parameters(device, temperature=1.0, seed=5, top_k=20, top_p=0.9, min_p=0.0)
    workspace = SamplerWorkspace(ROWS, device)
    crowd = sample(logits, slots, positions, **p, workspace=workspace).clone()
    for row in range(ROWS):
        one = slice(row, row + 1)
        assert torch.equal(sample(logits[one], slots[one], positions[one], **p, workspace=workspace), crowd[one])


def test_many_rows_are_drawn_like_few(device: str) -> None:
    """They run in another launch shape."""
    rows = 33
    logits, slots = torch.randn(rows, 1500, device=device), torch.arange(rows, dtype=torch.int32, device=device)
    temperature, seed = torch.full((rows,), 0.7, device=device), torch.arange(rows, device=device)
    workspace = SamplerWorkspace(rows, device)
    many = sample(logits, slots, slots, temperature, seed, workspace).clone()
    for start in range(0, rows, 11):
        few = slice(start, start + 11)
        assert torch.equal(sample(logits[few], slots[few], slots[few], temperature, seed, workspace), many[few])


def test_refusals(device: str) -> None:
    workspace = SamplerWorkspace(1, device)
    logits = torch.zeros(2, 8, device=device)
    slots, positions = rows_of(device)
    p = parameters(device, temperature=1.0, seed=0)
    with pytest.raises(ValueError, match="2 rows"):
        sample(logits, slots[:2], positions[:2], **p, workspace=workspace)
    with pytest.raises(ValueError, match="come together"):
        sample(logits[:1], slots[:1], positions[:1], **p, workspace=workspace, top_k=slots)
