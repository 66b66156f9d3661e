"""What is read of a closure and of the GPU beside times: memory, launches, host seconds."""

import time

import torch

from .providers import Closure


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
