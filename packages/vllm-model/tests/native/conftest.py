"""Each variant of the compiled kernels that this processor runs."""

from collections.abc import Iterator
from ctypes import CDLL

import pytest

from vllm_model.native import load_variant
from vllm_model.native.build import VARIANTS, library_path, machine


@pytest.fixture(params=list(VARIANTS.get(machine(), ["none"])))
def kernels(request: pytest.FixtureRequest) -> Iterator[CDLL]:
    """One variant, on two threads."""
    name: str = request.param
    if name == "none":
        pytest.skip(f"there are no kernels for {machine()}")
    if not library_path(name).exists():
        pytest.skip(f"{name} is not built")
    library = load_variant(name)
    if library is None:
        pytest.skip(f"this processor does not run {name}")
    library.set_threads(2)
    yield library
    library.set_threads(1)
