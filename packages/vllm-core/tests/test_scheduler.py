"""What the scheduler decides, where the outputs would be the same either way."""

from collections.abc import Callable
from typing import Any

import pytest

from vllm_core import Engine, EngineConfig, SamplingParams
from vllm_core.proposer import DraftRows
from vllm_core.scheduler import STEPS_TO_ONE_MORE
from vllm_core.simulation import KnowingProposer
from vllm_traits import LAST_SAMPLED, Batch, StructuredOutputsParams
from vllm_traits.errors import BackendError, BackendOutOfMemoryError
from vllm_traits.fake_backend import FakeBackend, expected_tokens


def engine_of(backend: FakeBackend | None = None, proposers: Any = (), **settings: Any) -> Engine:
    settings = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "block_size": 4,
        "num_blocks": 64,
        "max_model_len": 128,
    } | settings
    return Engine(backend or FakeBackend(), proposers=proposers, config=EngineConfig(**settings), clock=lambda: 0.0)


def greedy(max_tokens: int, **others: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **others)


def run(engine: Engine, after_each: Callable[[], None] = lambda: None) -> int:
    steps = 0
    while engine.has_unfinished_requests():
        engine.step()
        engine.check_integrity()
        assert isinstance(engine.target_model, FakeBackend)
        assert not engine.target_model.violations
        after_each()
        steps += 1
        assert steps < 2000
    return steps


def test_after_out_of_memory_one_more_is_let_in_now_and_then() -> None:
    fails = [BackendOutOfMemoryError("full")]
    engine = engine_of(FakeBackend(fail_result=lambda batch: fails.pop() if fails else None), max_num_seqs=6, num_blocks=400)
    outputs = [engine.add_request(str(i), [i], greedy(127)) for i in range(6)]
    seen = []
    run(engine, lambda: seen.append(len(engine.scheduler.running)))
    first = seen.index(3)
    # Half of them at once, then one more after so many steps, and again.
    assert seen[first : first + STEPS_TO_ONE_MORE] == [3] * STEPS_TO_ONE_MORE
    assert seen[first + STEPS_TO_ONE_MORE + 1] == 4
    assert max(seen[first:]) <= 6
    assert engine.scheduler.num_preemptions == 3
    assert [output.outputs[0].token_ids for output in outputs] == [expected_tokens([i], 127, 256) for i in range(6)]


def test_all_may_run_again_when_the_memory_has_held_for_long() -> None:
    fails = [BackendOutOfMemoryError("full")]
    engine = engine_of(FakeBackend(fail_result=lambda batch: fails.pop() if fails else None), max_num_seqs=2, num_blocks=200)
    for i in range(8):
        engine.add_request(str(i), [i], greedy(40))
    seen = []
    run(engine, lambda: seen.append(len(engine.scheduler.running)))
    assert seen[:STEPS_TO_ONE_MORE].count(1) >= STEPS_TO_ONE_MORE - 4
    assert 2 in seen[STEPS_TO_ONE_MORE:]
    assert max(seen) == 2


@pytest.mark.parametrize("overlap", [False, True])
def test_what_breaks_deep_in_a_long_prompt_is_given_up(overlap: bool) -> None:
    """The chunks before it succeed again each time, which does not count as getting past it."""

    def fail(batch: Batch) -> Exception | None:
        return BackendError("poison") if 255 in batch.token_ids.tolist() else None

    engine = engine_of(
        FakeBackend(fail_result=fail, supports_overlap=overlap), max_num_batched_tokens=8, enable_prefix_caching=False
    )
    good = engine.add_request("good", [1, 2], greedy(30))
    bad = engine.add_request("bad", [*range(20), 255, 3], greedy(5))
    run(engine)
    assert (bad.outputs[0].finish_reason, bad.outputs[0].stop_reason) == ("abort", "backend_error")
    assert good.outputs[0].token_ids == expected_tokens([1, 2], 30, 256)


@pytest.mark.parametrize("overlap", [False, True])
def test_failures_with_progress_between_them_are_no_reason_to_give_up(overlap: bool) -> None:
    engine = engine_of(
        FakeBackend(fail_result=lambda batch: BackendError("x") if batch.step_id % 4 == 0 else None, supports_overlap=overlap)
    )
    outputs = [engine.add_request(str(i), [i] * 5, greedy(40)) for i in range(3)]
    run(engine)
    assert [output.outputs[0].token_ids for output in outputs] == [expected_tokens([i] * 5, 40, 256) for i in range(3)]
    assert engine.scheduler.num_preemptions == 0


class Recording(KnowingProposer):
    """Always right, and notes what was wanted of it."""

    def __init__(self) -> None:
        super().__init__("right", 256, None)  # type: ignore[arg-type] - nothing is drawn
        self.wanted: list[tuple[int, int]] = []

    def propose(self, rows: DraftRows) -> list[list[int]]:
        known = rows.state.num_tokens[rows.slots].tolist()
        self.wanted += zip(known, rows.num_wanted.tolist(), strict=True)
        return super().propose(rows)

    def _guess(self, rows: DraftRows, slot: int, most: int) -> list[int]:
        return self.truth(rows, slot, most)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("block_size", [2, 3, 4])
