"""What a block has to move and compute at least, and how long that takes at given ceilings.

Compulsory bytes: X read and the output written once; X twice where one sample does not fit the
cache of the card between the two passes. Backward: X and the output's gradient read (X likewise),
X's gradient written. Weights are small beside maps, but count. Useful operations: those of the
cheapest association order; backward has two products for each of forward's.

Ceilings of the ``gpu`` command are measured in the same run. ``SHEETS`` has data-sheet figures of
cards that are not there: what is computed from those is a model and says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from da_triton.planning.costs import order_cost
from da_triton.planning.shapes import ORDERS

from .problems import BACKWARD, FORWARD, STEP
from .workloads import Workload


@dataclass(frozen=True)
class Ceilings:
    bandwidth: float  # bytes a second, read and written together
    matrix_rate: float  # operations a second in the dtype at hand
    cache: float = 50e6  # bytes of the last cache; half of it is taken to hold X


# Dense bfloat16 with float32 sums, and memory bandwidth, from the makers' data sheets (H200, H100
# and A100 80 GB as SXM modules); last-level cache from their architecture papers. Multiplied
# by the shares that large copies and products are taken to reach of them.
COPY_SHARE, MATRIX_SHARE = 0.9, 0.8
SHEETS = {
    "H200": Ceilings(4.8e12, 989e12, 50e6),
    "H100": Ceilings(3.35e12, 989e12, 50e6),
    "A100": Ceilings(2.039e12, 312e12, 40e6),
    "RTX 4090": Ceilings(1.008e12, 165e12, 72e6),
    "B200": Ceilings(8.0e12, 2250e12, 126e6),
    "MI300X": Ceilings(5.3e12, 1307e12, 256e6),
}


def modelled(sheet: Ceilings) -> Ceilings:
    """What a card is taken to reach of its data sheet."""
    return Ceilings(COPY_SHARE * sheet.bandwidth, MATRIX_SHARE * sheet.matrix_rate, sheet.cache)


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
    forward = 2 * batch * min(c.multiply_adds + c.small_multiply_adds for c in costs)
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


def table(workloads: Sequence[Workload], modes: Sequence[str]) -> pd.DataFrame:
    """A row for each workload, mode and card: modelled, and labelled so."""
    rows = []
    for mode in modes:
        for work in workloads:
            for card, sheet in SHEETS.items():
                found = floor(work, work.n, mode, 2, modelled(sheet))
                rows.append({
                    "kind": "model", "workload": work.name, "mode": mode, "dtype": "bfloat16",
                    "MB": found.bytes / 1e6, "GFLOP": found.flop / 1e9, "card": card,
                    "floor_us": 1e6 * found.seconds, "bound": found.bound,
                })  # fmt: skip
    return pd.DataFrame(rows)
