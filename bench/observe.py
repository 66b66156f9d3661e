"""Timers, and what else is read of a closure: memory, launches, host time; errors in a line."""

import time
from collections.abc import Callable
from typing import Protocol

import torch

from .providers import Closure

FLUSH_BYTES = 256 * 2**20
FLUSHES_AHEAD = 4


def prepare(closure: Closure) -> None:
    getattr(closure, "before", lambda: None)()


def on_gpu(device: torch.device) -> bool:
    return device.type != "cpu"


def wait(device: torch.device) -> None:
    """Waits until the device is idle."""
    if on_gpu(device):
        torch.cuda.synchronize()


def usable(device: torch.device) -> bool:
    """Whether the process can go on after an error: False after a CUDA error that persists.

    False also where a failed capture has left the caching allocator in capture mode (before torch
    2.12), in which it asserts sooner or later: ``empty_cache`` asserts it now.
    """
    if not on_gpu(device):
        return True
    try:
        if torch.cuda.is_current_stream_capturing():
            return False
        torch.cuda.empty_cache()
        return torch.ones(1, device=device).add_(1).item() == 2
    except Exception:
        return False


def describe(error: BaseException) -> str:
    """Type and first line of an error, and of the one that was being handled when it was raised.

    An aborted graph capture raises again in ``capture_end``; the cause is the error before.
    """
    earlier = None if error.__suppress_context__ else error.__context__
    found = []
    for one in filter(None, (error, earlier)):
        lines = str(one).strip().splitlines()
        found.append(f"{type(one).__name__}: {lines[0]}" if lines else type(one).__name__)
    return ", after ".join(found)


# --- on a GPU -------------------------------------------------------------------------------------


def peak_bytes(closure: Closure) -> int:
    """Most device memory in use during a call, beyond what was in use before it."""
    torch.cuda.synchronize()
    prepare(closure)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    closure()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def launches(closure: Closure) -> int:
    """Kernels, copies and fills that a call starts on the GPU.

    Raises:
        RuntimeError: the driver's profiling interface is not available, for example.
    """
    from torch.profiler import DeviceType, ProfilerActivity, profile

    prepare(closure)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        closure()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in seen.events())


def host_microseconds(closure: Closure, calls: int = 20) -> float:
    """Median time until a call returns, the GPU's work aside."""
    times = []
    for _ in range(calls):
        prepare(closure)
        torch.cuda.synchronize()
        start = time.perf_counter()
        closure()
        times.append(1e6 * (time.perf_counter() - start))
    return sorted(times)[calls // 2]


# --- timers ---------------------------------------------------------------------------------------


class Timer(Protocol):
    def __call__(self, closure: Closure, *, launches_count: bool) -> float:
        """Milliseconds of one call, with or without the host's part in it.

        The closure's ``before`` is called, but not timed.
        """


class WallTimer:
    """The host's clock; on a CPU the host does everything."""

    def __call__(self, closure: Closure, *, launches_count: bool) -> float:
        prepare(closure)
        start = time.perf_counter()
        closure()
        return 1e3 * (time.perf_counter() - start)


class CudaTimer:
    """CUDA events around one call, with L2 full of clean lines of an unrelated buffer.

    Writes of one buffer are followed by a read of another, both larger than L2: after writes alone,
    dirty lines would be written back during the measured call and charged to it. Where launches
    count, the GPU is idle when the clock starts: the figure is what a caller waits. Where they do
    not, the GPU is still busy with these buffers while the host launches.
    """

    def __init__(self, device: torch.device | str = "cuda", flush_bytes: int = FLUSH_BYTES) -> None:
        count = flush_bytes // 4
        self.written = torch.empty(count, dtype=torch.float32, device=device)
        self.read = torch.zeros(count, dtype=torch.float32, device=device)
        self.total = torch.zeros((), dtype=torch.float32, device=device)

    def __call__(self, closure: Closure, *, launches_count: bool) -> float:
        prepare(closure)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(1 if launches_count else FLUSHES_AHEAD):
            self.written.zero_()
        torch.sum(self.read, 0, out=self.total)
        if launches_count:
            torch.cuda.synchronize()
        start.record()
        closure()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def here() -> tuple[torch.device, Callable[[], Timer]]:
    """The GPU if there is one, and the type of its timer."""
    if torch.cuda.is_available():
        return torch.device("cuda"), CudaTimer
    return torch.device("cpu"), WallTimer
