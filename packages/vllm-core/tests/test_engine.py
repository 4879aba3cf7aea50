"""What a user of the engine sees, told with a backend whose answers are known."""

from typing import Any

import pytest

from vllm_core import Engine, EngineConfig, RequestOutput, SamplingParams
from vllm_traits import Batch
from vllm_traits.batch import TokenLogprobs
from vllm_traits.errors import (
    BackendError,
    BackendOutOfMemoryError,
    ContextLengthError,
    EngineDeadError,
    InvalidRequestError,
    QueueFullError,
    RequestTooLargeError,
)
from vllm_traits.fake_backend import FakeBackend, expected_tokens

GREEDY = SamplingParams(temperature=0, max_tokens=8)


def engine_of(backend: FakeBackend | None = None, **settings: Any) -> Engine:
    settings = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "block_size": 4,
        "num_blocks": 64,
        "max_model_len": 64,
    } | settings
    return Engine(backend or FakeBackend(), config=EngineConfig(**settings))


def run(engine: Engine) -> int:
    steps = 0
    while engine.has_unfinished_requests():
        engine.step()
        engine.check_integrity()
        steps += 1
        assert steps < 1000
    return steps


def tokens_of(output: RequestOutput, index: int = 0) -> list[int]:
    assert output.finished
    return output.outputs[index].token_ids


@pytest.mark.parametrize("overlap", [False, True])
def test_one_request(overlap: bool) -> None:
    engine = engine_of(FakeBackend(supports_overlap=overlap))
    output = engine.add_request("a", [1, 2, 3], GREEDY)
    run(engine)
    assert tokens_of(output) == expected_tokens([1, 2, 3], 8, 256)
    assert output.outputs[0].finish_reason == "length"
    assert output.metrics.finished_time is not None


def test_many_run_together() -> None:
    engine = engine_of()
    outputs = [engine.add_request(str(i), [i, i + 1], GREEDY) for i in range(8)]
    assert run(engine) == 8
    for i, output in enumerate(outputs):
        assert tokens_of(output) == expected_tokens([i, i + 1], 8, 256)


def test_a_long_prompt_never_stalls_running_streams() -> None:
    engine = engine_of(max_num_batched_tokens=8)
    short = engine.add_request("short", [1], SamplingParams(temperature=0, max_tokens=20))
    engine.step()
    engine.add_request("long", list(range(50)), GREEDY)
    for expected in range(2, 10):
        engine.step()
        assert len(short.outputs[0].token_ids) == expected
    run(engine)


