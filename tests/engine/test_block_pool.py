import random
from array import array
from collections.abc import Iterable

import pytest

from asyncllm.engine.block_pool import Block, BlockPool

SIZE = 4


def pool_of(num_blocks: int, prefix_cache: bool = True) -> BlockPool:
    return BlockPool(num_blocks + 1, SIZE, prefix_cache)


def ids(tokens: Iterable[int]) -> "array[int]":
    return array("I", tokens)


def store(pool: BlockPool, tokens: list[int], salt: str = "") -> list[Block]:
    """Hold the blocks of a sequence whose tokens are all computed."""
    blocks = pool.match_prefix(ids(tokens), salt, len(tokens))
    pool.acquire(blocks)
    parent = blocks[-1].uid if blocks else salt
    num_cached = len(blocks)
    blocks = blocks + pool.allocate(-(-len(tokens) // SIZE) - num_cached)
    pool.cache_full_blocks(ids(tokens), blocks, num_cached, len(tokens) // SIZE, parent)
    return blocks


def num_found(pool: BlockPool, tokens: list[int], salt: str = "") -> int:
    return len(pool.match_prefix(ids(tokens), salt, len(tokens)))


def test_the_null_block_is_never_handed_out() -> None:
    pool = pool_of(5)
    assert sorted(block.block_id for block in pool.allocate(5)) == [1, 2, 3, 4, 5]
    assert pool.num_free == 0


def test_allocating_more_than_is_free_is_a_broken_invariant() -> None:
    with pytest.raises(AssertionError, match="3 blocks asked of 2"):
        pool_of(2).allocate(3)


def test_a_block_freed_twice_is_noticed() -> None:
    pool = pool_of(2)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(blocks)


def test_freed_blocks_stay_findable_until_they_are_handed_out() -> None:
    pool = pool_of(4)
    tokens = list(range(8))
    pool.free(store(pool, tokens))
    assert num_found(pool, tokens) == 2
    assert pool.num_cached_free == 2
    pool.allocate(4)
    assert num_found(pool, tokens) == 0
    assert pool.num_cached_free == 0


def test_a_match_ends_at_the_first_difference_and_at_whole_blocks() -> None:
    pool = pool_of(8)
    store(pool, list(range(12)))
    assert num_found(pool, [*range(12), 99]) == 3
    assert num_found(pool, list(range(11))) == 2
    assert num_found(pool, [*range(4), 0, 0, 0, 0, *range(8, 12)]) == 1
    assert num_found(pool, [1, *range(1, 12)]) == 0


def test_a_match_holds_no_more_tokens_than_asked() -> None:
    pool = pool_of(4)
    tokens = list(range(8))
    store(pool, tokens)
    assert len(pool.match_prefix(ids(tokens), "", 7)) == 1  # the last token must be computed
    assert len(pool.match_prefix(ids(tokens), "", 3)) == 0
    assert len(pool.match_prefix(ids(tokens), "", 0)) == 0


def test_equal_blocks_behind_different_beginnings_are_different() -> None:
    pool = pool_of(8)
    store(pool, [1, 1, 1, 1, 5, 5, 5, 5])
    assert num_found(pool, [2, 2, 2, 2, 5, 5, 5, 5]) == 0
    assert num_found(pool, [5, 5, 5, 5]) == 0


def test_salts_do_not_see_each_other_and_leave_nothing_behind() -> None:
    pool = pool_of(4)
    tokens = list(range(8))
    for number in range(50):
        salt = f"tenant {number}"
        assert num_found(pool, tokens, salt) == 0
        pool.free(store(pool, tokens, salt))
        assert num_found(pool, tokens, salt) == 2
        assert len(pool._trie) <= 4
        pool.check([])


def test_shared_blocks_are_free_when_the_last_holder_lets_go() -> None:
    pool = pool_of(4)
    tokens = list(range(8))
    first, second = store(pool, tokens), store(pool, tokens)
    assert [block.block_id for block in first] == [block.block_id for block in second]
    pool.check([first, second])
    pool.free(first)
    assert pool.num_used == 2
    pool.check([second])
    pool.free(second)
    assert pool.num_used == 0
    pool.check([])


def test_a_chains_tail_is_evicted_before_its_head() -> None:
    pool = pool_of(4)
    tokens = list(range(16))
    pool.free(store(pool, tokens))
    for left in (3, 2, 1, 0):
        pool.allocate(1)
        assert num_found(pool, tokens) == left


def test_the_least_recently_freed_chain_is_evicted_first() -> None:
    pool = pool_of(4)
    old, new = [1] * 8, [2] * 8
    pool.free(store(pool, old))
    pool.free(store(pool, new))
    pool.free(store(pool, old))  # used again: now the younger one
    pool.allocate(2)
    assert (num_found(pool, old), num_found(pool, new)) == (2, 0)


def test_blocks_without_findable_content_are_reused_first() -> None:
    pool = pool_of(4)
    tokens = list(range(8))
    pool.free(store(pool, tokens))
    pool.free(pool.allocate(2))  # freed later, but worth nothing
    pool.allocate(2)
    assert num_found(pool, tokens) == 2


def test_a_block_computed_twice_at_once_is_kept_by_both_and_found_once() -> None:
    pool = pool_of(8)
    tokens = list(range(8))
    first, second = pool.allocate(2), pool.allocate(3)
    pool.cache_full_blocks(ids(tokens), first, 0, 2, "")
    parent = pool.cache_full_blocks(ids(tokens), second, 0, 2, "")
    assert pool.match_prefix(ids(tokens), "", 8) == first
    # The second one's next block hangs on the chain that can be found.
    pool.cache_full_blocks(ids([*tokens, 8, 8, 8, 8]), second, 2, 3, parent)
    assert pool.match_prefix(ids([*tokens, 8, 8, 8, 8]), "", 12) == [*first, second[2]]
    pool.check([first, second])


def test_a_child_whose_head_was_evicted_is_never_found_and_ages_out() -> None:
    pool = pool_of(6)
    head, tail = list(range(4)), list(range(4, 8))
    first, second = pool.allocate(1), pool.allocate(2)
    pool.cache_full_blocks(ids(head), first, 0, 1, "")
    parent = pool.cache_full_blocks(ids(head), second, 0, 1, "")  # a private copy
    pool.cache_full_blocks(ids(head + tail), second, 1, 2, parent)
    pool.free(first)
    others = pool.allocate(4)  # evicts the head that is found; its child is still held
    assert num_found(pool, head + tail) == 0
    pool.cache_full_blocks(ids(head), others, 0, 1, "")  # the head comes back, under a new uid
    assert num_found(pool, head + tail) == 1
    pool.check([others, second])
    pool.free(second)
    pool.free(others)
    pool.allocate(6)
    assert not pool._trie


def test_without_a_prefix_cache_nothing_is_found() -> None:
    pool = pool_of(4, prefix_cache=False)
    tokens = list(range(8))
    pool.free(store(pool, tokens))
    assert num_found(pool, tokens) == 0
    assert pool.num_cached_free == 0


def test_check_notices_a_holder_nobody_counted() -> None:
    pool = pool_of(4)
    blocks = pool.allocate(2)
    with pytest.raises(AssertionError):
        pool.check([])
    with pytest.raises(AssertionError):
        pool.check([blocks, blocks])


@pytest.mark.parametrize("seed", range(5))
def test_random_sequences_leave_the_pool_consistent(seed: int) -> None:
    rng = random.Random(seed)
    pool = pool_of(12)
    held: list[list[Block]] = []
    for _ in range(600):
        tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 20))]
        if pool.num_free >= 5 and rng.random() < 0.6:
            held.append(store(pool, tokens, rng.choice(["", "salt"])))
        elif held:
            pool.free(held.pop(rng.randrange(len(held))))
        pool.check(held)
