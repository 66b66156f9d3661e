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
from .calibration import ratio
from .costs import (
    AZ,
    XH,
    Order,
    compulsory_bytes,
    distribute_steps,
    fused_backward_steps,
    fused_tiles,
    gather_steps,
    has_statistics,
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
    to_channels_last: bool = False  # forward copies X to channels-last memory, and its results back
    backward_to_channels_last: bool = False

    def __str__(self) -> str:
        copied, backward_copied = (
            ", in channels-last memory" * way
            for way in (self.to_channels_last, self.backward_to_channels_last)
        )
        forward = f"{self.order}: gather {self.gather}, distribute {self.distribute}{copied}"
        return f"{forward}; backward {self.backward} {self.backward_order}{backward_copied}"


class PlannedRoute(NamedTuple):
    """A route with its modelled costs for the whole batch."""

    route: Route
    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    seconds: float  # forward
    backward_seconds: float


LAUNCH = 1.2e-6  # assumed seconds between two launches in a CUDA graph
CACHE_BANDWIDTH = 7.0e12  # bytes/s from the L2 cache, assumed
CACHE = 32 * 2**20  # bytes of X that stay in the L2 between two passes
UNFUSED = 1.1  # how much faster than a fused backward pass another one must be
COPIES, AGAIN = "channels-last copies", "gather again"  # parts


class Part(NamedTuple):
    """Steps of a route that are priced together."""

    name: str  # in the calibration
    steps: tuple[Step, ...]
    shape: Shape
    samples: int  # that a launch takes

    @property
    def roofline(self) -> float:
        """Seconds for the batch at peak rates: per step max(compute, memory), and the launches."""
        s = self.shape
        rate = MATRIX_RATE if s.itemsize == 2 else FLOAT32_RATE
        chunks = math.ceil(s.batch / self.samples)
        total = 0.0
        for step in self.steps:
            requested = step.requested * s.itemsize / CACHE_BANDWIDTH
            moved = step.bytes(s.itemsize) / BANDWIDTH
            total += max(step.macs / rate, moved, requested) * s.batch
            total += step.launches * chunks * LAUNCH
        return total

    @property
    def seconds(self) -> float:
        """Modelled seconds for the batch."""
        return self.roofline * ratio(self.name, self.shape, self.samples)


class Pass(NamedTuple):
    """A forward or a backward pass, and the fields of ``Route`` that it sets."""

    fields: dict[str, Any]
    parts: tuple[Part, ...]

    @property
    def steps(self) -> tuple[Step, ...]:
        return tuple(step for part in self.parts for step in part.steps)

    @property
    def seconds(self) -> float:
        """Modelled seconds for the batch."""
        return sum(part.seconds for part in self.parts)


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
    backs = backwards(s, limits, saved_v)
    after_from_x = [gathering_again(back, limits) for back in backs]
    chosen = (min(ways, key=_with_memory) for ways in (backs, after_from_x))
    best = [(back, back.seconds) for back in chosen]
    found = []
    for o in (order,) if order else orders(s.reconstruct):
        for way in forwards(s, limits, o, saved_v):
            back, seconds = best[o.from_x and way.fields["gather"] == "fused"]
            route = Route(**way.fields, **back.fields)
            found.append(PlannedRoute(route, way.steps, back.steps, way.seconds, seconds))
    return tuple(sorted(found, key=lambda planned: planned.seconds))


def forwards(s: Shape, limits: Limits, order: Order, saved_v: bool = False) -> list[Pass]:
    """Every forward pass in an order that the kernels can take."""
    fused_gather, fused_distribute = fused_tiles(order, limits)
    whole = max(1, s.batch)
    found = []
    for one, two in itertools.product({fused_gather, 0}, {fused_distribute, 0}):
        for chunk in sorted({whole, _batch_chunk(s)}) if one and two else [whole]:
            for last in _formats(s) if not one and not two else (s,):
                copied = last != s
                parts = _forward_parts(last, limits, order, one, two, chunk, copied)
                parts += _copies(s, s.channels, 2, saved_v, s.channels) if copied else ()
                gather, distribute = ("fused" if way else "unfused" for way in (one, two))
                fields = {
                    "order": order, "gather": gather, "distribute": distribute,
                    "batch_chunk": chunk, "to_channels_last": copied,
                }  # fmt: skip
                found.append(Pass(fields, parts))
    return found


def _forward_parts(s, limits, order, gather, distribute, batch_chunk, copied):
    """``gather``, ``distribute``: positions per tile of the fused kernel, 0 for the unfused.

    ``copied``: X is a copy, and the copy of the result adds it and the bias.
    """
    per_sm = 1
    if gather:
        per_sm = limits.per_sm.gather_from_x if order.from_x else limits.per_sm.gather_from_a
    num_splits = max(1, limits.num_sms * per_sm // max(1, min(s.batch, batch_chunk)))
    cached = batch_chunk * _bytes(s) <= CACHE
    both = not gather and not distribute
    statistics = has_statistics(s, order, limits.num_sms)
    first = [
        "gather", "X" if order.from_x else "A", "fused" if gather else "unfused",
        *["H"] * order.through_h, *["with V"] * both, *["copied"] * copied,
    ]  # fmt: skip
    last = [
        "distribute", "H" if order.through_h else "Z", "fused" if distribute else "unfused",
        *["of V"] * both, *["copied"] * copied,
    ]  # fmt: skip
    steps = (
        gather_steps(s, order, gather, num_splits, limits.blocks_of_n, both, statistics),
        distribute_steps(
            s, order, distribute, limits.core, cached, limits.channels_fit, both, copied
        ),
    )
    return tuple(
        Part(" ".join(name), tuple(of), s, batch_chunk)
        for name, of in zip((first, last), steps, strict=True)
    )


def backwards(s: Shape, limits: Limits, saved_v: bool = False) -> list[Pass]:
    """Every backward pass that the kernels can take, whatever the forward pass was.

    Beside a fused one, only the paper's order is left: the others take 18 to 33 launches.
    """
    ways: list[tuple[str, Order, Shape, list[Step]]] = [
        ("unfused", o, last, unfused_backward_steps(last, o, limits.core, saved_v))
        for o in ((AZ,) if limits.backward else orders(s.reconstruct))
        for last in _formats(s)
    ]
    whole = max(1, s.batch)
    if limits.backward:
        blocks, per_sm = limits.blocks_of_n, limits.per_sm
        wanted = (
            limits.num_sms * per_sm.gather_from_x // (whole * blocks),
            limits.num_sms * per_sm.block_bwd_distribute // whole,
        )
        partials = (
            num_partials(s.length, limits.gather_from_x, wanted[0]),
            num_partials(s.length, limits.block_bwd_distribute, wanted[1]),
        )
        sizes = max(1, limits.num_sms // whole), limits.backward, blocks, saved_v, partials
        ways.append(("fused", XH, s, fused_backward_steps(s, *sizes)))
    found = []
    for kind, order, last, steps in ways:
        copied = last != s
        part = Part(f"backward {kind} {order}", tuple(steps), last, whole)
        copies = _copies(s, 2 * s.channels, 3, saved_v) if copied else ()
        fields = {
            "backward": kind, "backward_order": order, "backward_to_channels_last": copied,
        }  # fmt: skip
        found.append(Pass(fields, (part, *copies)))
    return found


def gathering_again(back: Pass, limits: Limits) -> Pass:
    """The same after a fused gather from X, whose B was not rounded: from A, it repeats its own."""
    if back.fields["backward"] == "fused" or back.fields["backward_order"].from_x:
        return back
    s = back.parts[0].shape
    whole = max(1, s.batch)
    statistics = has_statistics(s, AZ, limits.num_sms)
    steps = gather_steps(s, AZ, 0, max(1, limits.num_sms // whole), statistics=statistics)
    again = tuple(steps[-1 - statistics :])
    return back._replace(parts=(*back.parts, Part(AGAIN, again, s, whole)))


def _with_memory(back: Pass) -> float:
    """Seconds, longer for an unfused pass, which needs more memory and launches."""
    return back.seconds * (1.0 if back.fields["backward"] == "fused" else UNFUSED)


def _formats(s: Shape) -> tuple[Shape, ...]:
    """X as it is, and copied to channels-last memory where only that is fast in vendor GEMMs."""
    last = s._replace(channels_last=True)
    return (s, last) if s.itemsize == 2 and s.alignment < last.alignment == 16 else (s,)


def _copies(
    s: Shape, inputs: int, launches: int, saved_v: bool, added: int = 0
) -> tuple[Part]:  # fmt: skip
    """Copies of ``inputs`` channels, of the result, and of a saved V between memory formats.

    ``added``: channels that are read again and added to the result.
    """
    rows = inputs + s.out_channels + saved_v * s.c_n
    step = Step(COPIES, False, 0, (2 * rows + added) * s.length, 0, launches + saved_v)
    return (Part(COPIES, (step,), s, max(1, s.batch)),)


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
