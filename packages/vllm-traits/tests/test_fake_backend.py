"""The fake backend's arithmetic, its memory of who wrote what, its rules, its clock and its faults."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vllm_traits import LAST_SAMPLED, SamplingParams, SeqId, StepId, StructuredOutputsParams
from vllm_traits.batch import Batch, BatchState
from vllm_traits.conformance import Driver, batch_of
from vllm_traits.errors import BackendError, BackendOutOfMemoryError
from vllm_traits.fake_backend import FakeBackend, Fault, VirtualDevice, expected_tokens, fast_tokens
from vllm_traits.fake_model import EMPTY_TAG, mix, mix_array


def test_mixing_arrays_is_mixing_each() -> None:
    tags, tokens = np.array([EMPTY_TAG, 0, 2**63 - 1]), np.array([0, 5, 10**9])
    assert mix_array(tags, tokens).tolist() == [
        mix(tag, token) for tag, token in zip(tags.tolist(), tokens.tolist(), strict=True)
    ]


def test_parameters_decide() -> None:
    plain = expected_tokens([1, 2], 30, 12)
    assert expected_tokens([1, 2], 30, 12, seed=3) == plain
    assert expected_tokens([1, 2], 30, 12, temperature=1, seed=3) != plain
    assert not any(token % 2 for token in expected_tokens([1, 2], 30, 12, structured=True))
    penalised = expected_tokens([1, 2], 12, 12, penalised=True)
    assert sorted(penalised) == list(range(12))
    held = expected_tokens([1, 2], 30, 12, min_tokens=20, stop_token_ids=(plain[0], plain[1]))
    assert not {plain[0], plain[1]} & set(held[:20])
    assert expected_tokens([1], 9, 1, penalised=True) == [0] * 9


@pytest.mark.parametrize(
    ("params", "expectation"),
    [
        ({"temperature": 0.7, "seed": 9}, {"temperature": 0.7, "seed": 9}),
        ({"temperature": 0, "presence_penalty": 1.0}, {"penalised": True}),
        ({"temperature": 0, "repetition_penalty": 1.1}, {"penalised": True}),
        ({"temperature": 0, "structured_outputs": StructuredOutputsParams(regex="x")}, {"structured": True}),
        ({"temperature": 0, "min_tokens": 5}, {"min_tokens": 5}),
    ],
)
def test_every_parameter_is_as_expected(params: dict[str, Any], expectation: dict[str, Any]) -> None:
    driver = Driver(FakeBackend(vocab_size=20))
    driver.place(0, [1, 2, 3], [4, 5], SamplingParams(**params))
    assert driver.generate(0, 18) == expected_tokens([1, 2, 3], 18, 20, **expectation)


def test_a_backend_without_a_cache_verifies_guesses() -> None:
    backend = FakeBackend(keep_kv=False, max_draft_tokens=3)
    state = BatchState(4, 64, 4)
    backend.initialize(state, num_blocks=1 << 40, max_num_batched_tokens=64)
    truth = fast_tokens(np.array([[7], [8]]), np.arange(5, 9), 256)
    state.seed[:2] = 7, 8
    state.num_tokens[:2] = 5
    batch = batch_of(state, [(0, 4), (1, 4)])
    assert backend.submit(batch).result().token_ids.tolist() == truth[:, :1].tolist()
    guesses = [*truth[0, :2].tolist(), (int(truth[0, 2]) + 1) % 256]
    batch = dataclasses.replace(
        batch,
        token_ids=np.array([0, *guesses, 0], np.int32),
        query_start=np.array([0, 4, 5], np.int32),
        num_draft=np.array([3, 0], np.int32),
    )
    tokens = backend.submit(batch).result().token_ids
    assert tokens.tolist() == [[*truth[0, :3].tolist(), -1], [int(truth[1, 0]), -1, -1, -1]]


# --- what it notices ---


def place(driver: Driver, slot: int, length: int, blocks: list[int], **params: Any) -> None:
    driver.place(slot, list(range(length)), blocks, SamplingParams(temperature=0, **params))


def stale_block(driver: Driver) -> None:
    driver.state.block_tables[0, 0] = 7
    driver.run([driver.rest(0)])


def foreign_block(driver: Driver) -> None:
    place(driver, 1, 20, [4, 9])
    driver.state.token_ids[1, 0] = 99
    driver.run([driver.rest(1)])
    driver.run([driver.rest(0)])


def wrong_token(driver: Driver) -> None:
    slot, tokens = driver.rest(0)
    driver.run([(slot, [tokens[0] + 1])])


def outside_the_vocabulary(driver: Driver) -> None:
    driver.state.token_ids[0, 20] = 256
    driver.run([driver.rest(0)])


def same_slot_twice(driver: Driver) -> None:
    driver.run([driver.rest(0), driver.rest(0)])


def too_few_blocks(driver: Driver) -> None:
    driver.state.num_blocks[0] = 1
    driver.run([driver.rest(0)])


def block_twice(driver: Driver) -> None:
    driver.state.block_tables[0, 1] = 4
    driver.run([driver.rest(0)])


def over_budget(driver: Driver) -> None:
    driver.backend._rules.max_num_batched_tokens = 1  # type: ignore[attr-defined]
    place(driver, 1, 3, [8])
    driver.run([driver.rest(1)])


def nothing_sampled_yet(driver: Driver) -> None:
    place(driver, 1, 1, [8])
    driver.run([(1, [LAST_SAMPLED])])


def grammar_without_its_token(driver: Driver) -> None:
    place(driver, 1, 1, [8], structured_outputs=StructuredOutputsParams(regex="x"))
    driver.run([driver.rest(1)])
    driver.run([(1, [LAST_SAMPLED])])


def too_many_guesses(driver: Driver) -> None:
    driver.run([driver.rest(0)], {0: [1, 2, 3]})


def write_to_a_shared_block(driver: Driver) -> None:
    place(driver, 1, 3, [5])
    driver.run([driver.rest(1), driver.rest(0)])


def slot_changed_unsaid(driver: Driver) -> None:
    batch = batch_of(driver.state, [(0, 20)], step=99)
    none = np.zeros(0, np.int32)
    driver.backend.submit(dataclasses.replace(batch, seq_ids=(SeqId(5),), changed_slots=none))


def sampled_in_the_middle(driver: Driver) -> None:
    driver.state.num_tokens[0] += 1
    batch = batch_of(driver.state, [(0, 20)], step=99)
    driver.state.num_tokens[0] += 1
    driver.backend.submit(batch)


def lopsided_arrays(driver: Driver) -> None:
    driver.backend.submit(dataclasses.replace(batch_of(driver.state, [(0, 20)], step=99), num_computed=np.zeros(2, np.int64)))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (stale_block, "block 7 holds another prefix at position 0: nobody wrote it"),
        (foreign_block, "block 4 holds another prefix .*sequence 1 wrote token 99 of its position 0 in step 2"),
        (wrong_token, "where the state has"),
        (outside_the_vocabulary, "not all of them in the vocabulary"),
        (same_slot_twice, "share a slot"),
        (too_few_blocks, "has 1 blocks"),
        (block_twice, r"block table \[4, 4\]"),
        (over_budget, "over the budget of 1"),
        (nothing_sampled_yet, "sampled last for"),
        (grammar_without_its_token, "must not run a token that is on its way"),
        (too_many_guesses, "2 are allowed"),
        (write_to_a_shared_block, "writes block 5, which sequences"),
        (slot_changed_unsaid, "was not said to have left"),
        (sampled_in_the_middle, "samples at 22, with 23 known"),
        (lopsided_arrays, "num_computed is int64"),
    ],
)
def test_a_mistake_is_named(mistake: Callable[[Driver], None], message: str) -> None:
    backend = FakeBackend(max_draft_tokens=2, supports_structured_outputs=True)
    driver = Driver(backend)
    place(driver, 0, 20, [4, 5])
    driver.run([driver.rest(0)])
    assert not backend.violations
    with pytest.raises(BackendError, match=message):
        mistake(driver)
    assert backend.violations


def test_what_may_be_read_is_asked() -> None:
    asked = []

    def may_read(reader: int, writer: int, step: int) -> bool:
        asked.append((reader, writer, step))
        return False

    driver = Driver(FakeBackend(may_read=may_read))
    place(driver, 0, 20, [4, 5])
    driver.run([driver.rest(0)])
    place(driver, 1, 20, [4, 6])
    driver._computed[1] = 16
    with pytest.raises(BackendError, match="sequence 1 reads what sequence 0 wrote in step 1"):
        driver.run([driver.rest(1)])
    assert asked == [(1, 0, 1)]


# --- steps under way ---


def overlapped() -> tuple[FakeBackend, BatchState, Any]:
    """A backend with a step under way: sequence 0 in slot 0 with blocks 4 and 5."""
    backend = FakeBackend(supports_overlap=True, device=VirtualDevice(base=1.0, per_token=0.5))
    driver = Driver(backend)
    place(driver, 0, 5, [4, 5])
    place(driver, 1, 3, [6])
    return backend, driver.state, backend.submit(batch_of(driver.state, [(0, 0)]))


def as_sequence(batch: Batch, seq: int, **changes: Any) -> Batch:
    return dataclasses.replace(batch, step_id=StepId(2), seq_ids=(SeqId(seq),), **changes)


def test_a_slot_is_not_reused_before_the_fence() -> None:
    backend, state, handle = overlapped()
    state.num_tokens[0] = 3
    again = as_sequence(batch_of(state, [(0, 0)]), 7)
    with pytest.raises(BackendError, match="slot 0 changes hands while step 1 names it"):
        backend.submit(again)
    assert any("has the slot of sequence 0 in step 1, which is under way" in each for each in backend.violations)
    handle.result()
    backend.submit(dataclasses.replace(again, step_id=StepId(3)))


def test_a_block_is_not_reused_before_the_fence() -> None:
    backend, state, handle = overlapped()
    state.block_tables[1, 0] = 5
    with pytest.raises(BackendError, match="writes block 5, which sequence 0 of step 1 names, which is under way"):
        backend.submit(batch_of(state, [(1, 0)], step=2))
    backend.device.advance(3.5)  # type: ignore[union-attr]
    assert handle.done()
    backend.submit(batch_of(state, [(1, 0)], step=3))


def test_a_token_on_its_way_is_run() -> None:
    backend, state, first = overlapped()
    batch = batch_of(state, [(0, 4)], step=2)
    late = dataclasses.replace(
        batch,
        token_ids=np.array([LAST_SAMPLED], np.int32),
        num_computed=np.array([5], np.int32),
        changed_slots=np.zeros(0, np.int32),
    )
    second = backend.submit(late)
    with pytest.raises(BackendError, match="sampled last"):
        backend.submit(dataclasses.replace(late, step_id=StepId(3)))
    assert not first.done()
    tokens = [int(second.result().token_ids[0, 0]), int(first.result().token_ids[0, 0])]
    assert tokens[::-1] == expected_tokens(range(5), 2, 256)


def test_steps_run_one_after_the_other_on_their_own_clock() -> None:
    backend, state, first = overlapped()
    device = backend.device
    assert device is not None
    second = backend.submit(batch_of(state, [(1, 0)], step=2))
    assert device.clock() == 0.0
    second.result()
    assert device.now == (1.0 + 5 * 0.5) + (1.0 + 3 * 0.5)
    assert first.done()
    assert not backend._under_way


# --- faults ---


@pytest.mark.parametrize(("fault", "error"), [(Fault.RESULT, BackendError), (Fault.OUT_OF_MEMORY, BackendOutOfMemoryError)])
def test_what_a_failed_step_wrote_is_spoilt(fault: Fault, error: type[Exception]) -> None:
    backend = FakeBackend(fault=lambda batch: fault if batch.step_id == 1 else None)
    driver = Driver(backend)
    place(driver, 0, 20, [4, 5])
    with pytest.raises(error):
        driver.run([driver.rest(0)])
    driver._computed[0] = 19
    with pytest.raises(BackendError, match="in step 1, which failed"):
        driver.run([driver.rest(0)])
    driver._computed[0] = 0
    driver.run([driver.rest(0)])
    assert driver.output(0) == expected_tokens(range(20), 1, 256)


def test_what_follows_on_a_failed_step_is_rubbish() -> None:
    backend, state, _ = overlapped()
    backend.fault = lambda batch: Fault.RESULT
    failing = backend.submit(batch_of(state, [(1, 0)], step=2))
    backend.fault = None
    state.token_ids[0, 5] = expected_tokens(range(5), 1, 256)[0]
    state.num_tokens[0] = 6
    after = backend.submit(dataclasses.replace(batch_of(state, [(0, 5)], step=3), changed_slots=np.zeros(0, np.int32)))
    with pytest.raises(BackendError):
        failing.result()
    assert after.result().token_ids.tolist() != [expected_tokens(range(6), 1, 256)]


def test_a_step_that_could_not_start_has_told_nothing() -> None:
    backend = FakeBackend(fault=lambda batch: Fault.SUBMIT if batch.step_id == 2 else None)
    driver = Driver(backend)
    place(driver, 0, 3, [4])
    driver.run([driver.rest(0)])
    place(driver, 0, 3, [5])
    fresh = as_sequence(batch_of(driver.state, [(0, 0)], step=2), 9)
    with pytest.raises(BackendError, match="could not be started"):
        backend.submit(fresh)
    with pytest.raises(BackendError, match="was not said to have left"):
        backend.submit(dataclasses.replace(fresh, step_id=StepId(3), changed_slots=np.zeros(0, np.int32)))


@pytest.mark.parametrize(
    ("fault", "tokens"),
    [
        (Fault.FEW_ROWS, [[-1]]),
        (Fault.FLAT, [-1, -1]),
        (Fault.MISSING, [[-1], [-1]]),
        (Fault.OUTSIDE, [[-1], [256]]),
        (Fault.SURPLUS, [[-1, -1], [*expected_tokens(range(3), 1, 256), 0]]),
    ],
)
def test_outputs_can_be_wrong(fault: Fault, tokens: list[Any]) -> None:
    backend = FakeBackend(fault=lambda batch: fault)
    driver = Driver(backend)
    place(driver, 0, 3, [4])
    place(driver, 1, 3, [5])
    batch = batch_of(driver.state, [(0, 0), (1, 0)])
    half = dataclasses.replace(
        batch,
        token_ids=np.array([0, 0, 1, 2], np.int32),
        query_start=np.array([0, 1, 4], np.int32),
        sample=np.array([False, True]),
    )
    shown = backend.submit(half).result().token_ids
    right = expected_tokens(range(3), 1, 256)
    assert shown.tolist() == ([[right[0]]] if fault is Fault.FEW_ROWS else [-1, *right] if fault is Fault.FLAT else tokens)


def test_late_and_dead() -> None:
    faults = {1: Fault.LATE, 2: Fault.DIE}
    backend = FakeBackend(fault=lambda batch: faults.get(batch.step_id), device=VirtualDevice(base=1.0, per_token=0.0))
    driver = Driver(backend)
    place(driver, 0, 3, [4])
    driver.run([driver.rest(0)])
    assert backend.device is not None
    assert backend.device.now == 1000.0
    for _ in range(2):
        with pytest.raises(BackendError, match="gone"):
            driver.run([driver.rest(0)])


def test_a_draft_may_write_again_what_is_the_same_and_nothing_else() -> None:
    backend = FakeBackend(is_draft=True)
    driver = Driver(backend)
    place(driver, 0, 20, [4, 5])
    driver.run([driver.rest(0)])
    place(driver, 1, 20, [4, 6])
    driver.run([driver.rest(1), driver.rest(0)])
    assert driver.output(0)[:1] == driver.output(1)
    place(driver, 1, 20, [4, 6])
    driver.state.token_ids[1, 3] = 77
    with pytest.raises(BackendError, match="holds another prefix at position 3"):
        driver.run([driver.rest(1), driver.rest(0)])
