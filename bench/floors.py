"""How long a block takes at least at given ceilings: ``planning.costs`` has the bytes and MACs.

Backward has two products for each of forward's. Ceilings are measured in the same run.
"""

from dataclasses import dataclass

from da_triton.planning import costs
from da_triton.planning.shapes import Shape

from .problems import BACKWARD, FORWARD, STEP
from .workloads import Workload


@dataclass(frozen=True)
class Ceilings:
    bandwidth: float  # bytes a second, read and written together
    matrix_rate: float  # FLOP/s in the dtype measured
    cache: float = costs.L2  # bytes; half of it is taken to hold X


def _shape(work: Workload, batch: int, itemsize: int) -> Shape:
    return Shape(batch, work.c, work.c_m, work.c_n, work.heads, work.length, itemsize, True)


def compulsory_bytes(
    work: Workload, batch: int, mode: str, itemsize: int, cache: float = Ceilings.cache
) -> int:
    """``costs.compulsory_bytes`` of the passes of a mode."""
    passes = {FORWARD: (False,), BACKWARD: (True,), STEP: (False, True)}[mode]
    s = _shape(work, batch, itemsize)
    return sum(costs.compulsory_bytes(s, cache, backward) for backward in passes)


def useful_flop(work: Workload, batch: int, mode: str) -> int:
    """Multiplications and additions of the cheapest association order, of the whole batch."""
    forward = 2 * costs.least_macs(_shape(work, batch, 1))
    return forward * {FORWARD: 1, BACKWARD: 2, STEP: 3}[mode]


@dataclass(frozen=True)
class Floor:
    """Seconds that nothing can beat at given ceilings, and which of them decides."""

    seconds: float
    bound: str  # "memory" or "compute"
    bytes: int
    flop: int


def floor(work: Workload, batch: int, mode: str, itemsize: int, ceilings: Ceilings) -> Floor:
    moved = compulsory_bytes(work, batch, mode, itemsize, ceilings.cache)
    flop = useful_flop(work, batch, mode)
    memory, compute = moved / ceilings.bandwidth, flop / ceilings.matrix_rate
    bound = "memory" if memory >= compute else "compute"
    return Floor(max(memory, compute), bound, moved, flop)
