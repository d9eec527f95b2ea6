"""Which KV blocks are free, who holds the others, and which prompt beginnings they hold.

The prefix cache is an exact trie in one dict: key (parent block's uid, tokens of the block). No hash of ours, so no
collisions; a lookup costs one dict access per block. Knows nothing of sequences or tensors. Engine thread only.

Why the trie cannot leak: a block has at most one key, and loses it when it is handed out again, so there are never more
keys than blocks. A uid is never reused, so a key whose parent was evicted can only be unreachable, never wrong; such a
block ages out of the free list like any other. It is rare: chains are freed tail first, so a tail is evicted before its
head, and whoever holds a tail holds its head too, unless two sequences computed the same head at the same time.
"""

from array import array
from collections import Counter
from collections.abc import Iterable

# uid of the parent block; a chain's first block hangs on its cache salt, and on its adapter's number where it has one
TrieParent = int | str | tuple[int, str]
TrieKey = tuple[TrieParent, bytes]


class Block:
    """One page of the KV cache, and its place in the free list while nobody holds it."""

    __slots__ = ("block_id", "key", "next", "prev", "ref_count", "uid")

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_count = 0
        self.key: TrieKey | None = None  # under which it can be found
        self.uid = 0  # names its content in its children's keys
        self.prev: Block = self
        self.next: Block = self

    def __repr__(self) -> str:
        return f"Block({self.block_id}, refs={self.ref_count}, uid={self.uid})"


class BlockPool:
    """Blocks 1 .. num_blocks - 1; block 0 is the null block that pads block tables.

    Free blocks stand in an intrusive doubly linked list, the next one to hand out first: those without content worth
    keeping, then cached ones, least recently freed first.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_cache: bool) -> None:
        """`block_size`: tokens in a block; `prefix_cache` False: nothing is ever found again."""
        self.block_size = block_size
        self.num_blocks = num_blocks - 1  # that can be held
        self.num_free = 0
        self.num_cached_free = 0  # free, but findable
        self._prefix_cache = prefix_cache
        self._blocks = [Block(block_id) for block_id in range(1, num_blocks)]
        self._trie: dict[TrieKey, Block] = {}
        self._last_uid = 0
        self._ends = Block(0)  # sentinel: `next` is the first free block, `prev` the last
        for block in self._blocks:
            self._link(block, self._ends.prev)

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - self.num_free

    def match_prefix(self, tokens: "array[int]", cache_salt: TrieParent, max_tokens: int) -> list[Block]:
        """The longest chain of cached blocks that `tokens` ("I") begins with, at most `max_tokens` of them.

        The blocks are not held yet: `acquire` them before the pool does anything else.
        """
        found: list[Block] = []
        if not self._prefix_cache:
            return found
        size = self.block_size
        parent: TrieParent = cache_salt
        for start in range(0, max_tokens - size + 1, size):
            block = self._trie.get((parent, tokens[start : start + size].tobytes()))
            if block is None:
                break
            found.append(block)
            parent = block.uid
        return found

    def acquire(self, blocks: list[Block]) -> None:
        """Hold cached blocks once more."""
        for block in blocks:
            if block.ref_count == 0:
                self._unlink(block)
            block.ref_count += 1

    def allocate(self, count: int) -> list[Block]:
        """Hold `count` blocks of undefined content, forgetting what the oldest free ones cached."""
        assert count <= self.num_free, f"{count} blocks asked of {self.num_free} free ones"
        taken = []
        for _ in range(count):
            block = self._ends.next
            self._unlink(block)
            if block.key is not None:
                del self._trie[block.key]
                block.key = None
            block.ref_count = 1
            taken.append(block)
        return taken

    def free(self, blocks: list[Block]) -> None:
        """Let go of a sequence's blocks, given head first."""
        # In reverse, so that a chain's tail is evicted before its head.
        for block in reversed(blocks):
            block.ref_count -= 1
            assert block.ref_count >= 0, f"{block} was freed twice"
            if block.ref_count == 0:
                # Content that nobody can find is reused first: it keeps cached blocks alive for longer.
                self._link(block, self._ends if block.key is None else self._ends.prev)

    def cache_full_blocks(
        self, tokens: "array[int]", blocks: list[Block], start: int, end: int, parent: TrieParent
    ) -> TrieParent:
        """Make blocks[start:end] findable under `parent`; they are full and their KV is in the cache.

        Returns the parent for block `end`. Where another sequence was faster with the same content, its block stays the
        one to be found and ours stays private: replacing it would mean rewriting a block table in use.
        """
        if not self._prefix_cache:
            return parent
        size = self.block_size
        for index in range(start, end):
            key = (parent, tokens[index * size : (index + 1) * size].tobytes())
            block = self._trie.get(key)
            if block is None:
                block = blocks[index]
                self._last_uid += 1
                block.uid = self._last_uid
                block.key = key
                self._trie[key] = block
            parent = block.uid
        return parent

    def check(self, holders: Iterable[list[Block]]) -> None:
        """Assert that every block is accounted for; `holders` are the block lists of all sequences."""
        held = Counter(block.block_id for blocks in holders for block in blocks)
        free = self._free_ids()
        assert len(free) == self.num_free, f"{len(free)} blocks in the free list, counted {self.num_free}"
        assert len(free) + len(held) == self.num_blocks, f"{len(free)} free + {len(held)} held != {self.num_blocks}"
        for block in self._blocks:
            assert block.ref_count == held[block.block_id], f"{block} is held by {held[block.block_id]}"
            assert (block.ref_count == 0) == (block.block_id in free), f"{block} is on the wrong side of the free list"
            assert block.key is None or self._trie.get(block.key) is block, f"{block} cannot be found under its key"
        keyed = [block for block in self._blocks if block.key is not None]
        assert len(keyed) == len(self._trie), f"{len(self._trie)} keys for {len(keyed)} cached blocks"
        cached_free = sum(block.ref_count == 0 for block in keyed)
        assert cached_free == self.num_cached_free, f"{cached_free} free cached blocks, counted {self.num_cached_free}"

    def _free_ids(self) -> set[int]:
        """Ids in the free list, walked forwards, each link checked backwards."""
        ids: set[int] = set()
        block = self._ends.next
        while block is not self._ends:
            assert block.block_id not in ids, f"{block} stands twice in the free list"
            assert block.next.prev is block, f"{block}'s neighbour does not point back"
            ids.add(block.block_id)
            block = block.next
        return ids

    def _link(self, block: Block, after: Block) -> None:
        block.prev, block.next = after, after.next
        after.next.prev = block
        after.next = block
        self.num_free += 1
        if block.key is not None:
            self.num_cached_free += 1

    def _unlink(self, block: Block) -> None:
        block.prev.next, block.next.prev = block.next, block.prev
        block.prev = block.next = block
        self.num_free -= 1
        if block.key is not None:
            self.num_cached_free -= 1
