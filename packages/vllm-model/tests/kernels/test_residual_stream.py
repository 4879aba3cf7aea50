import itertools
from collections.abc import Callable

import pytest
import torch

from vllm_model.cuda.residual_stream import ResidualStream
from vllm_model.decoder import Linear
from vllm_model.kernels.linear import LinearConfig, LinearWorkspace

OURS = LinearConfig(16, 16, 16, num_stages=2)


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("choice", list(itertools.product([None, OURS], repeat=4)))
def test_every_choice_gives_the_same_layer(
    choice: tuple[LinearConfig | None, ...],
    adds: bool,
    device: str,
    check: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two products that read the stream and two that add to it, each by the library or our own, against float64."""
    monkeypatch.setattr("vllm_model.cuda.residual_stream.ADDING_ROWS", 1 if adds else 6)
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    rows, width, inner = 5, 48, 32

    def make(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, device=device) * shape[-1] ** -0.5).to(dtype)

    first, second, third, fourth = make(width, width), make(width, width), make(2 * inner, width), make(width, inner)
    one, two = (make(width, width)[0] * width**0.5 for _ in range(2))
    x = make(rows, width) * width**0.5

    def normed(total: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-6) * weight.double()

    total = x.double()
    for _ in range(2):
        total = total + normed(total, one) @ first.double().T @ second.double().T
        gate, up = (normed(total, two) @ third.double().T).chunk(2, dim=-1)
        total = total + (torch.nn.functional.silu(gate) * up) @ fourth.double().T

    def choose(rows: int, n: int, k: int, silu: bool) -> LinearConfig | None:
        assert rows == len(x)
        return choice[{(width, width, False): index, (inner, width, True): 2, (width, inner, False): 3}[n, k, silu]]

    stream = ResidualStream(x, eps=1e-6, choose=choose, workspace=LinearWorkspace(1 << 16, device), thin_rows=0, pdl=False)
    for _ in range(2):
        index = 0
        read = stream.read(Linear(first), one)
        index = 1
        stream.add(read, Linear(second), two)
        stream.add(stream.read(Linear(third), two, silu=True), Linear(fourth), one)
    check(stream.total(), total, 1e-2)