def test_guesses_get_the_blocks_that_they_need(block_size: int, overlap: bool) -> None:
    proposer = Recording()
    engine = engine_of(
        FakeBackend(max_draft_tokens=4, supports_overlap=overlap),
        [proposer],
        max_draft_tokens=4,
        block_size=block_size,
        num_blocks=100,
    )
    output = engine.add_request("a", [1, 2, 3], greedy(30))
    run(engine)
    limit = 33
    assert proposer.wanted
    assert all(wanted == min(4, limit - known - 1) for known, wanted in proposer.wanted), proposer.wanted
    assert output.outputs[0].token_ids == expected_tokens([1, 2, 3], 30, 256)
    assert len(proposer.wanted) == 6  # five tokens a step, after the first
    assert output.metrics.num_draft_tokens == output.metrics.num_accepted_tokens == sum(wanted for _, wanted in proposer.wanted)


def test_guesses_take_no_more_than_is_free_and_push_nobody_out() -> None:
    proposer = Recording()
    engine = engine_of(
        FakeBackend(max_draft_tokens=4), [proposer], max_draft_tokens=4, block_size=2, num_blocks=10, max_num_seqs=2
    )
    outputs = [engine.add_request(str(i), [i, 5, 6], greedy(8)) for i in range(2)]
    run(engine)
    assert engine.scheduler.num_preemptions == 0
    assert [output.outputs[0].token_ids for output in outputs] == [expected_tokens([i, 5, 6], 8, 256) for i in range(2)]


def test_guesses_fit_into_what_is_left_of_the_budget() -> None:
    proposer = Recording()
    engine = engine_of(
        FakeBackend(max_draft_tokens=4), [proposer], max_draft_tokens=4, max_num_batched_tokens=4, max_num_seqs=2
    )
    for i in range(2):
        engine.add_request(str(i), [i], greedy(12))
    run(engine)
    first = [wanted for known, wanted in proposer.wanted if known == 1]
    assert first[0] == 2  # of four, two are the known tokens


def test_the_last_token_waits_for_no_guess() -> None:
    proposer = Recording()
    engine = engine_of(FakeBackend(max_draft_tokens=4, supports_overlap=True), [proposer], max_draft_tokens=4)
    engine.add_request("b", [1, 2], greedy(2))
    engine.step()
    engine._drain()
    (sequence,) = engine.scheduler.running
    assert sequence.num_tokens + 1 == sequence.limit
    assert not engine.scheduler.wants_guesses()
    run(engine)


def test_a_prompt_that_fills_the_pool_runs() -> None:
    engine = engine_of(num_blocks=4)
    output = engine.add_request("a", [7] * 16, greedy(1))
    assert run(engine) == 1
    assert output.outputs[0].token_ids == expected_tokens([7] * 16, 1, 256)


def test_two_that_fit_exactly_run_together() -> None:
    engine = engine_of(num_blocks=4, enable_prefix_caching=False)
    for i in range(2):
        engine.add_request(str(i), [i] * 8, greedy(1))
    assert run(engine) == 1


def test_cached_blocks_that_are_free_count_once() -> None:
    """A hit on a free block takes it out of the free ones: what is needed besides must still be there."""
    engine = engine_of(num_blocks=4)
    engine.add_request("a", [3] * 12, greedy(1))
    run(engine)
    again = engine.add_request("b", [3] * 16, greedy(1))
    assert run(engine) == 1
    assert again.num_cached_tokens == 12


def test_chunks_fill_the_budget_in_order() -> None:
    lens: list[list[int]] = []
    engine = engine_of(
        FakeBackend(on_submit=lambda batch: lens.append(batch.query_lens.tolist())),
        max_num_batched_tokens=10,
        long_prefill_token_threshold=6,
        enable_prefix_caching=False,
    )
    engine.add_request("a", [1], greedy(6))
    engine.step()
    for i in range(3):
        engine.add_request(str(i), [i] * 7, greedy(1))
    run(engine)
    # One for the stream, six for the first prompt, three left for the second; then what is left of them, and the third.
    assert lens[:3] == [[1], [1, 6, 3], [1, 1, 4, 4]]


def test_resetting_needs_an_engine_at_rest() -> None:
    engine = engine_of(FakeBackend(supports_overlap=True))
    engine.add_request("a", [1] * 9, greedy(2))
    assert engine.reset_prefix_cache()
    engine.step()
    assert not engine.reset_prefix_cache()
    engine.abort("a")
    assert not engine.reset_prefix_cache()
    run(engine)
    assert engine.scheduler.pool.num_cached in (0, 2)
    assert engine.reset_prefix_cache()
    assert engine.scheduler.pool.num_cached == 0


def test_work_is_there_while_somebody_waits_or_runs() -> None:
    engine = engine_of()
    assert not engine.scheduler.has_work()
    engine.add_request("a", [1], greedy(2))
    assert engine.scheduler.has_work()
    engine.step()
    assert engine.scheduler.num_waiting == 0
    assert engine.scheduler.has_work()
    run(engine)
    assert not engine.scheduler.has_work()


