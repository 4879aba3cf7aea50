"""The books of the block pool balance, whatever is done to it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_core.block_pool import BlockPool
from vllm_traits.ids import BlockId


def take(pool: BlockPool, num: int) -> list[BlockId]:
    blocks = [pool.allocate() for _ in range(num)]
    assert None not in blocks
    return [block for block in blocks if block is not None]


def test_blocks_come_back_least_recently_used_first() -> None:
    pool = BlockPool(4)
    blocks = take(pool, 4)
    assert pool.allocate() is None
    assert pool.usage == 1.0
    pool.release([blocks[2], blocks[0]])
    assert take(pool, 2) == [blocks[2], blocks[0]]


def test_a_cached_block_survives_until_its_memory_is_needed() -> None:
    pool = BlockPool(2)
    (block,) = take(pool, 1)
    pool.register(block, b"key")
    pool.release([block])
    assert pool.lookup(b"key") == block
    pool.hold(block)
    pool.release([block])
    take(pool, 2)
    assert pool.lookup(b"key") is None
    assert pool.num_cached == 0


def test_the_first_block_of_a_prefix_stays_the_one_found() -> None:
    pool = BlockPool(2)
    first, second = take(pool, 2)
    pool.register(first, b"key")
    pool.register(second, b"key")
    assert pool.lookup(b"key") == first
    pool.check_integrity([[first], [second]])


@pytest.mark.parametrize("lie", ["lost reference", "double holder", "free but held"])
def test_the_check_notices(lie: str) -> None:
    pool = BlockPool(3)
    first, second = take(pool, 2)
    tables = {
        "lost reference": [[first]],
        "double holder": [[first], [second], [second]],
        "free but held": [[first], [second], [BlockId(2)]],
    }
    with pytest.raises(AssertionError):
        pool.check_integrity(tables[lie])


def test_releasing_twice_is_noticed() -> None:
    pool = BlockPool(2)
    (block,) = take(pool, 1)
    pool.release([block])
    with pytest.raises(AssertionError, match="more often"):
        pool.release([block])


@given(st.integers(1, 6), st.lists(st.tuples(st.sampled_from("ahrkz"), st.integers(0, 9)), max_size=60))
def test_the_books_balance(num_blocks: int, actions: list[tuple[str, int]]) -> None:
    pool = BlockPool(num_blocks)
    tables: list[list[BlockId]] = []
    for action, number in actions:
        if action == "a" and (block := pool.allocate()) is not None:
            tables.append([block])
        elif action == "h" and (found := pool.lookup(b"%d" % number)) is not None:
            pool.hold(found)
            tables.append([found])
        elif action == "r" and tables:
            pool.release(tables.pop(number % len(tables)))
        elif action == "k" and tables:
            pool.register(tables[number % len(tables)][0], b"%d" % number)
        elif action == "z":
            pool.reset_cache()
        pool.check_integrity(tables)
        assert pool.num_free == num_blocks - len({block for table in tables for block in table})


def test_a_free_block_gets_no_key() -> None:
    pool = BlockPool(2)
    with pytest.raises(AssertionError):
        pool.register(BlockId(1), b"key")


def test_a_block_keeps_its_first_key_and_a_held_one_is_not_lost_by_a_reset() -> None:
    pool = BlockPool(3)
    (block,) = take(pool, 1)
    pool.register(block, b"one")
    pool.register(block, b"two")
    assert (pool.key_of(block), pool.lookup(b"two"), pool.num_cached) == (b"one", None, 1)
    pool.reset_cache()
    assert (pool.key_of(block), pool.num_cached, pool.num_holders(block)) == (None, 0, 1)
    pool.register(block, b"two")
    assert pool.lookup(b"two") == block
    assert pool.usage == pytest.approx(1 / 3)
    assert not pool.is_free(block)


def test_a_hit_on_a_free_block_leaves_the_order_of_the_others() -> None:
    pool = BlockPool(4)
    blocks = take(pool, 4)
    pool.register(blocks[1], b"key")
    pool.release(blocks)
    pool.hold(blocks[1])
    assert pool.num_free == 3
    assert take(pool, 3) == [blocks[0], blocks[2], blocks[3]]
    assert pool.allocate() is None
