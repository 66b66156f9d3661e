"""What runs, from shapes alone; nothing is measured.

For the operations of the ``torch`` backend only the association order is chosen: each order's
modelled time is a line over the number of positions L, so the best order is a few intervals of L.
They depend on channels and heads only, which a compiled model knows: no guard on L is made unless L
is known, and a model traced for any L takes the paper's order.

For the kernels the whole plan is made inside the operator, where L is a number: order, route, batch
chunk, and the route of the backward pass. ``plan`` shows it.
"""

import dataclasses
import functools
import importlib.util
import itertools
import math
from typing import Any, NamedTuple

import torch

from .. import checks
from ..checks import ORDERS
from ..tracing import constant
from .costs import (
    Core,
    Cost,
    Shape,
    Step,
    distribute_steps,
    fused_backward_steps,
    gather_steps,
    order_cost,
    split_backward_steps,
)

# Rates of an H200 with measured or data-sheet ceilings; only their proportions matter here, and
# only to rank the orders.
MATRIX_RATE = 395e12  # multiply-adds a second in half precision
FLOAT32_RATE = 25e12  # multiply-adds a second in float32
BANDWIDTH = 4.3e12  # bytes a second
CPU_RATE = 1e11  # multiply-adds a second of two cores


def seconds(cost: Cost, itemsize: int, cpu: bool = False) -> float:
    """Modelled time of one sample; a ranking, not a prediction."""
    if cpu:  # one rate for every product, and maps stay in the cache between them
        return (cost.multiply_adds + cost.small_multiply_adds) / CPU_RATE
    rate = MATRIX_RATE if itemsize == 2 else FLOAT32_RATE
    return (
        cost.multiply_adds / rate
        + cost.small_multiply_adds / FLOAT32_RATE
        + cost.elements * itemsize / BANDWIDTH
    )


@functools.lru_cache(maxsize=4096)
def intervals(
    channels: int,
    c_m: int,
    c_n: int,
    heads: int,
    itemsize: int,
    reconstruct: bool,
    cpu: bool = False,
) -> tuple[tuple[float, float, str], ...]:
    """``(first L, first L beyond, best order)``, ascending, from 1 to infinity."""
    orders = ORDERS if reconstruct else ORDERS[:2]

    def modelled(order: str, length: int) -> float:
        cost = order_cost(order, channels, c_m, c_n, heads, length, reconstruct)
        return seconds(cost, itemsize, cpu)

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


@constant
def _known_intervals(*shape):
    """``intervals``, which depends on nothing that varies from call to call of a model."""
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
) -> str:
    """The order with the least modelled time for ``length`` positions."""
    known: Any = bool
    if torch.compiler.is_compiling() or isinstance(length, torch.SymInt):  # slow to import
        from torch.fx.experimental.symbolic_shapes import statically_known_true as known
    chosen = "AZ"
    for start, end, order in _known_intervals(
        channels, c_m, c_n, heads, itemsize, reconstruct, cpu
    ):
        if known(length >= start) and (end == math.inf or known(length < end)):
            chosen = order
    return chosen


# --- kernels --------------------------------------------------------------------------------------

# Shares of the matrix rate that library products and our kernels are taken to reach, time of a
# launch in a CUDA graph, second-level cache: assumptions to rank routes with, none measured.
LIBRARY_SHARE, KERNEL_SHARE = 0.85, 0.6
NARROW_SHARE = 0.5  # of either, where rows of positions are not aligned to 8 bytes
LAUNCH = 2.0e-6  # seconds, start and tail included
CACHE_BANDWIDTH = 5.5e12  # bytes a second that programs can ask of the second-level cache
CACHE = 32 * 2**20  # bytes of X that stay at hand between two passes


class Route(NamedTuple):
    """How a block runs in kernels."""

    order: str  # AZ, XZ, AH or XH
    gather: str  # "fused" or "split"
    distribute: str
    backward: str
    backward_order: str  # of a split backward pass; XH of a fused one
    chunk: int  # samples that go through both passes before the next ones start

    def __str__(self) -> str:
        forward = f"{self.order}: gather {self.gather}, distribute {self.distribute}"
        return f"{forward}; backward {self.backward} {self.backward_order}"


class Limits(NamedTuple):
    """What the kernels can do for a shape on a GPU; ``runtime.configs.limits`` finds it."""

    processors: int
    gather_from_x: int  # positions in a tile; 0 where the kernel does not fit
    gather_from_a: int
    project_distribute: int
    backward: int  # of the pass that writes dX
    map_blocks: int  # of gather_from_x
    whole: bool  # project_distribute keeps all channels of a tile at hand
    core: Core  # what the kernels of the split route hold


@dataclasses.dataclass(frozen=True)
class Option:
    """A route with its modelled costs for the whole batch."""

    route: Route
    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    seconds: float  # forward
    backward_seconds: float


