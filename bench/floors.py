"""What a block has to move and compute at least, and how long that takes at given ceilings.

Compulsory bytes: X read and the output written once; X twice where one sample does not fit the
cache of the card between the two passes. Backward: X and the output's gradient read (X likewise),
X's gradient written. Weights are small beside maps, but count. Useful operations: those of the
cheapest association order; backward has two products for each of forward's.

Ceilings are measured in the same run.
"""

from dataclasses import dataclass

from da_triton.planning.costs import order_cost
from da_triton.planning.shapes import ORDERS

from .problems import BACKWARD, FORWARD, STEP
from .workloads import Workload


@dataclass(frozen=True)
class Ceilings:
    bandwidth: float  # bytes a second, read and written together
    matrix_rate: float  # operations a second in the dtype at hand
    cache: float = 50e6  # bytes of the last cache; half of it is taken to hold X


def compulsory_bytes(
    work: Workload, batch: int, mode: str, itemsize: int, cache: float = Ceilings.cache
) -> int:
    """Of the whole batch."""
    one = work.c * work.length * itemsize
    reads = 1 if one <= cache / 2 else 2
    weights = itemsize * work.c * (2 * work.c_m + 2 * work.c_n)
    forward = batch * one * (reads + 1) + weights
    backward = batch * one * (reads + 2) + 2 * weights
    return {FORWARD: forward, BACKWARD: backward, STEP: forward + backward}[mode]


def useful_flop(work: Workload, batch: int, mode: str) -> int:
    """Multiplications and additions of the cheapest association order, of the whole batch."""
    costs = [
        order_cost(o, work.c, work.c_m, work.c_n, work.heads, work.length) for o in ORDERS.values()
    ]
    forward = 2 * batch * min(c.macs + c.small_macs for c in costs)
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
