"""The CUDA backend with all that it does, on a card or on Triton's interpreter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_traits import conformance

# What is left in memory that nobody reads overflows where a card would say nothing.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")


@pytest.mark.parametrize("law", conformance.LAWS, ids=lambda law: law.__name__)
def test_the_contract(law: Callable[..., None], make_backend: Callable[..., Any]) -> None:
    if law is conformance.seeds_decide and not torch.cuda.is_available():
        pytest.skip("hundreds of steps, which take the interpreter minutes")
    law(make_backend)
