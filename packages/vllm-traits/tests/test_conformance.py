"""The fake backend keeps the laws that it helps to check, and broken ones are caught."""

from collections.abc import Callable

import numpy as np
import pytest

from vllm_traits import Batch, conformance
from vllm_traits.batch import BatchOutput
from vllm_traits.fake_backend import FakeBackend, expected_tokens


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("law", conformance.LAWS, ids=lambda law: law.__name__)
def test_fake_backend_conforms(law: Callable[[conformance.MakeBackend], None], overlap: bool) -> None:
    law(lambda: FakeBackend(supports_overlap=overlap, max_draft_tokens=3))
    law(lambda: FakeBackend(supports_overlap=overlap))


def test_fake_backend_says_what_is_expected() -> None:
    driver = conformance.Driver(FakeBackend())
    driver.place(0, [1, 2, 3], [4, 5])
    assert driver.generate(0, 20) == expected_tokens([1, 2, 3], 20, 256)
    assert driver.output(0) == expected_tokens([1, 2, 3], 20, 256)


class _ReordersRows(FakeBackend):
    def _run(self, batch: Batch) -> BatchOutput:
        output = super()._run(batch)
        return BatchOutput(token_ids=output.token_ids[::-1].copy())


def test_a_backend_that_mixes_up_rows_is_caught() -> None:
    with pytest.raises(AssertionError):
        conformance.neighbours_do_not_matter(_ReordersRows)


class _Believes(FakeBackend):
    """Takes every guess for right."""

    def _run(self, batch: Batch) -> BatchOutput:
        output = super()._run(batch)
        for row in np.flatnonzero(batch.num_draft).tolist():
            num_draft, end = int(batch.num_draft[row]), int(batch.query_start[row + 1])
            output.token_ids[row, :num_draft] = batch.token_ids[end - num_draft : end]
            output.token_ids[row, num_draft] = 0
        return output


class _StopsEarly(FakeBackend):
    """Leaves out the token after the last right guess."""

    def _run(self, batch: Batch) -> BatchOutput:
        output = super()._run(batch)
        for row in np.flatnonzero(batch.num_draft).tolist():
            num = int((output.token_ids[row] >= 0).sum())
            output.token_ids[row, max(1, num - 1) :] = -1
        return output


@pytest.mark.parametrize("broken", [_Believes, _StopsEarly])
def test_a_backend_that_verifies_wrongly_is_caught(broken: type[FakeBackend]) -> None:
    with pytest.raises(AssertionError):
        conformance.guesses_change_nothing(lambda: broken(max_draft_tokens=3))
