"""The fake backend keeps the laws that it helps to check, and a broken one is caught."""

from collections.abc import Callable

import pytest

from vllm_traits import Batch, conformance
from vllm_traits.batch import BatchOutput
from vllm_traits.errors import BackendError
from vllm_traits.fake_backend import FakeBackend, expected_tokens


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("law", conformance.LAWS, ids=lambda law: law.__name__)
def test_fake_backend_conforms(law: Callable[[conformance.MakeBackend], None], overlap: bool) -> None:
    law(lambda: FakeBackend(supports_overlap=overlap))


def test_fake_backend_says_what_is_expected() -> None:
    driver = conformance.Driver(FakeBackend())
    driver.place(0, [1, 2, 3], [4, 5])
    assert driver.generate(0, 20) == expected_tokens([1, 2, 3], 20, 256)


class _ReordersRows(FakeBackend):
    def _run(self, batch: Batch) -> BatchOutput:
        output = super()._run(batch)
        return BatchOutput(token_ids=output.token_ids[::-1].copy())


def test_a_backend_that_mixes_up_rows_is_caught() -> None:
    with pytest.raises(AssertionError):
        conformance.neighbours_do_not_matter(_ReordersRows)


def test_a_wrong_block_table_is_noticed() -> None:
    driver = conformance.Driver(FakeBackend())
    driver.place(0, list(range(20)), [4, 5])
    driver.generate(0, 1)
    driver.state.block_tables[0, 0] = 7
    with pytest.raises(BackendError, match="another prefix"):
        driver.generate(0, 2)
