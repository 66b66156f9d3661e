"""What the machine can do: a large copy and a large matrix product, measured in the same run."""

from typing import Any

import torch

from .floors import Ceilings
from .measure import describe
from .observe import Timer

REPETITIONS = 20
SIZES = {"cuda": (4 * 2**30, 8192), "cpu": (2**28, 1024)}  # bytes of the copy, side of a matrix
CPU_CACHE = 32e6  # bytes; a reading of it would differ by operating system


def measure(
    timer: Timer,
    device: torch.device,
    dtype: torch.dtype,
    copy_bytes: int | None = None,
    size: int | None = None,
) -> tuple[Ceilings | None, dict[str, Any]]:
    """The ceilings, None if one of them failed, and both as they are recorded."""
    copy_bytes = copy_bytes or SIZES[device.type][0]
    side = size or SIZES[device.type][1]

    def copy_rate() -> float:
        source = torch.ones(copy_bytes, dtype=torch.int8, device=device)
        target = torch.empty_like(source)
        return 2 * copy_bytes / _median(timer, lambda: (target.copy_(source),))

    def matrix_rate() -> float:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        return 2 * side**3 / _median(timer, lambda: (a @ b,))

    rates: dict[str, float] = {}
    facts: dict[str, Any] = {}
    name = str(dtype).removeprefix("torch.")
    for title, rate, unit in (
        ("copy GB/s", copy_rate, 1e9),
        (f"{name} TFLOP/s", matrix_rate, 1e12),
    ):
        try:
            rates[title] = rate()
            facts[title] = round(rates[title] / unit, 1 if unit == 1e9 else 3)
        except Exception as error:
            facts[title] = f"failed: {describe(error)}"
    if len(rates) < 2:
        return None, facts
    cache = CPU_CACHE
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    bandwidth, products = rates.values()
    return Ceilings(bandwidth, products, cache), facts


def _median(timer, closure):
    """Seconds of a call."""
    times = [timer(closure, launches_count=False) for _ in range(REPETITIONS)]
    return 1e-3 * sorted(times)[len(times) // 2]