def test_end_of_sequence_and_stop_tokens() -> None:
    tokens = expected_tokens([5], 30, 256)
    cut = tokens.index(tokens[3]) + 1

    engine = engine_of(FakeBackend(eos_token_ids=(tokens[3],)))
    params = SamplingParams(temperature=0, max_tokens=30)
    by_eos = engine.add_request("eos", [5], params)
    ignoring = engine.add_request("ignore", [5], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    run(engine)
    assert tokens_of(by_eos) == tokens[:cut]
    assert (by_eos.outputs[0].finish_reason, by_eos.outputs[0].stop_reason) == ("stop", None)
    assert tokens_of(ignoring) == tokens

    engine = engine_of()
    own = engine.add_request("own", [5], SamplingParams(temperature=0, max_tokens=30, stop_token_ids=[tokens[3]]))
    run(engine)
    assert tokens_of(own) == tokens[:cut]
    assert own.outputs[0].stop_reason == tokens[3]


def test_the_context_ends_a_request() -> None:
    engine = engine_of(max_model_len=16)
    output = engine.add_request("a", [1] * 10, SamplingParams(temperature=0, max_tokens=None))
    run(engine)
    assert tokens_of(output) == expected_tokens([1] * 10, 6, 256)
    assert output.outputs[0].finish_reason == "length"


def test_choices_share_the_prompt_and_differ_by_seed() -> None:
    engine = engine_of()
    prompt = list(range(17))
    output = engine.add_request("a", prompt, SamplingParams(n=3, seed=7, max_tokens=6))
    run(engine)
    assert tokens_of(output, 0) == expected_tokens(prompt, 6, 256, temperature=1, seed=7)
    assert len({tuple(choice.token_ids) for choice in output.outputs}) == 3
    assert engine.scheduler.prefix_cache.stats.num_hit_tokens == 2 * 16  # four full blocks, computed once
    assert output.num_cached_tokens == 0


def test_prefixes_that_arrive_together_are_computed_once() -> None:
    computed = 0

    def count(batch: Batch) -> None:
        nonlocal computed
        computed += batch.num_tokens

    engine = engine_of(FakeBackend(on_submit=count))
    prefix = list(range(40))
    one = SamplingParams(temperature=0, max_tokens=1)
    outputs = [engine.add_request(str(i), [*prefix, i], one) for i in range(5)]
    run(engine)
    assert computed == 41 + 4
    assert [output.num_cached_tokens for output in outputs] == [0, 40, 40, 40, 40]


def test_a_second_turn_hits_the_first() -> None:
    engine = engine_of()
    first = engine.add_request("1", list(range(10)), GREEDY)
    run(engine)
    history = [*range(10), *tokens_of(first), 3, 4]
    second = engine.add_request("2", history, GREEDY)
    run(engine)
    assert second.num_cached_tokens == 16  # of the 17 tokens that were computed, the full blocks
    assert tokens_of(second) == expected_tokens(history, 8, 256)


def test_salts_and_resets_hide_the_cache() -> None:
    engine = engine_of()
    prompt = list(range(12))
    hits = []
    for request_id, salt in (("1", None), ("2", "x"), ("3", "x"), ("4", None)):
        output = engine.add_request(request_id, prompt, GREEDY, cache_salt=salt)
        engine.step()
        assert not engine.reset_prefix_cache()
        run(engine)
        hits.append(output.num_cached_tokens)
    assert hits == [0, 0, 8, 8]
    assert engine.reset_prefix_cache()
    after = engine.add_request("5", prompt, GREEDY)
    run(engine)
    assert after.num_cached_tokens == 0


def test_a_small_pool_preempts_and_loses_nothing() -> None:
    engine = engine_of(num_blocks=12)
    params = SamplingParams(temperature=0, max_tokens=20)
    outputs = [engine.add_request(str(i), [i] * 9, params) for i in range(4)]
    run(engine)
    assert engine.scheduler.num_preemptions > 0
    assert sum(output.metrics.num_preemptions for output in outputs) == engine.scheduler.num_preemptions
    for i, output in enumerate(outputs):
        assert tokens_of(output) == expected_tokens([i] * 9, 20, 256)


def test_priority_runs_first_and_is_preempted_last() -> None:
    engine = engine_of(max_num_seqs=1, scheduling_policy="priority")
    order = []
    for request_id, priority in (("low", 5), ("high", -1), ("middle", 2)):
        engine.add_request(request_id, [1], SamplingParams(max_tokens=1), priority=priority)
    while engine.has_unfinished_requests():
        order += [output.request_id for output in engine.step()]
    assert order == ["high", "middle", "low"]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_abort_in_every_state(overlap: bool, steps: int) -> None:
    engine = engine_of(FakeBackend(supports_overlap=overlap), max_num_seqs=2)
    outputs = {str(i): engine.add_request(str(i), [i] * 6, GREEDY) for i in range(4)}
    for _ in range(steps):
        engine.step()
    assert engine.abort("0")
    assert not engine.abort("0")
    assert engine.abort("3")
    assert outputs["0"].finished
    silent = len(outputs["0"].outputs[0].token_ids)
    run(engine)
    assert len(outputs["0"].outputs[0].token_ids) == silent
    assert outputs["0"].outputs[0].finish_reason == "abort"
    for i in (1, 2):
        assert tokens_of(outputs[str(i)]) == expected_tokens([i] * 6, 8, 256)
    assert engine.scheduler.pool.num_free == 64


def test_one_choice_stopped_by_a_string_counts_as_stopped() -> None:
    engine = engine_of()
    output = engine.add_request("a", [1], SamplingParams(n=2, seed=1, max_tokens=8))
    for _ in range(4):
        engine.step()
    assert engine.abort_choice("a", 0, stop_reason="END")
    assert not engine.abort_choice("a", 0)
    run(engine)
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", "END")
    assert output.outputs[1].finish_reason == "length"
    assert engine.metrics.request_success == {"stop": 1, "length": 1, "abort": 0}


def test_logprobs_of_prompt_and_output() -> None:
    engine = engine_of(max_num_batched_tokens=8)
    prompt = list(range(20))
    output = engine.add_request("a", prompt, SamplingParams(temperature=0, max_tokens=3, logprobs=2, prompt_logprobs=1))
    run(engine)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert [entry.token_ids[0] for entry in output.prompt_logprobs[1:] if entry] == prompt[1:]
    choice = output.outputs[0]
    assert choice.logprobs is not None
    assert [entry.token_ids[0] for entry in choice.logprobs] == choice.token_ids
    assert choice.cumulative_logprob == pytest.approx(sum(entry.logprobs[0] for entry in choice.logprobs))
    again = engine.add_request("b", prompt, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1))
    run(engine)
    assert again.num_cached_tokens == 0  # every prompt token must run
    assert again.prompt_logprobs == output.prompt_logprobs