def modelled(steps: tuple[Step, ...], s: Shape, chunks: int = 1) -> float:
    """Seconds of a batch: of each step the larger of its operations and its bytes, and launches."""
    rate = MATRIX_RATE if s.itemsize == 2 else FLOAT32_RATE
    total = 0.0
    for step in steps:
        share = LIBRARY_SHARE if step.library else KERNEL_SHARE
        narrow = 1.0 if step.library or s.wide else NARROW_SHARE
        moved = step.elements * s.itemsize + step.wide_elements * max(4, s.itemsize)
        asked = step.requested * s.itemsize / CACHE_BANDWIDTH
        busy = max(step.multiply_adds / (rate * share), moved / BANDWIDTH, asked) / narrow
        total += busy * s.batch + step.launches * chunks * LAUNCH
    return total


def wide(x) -> bool:
    """Whether kernels can load x, ``(N, C, L)``, at least 8 bytes at once."""
    rows = x.shape[1] if x.stride(1) == 1 else x.shape[2]
    return rows * x.element_size() % 8 == 0


def floor(s: Shape) -> float:
    """Seconds that no implementation can beat: two passes over X, or the cheapest order."""
    rate = MATRIX_RATE if s.itemsize == 2 else FLOAT32_RATE
    per_sample = s.channels * s.length * s.itemsize
    reads = 1 if per_sample <= 25e6 else 2
    moved = per_sample * reads + s.out_channels * s.length * s.itemsize
    orders = ORDERS if s.reconstruct else ORDERS[:2]
    costs = [
        order_cost(o, s.channels, s.c_m, s.c_n, s.heads, s.length, s.reconstruct) for o in orders
    ]
    cheapest = min(c.multiply_adds + c.small_multiply_adds for c in costs)
    return s.batch * max(moved / BANDWIDTH, cheapest / rate)


