"""Sampling is exact, and depends on nothing but the request."""

import numpy as np
import pytest
import torch

from vllm_model.native import load_kernels
from vllm_model.sampler import _filter, sample, token_logprobs
from vllm_model.verifier import sampled_entries
from vllm_traits import BatchState, SamplingParams
from vllm_traits.conformance import batch_of


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def _kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test on the compiled kernels and on torch's operations."""
    if request.param == "torch":
        monkeypatch.setattr("vllm_model.sampler.load_kernels", lambda: None)
    elif load_kernels() is None:
        pytest.skip("there are no compiled kernels")


def draw(
    logits: torch.Tensor, params: SamplingParams, num: int, *, prompt: int = 1, history: list[int] | None = None
) -> np.ndarray:
    """``num`` tokens from one distribution, with seeds 0, 1, 2, ..."""
    tokens = history or [0]
    state = BatchState(num, 64, 16)
    state.token_ids[:, : len(tokens)] = tokens
    state.num_tokens[:] = len(tokens)
    state.num_prompt_tokens[:] = prompt
    state.seed[:] = np.arange(num)
    for name in ("temperature", "top_p", "min_p"):
        getattr(state, name)[:] = getattr(params, name)
    state.top_k[:] = max(params.top_k, 0)
    state.stop_token_ids = [(0,)] * num
    batch = batch_of(state, [(slot, len(tokens) - 1) for slot in range(num)], params=params)
    return sample(logits.repeat(num, 1), batch, sampled_entries(batch)).numpy()


def chi_squared(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Of observed counts; tokens without probability must not occur."""
    assert not counts[probabilities == 0].any()
    expected = probabilities[probabilities > 0] * counts.sum()
    return float(((counts[probabilities > 0] - expected) ** 2 / expected).sum())


LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, 1.5, -3.0])
HALF = np.exp(LOGITS.numpy() / 0.5)


def kept(keep: list[int], temperature: float) -> np.ndarray:
    weights = np.where(np.isin(np.arange(8), keep), np.exp(LOGITS.numpy() / temperature), 0.0)
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("params", "probabilities"),
    [
        (SamplingParams(temperature=1.0), kept(list(range(8)), 1.0)),
        (SamplingParams(temperature=0.5), kept(list(range(8)), 0.5)),
        (SamplingParams(temperature=2.0, top_k=3), kept([0, 6, 1], 2.0)),
        (SamplingParams(temperature=1.0, top_p=0.6), kept([0, 6], 1.0)),
        (SamplingParams(temperature=1.0, min_p=0.3), kept([0, 6, 1], 1.0)),
        (SamplingParams(temperature=1.0, top_k=4, top_p=0.85), kept([0, 6, 1], 1.0)),
        (SamplingParams(temperature=1.0, allowed_token_ids=[3, 7]), kept([3, 7], 1.0)),
    ],
)
def test_the_distribution_is_exact(params: SamplingParams, probabilities: np.ndarray) -> None:
    counts = np.bincount(draw(LOGITS, params, 20_000), minlength=8)
    degrees = int((probabilities > 0).sum()) - 1
    assert chi_squared(counts, probabilities) < degrees + 5 * (2 * degrees) ** 0.5  # five standard deviations


def kept_by(row: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """One row's filters, one after the other: bool ``[vocab_size]``."""
    weights = np.exp(row.astype(np.float64) - row.max())
    keep = weights >= min_p
    ordered = np.sort(row[keep])[::-1]
    if 0 < top_k < len(ordered):
        keep &= row >= ordered[top_k - 1]
    ordered = np.sort(weights[keep])[::-1]
    before = np.cumsum(ordered) - ordered
    keep &= weights >= ordered[before < top_p * ordered.sum()].min()
    return keep


def test_filters_keep_equal_logits_together() -> None:
    torch.manual_seed(2)
    logits = torch.randn(64, 50).mul(3).round(decimals=1)
    state = BatchState(64, 16, 16)
    state.top_k[:] = torch.randint(0, 8, (64,)).numpy()
    state.top_p[:] = torch.rand(64).mul(1.4).clamp(1e-9, 1).numpy()
    state.min_p[:] = (torch.rand(64) * 0.3 * (torch.rand(64) < 0.5)).numpy()
    ours = logits.clone()
    filtered = _filter(ours, state, np.arange(64, dtype=np.int32))
    assert filtered.tolist() == ((state.top_k > 0) | (state.top_p < 1) | (state.min_p > 0)).tolist()
    rows = zip(logits.numpy(), state.top_k.tolist(), state.top_p.tolist(), state.min_p.tolist(), strict=True)
    expected = np.stack([kept_by(*row) for row in rows])
    np.testing.assert_array_equal(ours.numpy() > -np.inf, expected)
    assert expected.sum(axis=1).max() > 20


def test_temperature_zero_takes_the_most_likely() -> None:
    assert set(draw(LOGITS, SamplingParams(temperature=0), 50)) == {0}


def test_penalties() -> None:
    flat = torch.zeros(8)
    history = [3, 3, 5, 5, 6]  # the first two are the prompt

    def best(**params: float) -> int:
        greedy = SamplingParams(temperature=0, **params)  # type: ignore[arg-type]
        return int(draw(flat + torch.tensor([0, 0, 0, 3.0, 0, 2.5, 2.0, 1.0]), greedy, 1, prompt=2, history=history)[0])

    assert best() == 3
    assert best(repetition_penalty=2.0) == 3  # 1.5 against 1.25 and 1.0 of the others seen, and 1.0
    assert best(repetition_penalty=4.0) == 7
    assert best(presence_penalty=-1.0) == 5  # only what was generated counts
    assert best(frequency_penalty=-0.4) == 5  # 2.5 + 2 * 0.4
    assert best(frequency_penalty=-0.2) == 3


def test_bias_and_minimum_length() -> None:
    assert draw(LOGITS, SamplingParams(temperature=0, logit_bias={7: 100.0}), 1)[0] == 7
    assert draw(LOGITS, SamplingParams(temperature=0, logit_bias={0: -100.0}), 1)[0] == 6
    assert draw(LOGITS, SamplingParams(temperature=0, min_tokens=1), 1)[0] == 6  # 0 would stop
    assert draw(LOGITS, SamplingParams(temperature=0, min_tokens=1), 1, history=[0, 1])[0] == 0


def test_logprobs_are_of_the_raw_logits() -> None:
    (entry,) = token_logprobs(LOGITS[None], [1], 2)
    expected = LOGITS.double().log_softmax(-1)
    assert entry.token_ids == [1, 0, 6]
    assert entry.rank == 3
    np.testing.assert_allclose(entry.logprobs, expected[[1, 0, 6]].numpy(), rtol=1e-5)
