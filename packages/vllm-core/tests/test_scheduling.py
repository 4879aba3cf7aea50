"""What users notice of the order in which requests run."""

from typing import Any

import pytest

from vllm_core import Engine, EngineConfig, RequestOutput, SamplingParams
from vllm_traits.fake_backend import FakeBackend, expected_tokens

ONE = SamplingParams(temperature=0, max_tokens=1)


def engine_of(backend: FakeBackend | None = None, **settings: Any) -> Engine:
    settings = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "block_size": 4,
        "num_blocks": 64,
        "max_model_len": 64,
    } | settings
    return Engine(backend or FakeBackend(), config=EngineConfig(**settings))


def finish_order(engine: Engine) -> list[str]:
    order: list[str] = []
    steps = 0
    while engine.has_unfinished_requests():
        order += [output.request_id for output in engine.step() if output.finished]
        engine.check_integrity()
        steps += 1
        assert steps < 2000
    return order


def answer(prompt: list[int], num: int) -> list[int]:
    return expected_tokens(prompt, num, 256)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("scarce", ["slots", "blocks"])
def test_a_better_priority_takes_the_place_of_a_running_one(overlap: bool, scarce: str) -> None:
    limits = {"max_num_seqs": 2} if scarce == "slots" else {"num_blocks": 12}
    engine = engine_of(FakeBackend(supports_overlap=overlap), scheduling_policy="priority", **limits)
    long = SamplingParams(temperature=0, max_tokens=30)
    batch = [engine.add_request(f"batch {i}", [i] * 9, long, priority=5) for i in range(2)]
    for _ in range(6):
        engine.step()
    chat = engine.add_request("chat", [9] * 10, SamplingParams(temperature=0, max_tokens=3), priority=0)
    for _ in range(8):
        engine.step()
        engine.check_integrity()
    assert chat.finished
    assert chat.outputs[0].token_ids == answer([9] * 10, 3)
    assert not any(output.finished for output in batch)
    assert finish_order(engine)[0] == "batch 0"
    assert [output.outputs[0].token_ids for output in batch] == [answer([i] * 9, 30) for i in range(2)]


def test_equal_priorities_never_take_each_others_place() -> None:
    engine = engine_of(scheduling_policy="priority", max_num_seqs=1)
    for i in range(3):
        engine.add_request(str(i), [i], SamplingParams(temperature=0, max_tokens=5), priority=1)
        engine.step()
    assert finish_order(engine) == ["0", "1", "2"]
    assert engine.scheduler.num_preemptions == 0


def test_a_low_priority_is_overtaken_by_so_many_and_then_runs() -> None:
    engine = engine_of(scheduling_policy="priority", priority_aging=10, max_num_seqs=1)
    engine.add_request("0", [1], ONE, priority=0)
    engine.add_request("low", [2], ONE, priority=1)
    order: list[str] = []
    for i in range(1, 60):  # one of a better priority comes with every step
        engine.add_request(str(i), [3], ONE, priority=0)
        order += [output.request_id for output in engine.step() if output.finished]
    assert order.index("low") == 10
    assert order[:3] == ["0", "1", "2"]


def test_priorities_are_strict_without_aging() -> None:
    engine = engine_of(scheduling_policy="priority", priority_aging=0, max_num_seqs=1)
    engine.add_request("low", [2], ONE, priority=1)
    for i in range(50):
        engine.add_request(str(i), [3], ONE, priority=0)
    assert finish_order(engine)[-1] == "low"


def test_a_priority_can_be_changed_wherever_a_request_is() -> None:
    engine = engine_of(scheduling_policy="priority", max_num_seqs=2)
    long = SamplingParams(temperature=0, max_tokens=10)
    for name in "abcd":
        engine.add_request(name, [1], long, priority=3)
    engine.step()
    assert engine.set_priority("d", 0)  # waits, and takes the place of b
    engine.step()
    engine.check_integrity()
    assert [sequence.request.request_id for sequence in engine.scheduler.running] == ["d", "a"]
    assert engine.set_priority("a", 9)  # runs, and goes behind all
    engine.step()
    assert [sequence.request.request_id for sequence in engine.scheduler.running] == ["d", "b"]
    assert finish_order(engine)[:2] == ["d", "b"]
    assert not engine.set_priority("a", 1)


def test_a_priority_says_nothing_where_the_first_come_goes_first() -> None:
    engine = engine_of(max_num_seqs=1)
    for name, priority in (("a", 3), ("b", 0)):
        engine.add_request(name, [1], ONE, priority=priority)
    assert engine.set_priority("b", -5)
    assert finish_order(engine) == ["a", "b"]


def test_the_longest_cached_prefix_goes_first() -> None:
    engine = engine_of(scheduling_policy="lpm", max_num_seqs=1)
    engine.add_request("before", list(range(40)), ONE)
    finish_order(engine)
    engine.add_request("running", [200], SamplingParams(temperature=0, max_tokens=4))
    engine.step()
    prompts = {"none": [99] * 20, "some": [*range(8), 98], "most": [*range(36), 97], "none too": [96] * 20}
    outputs: dict[str, RequestOutput] = {name: engine.add_request(name, prompt, ONE) for name, prompt in prompts.items()}
    assert finish_order(engine) == ["running", "most", "some", "none", "none too"]
    assert [outputs[name].num_cached_tokens for name in prompts] == [0, 8, 36, 0]


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_a_cached_prefix_overtakes_nobody_under_other_policies(policy: str) -> None:
    engine = engine_of(scheduling_policy=policy, max_num_seqs=1)
    engine.add_request("before", list(range(40)), ONE)
    finish_order(engine)
    for name, prompt in (("cold", [99] * 20), ("cached", [*range(36), 97])):
        engine.add_request(name, prompt, ONE)
    assert finish_order(engine) == ["cold", "cached"]


def test_the_first_in_order_is_not_passed_over_for_ever() -> None:
    engine = engine_of(scheduling_policy="lpm", max_num_seqs=1)
    engine.add_request("before", list(range(9)), ONE)
    finish_order(engine)
    engine.add_request("first", [1], SamplingParams(temperature=0, max_tokens=2))
    engine.step()
    engine.add_request("cold", [99] * 20, ONE)
    order: list[str] = []
    for i in range(200):
        engine.add_request(str(i), [*range(9), i], ONE)
        order += [output.request_id for output in engine.step() if output.finished]
    assert 60 <= order.index("cold") <= 70


def test_what_barely_fits_gets_done() -> None:
    """Every request needs the whole pool to finish: they take turns, and none undoes another for ever."""
    for overlap in (False, True):
        engine = engine_of(FakeBackend(supports_overlap=overlap), num_blocks=8, max_num_seqs=4)
        params = SamplingParams(temperature=0, max_tokens=24)
        outputs = [engine.add_request(str(i), [i] * 9, params) for i in range(6)]
        finish_order(engine)
        assert [output.outputs[0].token_ids for output in outputs] == [answer([i] * 9, 24) for i in range(6)]
