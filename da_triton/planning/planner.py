"""Chooses order and route from shapes with a static cost model; nothing is timed at run time.

For the operations of the ``torch`` backend only the association order is chosen: each order's
modelled time is linear in the number of positions L, so the best order is constant on a few
intervals of L. These depend only on channels and heads, which a compiled model knows: there is no
guard on L unless L is known, and a model traced for any L takes the paper's order.

For the kernels the whole plan is made inside the operator, where L is a number: order, route, batch
chunk, and the route of the backward pass. ``da_triton.plan`` shows it.
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import torch

from ..tracing import constant
from .costs import (
    AZ,
    XH,
    Order,
    compulsory_bytes,
    distribute_steps,
    fused_backward_steps,
    fused_tiles,
    gather_steps,
    least_macs,
    num_partials,
    order_cost,
    orders,
    unfused_backward_steps,
)
from .shapes import Cost, Limits, Shape, Step

# H200 peak rates, measured or from data sheets. Only their ratios matter: they rank the orders.
MATRIX_RATE = 395e12  # MAC/s in half precision
FLOAT32_RATE = 25e12  # MAC/s in float32
BANDWIDTH = 4.3e12  # bytes/s
CPU_RATE = 1e11  # MAC/s of two cores


def seconds(cost: Cost, itemsize: int, cpu: bool = False) -> float:
    """Modelled time of one sample; a ranking, not a prediction."""
    if cpu:  # one rate for every product, and tensors stay in the cache between them
        return cost.all_macs / CPU_RATE
    rate = MATRIX_RATE if itemsize == 2 else FLOAT32_RATE
    return cost.macs / rate + cost.small_macs / FLOAT32_RATE + cost.elements * itemsize / BANDWIDTH


@functools.lru_cache(maxsize=4096)
def intervals(
    channels: int,
    c_m: int,
    c_n: int,
    heads: int,
    itemsize: int,
    reconstruct: bool,
    cpu: bool = False,
) -> tuple[tuple[float, float, Order], ...]:
    """``(first L, first L beyond, best order)``, ascending, from 1 to infinity."""
    candidates = orders(reconstruct)

    def modelled(order: Order, length: int) -> float:
        cost = order_cost(order, channels, c_m, c_n, heads, length, reconstruct)
        return seconds(cost, itemsize, cpu)

    lines = [(modelled(o, 0), modelled(o, 1) - modelled(o, 0)) for o in candidates]
    crossings = {
        math.floor((there - here) / (slope - slope_there)) + i
        for here, slope in lines
        for there, slope_there in lines
        if slope > slope_there and there > here
        for i in (0, 1, 2)  # either side of a crossing that rounding may have moved
    }
    starts = sorted({1, *crossings} - {0})
    best = [min(candidates, key=lambda o: modelled(o, start)) for start in starts]
    return tuple(zip(starts, [*starts[1:], math.inf], best, strict=True))


@constant
def _known_intervals(*shape):
    """``intervals``, which depend on nothing that varies between the calls of a model."""
    return intervals(*shape)


def choose_order(
    channels: int,
    c_m: int,
    c_n: int,
    heads: int,
    length: int,
    itemsize: int,
    reconstruct: bool,
    cpu: bool = False,
) -> Order:
    """The order with the least modelled time for ``length`` positions."""
    known: Any = bool
    if torch.compiler.is_compiling() or isinstance(length, torch.SymInt):  # slow to import
        from torch.fx.experimental.symbolic_shapes import statically_known_true as known
    chosen = AZ
    for start, end, order in _known_intervals(
        channels, c_m, c_n, heads, itemsize, reconstruct, cpu
    ):
        if known(length >= start) and (end == math.inf or known(length < end)):
            chosen = order
    return chosen


# --- kernels --------------------------------------------------------------------------------------


class Route(NamedTuple):
    """How a block runs in kernels."""

    order: Order
    gather: str  # "fused" or "unfused"
    distribute: str
    backward: str
    backward_order: Order  # of an unfused backward pass; XH of a fused one
    batch_chunk: int  # samples that go through both passes before the next ones start

    def __str__(self) -> str:
        forward = f"{self.order}: gather {self.gather}, distribute {self.distribute}"
        return f"{forward}; backward {self.backward} {self.backward_order}"


class PlannedRoute(NamedTuple):
    """A route with its modelled costs for the whole batch."""

    route: Route
    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    seconds: float  # forward
    backward_seconds: float


# Assumed fractions of the peak rate for vendor GEMMs and for these kernels, launch latency in a
# CUDA graph, and L2 size, to rank routes with. None is measured.
VENDOR_EFFICIENCY, KERNEL_EFFICIENCY = 0.85, 0.6
NARROW_SHARE = 0.5  # of either, where rows of positions are not aligned to 8 bytes
LAUNCH = 2.0e-6  # seconds, start and tail included
CACHE_BANDWIDTH = 5.5e12  # bytes/s from the L2 cache
CACHE = 32 * 2**20  # bytes of X that stay in the L2 between two passes


def modelled(steps: tuple[Step, ...], s: Shape, batch_chunks: int = 1) -> float:
    """Modelled seconds for a batch: per step max(compute, memory), plus launch latency."""
    rate = MATRIX_RATE if s.itemsize == 2 else FLOAT32_RATE
    total = 0.0
    for step in steps:
        efficiency = VENDOR_EFFICIENCY if step.library else KERNEL_EFFICIENCY
        narrow = 1.0 if step.library or s.wide else NARROW_SHARE
        requested = step.requested * s.itemsize / CACHE_BANDWIDTH
        moved = step.bytes(s.itemsize) / BANDWIDTH
        busy = max(step.macs / (rate * efficiency), moved, requested) / narrow
        total += busy * s.batch + step.launches * batch_chunks * LAUNCH
    return total


def wide(x) -> bool:
    """Whether kernels can load x, ``(N, C, L)``, at least 8 bytes at once."""
    rows = x.shape[1] if x.stride(1) == 1 else x.shape[2]
    return rows * x.element_size() % 8 == 0


def floor(s: Shape) -> float:
    """Roofline bound of forward in seconds: the compulsory bytes or the cheapest order's MACs."""
    rate = MATRIX_RATE if s.itemsize == 2 else FLOAT32_RATE
    return max(compulsory_bytes(s) / BANDWIDTH, least_macs(s) / rate)


