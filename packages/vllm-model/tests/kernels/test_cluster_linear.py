from collections.abc import Callable

import pytest
import torch

from vllm_model.kernels._launch import rows_with_room, with_room
from vllm_model.kernels.cluster_linear import ClusterConfig, has_clusters, shared_bytes, source
from vllm_model.kernels.linear import LinearConfig, Scaled, linear, linear_reference, linear_residual
from vllm_model.kernels.linear_table import Config

Check = Callable[..., None]
EPS = 1e-6
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9 and has_clusters(torch.device("cuda"))
on_hopper = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU and torch for CUDA")]

ALONE, PAIR = ClusterConfig(64, 32, 2, 3, 1), ClusterConfig(64, 64, 2, 2, 2)
FOUR, EIGHT = ClusterConfig(64, 32, 1, 4, 4), ClusterConfig(64, 64, 1, 2, 8)
TALL, TALL_PAIR = ClusterConfig(128, 32, 2, 3, 1), ClusterConfig(128, 96, 1, 4, 2)


def weights(n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(n, k, device="cuda") * k**-0.5).to(dtype)


def rows_of(rows: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """With room behind them, in which there is NaN."""
    x = with_room(torch.empty(0, dtype=dtype, device="cuda"), rows, k)
    torch.as_strided(x, (rows_with_room(x, 64), k), (k, 1)).fill_(float("nan"))
    return x.copy_(torch.randn(rows, k, device="cuda"))


class TestOnTheCard:
    pytestmark = on_hopper

    @pytest.mark.parametrize("config", [ALONE, PAIR, FOUR, EIGHT, TALL, TALL_PAIR])
    @pytest.mark.parametrize(("rows", "n", "k"), [(64, 256, 512), (1, 40, 64), (50, 1000, 1088), (130, 96, 192)])
    @pytest.mark.parametrize(("silu", "parts"), [(False, 0), (True, 0), (False, 4), (True, 37)])
    def test_product(self, config: ClusterConfig, rows: int, n: int, k: int, silu: bool, parts: int, check: Check) -> None:
        for dtype in (torch.bfloat16, torch.float16):
            x, weight = rows_of(rows, k, dtype), weights(n * (2 if silu else 1), k, dtype)
            norm_weight = torch.randn(k, device="cuda").to(dtype) if parts else None
            given: torch.Tensor | Scaled = x
            if norm_weight is not None:
                squares = torch.stack([each.float().square().sum(1) for each in x.tensor_split(parts, dim=1)], 1)
                given = Scaled((x.float() * norm_weight.float()).to(dtype), squares.contiguous())
            expected = linear_reference(
                x.double(), weight.double(), None if norm_weight is None else norm_weight.double(), EPS, silu
            )
            for pdl in (False, True):
                out = torch.full((rows, n), float("nan"), dtype=dtype, device="cuda")
                torch.cuda.synchronize()  # weights are read before the kernel ahead has ended
                assert linear(given, weight, config, silu=silu, eps=EPS, out=out, pdl=pdl) is out
                check(out, expected, 1e-2)

    @pytest.mark.parametrize("config", [ALONE, PAIR, FOUR, EIGHT, TALL])
    @pytest.mark.parametrize(("rows", "n", "k"), [(64, 256, 512), (1, 64, 64), (33, 1000, 3072), (130, 96, 192)])
    def test_residual(self, config: ClusterConfig, rows: int, n: int, k: int, check: Check) -> None:
        x, weight = rows_of(rows, k, torch.bfloat16), weights(n, k, torch.bfloat16)
        residual, norm_weight = rows_of(rows, n, torch.bfloat16).clone(), torch.randn(n, device="cuda").bfloat16()
        total = residual.double() + linear_reference(x.double(), weight.double())
        torch.cuda.synchronize()
        scaled = linear_residual(x, weight, residual, norm_weight, config, pdl=True)
        check(residual, total)
        check(scaled.x, residual.double() * norm_weight.double())
        check(scaled.squares.sum(1), residual.double().square().sum(1), 1e-5)

    def test_a_graph_of_both_kinds_of_products_follows_its_inputs(self, check: Check) -> None:
        """A product by clusters reads what one of Triton's left for its norm, and the other way round."""
        x, residual = rows_of(40, 512, torch.bfloat16), rows_of(40, 512, torch.bfloat16)
        first, second = weights(512, 512, torch.bfloat16), weights(1024, 512, torch.bfloat16)
        norm_weight = torch.randn(512, device="cuda").bfloat16()
        tritons = LinearConfig(64, 32, 64, 4, 3)
        pairs: list[tuple[Config, Config]] = [(FOUR, tritons), (tritons, ALONE), (PAIR, FOUR)]
        for one, two in pairs:
            stream = residual.clone()

            def run(stream: torch.Tensor = stream, one: Config = one, two: Config = two) -> torch.Tensor:
                scaled = linear_residual(x, first, stream, norm_weight, one, pdl=True)
                return linear(scaled, second, two, silu=True, eps=EPS, pdl=True)

            run()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                got = run()
            for _ in range(3):
                x.copy_(torch.randn(40, 512, device="cuda"))
                stream.copy_(residual)
                graph.replay()
                total = residual.double() + x.double() @ first.double().T
                check(got, linear_reference(total, second.double(), norm_weight.double(), EPS, True), 2e-2)

    def test_refusals(self) -> None:
        x = torch.zeros(4, 96, dtype=torch.bfloat16, device="cuda")
        with pytest.raises(ValueError, match="no product by clusters"):
            linear(x, torch.zeros(32, 96, dtype=torch.bfloat16, device="cuda"), ALONE)
        with pytest.raises(ValueError, match="no product by clusters"):
            linear(x[:, :64], torch.zeros(30, 64, dtype=torch.bfloat16, device="cuda"), ALONE)
        with pytest.raises(ValueError, match="no product by clusters"):
            linear_residual(x[:, :64].contiguous(), torch.zeros(96, 64, dtype=x.dtype, device="cuda"), x, x[0], TALL_PAIR)


def test_the_program_says_what_it_is() -> None:
    text = source(ClusterConfig(64, 96, 2, 4, 2), torch.float16, True, True, False)
    assert "m64n48k16.f32.f16.f16" in text  # gate and up are products of their own
    assert "#define CLUSTER 2\n" in text
    assert shared_bytes(ClusterConfig(64, 96, 2, 4, 2)) < 227 * 1024


def test_rows_have_room_for_whole_tiles() -> None:
    x = with_room(torch.empty(0), 65, 8)
    assert x.shape == (65, 8)
    assert x.is_contiguous()
    assert x.untyped_storage().nbytes() == 128 * 8 * 4
    assert rows_with_room(x, 64) == 65  # off the card what is behind them is not read