def test_steps_overlap_in_steady_decode() -> None:
    late: list[int] = []
    engine = engine_of(
        FakeBackend(supports_overlap=True, on_submit=lambda batch: late.append(int((batch.token_ids == LAST_SAMPLED).sum())))
    )
    for i in range(3):
        engine.add_request(str(i), [i, i], greedy(10))
    run(engine)
    assert late == [0] + [3] * 9  # every step but the first goes out before the tokens of the one before are read


def test_a_row_under_a_grammar_waits_for_its_token_alone() -> None:
    late: list[tuple[int, int]] = []

    def note(batch: Batch) -> None:
        late.append((batch.num_rows, int((batch.token_ids == LAST_SAMPLED).sum())))

    engine = engine_of(FakeBackend(supports_overlap=True, supports_structured_outputs=True, on_submit=note))
    free = engine.add_request("free", [1, 2], greedy(9))
    held = engine.add_request("held", [1, 2], greedy(4, structured_outputs=StructuredOutputsParams(regex="x")))
    run(engine)
    assert late == [(2, 0), (1, 1), (2, 1), (1, 1), (2, 1), (1, 1), (2, 1), (1, 1), (1, 1)]
    assert free.outputs[0].token_ids == expected_tokens([1, 2], 9, 256)
    assert held.outputs[0].token_ids == expected_tokens([1, 2], 4, 256, structured=True)


@pytest.mark.parametrize("aging", [0, 2])
def test_an_old_request_of_a_worse_priority_does_not_push_out_a_better_one(aging: int) -> None:
    """With aging it is first in line by now, and still only waits for the next place."""
    engine = engine_of(max_num_seqs=1, scheduling_policy="priority", priority_aging=aging)
    engine.add_request("old", [1], greedy(3), priority=1)
    for i in range(4):
        engine.add_request(str(i), [2, i], greedy(3), priority=0)
    run(engine)
    assert engine.scheduler.num_preemptions == 0


@pytest.mark.parametrize("priority", [1, 0])
def test_who_comes_to_be_first_by_age_pushes_out_nobody_of_a_priority_as_good(priority: int) -> None:
    engine = engine_of(max_num_seqs=1, scheduling_policy="priority", priority_aging=4)
    engine.add_request("old", [1], greedy(2), priority=9)
    for i in range(5):
        engine.add_request(str(i), [1], greedy(2))
        engine.abort(str(i))
    engine.add_request("young", [2], greedy(5), priority=0)
    engine.step()
    (running,) = engine.scheduler.running
    assert running.request.request_id == "young"
    engine.set_priority("old", priority)
    head = engine.scheduler._waiting.head()
    assert head is not None
    assert head < running
    run(engine)
    assert engine.scheduler.num_preemptions == 0


@pytest.mark.parametrize("gone", ["0", "1", "2"])
def test_a_failed_step_is_undone_for_all_who_are_still_there(gone: str) -> None:
    fails = {3, 4}
    engine = engine_of(
        FakeBackend(fail_result=lambda batch: BackendError("x") if batch.step_id in fails else None, supports_overlap=True)
    )
    outputs = {str(i): engine.add_request(str(i), [i, 9], greedy(8)) for i in range(3)}
    for _ in range(3):
        engine.step()
    engine.abort(gone)
    run(engine)
    for name, output in outputs.items():
        if name != gone:
            assert output.outputs[0].token_ids == expected_tokens([int(name), 9], 8, 256)


def test_a_stop_token_counts_from_min_tokens_on() -> None:
    engine = engine_of(FakeBackend(vocab_size=1))
    output = engine.add_request("a", [0], greedy(8, min_tokens=3, stop_token_ids=[0]))
    run(engine)
    assert (output.outputs[0].token_ids, output.outputs[0].finish_reason) == ([0, 0, 0], "stop")


def test_the_budget_is_shared_by_all_guesses() -> None:
    proposer = Recording()
    engine = engine_of(FakeBackend(max_draft_tokens=4), [proposer], max_draft_tokens=4)
    outputs = [engine.add_request(str(i), [i, 2, 3], greedy(31)) for i in range(4)]
    run(engine)
    assert all(wanted == min(4, 34 - known - 1) for known, wanted in proposer.wanted), proposer.wanted
    assert [output.outputs[0].token_ids for output in outputs] == [expected_tokens([i, 2, 3], 31, 256) for i in range(4)]


def test_only_the_priority_policy_heeds_priorities() -> None:
    engine = engine_of(scheduling_policy="lpm", max_num_seqs=1)
    engine.add_request("before", [5] * 9, greedy(1))
    run(engine)
    engine.add_request("old", [1] * 9, greedy(3), priority=0)
    engine.add_request("young", [5] * 9, greedy(3), priority=5)
    engine.step()
    (running,) = engine.scheduler.running
    assert running.request.request_id == "young"
    run(engine)
    assert engine.scheduler.num_preemptions == 0