def routes(
    s: Shape, limits: Limits, order: Order | None = None, saved_v: bool = False
) -> tuple[PlannedRoute, ...]:
    """Every route that the kernels can take, the one with the least modelled forward time first.

    ``order``: that of the forward pass; None for all. ``saved_v``: backward reads V instead of
    projecting it again.
    """
    kind, backward_order, backward_steps, backward_seconds = _backward(s, limits, saved_v)
    found = []
    for o in (order,) if order else orders(s.reconstruct):
        fused_gather, fused_distribute = fused_tiles(o, limits)
        for one, two in itertools.product({fused_gather, 0}, {fused_distribute, 0}):
            batch_chunk = _batch_chunk(s) if one and two else max(1, s.batch)
            per_sm = 1
            if one:
                per_sm = limits.per_sm.gather_from_x if o.from_x else limits.per_sm.gather_from_a
            num_splits = max(1, limits.num_sms * per_sm // max(1, min(s.batch, batch_chunk)))
            cached = batch_chunk * _bytes(s) <= CACHE
            both = not one and not two
            steps = (
                *gather_steps(s, o, one, num_splits, limits.blocks_of_n, both),
                *distribute_steps(s, o, two, limits.core, cached, limits.channels_fit, both),
            )
            gather, distribute = ("fused" if way else "unfused" for way in (one, two))
            route = Route(o, gather, distribute, kind, backward_order, batch_chunk)
            seconds = modelled(steps, s, math.ceil(s.batch / batch_chunk))
            found.append(PlannedRoute(route, steps, backward_steps, seconds, backward_seconds))
    return tuple(sorted(found, key=lambda planned: planned.seconds))


def _backward(
    s: Shape, limits: Limits, saved_v: bool
) -> tuple[str, Order, tuple[Step, ...], float]:
    """The backward pass with the least modelled time, whatever the forward pass was."""
    num_splits = max(1, limits.num_sms // max(1, s.batch))
    candidates = [
        ("unfused", o, tuple(unfused_backward_steps(s, o, limits.core, saved_v)))
        for o in orders(s.reconstruct)
    ]
    if limits.backward:
        blocks, batch, per_sm = limits.blocks_of_n, max(1, s.batch), limits.per_sm
        wanted = (
            limits.num_sms * per_sm.gather_from_x // (batch * blocks),
            limits.num_sms * per_sm.block_bwd_distribute // batch,
        )
        partials = (
            num_partials(s.length, limits.gather_from_x, wanted[0]),
            num_partials(s.length, limits.block_bwd_distribute, wanted[1]),
        )
        sizes = num_splits, limits.backward, blocks, saved_v, partials
        candidates.append(("fused", XH, tuple(fused_backward_steps(s, *sizes))))
    timed = [(*c, modelled(c[2], s)) for c in candidates]
    return min(timed, key=lambda c: c[-1])


def _bytes(s: Shape) -> int:
    return s.channels * s.length * s.itemsize


def _batch_chunk(s: Shape) -> int:
    """Samples whose X stays in the cache between two passes; all, where not even one does."""
    fitting = CACHE // _bytes(s)
    if fitting == 0 or fitting >= s.batch:
        return max(1, s.batch)
    return math.ceil(s.batch / math.ceil(s.batch / fitting))


def saves_v(channels: int, c_m: int, c_n: int, heads: int, recompute: bool | str) -> bool:
    """Whether forward saves V for backward. "auto": if recomputing it takes a tenth of a step.

    In MACs per position, in the paper's order: forward, backward (twice as much), and what backward
    projects again. Where bandwidth is the limit it costs even less, since X is read anyway.
    """
    if isinstance(recompute, bool):
        return not recompute
    forward = order_cost(AZ, channels, c_m, c_n, heads, 1).macs
    step = 3 * forward + channels * (c_m + c_n)
    return channels * c_n > 0.1 * (step + channels * c_n)