@pytest.mark.parametrize(
    ("prompt", "params", "error", "message"),
    [
        ([], {}, InvalidRequestError, "at least one token"),
        ([256], {}, InvalidRequestError, "0 to 255"),
        ([-1], {}, InvalidRequestError, "0 to 255"),
        (["x"], {}, InvalidRequestError, "list of token ids"),
        ([1] * 64, {}, ContextLengthError, "This model's maximum context length is 64"),
        ([1], {"stop_token_ids": [999]}, InvalidRequestError, "stop_token_ids"),
        ([1], {"structured_outputs": {"json_object": True}}, InvalidRequestError, "structured_outputs"),
    ],
)
def test_a_bad_request_is_refused_and_the_next_is_served(
    prompt: list[Any], params: dict[str, Any], error: type[Exception], message: str
) -> None:
    engine = engine_of()
    if "structured_outputs" in params:
        from vllm_traits import StructuredOutputsParams

        params = {"structured_outputs": StructuredOutputsParams(json_object=True)}
    with pytest.raises(error, match=message):
        engine.add_request("bad", prompt, SamplingParams(**params))
    assert not engine.has_unfinished_requests()
    output = engine.add_request("bad", [1], GREEDY)
    with pytest.raises(InvalidRequestError, match="taken"):
        engine.add_request("bad", [1], GREEDY)
    run(engine)
    assert tokens_of(output) == expected_tokens([1], 8, 256)


def test_what_can_never_fit_is_refused_at_once() -> None:
    engine = engine_of(num_blocks=4)
    with pytest.raises(RequestTooLargeError, match="16"):
        engine.add_request("a", [1] * 10, SamplingParams(max_tokens=10))
    engine.add_request("b", [1] * 10, SamplingParams(max_tokens=7))
    run(engine)


def test_the_queue_is_bounded() -> None:
    engine = engine_of(max_num_waiting=2)
    engine.add_request("a", [1], GREEDY)
    with pytest.raises(QueueFullError, match="max_num_waiting is 2"):
        engine.add_request("b", [1], SamplingParams(n=2))
    engine.step()
    engine.add_request("b", [1], SamplingParams(n=2))
    run(engine)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("where", ["submit", "result"])
@pytest.mark.parametrize("failing_step", [1, 3, 4])
def test_a_step_that_fails_once_is_run_again(overlap: bool, where: str, failing_step: int) -> None:
    def fail(batch: Batch) -> Exception | None:
        return BackendError("a cosmic ray") if batch.step_id == failing_step else None

    def on_submit(batch: Batch) -> None:
        if (error := fail(batch)) is not None:
            raise error

    hooks: dict[str, Any] = {"on_submit": on_submit} if where == "submit" else {"fail_result": fail}
    engine = engine_of(FakeBackend(supports_overlap=overlap, **hooks))
    outputs = [engine.add_request(str(i), [i] * 6, GREEDY) for i in range(3)]
    run(engine)
    for i, output in enumerate(outputs):
        assert tokens_of(output) == expected_tokens([i] * 6, 8, 256)


