"""The checks of the engine's books notice each way in which they can be wrong."""

from collections.abc import Callable
from typing import Any

import pytest

from vllm_core import Engine, EngineConfig, SamplingParams
from vllm_core.sequence import Status
from vllm_traits.fake_backend import FakeBackend


def busy() -> Engine:
    """Three run, two of them with shared blocks, one is parked, one waits, one slot is free, and a step is under way."""
    config = EngineConfig(
        max_num_seqs=4,
        max_num_batched_tokens=12,
        block_size=4,
        num_blocks=24,
        max_model_len=64,
        long_prefill_token_threshold=2,
    )
    engine = Engine(FakeBackend(supports_overlap=True), config=config)
    params = SamplingParams(temperature=0, max_tokens=30)
    engine.add_request("first", list(range(9)), params)
    for _ in range(4):
        engine.step()
    engine.add_request("shares", [*range(8), 100], params)
    engine.add_request("long", list(range(20, 50)), params)
    engine.step()
    engine.add_request("parked", [*range(20, 50), 3], params)
    engine.step()
    assert not engine.scheduler._table.fenced
    engine.add_request("waits", [7] * 9, params)
    engine.check_integrity()
    return engine


def running(engine: Engine, which: int = 0) -> Any:
    return engine.scheduler.running[which]


def swap_order(engine: Engine) -> None:
    engine.scheduler.running.reverse()


def wrong_status(engine: Engine) -> None:
    running(engine).status = Status.WAITING


def lost_slot(engine: Engine) -> None:
    engine.scheduler._table.free.append(running(engine).slot)


def lost_block(engine: Engine) -> None:
    running(engine).blocks.pop()


def table_of_another(engine: Engine) -> None:
    engine.scheduler.state.block_tables[running(engine).slot, 0] += 1


def wrong_block_count(engine: Engine) -> None:
    engine.scheduler.state.num_blocks[running(engine).slot] += 1


def wrong_token(engine: Engine) -> None:
    engine.scheduler.state.token_ids[running(engine).slot, 1] += 1


def wrong_length(engine: Engine) -> None:
    engine.scheduler.state.num_tokens[running(engine).slot] += 1


def computed_too_far(engine: Engine) -> None:
    engine.scheduler._table.computed[running(engine).slot] += 1


def committed_too_far(engine: Engine) -> None:
    engine.scheduler._table.committed[running(engine).slot] += 3


def too_many_under_way(engine: Engine) -> None:
    engine.scheduler._table.pending[running(engine).slot] = 3


def guesses_from_nowhere(engine: Engine) -> None:
    engine.scheduler._table.guessed[running(engine).slot] = 1


def known_before_computed(engine: Engine) -> None:
    running(engine).num_registered += 2


def registered_differs(engine: Engine) -> None:
    engine.scheduler._table.registered[running(engine).slot] += 1


def key_of_other_tokens(engine: Engine) -> None:
    running(engine).keys[0] = b"another"


def key_of_another_block(engine: Engine) -> None:
    pool, block = engine.scheduler.pool, running(engine).blocks[0]
    del pool._by_key[pool._keys[block]]  # type: ignore[arg-type]
    pool._keys[block] = b"another"
    pool._by_key[b"another"] = block


def slot_of_another(engine: Engine) -> None:
    engine.scheduler._table.sequences[running(engine).slot] = running(engine, 1)


def shared_and_written(engine: Engine) -> None:
    block = running(engine).blocks[-1]
    engine.scheduler.pool.hold(block)
    engine.scheduler._table.fenced.append((10**6, [block], engine.scheduler._table.free.pop()))  # type: ignore[arg-type]


def counted_twice(engine: Engine) -> None:
    engine.scheduler._waiting.num_waiting += 1


def nobody_to_wake(engine: Engine) -> None:
    engine.scheduler.prefix_cache._computing.clear()


def computing_what_is_there(engine: Engine) -> None:
    engine.scheduler.prefix_cache._computing[running(engine).keys[0]] = running(engine)


def computed_by_one_that_left(engine: Engine) -> None:
    first, last = running(engine), running(engine, -1)
    for key, sequence in engine.scheduler.prefix_cache._computing.items():
        assert sequence is last
        engine.scheduler.prefix_cache._computing[key] = first
        break


def stale_running_set(engine: Engine) -> None:
    engine.scheduler._running_now().sequences.pop()


def request_forgotten(engine: Engine) -> None:
    del engine._requests["first"]


def request_without_life(engine: Engine) -> None:
    engine._requests["ghost"] = engine._requests["first"].__class__(
        "ghost", engine._requests["first"].params, 0, 99, engine._requests["first"].output
    )


def waiting_with_a_slot(engine: Engine) -> None:
    head = engine.scheduler._waiting.head()
    assert head is not None
    head.slot = running(engine).slot


def free_list_cut(engine: Engine) -> None:
    engine.scheduler.pool.num_free -= 1


MISTAKES: list[Callable[[Engine], None]] = [
    swap_order,
    wrong_status,
    lost_slot,
    lost_block,
    table_of_another,
    wrong_block_count,
    wrong_token,
    wrong_length,
    computed_too_far,
    committed_too_far,
    too_many_under_way,
    guesses_from_nowhere,
    known_before_computed,
    registered_differs,
    key_of_other_tokens,
    key_of_another_block,
    slot_of_another,
    shared_and_written,
    counted_twice,
    nobody_to_wake,
    computing_what_is_there,
    computed_by_one_that_left,
    stale_running_set,
    request_forgotten,
    request_without_life,
    waiting_with_a_slot,
    free_list_cut,
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_noticed(mistake: Callable[[Engine], None]) -> None:
    engine = busy()
    mistake(engine)
    with pytest.raises(AssertionError):
        engine.check_integrity()


def test_an_empty_engine_that_holds_a_block_is_noticed() -> None:
    engine = Engine(FakeBackend(), config=EngineConfig(num_blocks=4, max_model_len=64))
    engine.check_integrity()
    engine.scheduler.pool.allocate()
    with pytest.raises(AssertionError):
        engine.check_integrity()
