"""Bugs planted one at a time: the simulation notices each, and with none of them the same seeds pass.

A plant is a function that patches the engine. It names the seeds' failure that it must cause, so that a check which would only
ever stumble over something else is not taken for proof.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vllm_core.block_pool import BlockPool
from vllm_core.engine import Engine
from vllm_core.prefix_cache import PrefixCache
from vllm_core.scheduler import Scheduler
from vllm_core.sequence import Sequence, Status
from vllm_core.simulation import SimulationFailure, simulate
from vllm_core.slot_table import SlotTable
from vllm_core.waiting_queue import WaitingQueue
from vllm_traits.batch import LAST_SAMPLED
from vllm_traits.ids import BlockId

SEEDS = range(300, 420)

Patch = pytest.MonkeyPatch


def around(patch: Patch, owner: type, name: str, change: Callable[..., Any]) -> None:
    """Put ``change(original, self, *args)`` in place of a method."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda self, *args, **kwargs: change(original, self, *args, **kwargs))


def double_free(patch: Patch) -> None:
    def release(original: Any, table: SlotTable) -> None:
        again = [blocks for step, blocks, _ in table.fenced if step <= table._completed][:1]
        original(table)
        for blocks in again:
            table.pool.release(blocks[:1])

    around(patch, SlotTable, "_release", release)


def reuse_before_the_fence(patch: Patch) -> None:
    def leave(original: Any, table: SlotTable, sequence: Sequence, last_step: int) -> None:
        original(table, sequence, 0)

    around(patch, SlotTable, "leave", leave)


