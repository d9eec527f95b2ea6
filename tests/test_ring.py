import sys
import threading

import pytest

from asyncllm.ring import Bell, SpscRing


def test_items_come_out_in_the_order_they_went_in() -> None:
    ring: SpscRing[int] = SpscRing(8)
    for lap in range(5):  # the indices run past the capacity several times
        items = list(range(lap * 10, lap * 10 + 7))
        assert all(ring.try_push(item) for item in items)
        assert [ring.try_pop() for _ in items] == items


def test_a_full_ring_refuses_and_keeps_what_it_has() -> None:
    ring: SpscRing[str] = SpscRing(2)
    assert ring.try_push("a") and ring.try_push("b")
    assert not ring.try_push("c")
    assert len(ring) == ring.capacity == 2
    assert ring.try_pop() == "a"
    assert ring.try_push("c")
    assert [ring.try_pop(), ring.try_pop()] == ["b", "c"]


def test_an_empty_ring_gives_none() -> None:
    ring: SpscRing[int] = SpscRing(1)
    assert ring.try_pop() is None
    ring.try_push(0)
    assert ring.try_pop() == 0  # a false item is an item
    assert ring.try_pop() is None


def test_a_popped_item_is_not_kept_alive() -> None:
    ring: SpscRing[list[int]] = SpscRing(4)
    item = [1]
    before = sys.getrefcount(item)
    ring.try_push(item)
    ring.try_pop()
    assert sys.getrefcount(item) == before


@pytest.mark.parametrize("capacity", [0, 3, -2, 6])
def test_a_capacity_that_is_no_power_of_two_is_refused(capacity: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        SpscRing(capacity)


def test_a_ring_before_the_wait_is_not_slept_over() -> None:
    bell = Bell()
    bell.ring()
    waiter = threading.Thread(target=bell.wait)
    waiter.start()
    waiter.join(10.0)
    assert not waiter.is_alive()


@pytest.mark.parametrize("capacity", [1, 64])
def test_two_threads_lose_double_and_reorder_nothing(capacity: int) -> None:
    num_items = 200_000 if capacity > 1 else 2_000  # one cell: a thread switch per item
    ring: SpscRing[int] = SpscRing(capacity)
    ready = threading.Barrier(2)
    interval = sys.getswitchinterval()

    def produce() -> None:
        ready.wait()
        for item in range(num_items):
            while not ring.try_push(item):
                pass

    producer = threading.Thread(target=produce)
    sys.setswitchinterval(1e-5)  # switch threads in the middle of everything
    try:
        producer.start()
        ready.wait()
        for expected in range(num_items):
            item = ring.try_pop()
            while item is None:
                item = ring.try_pop()
            assert item == expected
        producer.join()
    finally:
        sys.setswitchinterval(interval)
    assert ring.try_pop() is None and len(ring) == 0


def test_a_bell_wakes_the_consumer_for_every_item() -> None:
    ring: SpscRing[int] = SpscRing(16)
    bell = Bell()
    received: list[int] = []

    def consume() -> None:
        while len(received) < 5_000:
            bell.clear()
            if not len(ring):
                bell.wait()
            while (item := ring.try_pop()) is not None:
                received.append(item)

    consumer = threading.Thread(target=consume, daemon=True)
    consumer.start()
    for item in range(5_000):
        while not ring.try_push(item):
            pass
        bell.ring()
    consumer.join(timeout=30)
    assert received == list(range(5_000))