@functools.lru_cache(maxsize=4096)
def options(
    s: Shape, limits: Limits, order: str = "auto", kept_v: bool = False
) -> tuple[Option, ...]:
    """Every route that the kernels can take, the one with the least modelled forward time first.

    ``kept_v``: backward finds V, and does not project it again.
    """
    orders = ORDERS if s.reconstruct else ORDERS[:2]
    backward = _backwards(s, limits, orders, kept_v)
    found = []
    for name in orders if order == "auto" else (order,):
        pass_1 = limits.gather_from_x if name[0] == "X" else limits.gather_from_a
        pass_2 = limits.project_distribute if name[1] == "H" else 0
        for one, two in itertools.product({pass_1, 0}, {pass_2, 0}):
            chunk = _chunk(s) if one and two else max(1, s.batch)
            splits = max(1, limits.processors // max(1, min(s.batch, chunk)))
            cached = chunk * _bytes(s) <= CACHE
            want_h, both = name[1] == "H", not one and not two
            steps = (
                *gather_steps(s, name[0], one, want_h, splits, limits.map_blocks, both),
                *distribute_steps(s, name[1], two, limits.core, cached, limits.whole, both),
            )
            chunks = math.ceil(s.batch / chunk)
            kind, backward_order, backward_steps, seconds = backward
            gather, distribute = ("fused" if way else "split" for way in (one, two))
            route = Route(name, gather, distribute, kind, backward_order, chunk)
            found.append(Option(route, steps, backward_steps, modelled(steps, s, chunks), seconds))
    return tuple(sorted(found, key=lambda option: option.seconds))


def _backwards(
    s: Shape, limits: Limits, orders, kept_v: bool
) -> tuple[str, str, tuple[Step, ...], float]:
    """The backward pass with the least modelled time, whatever the forward pass was."""
    splits = max(1, limits.processors // max(1, s.batch))
    candidates = [
        ("split", o, tuple(split_backward_steps(s, o, limits.core, kept_v))) for o in orders
    ]
    if limits.backward:
        sizes = splits, limits.backward, limits.map_blocks, kept_v
        candidates.append(("fused", "XH", tuple(fused_backward_steps(s, *sizes))))
    timed = [(*c, modelled(c[2], s)) for c in candidates]
    return min(timed, key=lambda c: c[-1])


def _bytes(s: Shape) -> int:
    return s.channels * s.length * s.itemsize


def _chunk(s: Shape) -> int:
    """Samples whose X stays in the cache between two passes; all, where not even one does."""
    fitting = CACHE // _bytes(s)
    if fitting == 0 or fitting >= s.batch:
        return max(1, s.batch)
    return math.ceil(s.batch / math.ceil(s.batch / fitting))


def keeps_v(channels: int, c_m: int, c_n: int, heads: int, recompute: bool | str) -> bool:
    """Whether forward keeps V for backward. "auto": if projecting it again is a tenth of a step.

    In multiply-adds of a position, in the paper's order: forward, backward (twice as much), and
    what backward projects again. Where bytes decide, it costs less still: X is read anyway.
    """
    if isinstance(recompute, bool):
        return not recompute
    forward = channels * (2 * c_m + 2 * c_n) + 2 * c_m * c_n // heads
    step = 3 * forward + channels * (c_m + c_n)
    return channels * c_n > 0.1 * (step + channels * c_n)


# --- what a user sees -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """What would run for a shape, and why. ``print`` shows it; times are modelled, not measured."""

    shape: Shape
    device: str  # what the plan is for
    chosen: Option
    runners_up: tuple[Option, ...]
    keeps_v: bool  # V is kept for backward instead of projected again
    floor: float  # seconds; see ``floor``

    @property
    def order(self) -> str:
        return self.chosen.route.order

    @property
    def route(self) -> Route:
        return self.chosen.route

    def __str__(self) -> str:
        s = self.shape
        lines = [
            f"double attention block, N={s.batch} C={s.channels} L={s.length} c_m={s.c_m} "
            f"c_n={s.c_n} heads={s.heads}, {s.itemsize} bytes an element, on {self.device}",
            f"  {self.route}",
            f"  {math.ceil(s.batch / self.route.chunk)} chunk(s) of {self.route.chunk} samples; "
            f"backward {'keeps V' if self.keeps_v else 'projects V again'}",
            f"  modelled forward {self.chosen.seconds * 1e6:.1f} µs (floor "
            f"{self.floor * 1e6:.1f} µs), backward {self.chosen.backward_seconds * 1e6:.1f} µs",
            "",
            f"  {'step':<26}{'GFLOP':>9}{'MB':>9}{'launches':>10}",
        ]
        for title, steps in (("forward", self.chosen.forward), ("backward", self.chosen.backward)):
            lines.append(f"  {title}")
            lines += [self._line(step) for step in steps]
        lines += ["", f"  {'runners-up, forward':<46}{'modelled µs':>12}"]
        for option in self.runners_up:
            forward = str(option.route).split(";")[0]
            lines.append(f"  {forward:<46}{option.seconds * 1e6:>12.1f}")
        return "\n".join(lines)

    def _line(self, step: Step) -> str:
        s = self.shape
        moved = step.elements * s.itemsize + step.wide_elements * max(4, s.itemsize)
        flop = 2 * step.multiply_adds * s.batch / 1e9
        return f"    {step.name:<24}{flop:>9.2f}{moved * s.batch / 1e6:>9.2f}{step.launches:>10}"


def plan(
    x_shape,
    c_m: int,
    c_n: int,
    *,
    heads: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    memory_format: torch.memory_format = torch.contiguous_format,
    reconstruct: bool = True,
    order: str = "auto",
    recompute: bool | str = "auto",
) -> Plan:
    """What ``double_attention_block`` would run on a GPU for an input of a shape, and why.

    Args:
        x_shape: ``(N, C, *positions)``.
        c_m, c_n, heads, reconstruct, order, recompute: as of the block.
        dtype: of the input and the weights.
        device: a CUDA device. On a machine that has none, the plan is for an H200.
        memory_format: of the input.

    Returns:
        A :class:`Plan`, with the order, the route (which steps are fused kernels and which library
        products), samples in a chunk, modelled operations, bytes and launches of each step, the
        floor, and the runners-up. The times come from a model with stated assumptions, not from
        measurements.

    Raises:
        ValueError: shape, channels, heads, order, recompute.
        TypeError: dtype, or ``reconstruct`` that is no bool.
        RuntimeError: ``device`` is no CUDA device, or Triton is not installed.
    """
    shape = tuple(x_shape) if isinstance(x_shape, (tuple, list)) else ()
    if not 3 <= len(shape) <= 5 or not all(isinstance(n, int) and n >= 1 for n in shape):
        raise ValueError(
            f"x_shape must be (N, C, *positions) with one to three position axes and no size "
            f"below 1, got {x_shape!r}."
        )
    checks.positive(c_m=c_m, c_n=c_n, heads=heads)
    checks.heads(heads, c_m=c_m, c_n=c_n)
    checks.flag(reconstruct=reconstruct)
    checks.order(order, reconstruct, "auto")
    checks.recompute(recompute, "auto")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise type(error)(f"device must be a CUDA device, got {device!r}. {error}") from error
    if device.type != "cuda":
        raise RuntimeError(
            f"plan() shows the kernels' plan, which needs a CUDA device; got {str(device)!r}. "
            "On other devices the operations of backend='torch' run."
        )
    if dtype not in checks.DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, checks.DTYPES))}, got {dtype}.")
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("plan() shows the kernels' plan, and Triton is not installed.")
    from ..runtime import configs, launch, tiles  # Triton is needed from here on

    batch, channels, length = shape[0], shape[1], math.prod(shape[2:])
    rows = length if memory_format == torch.contiguous_format else channels
    s = Shape(
        batch, channels, c_m, c_n, heads, length, dtype.itemsize, reconstruct,
        rows * dtype.itemsize % 8 == 0,
    )  # fmt: skip
    name, arch, processors = "an H200 (no GPU here)", "sm_90", 132
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(device)
        arch, processors = tiles.architecture(device), launch.processors(device)
    limits = configs.limits(s, channels if reconstruct else c_m, arch, processors)
    keep = keeps_v(channels, c_m, c_n, heads, recompute)
    chosen, *others = options(s, limits, order, keep)
    return Plan(s, name, chosen, tuple(others), keep, floor(s))