def hash_of_a_partial_block(patch: Patch) -> None:
    def register(original: Any, scheduler: Scheduler, slots: Any, committed: Any) -> None:
        size = scheduler.config.block_size
        original(scheduler, slots, np.minimum(-(-committed // size), scheduler.state.num_blocks[slots]) * size)

    around(patch, Scheduler, "_register", register)


def salt_left_out(patch: Patch) -> None:
    patch.setattr("vllm_core.engine.root_key", lambda salt: b"")


def lost_reference(patch: Patch) -> None:
    def hold(original: Any, pool: BlockPool, block: BlockId) -> None:
        if pool.is_free(block):
            original(pool, block)

    around(patch, BlockPool, "hold", hold)


def rejected_guesses_stay_computed(patch: Patch) -> None:
    def take(original: Any, scheduler: Scheduler, step: Any, output: Any, rows: Any, *rest: Any) -> Any:
        taken = original(scheduler, step, output, rows, *rest)
        table, at = scheduler._table, step.batch.slots[rows]
        table.computed[at] = table.committed[at] = np.minimum(step.ends[rows], scheduler.state.num_tokens[at])
        return taken

    around(patch, Scheduler, "_take_guesses", take)


def stale_epoch_accepted(patch: Patch) -> None:
    def leave(original: Any, table: SlotTable, sequence: Sequence, last_step: int) -> None:
        slot = sequence.slot
        original(table, sequence, last_step)
        table.epochs[slot] -= 1
        table.sequences[slot] = sequence

    around(patch, SlotTable, "leave", leave)


def last_sampled_of_another_slot(patch: Patch) -> None:
    def build(original: Any, scheduler: Scheduler, *args: Any) -> Any:
        step = original(scheduler, *args)
        late = np.flatnonzero(step.batch.token_ids == LAST_SAMPLED)
        if len(late) > 1 and step.batch.num_tokens == step.batch.num_rows:
            slots = step.batch.slots.copy()
            slots[late] = np.roll(slots[late], 1)
            step = dataclasses.replace(step, batch=dataclasses.replace(step.batch, slots=slots))
        return step

    around(patch, Scheduler, "_build", build)


def write_to_a_shared_block(patch: Patch) -> None:
    def enter(original: Any, table: SlotTable, sequence: Sequence, hits: list[BlockId], need: int) -> Any:
        slot = original(table, sequence, hits, need)
        if hits:
            table.computed[slot] -= 1
            table.committed[slot] -= 1
        return slot

    around(patch, SlotTable, "enter", enter)


def token_dropped_at_preemption(patch: Patch) -> None:
    def preempt(original: Any, scheduler: Scheduler, sequence: Sequence) -> None:
        original(scheduler, sequence)
        sequence.completion.token_ids[-1:] = []

    around(patch, Scheduler, "preempt", preempt)


def budget_overrun(patch: Patch) -> None:
    patch.setattr(Scheduler, "_share_budget", lambda self, lens: None)


def most_recently_used_evicted(patch: Patch) -> None:
    def link_first(pool: BlockPool, block: int) -> None:
        end = pool.num_blocks
        first = pool._next[end]
        pool._prev[first] = pool._next[end] = block
        pool._next[block], pool._prev[block] = first, end
        pool.num_free += 1

    patch.setattr(BlockPool, "_link_last", link_first)


def starvation(patch: Patch) -> None:
    patch.setattr("vllm_core.engine.queue_key", lambda arrival, index, priority, aging: (priority, -arrival, index))


def parked_for_ever(patch: Patch) -> None:
    def settle(original: Any, cache: PrefixCache, key: bytes, sequence: Sequence) -> None:
        if cache._computing.get(key) is sequence:
            del cache._computing[key]

    around(patch, PrefixCache, "_settle", settle)


def reset_that_forgets_nothing(patch: Patch) -> None:
    patch.setattr(BlockPool, "reset_cache", lambda self: None)


def guesses_without_blocks(patch: Patch) -> None:
    patch.setattr(Scheduler, "_make_place", lambda self, sequence, known, most: most)


def new_slot_untold(patch: Patch) -> None:
    def enter(original: Any, table: SlotTable, sequence: Sequence, hits: list[BlockId], need: int) -> Any:
        slot = original(table, sequence, hits, need)
        if sequence.was_admitted:
            table.changed.remove(slot)
        return slot

    around(patch, SlotTable, "enter", enter)


def one_token_too_many(patch: Patch) -> None:
    def check(original: Any, engine: Engine, *args: Any) -> Any:
        prompt, limit = original(engine, *args)
        return prompt, min(limit + 1, engine.max_model_len)

    around(patch, Engine, "_check", check)


def failure_not_rewound(patch: Patch) -> None:
    def rewind(original: Any, scheduler: Scheduler, steps: list[Any]) -> Any:
        computed = scheduler._table.computed.copy()
        failed = original(scheduler, steps)
        scheduler._table.computed[:] = np.minimum(computed, np.maximum(scheduler.state.num_tokens - 1, 0))
        return failed

    around(patch, Scheduler, "rewind", rewind)


def aborted_in_the_queue_still_runs(patch: Patch) -> None:
    def remove(original: Any, queue: WaitingQueue, sequence: Sequence) -> None:
        queue.num_waiting -= 1

    def finish(original: Any, scheduler: Scheduler, sequence: Sequence) -> None:
        waited = sequence.status is Status.WAITING
        original(scheduler, sequence)
        if waited:
            sequence.status = Status.WAITING

    around(patch, WaitingQueue, "remove", remove)
    around(patch, Scheduler, "finish", finish)


def known_prefix_computed_again(patch: Patch) -> None:
    def hits(original: Any, cache: PrefixCache, sequence: Sequence) -> Any:
        found, awaited = original(cache, sequence)
        return found[:1], awaited if len(found) < 2 else None

    around(patch, PrefixCache, "match", hits)


def token_run_twice(patch: Patch) -> None:
    def enter(original: Any, table: SlotTable, sequence: Sequence, hits: list[BlockId], need: int) -> Any:
        slot = original(table, sequence, hits, need)
        if hits:  # its last block is taken for its own, and computed once more
            table.pool.release([sequence.blocks[-need - 1]])
            sequence.blocks[-need - 1] = table.state.block_tables[slot, len(hits) - 1] = table.pool.allocate()
            table.computed[slot] = table.committed[slot] = (len(hits) - 1) * table.state.block_size
            table.registered[slot] = sequence.num_registered = len(hits) - 1
        return slot

    around(patch, SlotTable, "enter", enter)


PLANTS: dict[Callable[[Patch], None], str] = {
    double_free: "more often than held|references and|out of order|free list|not the block",
    reuse_before_the_fence: "under way",
    hash_of_a_partial_block: "known before it is computed",
    salt_left_out: "which it may not",
    lost_reference: "references and .* holders|more often than held",
    rejected_guesses_stay_computed: "the last known token cannot have run|computed passes",
    stale_epoch_accepted: "register, line|speaks after|lost or taken twice|nobody was told|, not \\[",
    last_sampled_of_another_slot: "sampled last for|has the slot of|was not said|under way",
    write_to_a_shared_block: "which sequence|is shared and still written|before it is computed",
    token_dropped_at_preemption: "lost tokens|not \\[",
    budget_overrun: "over the budget",
    most_recently_used_evicted: "free for longest",
    starvation: "was let in before",
    parked_for_ever: "nobody wakes",
    reset_that_forgets_nothing: "num_cached == 0",
    guesses_without_blocks: "without a block|has \\d+ blocks",
    new_slot_untold: "was not said to have left",
    one_token_too_many: "is \\[.*, not \\[",
    failure_not_rewound: "which failed|holds another prefix|has run|not \\[",
    known_prefix_computed_again: "did not hit block",
    token_run_twice: "ran for nothing|is still computed that is there",
    aborted_in_the_queue_still_runs: "in two queues",
}


def run_all() -> None:
    for seed in SEEDS:
        simulate(seed)


@pytest.fixture(scope="module")
def sound() -> None:
    """Without a plant the seeds pass."""
    run_all()


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_caught(plant: Callable[[Patch], None], sound: None, monkeypatch: Patch) -> None:
    plant(monkeypatch)
    with pytest.raises(SimulationFailure, match=PLANTS[plant]):
        run_all()
