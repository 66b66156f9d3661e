"""The association order, from shapes alone; nothing is measured.

Each order's modelled time is a line over the number of positions L, so the best order is a few
intervals of L. They depend on channels and heads only, which a compiled model knows: no guard on L
is made unless L is known, and a model traced for any L takes the paper's order.
"""

import functools
import math

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .checks import ORDERS
from .costs import Cost, order_cost

# Rates of an H200 with measured or data-sheet ceilings; only their proportions matter here, and
# only to rank the orders.
MATRIX_RATE = 395e12  # multiply-adds a second in half precision
FLOAT32_RATE = 25e12  # multiply-adds a second in float32
BANDWIDTH = 4.3e12  # bytes a second


def seconds(cost: Cost, itemsize: int) -> float:
    """Modelled time of one sample; a ranking, not a prediction."""
    rate = MATRIX_RATE if itemsize == 2 else FLOAT32_RATE
    return (
        cost.multiply_adds / rate
        + cost.small_multiply_adds / FLOAT32_RATE
        + cost.elements * itemsize / BANDWIDTH
    )


@functools.lru_cache(maxsize=4096)
def intervals(
    channels: int, c_m: int, c_n: int, heads: int, itemsize: int, reconstruct: bool
) -> tuple[tuple[float, float, str], ...]:
    """``(first L, first L beyond, best order)``, ascending, from 1 to infinity."""
    orders = ORDERS if reconstruct else ORDERS[:2]

    def modelled(order: str, length: int) -> float:
        return seconds(order_cost(order, channels, c_m, c_n, heads, length, reconstruct), itemsize)

    lines = [(modelled(o, 0), modelled(o, 1) - modelled(o, 0)) for o in orders]
    crossings = {
        math.floor((there - here) / (slope - slope_there)) + i
        for here, slope in lines
        for there, slope_there in lines
        if slope > slope_there and there > here
        for i in (0, 1, 2)  # either side of a crossing that rounding may have moved
    }
    starts = sorted({1, *crossings} - {0})
    best = [min(orders, key=lambda o: modelled(o, start)) for start in starts]
    return tuple(zip(starts, [*starts[1:], math.inf], best, strict=True))


@torch.compiler.assume_constant_result
def _known_intervals(*shape):
    """``intervals``, which depends on nothing that varies from call to call of a model."""
    return intervals(*shape)


def choose_order(
    channels: int, c_m: int, c_n: int, heads: int, length: int, itemsize: int, reconstruct: bool
) -> str:
    """The order with the least modelled time for ``length`` positions."""
    chosen = "AZ"
    for start, end, order in _known_intervals(channels, c_m, c_n, heads, itemsize, reconstruct):
        if statically_known_true(length >= start) and (
            end == math.inf or statically_known_true(length < end)
        ):
            chosen = order
    return chosen
