"""Drawn tokens are those of the noise in ``noise.py``."""

from ctypes import CDLL

import numpy as np
import pytest
import torch

from vllm_model.native import draw_tokens
from vllm_model.noise import gumbel_noise
from vllm_model.sampler import _filter
from vllm_traits.batch import BatchState


def draw(kernels: CDLL, logits: torch.Tensor, temperature: float, seed: int = 0, position: int = 0) -> list[int]:
    """All rows alike."""
    rows = len(logits)
    return draw_tokens(
        kernels,
        logits,
        np.full(rows, temperature, np.float32),
        np.full(rows, seed, np.int64),
        np.full(rows, position, np.int64),
    ).tolist()


@pytest.mark.parametrize("vocab_size", [1, 2, 7, 15, 16, 17, 97, 1000, 49_152, 151_669])
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_tokens_follow_the_noise(kernels: CDLL, vocab_size: int, spread: float) -> None:
    rng = np.random.default_rng(vocab_size)
    rows = 12
    temperature = np.array([0, 1e-3, 0.05, 0.3, 0.7, 1, 1.5, 2, 10, 1e3, 1e6, 0], np.float32)
    seeds = rng.integers(-(2**63), 2**63 - 1, rows)
    seeds[:4] = [0, -1, -(2**63), 2**63 - 1]
    positions = rng.integers(0, 1 << 20, rows)
    wider = torch.from_numpy(rng.normal(size=(rows, vocab_size + 5)).astype(np.float32)) * spread
    logits = wider[:, :vocab_size]  # rows need not touch
    wider[:, vocab_size:] = 1e9
    tokens = draw_tokens(kernels, logits, temperature, seeds, positions)
    hot = torch.from_numpy(temperature)[:, None] > 0
    scaled = logits / torch.from_numpy(np.where(temperature > 0, temperature, 1))[:, None]
    noise = gumbel_noise(torch.from_numpy(seeds)[:, None], torch.from_numpy(positions)[:, None], torch.arange(vocab_size)[None])
    scores = torch.where(hot, scaled + noise, logits)
    best, first = scores.max(dim=1)
    # Logarithms may differ in their last place: only tokens that are so close may change places.
    behind = (best - scores.gather(1, tokens[:, None])[:, 0]) / best.abs().clamp(min=1)
    assert ((tokens == first) | (hot[:, 0] & (behind < 1e-6))).all()
    assert (tokens == first).sum() >= rows - 1


@pytest.mark.parametrize("vocab_size", [40, 48, 53])
def test_ties_take_the_first(kernels: CDLL, vocab_size: int) -> None:
    logits = torch.zeros(vocab_size, vocab_size)
    for row in range(vocab_size):
        logits[row, row:] = 1.0
    assert draw(kernels, logits, 0.0) == list(range(vocab_size))
    assert draw(kernels, -logits[1:] - 5, 0.0) == [0] * (vocab_size - 1)


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 0.5, 1e30])
def test_what_is_forbidden_is_not_drawn(kernels: CDLL, temperature: float) -> None:
    """One token left of each row, wherever it is; of a row that leaves none the first, as torch's argmax."""
    logits = torch.full((37, 37), -torch.inf)
    logits.fill_diagonal_(-3.0)
    for seed in range(3):
        assert draw(kernels, logits, temperature, seed) == list(range(37))
    assert draw(kernels, torch.full((2, 37), -torch.inf), temperature) == [0, 0]


def test_no_temperature_is_too_small(kernels: CDLL) -> None:
    """Logits divided by it may be beyond float32."""
    logits = torch.tensor([[-5.0, 1.0, 3.0, 2.0]])
    for below in (0, 4):
        assert draw(kernels, logits - below, 1e-38) == [2]


def test_no_rows(kernels: CDLL) -> None:
    assert draw(kernels, torch.empty(0, 5), 1.0) == []


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("vocab_size", [5, 16, 37, 1000, 20000])
def test_filters_leave_what_torch_leaves(kernels: CDLL, vocab_size: int, spread: float) -> None:
    """Ties, outliers, tokens that are forbidden, and filters of all strengths, alone and together."""
    rng = np.random.default_rng(vocab_size)
    rows = 30
    logits = torch.from_numpy((rng.standard_normal((rows, vocab_size)) * spread).astype(np.float32))
    logits[::3] = logits[::3].round()
    logits[::4, 0] += 60
    logits[::5, vocab_size // 2 :] = -torch.inf
    temperature = (rng.random(rows) * 2 + 0.01).astype(np.float32)
    min_p = np.where(rng.random(rows) < 0.4, rng.random(rows) * 0.3, 0).astype(np.float32)
    top_p = np.where(rng.random(rows) < 0.6, rng.random(rows) * 0.98 + 0.01, 1).astype(np.float32)
    top_k = np.where(rng.random(rows) < 0.5, rng.integers(1, 2 * vocab_size, rows), 0).astype(np.int32)
    seeds, positions = rng.integers(-(2**62), 2**62, rows), rng.integers(0, 10**5, rows)
    tokens = draw_tokens(kernels, logits, temperature, seeds, positions, min_p=min_p, top_p=top_p, top_k=top_k)
    state = BatchState(rows, 1, 1)
    state.min_p[:], state.top_p[:], state.top_k[:] = min_p, top_p, top_k
    scaled = logits / torch.from_numpy(temperature)[:, None]
    _filter(scaled, state, np.arange(rows, dtype=np.int32))
    noise = gumbel_noise(torch.from_numpy(seeds)[:, None], torch.from_numpy(positions)[:, None], torch.arange(vocab_size)[None])
    assert torch.equal(tokens, (scaled + noise).argmax(dim=-1))
