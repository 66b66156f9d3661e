"""Timers, and what is read of a closure beside times: memory, launches, host seconds."""

import time
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
    """Until the device has done what it was given."""
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


def peak_bytes(closure: Closure, device: torch.device) -> int | None:
    """Most device memory in use during a call beyond what was before; None on a CPU."""
    if not on_gpu(device):
        return None
    torch.cuda.synchronize()
    prepare(closure)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    closure()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def launches(closure: Closure, device: torch.device) -> int | None:
    """Kernels, copies and fills that a call starts on the device; None on a CPU.

    Raises:
        RuntimeError: among others, where the driver's profiling interface is not available.
    """
    if not on_gpu(device):
        return None
    from torch.profiler import DeviceType, ProfilerActivity, profile

    prepare(closure)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        closure()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in seen.events())


def host_microseconds(closure: Closure, device: torch.device, calls: int = 20) -> float | None:
    """Median time until a call returns, the device's work aside; None on a CPU."""
    if not on_gpu(device):
        return None
    times = []
    for _ in range(calls):
        prepare(closure)
        torch.cuda.synchronize()
        start = time.perf_counter()
        closure()
        times.append(1e6 * (time.perf_counter() - start))
    return sorted(times)[calls // 2]


class Timer(Protocol):
    def __call__(self, closure: Closure, *, launches_count: bool) -> float:
        """Milliseconds of one call, with or without the host's part in it.

        What the closure has to do before is called, but not timed.
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


def here() -> tuple[torch.device, Timer]:
    """The GPU if there is one, with its clock."""
    if torch.cuda.is_available():
        return torch.device("cuda"), CudaTimer()
    return torch.device("cpu"), WallTimer()
