from collections.abc import Callable

import pytest
import torch

from vllm_model.cuda.decode_steps import GRAPH_SIZES
from vllm_model.cuda.residual_stream import ResidualStream
from vllm_model.decoder import Linear
from vllm_model.kernels.library_linear import Algorithm, Product, has_algorithms, library_linear
from vllm_model.kernels.library_table import ALGORITHMS, choose_algorithm
from vllm_model.kernels.linear import LinearWorkspace

Check = Callable[..., None]
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
on_such_a_card = [pytest.mark.gpu, pytest.mark.skipif(not has_algorithms(HERE), reason="needs the card of the table")]
NONSENSE = Algorithm(9999, tile=12345, stages=678, split_k=3)
TYPES = [torch.bfloat16, torch.float16]


def make(rows: int, n: int, k: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two matrices, and their product in float64."""
    x, weight = torch.randn(rows, k, device=device).to(dtype), (torch.randn(n, k, device=device) * k**-0.5).to(dtype)
    return x, weight, x.double() @ weight.double().T


@pytest.mark.parametrize("dtype", [*TYPES, torch.float32])
@pytest.mark.parametrize("algorithm", [None, NONSENSE])
def test_what_cannot_be_computed_so_is_torchs(
    algorithm: Algorithm | None, dtype: torch.dtype, device: str, check: Check
) -> None:
    x, weight, expected = make(5, 24, 48, dtype, device)
    check(library_linear(x, weight, algorithm), expected)
    wide = torch.full((5, 40), float("nan"), dtype=dtype, device=device)
    assert library_linear(x, weight, algorithm, out=wide[:, 8:32]).data_ptr() == wide[:, 8:].data_ptr()
    check(wide[:, 8:32], expected)
    assert wide[:, :8].isnan().all()
    assert wide[:, 32:].isnan().all()


def test_other_machines_have_no_algorithms() -> None:
    assert not has_algorithms(torch.device("cpu"))


def test_the_table_is_of_rows_that_steps_have() -> None:
    for rows, n, k in ALGORITHMS:
        assert rows in (*GRAPH_SIZES, 512, 1024, 2048, 4096)
        assert n % 8 == k % 8 == 0


def test_the_table_knows_its_own_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALGORITHMS, (8, 24, 48), NONSENSE)
    assert choose_algorithm(8, 24, 48) is NONSENSE
    assert choose_algorithm(9, 24, 48) is None
    assert choose_algorithm(8, 48, 24) is None


def test_the_residual_stream_asks_the_table(monkeypatch: pytest.MonkeyPatch, device: str, check: Check) -> None:
    """And gets the same numbers of an algorithm that there is not."""
    asked = []

    def ask(*shape: int) -> Algorithm:
        asked.append(shape)
        return NONSENSE

    monkeypatch.setattr("vllm_model.cuda.residual_stream.choose_algorithm", ask)
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    residual, first, normed_first = make(5, 32, 48, dtype, device)
    second = make(5, 48, 32, dtype, device)[1]
    stream = ResidualStream(
        residual,
        eps=0.0,
        choose=lambda rows, n, k, silu: None,
        workspace=LinearWorkspace(0, device),
        thin_rows=0,
        pdl=False,
    )
    one = torch.ones(48, dtype=dtype, device=device)
    read = stream.read(Linear(first), one)
    check(read, normed_first / residual.double().square().mean(1, keepdim=True).sqrt(), 1e-2)
    stream.add(read, Linear(second), one)
    check(stream.total(), residual.double() + read.double() @ second.double().T, 1e-2)
    stream.add(read, Linear(second, one), one)
    assert asked == [(5, 32, 48), (5, 48, 32)]  # none with a bias


class TestOnTheCard:
    pytestmark = on_such_a_card

    def possible(self, product: Product, most: int = 6) -> list[Algorithm]:
        """Some that cuBLASLt takes for a product, found by asking: of as many kinds as there are."""
        found: dict[int, Algorithm] = {}
        for index in range(128):
            for tile in (15, 17, 18, 20, 21, 24):  # 64 to 256 wide
                for stages in (0, *range(13, 25), 35, 36):
                    algorithm = Algorithm(index, tile, stages)
                    try:
                        product.configured(algorithm)
                    except RuntimeError:
                        continue
                    found.setdefault(index, algorithm)
        assert found
        return list(found.values())[-most:]

    @pytest.mark.parametrize("dtype", TYPES)
    @pytest.mark.parametrize(("rows", "n", "k"), [(1, 64, 128), (13, 1000, 584), (64, 512, 512), (515, 264, 1032)])
    def test_results(self, rows: int, n: int, k: int, dtype: torch.dtype, device: str, check: Check) -> None:
        x, weight, expected = make(rows, n, k, dtype, device)
        wide_x = torch.full((rows, k + 16), float("nan"), dtype=dtype, device=device)
        wide_x[:, 8 : k + 8] = x
        x = wide_x[:, 8 : k + 8]
        wide = torch.full((rows, n + 16), float("nan"), dtype=dtype, device=device)
        out = wide[:, 8 : n + 8]
        product = Product(x.device, dtype, rows, n, k, x.stride(0), out.stride(0))
        launched = 0
        for algorithm in self.possible(product):
            out.fill_(float("nan"))
            launched += product.launch(product.configured(algorithm), x, weight, out)
            assert library_linear(x, weight, algorithm, out=out) is out
            check(out, expected, 1e-2)
            check(library_linear(x, weight, algorithm), expected, 1e-2)
            assert wide[:, :8].isnan().all()
            assert wide[:, n + 8 :].isnan().all()
        assert launched

    def test_a_graph_follows_its_inputs(self, device: str, check: Check) -> None:
        x, weight, _ = make(24, 512, 1024, torch.bfloat16, device)
        product = Product(x.device, x.dtype, 24, 512, 1024, 1024, 512)
        algorithm = self.possible(product)[-1]
        library_linear(x, weight, algorithm)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = library_linear(x, weight, algorithm)
        for _ in range(3):
            x.copy_(torch.randn(24, 1024, device=device))
            graph.replay()
            check(got, x.double() @ weight.double().T, 1e-2)

    def test_every_entry_of_the_table_is_taken_and_right(self, device: str, check: Check) -> None:
        for (rows, n, k), algorithm in ALGORITHMS.items():
            x, weight, _ = make(rows, n, k, torch.bfloat16, device)
            out = torch.full((rows, n), float("nan"), dtype=x.dtype, device=device)
            product = Product(x.device, x.dtype, rows, n, k, k, n)
            assert product.launch(product.configured(algorithm), x, weight, out), (rows, n, k)
            check(out, x.float() @ weight.float().T, 1e-2)