def test_a_request_that_breaks_the_model_takes_no_other_with_it() -> None:
    def fail(batch: Batch) -> Exception | None:
        return ValueError("poison") if poison in batch.token_ids else None

    answers = [expected_tokens([i] * 6, 8, 256) for i in range(3)]
    poison = next(token for token in range(10, 256) if not any(token in answer for answer in answers))
    engine = engine_of(FakeBackend(fail_result=fail))
    good = [engine.add_request(str(i), [i] * 6, GREEDY) for i in range(3)]
    bad = engine.add_request("bad", [poison, 1], GREEDY)
    run(engine)
    assert (bad.outputs[0].finish_reason, bad.outputs[0].stop_reason) == ("abort", "backend_error")
    assert [tokens_of(output) for output in good] == answers


def test_out_of_memory_preempts() -> None:
    def fail(batch: Batch) -> Exception | None:
        return BackendOutOfMemoryError("full") if batch.num_rows > 2 else None

    engine = engine_of(FakeBackend(fail_result=fail), max_num_seqs=4)
    outputs = [engine.add_request(str(i), [i] * 6, SamplingParams(temperature=0, max_tokens=3)) for i in range(4)]
    run(engine)
    assert engine.scheduler.num_preemptions > 0
    for i, output in enumerate(outputs):
        assert tokens_of(output) == expected_tokens([i] * 6, 3, 256)


def test_a_token_outside_the_vocabulary_is_a_failure() -> None:
    class Broken(FakeBackend):
        def _run(self, batch: Batch) -> Any:
            output = super()._run(batch)
            output.token_ids[0, 0] = 10_000
            return output

    engine = engine_of(Broken())
    output = engine.add_request("a", [1], GREEDY)
    run(engine)
    assert output.outputs[0].stop_reason == "backend_error"


def test_close_ends_everything() -> None:
    backend = FakeBackend(supports_overlap=True)
    engine = engine_of(backend)
    output = engine.add_request("a", [1], GREEDY)
    engine.step()
    engine.close()
    engine.close()
    assert backend.closed
    assert output.finished
    assert not engine.has_unfinished_requests()


@pytest.mark.parametrize("overlap", [False, True])
def test_failures_that_pass_cost_a_few_steps_not_the_crowd(overlap: bool) -> None:
    """Each suspect runs alone past the place of the failure, not to its end."""

    def fail(batch: Batch) -> Exception | None:
        return BackendError("a cosmic ray") if batch.step_id in (10, 12) else None

    engine = engine_of(FakeBackend(supports_overlap=overlap, fail_result=fail), max_num_seqs=16, num_blocks=512)
    params = SamplingParams(temperature=0, max_tokens=50)
    outputs = [engine.add_request(str(i), [i] * 6, params) for i in range(16)]
    assert run(engine) < 50 + 4 * 16
    for i, output in enumerate(outputs):
        assert tokens_of(output) == expected_tokens([i] * 6, 50, 256)


def test_a_request_that_breaks_the_model_does_not_hold_up_the_others() -> None:
    def fail(batch: Batch) -> Exception | None:
        return ValueError("poison") if poison in batch.token_ids else None

    answers = [expected_tokens([i] * 6, 20, 256) for i in range(8)]
    poison = next(token for token in range(10, 256) if not any(token in answer for answer in answers))
    engine = engine_of(FakeBackend(fail_result=fail), max_num_seqs=16, num_blocks=512)
    params = SamplingParams(temperature=0, max_tokens=20)
    good = [engine.add_request(str(i), [i] * 6, params) for i in range(8)]
    bad = engine.add_request("bad", [poison, 1], params)
    assert run(engine) < 20 + 4 * 10
    assert bad.outputs[0].stop_reason == "backend_error"
    assert [tokens_of(output) for output in good] == answers


