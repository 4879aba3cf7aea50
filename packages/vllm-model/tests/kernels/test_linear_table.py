import pytest
import torch

from vllm_model.kernels.cluster_linear import ClusterConfig, shared_bytes
from vllm_model.kernels.linear import LinearConfig
from vllm_model.kernels.linear_table import choose_linear, has_table

SHARED_MEMORY = 227 * 1024
QWEN3 = {
    "0.6B": [(4096, 1024, False), (1024, 2048, False), (3072, 1024, True), (1024, 3072, False)],
    "8B": [(6144, 4096, False), (4096, 4096, False), (12288, 4096, True), (4096, 12288, False)],
    "14B": [(7168, 5120, False), (5120, 5120, False), (17408, 5120, True), (5120, 17408, False)],
    "Llama 70B": [(10240, 8192, False), (8192, 8192, False), (28672, 8192, True), (8192, 28672, False)],
}
PARTS = 1 << 22


def bytes_of(config: LinearConfig, silu: bool) -> int:
    """Of the load pipeline."""
    return (config.block_m + config.block_n * (2 if silu else 1)) * config.block_k * 2 * config.num_stages


@pytest.mark.parametrize("model", QWEN3)
@pytest.mark.parametrize("rows", [3, 16, 33, 64, 65, 96, 97, 128, 129, 256])
@pytest.mark.parametrize("clusters", [True, False])
def test_every_shape_fits_the_card_and_the_workspace(model: str, rows: int, clusters: bool) -> None:
    for n, k, silu in QWEN3[model]:
        config = choose_linear(rows, n, k, silu, clusters=clusters)
        if isinstance(config, ClusterConfig):
            assert clusters
            assert shared_bytes(config) <= SHARED_MEMORY
            assert silu or config.block_n in (16, 32, 64, 128)  # it may add to the residual stream
        elif config is not None:
            assert bytes_of(config, silu) < SHARED_MEMORY
            tiles = -(-rows // config.block_m) * -(-n // config.block_n)
            assert config.split_k == 1 or tiles * config.split_k * config.block_m * config.block_n * (1 + silu) <= PARTS


def test_small_products_are_ours_and_long_steps_are_the_librarys() -> None:
    assert all(choose_linear(64, *product) for product in QWEN3["0.6B"])
    assert not any(choose_linear(rows, *product) for rows in (257, 4096) for product in QWEN3["0.6B"] + QWEN3["8B"])
    assert not any(choose_linear(16, *product) for product in QWEN3["8B"])
    assert not any(choose_linear(64, *product, clusters=False) for product in QWEN3["8B"])


def test_clusters_take_only_what_their_copies_can_read() -> None:
    assert isinstance(choose_linear(64, 1024, 3072, False), ClusterConfig)
    assert isinstance(choose_linear(64, 1024, 3080, False), LinearConfig)
    assert isinstance(choose_linear(64, 1020, 3072, False), LinearConfig)
    assert choose_linear(64, 12288, 4100, True) is None


def test_other_machines_have_no_table() -> None:
    assert not has_table(torch.device("cpu"))
