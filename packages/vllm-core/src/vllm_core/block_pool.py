"""KV blocks: who holds them, which are free, and which still hold a known prefix.

Every block is in exactly one of two states::

    held    ref_count > 0, in the table of that many sequences (a finished sequence holds its own until the last step
            that names them is done)
    free    ref_count = 0, in the free list, least recently used first; its content stays valid, and findable by its
            key, until it is allocated again
"""

from collections.abc import Iterable, Sequence

from vllm_traits.ids import BlockId

_NONE = -1


class BlockPool:
    """Reference counts, the free list and the map from prefix keys to blocks. All operations are O(1) a block.

    Args:
        num_blocks: Blocks ``0 <= id < num_blocks``.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self._ref_counts = [0] * num_blocks
        # The free list is linked through two arrays; entry num_blocks is its head and tail.
        self._next = [*range(1, num_blocks + 1), 0]
        self._prev = [num_blocks, *range(num_blocks)]
        self._keys: list[bytes | None] = [None] * num_blocks
        self._by_key: dict[bytes, int] = {}

    @property
    def usage(self) -> float:
        """Share of the blocks that are held, 0..1."""
        return 1.0 - self.num_free / self.num_blocks

    @property
    def num_cached(self) -> int:
        """Blocks that can be found by a key."""
        return len(self._by_key)

    def lookup(self, key: bytes) -> BlockId | None:
        """The block whose prefix has ``key``, held or free."""
        block = self._by_key.get(key)
        return None if block is None else BlockId(block)

    def is_free(self, block: BlockId) -> bool:
        """Whether nobody holds it."""
        return self._ref_counts[block] == 0

    def num_holders(self, block: BlockId) -> int:
        """Tables that it is in."""
        return self._ref_counts[block]

    def key_of(self, block: BlockId) -> bytes | None:
        """The key that it is found by."""
        return self._keys[block]

    def allocate(self) -> BlockId | None:
        """The block that was free for longest, with one reference and no key; None if none is free."""
        if self.num_free == 0:
            return None
        block = self._next[self.num_blocks]
        self._unlink(block)
        self._forget(block)
        self._ref_counts[block] = 1
        return BlockId(block)

    def hold(self, block: BlockId) -> None:
        """One reference more; takes the block out of the free list if it was there."""
        if self._ref_counts[block] == 0:
            self._unlink(block)
        self._ref_counts[block] += 1

    def release(self, blocks: Iterable[BlockId]) -> None:
        """One reference less each; those without any become free, in this order. Give a sequence's blocks last first:
        the tail of a prefix is of less use than its head.
        """
        for block in blocks:
            count = self._ref_counts[block] - 1
            assert count >= 0, f"block {block} was released more often than held"
            self._ref_counts[block] = count
            if count == 0:
                self._link_last(block)

    def register(self, block: BlockId, key: bytes) -> None:
        """``block`` is full and computed, and holds the prefix with ``key``. The first such block stays the one found."""
        assert self._ref_counts[block] > 0
        if self._keys[block] is None and key not in self._by_key:
            self._keys[block] = key
            self._by_key[key] = block

    def reset_cache(self) -> None:
        """Forget all keys; who holds a block keeps it."""
        self._by_key.clear()
        self._keys = [None] * self.num_blocks

    def check_integrity(self, tables: Iterable[Sequence[BlockId]]) -> None:
        """Prove that the books balance.

        Args:
            tables: The blocks of every holder, fenced ones included.

        Raises:
            AssertionError: They do not; the message says where.
        """
        counts = [0] * self.num_blocks
        for table in tables:
            assert len(set(table)) == len(table), f"a table holds a block twice: {table}"
            for block in table:
                counts[block] += 1
        for place, (expected, counted) in enumerate(zip(counts, self._ref_counts, strict=True)):
            assert counted == expected, f"block {place} has {counted} references and {expected} holders"
        free: list[int] = []
        place = self._next[self.num_blocks]
        while place != self.num_blocks:
            free.append(place)
            assert len(free) <= self.num_blocks, "the free list has a loop"
            assert self._prev[self._next[place]] == place, f"the free list is broken at block {place}"
            place = self._next[place]
        assert len(free) == self.num_free, f"{len(free)} blocks in the free list, {self.num_free} counted"
        assert sorted(free) == [block for block in range(self.num_blocks) if counts[block] == 0], (
            "free list and counts disagree"
        )
        keyed = {key: block for block, key in enumerate(self._keys) if key is not None}
        assert keyed == self._by_key, "keys and blocks disagree"

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._by_key[key]
            self._keys[block] = None

    def _unlink(self, block: int) -> None:
        before, after = self._prev[block], self._next[block]
        self._next[before], self._prev[after] = after, before
        self._next[block] = self._prev[block] = _NONE
        self.num_free -= 1

    def _link_last(self, block: int) -> None:
        end = self.num_blocks
        last = self._prev[end]
        self._next[last] = self._prev[end] = block
        self._prev[block], self._next[block] = last, end
        self.num_free += 1
