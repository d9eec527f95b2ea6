"""Who runs next: the sequences that are not running, by (priority, arrival, request id).

Knows order only, not whether anything fits. Engine thread only.
"""

import heapq

from asyncllm.engine.sequence import Sequence, SequenceStatus

MIN_COMPACT = 64  # entries below which ended sequences may stay in the heap


class WaitingQueue:
    """A heap of waiting sequences, and those held back until a sibling has computed the prompt they share.

    A held sequence hangs on its leader instead of standing in the heap, so it blocks nobody behind it and costs nothing
    per step.
    """

    def __init__(self) -> None:
        self.num_tokens = 0  # of all waiting sequences, held ones included
        self._num_waiting = 0
        self._heap: list[tuple[tuple[int, float, int], Sequence]] = []

    def __len__(self) -> int:
        """Waiting sequences, held ones included."""
        return self._num_waiting

    def push(self, sequence: Sequence) -> None:
        """Queue a sequence: a new one behind its equals, a preempted one (older arrival) before them."""
        self._count(sequence, 1)
        heapq.heappush(self._heap, (sequence.order, sequence))

    def hold(self, sequence: Sequence, leader: Sequence) -> None:
        """Queue a sequence once `leader` is released."""
        self._count(sequence, 1)
        if leader.followers is None:
            leader.followers = []
        leader.followers.append(sequence)

    def release_followers(self, leader: Sequence) -> None:
        """Let the sequences held behind `leader` compete."""
        followers, leader.followers = leader.followers, None
        for sequence in followers or ():  # one that ended meanwhile is dropped by `peek`
            heapq.heappush(self._heap, (sequence.order, sequence))

    def peek(self) -> Sequence | None:
        """The sequence to admit next, or None when all wait for a sibling."""
        while self._heap:
            sequence = self._heap[0][1]
            if sequence.status is SequenceStatus.WAITING:
                return sequence
            heapq.heappop(self._heap)
        return None

    def pop(self) -> None:
        """Take out the sequence that `peek` returned."""
        self._count(heapq.heappop(self._heap)[1], -1)

    def discard(self, sequence: Sequence) -> None:
        """Forget a sequence that ended while it waited (its status says so already)."""
        # It stays in the heap, where `peek` drops it; rebuilt now and then, or a low priority could pile up the dead.
        self._count(sequence, -1)
        if len(self._heap) > MIN_COMPACT + 2 * self._num_waiting:
            self._heap = [entry for entry in self._heap if entry[1].status is SequenceStatus.WAITING]
            heapq.heapify(self._heap)

    def _count(self, sequence: Sequence, sign: int) -> None:
        self._num_waiting += sign
        self.num_tokens += sign * len(sequence.tokens)
