"""The roofline: measured peaks of the machine, and how long a block takes at least at them.

Peaks are those of a large copy and a large GEMM, measured in the same run. Bytes and MACs of a
block are those of ``planning.costs``; backward has two GEMMs for each of forward's.
"""

from typing import Any, NamedTuple

import torch

from da_triton.planning.costs import L2, compulsory_bytes, least_macs
from da_triton.planning.shapes import Shape

from .observe import Timer, describe
from .problems import BACKWARD, FORWARD, STEP
from .providers import Closure
from .workloads import Workload

REPETITIONS = 20
SIZES = {"cuda": (4 * 2**30, 8192), "cpu": (2**28, 1024)}  # bytes of the copy, side of a matrix
CPU_CACHE = 32e6  # bytes; a reading of it would differ by operating system
PASSES = {FORWARD: (False,), BACKWARD: (True,), STEP: (False, True)}  # whether each is backward


class Ceilings(NamedTuple):
    bandwidth: float  # bytes per second, read and written together
    matrix_rate: float  # FLOP/s in the dtype measured
    cache: float = L2  # bytes; half of it is taken to hold X


class Work(NamedTuple):
    """Bytes that a mode has to move, and FLOP of its cheapest association order."""

    bytes: int
    flop: int

    def least_time(self, ceilings: Ceilings) -> tuple[float, str]:
        """Seconds that nothing can beat, and whether "memory" or "compute" decides."""
        seconds = self.bytes / ceilings.bandwidth, self.flop / ceilings.matrix_rate
        return max(seconds), "memory" if seconds[0] >= seconds[1] else "compute"


def work_of(w: Workload, batch: int, mode: str, itemsize: int, cache: float = L2) -> Work:
    s = Shape(batch, w.c, w.c_m, w.c_n, w.heads, w.length, itemsize, True)
    moved = sum(compulsory_bytes(s, cache, backward) for backward in PASSES[mode])
    return Work(moved, 2 * least_macs(s) * sum(1 + backward for backward in PASSES[mode]))


def measure(
    timer: Timer,
    device: torch.device,
    dtype: torch.dtype,
    copy_bytes: int | None = None,
    side: int | None = None,
) -> tuple[Ceilings | None, dict[str, Any]]:
    """The ceilings, None if one of them failed, and both as they are recorded."""
    copy_bytes = copy_bytes or SIZES[device.type][0]
    side = side or SIZES[device.type][1]

    def copy() -> Closure:
        source = torch.ones(copy_bytes, dtype=torch.int8, device=device)
        target = torch.empty_like(source)
        return lambda: (target.copy_(source),)

    def product() -> Closure:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        return lambda: (a @ b,)

    matrix = f"{str(dtype).removeprefix('torch.')} TFLOP/s"
    rates: list[float] = []
    facts: dict[str, Any] = {}
    for title, make, amount, unit, digits in (
        ("copy GB/s", copy, 2 * copy_bytes, 1e9, 1),
        (matrix, product, 2 * side**3, 1e12, 3),
    ):
        try:
            rates.append(amount / _seconds(timer, make()))
            facts[title] = round(rates[-1] / unit, digits)
        except Exception as error:
            facts[title] = f"failed: {describe(error)}"
    if len(rates) < 2:
        return None, facts
    cuda = device.type == "cuda"
    cache = torch.cuda.get_device_properties(device).L2_cache_size if cuda else CPU_CACHE
    return Ceilings(rates[0], rates[1], cache), facts


def _seconds(timer: Timer, closure: Closure) -> float:
    """Median of a call."""
    times = [timer(closure, launches_count=False) for _ in range(REPETITIONS)]
    return 1e-3 * sorted(times)[len(times) // 2]
