"""The few things a CUDA executor asks of CUDA: a stream, marks on it, pinned memory, graphs; and a stand-in for a host.

Work is launched in order and runs later; what the host may read is known by waiting for a mark behind it. `HostDevice`
keeps that contract without CUDA, so that tests run the whole executor on a CPU and find what would be a race. Engine
thread only.
"""

import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

Work = Callable[[], object]


class Mark(Protocol):
    """A point in the stream."""

    def wait(self) -> None:
        """Block (GIL released) until the device is there."""
        ...

    def seconds_since(self, earlier: "Mark") -> float:
        """Device time between two marks that were both reached."""
        ...


class Device(Protocol):
    """One stream of work."""

    torch_device: torch.device
    num_sms: int
    overlaps: bool  # whether work runs beside the host

    def run(self, work: Work) -> None:
        """Launch `work` behind everything before it."""
        ...

    def upload(self, target: Tensor, source: Tensor) -> None:
        """Copy pinned host memory to the device; `source` must not change until a mark behind was waited for."""
        ...

    def download(self, target: Tensor, source: Tensor) -> None:
        """Copy to pinned host memory, to be read once a mark behind was waited for."""
        ...

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Host memory the device copies from and to by itself."""
        ...

    def mark(self) -> Mark:
        """A mark that is not set yet."""
        ...

    def set(self, mark: Mark) -> None:
        """Put a mark, new or used, behind everything launched so far."""
        ...

    def capture(self, work: Work) -> Work:
        """Record `work` as one graph; the result replays it. `work` must have run before, so that all is compiled."""
        ...

    def synchronize(self) -> None:
        """Wait for everything."""
        ...

    def memory(self) -> tuple[int, int]:
        """Bytes free, and bytes in all."""
        ...


class CudaMark:
    """A CUDA event with its time."""

    def __init__(self, blocking: bool) -> None:
        self.event = torch.cuda.Event(enable_timing=True, blocking=blocking)

    def wait(self) -> None:
        """See `Mark`."""
        self.event.synchronize()

    def seconds_since(self, earlier: Mark) -> float:
        """See `Mark`."""
        assert isinstance(earlier, CudaMark)
        return earlier.event.elapsed_time(self.event) / 1e3


class CudaDevice:
    """An NVIDIA GPU."""

    overlaps = True

    def __init__(self, torch_device: torch.device, spin: bool) -> None:
        """`spin`: burn a core while waiting, which hears of a step's end some 20 µs sooner than sleeping."""
        self.torch_device = torch_device
        self.num_sms = torch.cuda.get_device_properties(torch_device).multi_processor_count
        self._stream = torch.cuda.Stream(torch_device)
        # One stream for all that this thread does, libraries included: no operation needs to name it.
        torch.cuda.set_stream(self._stream)
        self._blocking = not spin
        self._pool = torch.cuda.graph_pool_handle()  # all graphs share their memory: one runs at a time

    def run(self, work: Work) -> None:
        """See `Device`."""
        work()

    def upload(self, target: Tensor, source: Tensor) -> None:
        """See `Device`."""
        target.copy_(source, non_blocking=True)

    def download(self, target: Tensor, source: Tensor) -> None:
        """See `Device`."""
        target.copy_(source, non_blocking=True)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See `Device`."""
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def mark(self) -> Mark:
        """See `Device`."""
        return CudaMark(self._blocking)

    def set(self, mark: Mark) -> None:
        """See `Device`."""
        assert isinstance(mark, CudaMark)
        mark.event.record(self._stream)

    def capture(self, work: Work) -> Work:
        """See `Device`."""
        graph = torch.cuda.CUDAGraph()
        # Not `torch.cuda.graph`, which gives cached memory back first: eager steps are sized to find it there.
        # thread_local: what other threads of the process do with CUDA does not spoil the capture.
        graph.capture_begin(self._pool, capture_error_mode="thread_local")
        work()
        graph.capture_end()
        return graph.replay

    def synchronize(self) -> None:
        """See `Device`."""
        self._stream.synchronize()

    def memory(self) -> tuple[int, int]:
        """See `Device`."""
        return torch.cuda.mem_get_info(self.torch_device)


class HostMark:
    """Set when the queue comes to it."""

    def __init__(self, device: "HostDevice") -> None:
        self._device = device
        self.reached_s: float | None = None

    def wait(self) -> None:
        """See `Mark`."""
        self._device.run_until(self)

    def seconds_since(self, earlier: Mark) -> float:
        """See `Mark`."""
        assert isinstance(earlier, HostMark) and self.reached_s is not None and earlier.reached_s is not None
        return self.reached_s - earlier.reached_s


class HostDevice:
    """A CPU that behaves like a device: nothing launched runs before somebody waits for it.

    As late as can be: an upload reads its source only then, so a buffer that was reused too early shows.
    """

    overlaps = True
    num_sms = 4  # for kernels that size their grid by it: small, as every program is interpreted

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self._queue: deque[Work] = deque()
        self._is_running = False

    def run(self, work: Work) -> None:
        """See `Device`. What work itself launches belongs to it."""
        if self._is_running:
            work()
        else:
            self._queue.append(work)

    def upload(self, target: Tensor, source: Tensor) -> None:
        """See `Device`."""
        self.run(partial(target.copy_, source))

    def download(self, target: Tensor, source: Tensor) -> None:
        """See `Device`."""
        self.run(partial(target.copy_, source))

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See `Device`."""
        return torch.zeros(shape, dtype=dtype)

    def mark(self) -> Mark:
        """See `Device`."""
        return HostMark(self)

    def set(self, mark: Mark) -> None:
        """See `Device`."""
        assert isinstance(mark, HostMark)
        mark.reached_s = None

        def reach() -> None:
            mark.reached_s = time.perf_counter()

        self._queue.append(reach)

    def capture(self, work: Work) -> Work:
        """See `Device`. A replay computes anew from the same tensors, as a graph does."""
        return lambda: self.run(work)

    def synchronize(self) -> None:
        """See `Device`."""
        while self._queue:
            self._run_next()

    def memory(self) -> tuple[int, int]:
        """See `Device`. A number of bytes that tiny models fit into."""
        return 2**29, 2**30

    def run_until(self, mark: HostMark) -> None:
        """Do what was launched up to a mark."""
        while mark.reached_s is None:
            assert self._queue, "waited for a mark that was never set"
            self._run_next()

    def _run_next(self) -> None:
        work = self._queue.popleft()
        self._is_running = True
        try:
            work()
        finally:
            self._is_running = False