@pytest.mark.parametrize(
    "logprobs",
    [
        {0: [TokenLogprobs([], [], 1)]},
        {0: [None]},
        {7: [TokenLogprobs([1], [-1.0], 1)]},
        {0: [TokenLogprobs([1], [-1.0], 1)] * 3},
    ],
)
@pytest.mark.parametrize("kind", ["logprobs", "prompt_logprobs"])
def test_log_probabilities_that_make_no_sense_are_a_failure(kind: str, logprobs: Any) -> None:
    class Broken(FakeBackend):
        def _run(self, batch: Batch) -> Any:
            output = super()._run(batch)
            return type(output)(token_ids=output.token_ids, **{kind: logprobs})

    engine = engine_of(Broken())
    output = engine.add_request("a", [1], SamplingParams(temperature=0, max_tokens=3, logprobs=1, prompt_logprobs=1))
    run(engine)
    assert output.outputs[0].stop_reason == "backend_error"
    assert output.outputs[0].token_ids == []


def test_the_time_between_tokens_is_a_sequences_own() -> None:
    """Over a preemption too, whatever slot it comes back to."""
    now = [1000.0]

    def clock() -> float:
        now[0] += 0.001
        return now[0]

    config = EngineConfig(max_num_seqs=8, max_num_batched_tokens=64, block_size=4, num_blocks=12, max_model_len=64)
    engine = Engine(FakeBackend(), config=config, clock=clock)
    outputs = [engine.add_request(str(i), [i] * 9, SamplingParams(temperature=0, max_tokens=20)) for i in range(4)]
    run(engine)
    assert engine.scheduler.num_preemptions > 0
    metrics = [output.metrics for output in outputs]
    between = sum((m.finished_time or 0) - (m.first_token_time or 0) for m in metrics)
    assert engine.metrics.inter_token_latency.counts.sum() == 4 * 19
    assert engine.metrics.inter_token_latency.sum == pytest.approx(between, abs=0.1)


@pytest.mark.parametrize(
    ("prompt", "settings", "salt", "field"),
    [
        ([1.7, 2], {}, None, "prompt"),
        ([True, False], {}, None, "prompt"),
        (["1"], {}, None, "prompt"),
        ([1], {"n": 5}, None, "n"),
        ([1], {}, 7, "cache_salt"),
    ],
)
def test_what_cannot_be_meant_names_its_field(prompt: Any, settings: dict[str, Any], salt: Any, field: str) -> None:
    engine = engine_of(max_num_waiting=4)
    with pytest.raises(InvalidRequestError) as caught:
        engine.add_request("a", prompt, SamplingParams(**settings), cache_salt=salt)
    assert caught.value.param == field
    assert not engine.has_unfinished_requests()


def test_a_choice_that_is_not_there_and_an_engine_that_is_closed() -> None:
    engine = engine_of()
    engine.add_request("a", [1], GREEDY)
    assert not engine.abort_choice("a", 1)
    assert not engine.abort_choice("a", -1)
    engine.close()
    with pytest.raises(EngineDeadError):
        engine.add_request("b", [1], GREEDY)


def test_many_that_wait_for_one_prefix_are_woken_once() -> None:
    engine = engine_of(num_blocks=512, max_model_len=512, max_num_seqs=64, long_prefill_token_threshold=8)
    woken = []
    queue = engine.scheduler._waiting
    wake = queue.wake
    queue.wake = lambda key: (woken.append(len(queue._parked.get(key, ()))), wake(key))[1]  # type: ignore[func-returns-value,method-assign,assignment]
    prompt = [i % 256 for i in range(400)]
    outputs = [engine.add_request(str(i), [*prompt, i], SamplingParams(temperature=0, max_tokens=1)) for i in range(40)]
    run(engine)
    assert sum(woken) == 39
    assert all(output.num_cached_tokens == 400 for output in outputs[1:])
