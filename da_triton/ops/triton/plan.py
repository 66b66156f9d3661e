"""The plan of a block in kernels: the planner's choice, given the kernels' tables of tiles.

Only this module uses both. ``plan`` is public, and imports Triton only when it is called.
"""

import dataclasses
import functools
import importlib.util
import math

import torch

from ... import checks
from ...planning import planner
from ...planning.costs import ORDERS
from ...planning.planner import PlannedRoute, Route
from ...planning.shapes import CoreLimits, Limits, PerSM, Shape, Step
from ...precision import POLICIES
from ...runtime import tiles

TILE_CLASSES = {dtype.itemsize: policy.tile_class for dtype, policy in POLICIES.items()}


def kernel_limits(shape, c_out, arch, num_sms):
    """Limits of the kernels on a GPU, for the planner: those of tiles for any rows and no mask."""
    m, n, channels = shape.c_m // shape.heads, shape.c_n // shape.heads, shape.channels
    tile_class = TILE_CLASSES[shape.itemsize]
    widest, full_n = max(channels, c_out), math.prod(tiles.packed_cols(shape.heads, n))
    channels_fit = tiles.channels_fit(widest, full_n)
    pass_2 = "project_distribute" if channels_fit else "project_distribute_blocks"

    def positions_of(kernel, features, descriptors, variant=tiles.PLAIN):
        tile = tiles.find(kernel, tile_class, features, descriptors, variant, arch)
        return 0 if tile is None else tile.block_l

    def per_sm(kernel, *sizes):
        tile = tiles.find(kernel, tile_class, *sizes, tiles.PLAIN, arch)
        return 1 if tile is None else tile.ctas_per_sm

    def positions(last, *others):
        """Per tile of the last kernel, if all fit; short tiles are left to the unfused route."""
        found = [positions_of(*kernel) for kernel in (*others, last)]
        return found[-1] if all(found) and found[-1] >= 32 else 0

    small, pass_1 = ("combine", m, n), ("gather_from_x", channels, shape.c_n)
    from_a, last_but_one = ("gather_from_a", m, n), ("block_bwd_distribute", widest, full_n)
    backward = (
        ("block_bwd_gather", channels, shape.c_n),
        small,
        pass_1,
        ("combine_backward", m, n),
        last_but_one,
        ("outer_product", channels, 2 * shape.c_n),
        ("weight_gradients", m, n),
    )
    return Limits(
        num_sms=num_sms,
        gather_from_x=positions(pass_1, small),
        gather_from_a=positions(from_a, small),
        project_distribute=positions((pass_2, widest, full_n), small),
        backward=positions(*backward) if shape.reconstruct else 0,
        block_bwd_distribute=positions_of(*last_but_one),
        blocks_of_n=-(-shape.c_n // tiles.blocks(pass_1[0], tile_class, *pass_1[1:])[1]),
        channels_fit=channels_fit,
        core=CoreLimits(
            tiles.LARGEST_G_TILE[tile_class],
            *(positions_of("full_n", 1, n, variant) for variant in (tiles.PLAIN, "gradient")),
        ),
        per_sm=PerSM(per_sm(*pass_1), per_sm(*from_a), per_sm(*last_but_one)),
    )


@functools.lru_cache(maxsize=4096)
def kernel_routes(shape, c_out, arch, num_sms, order=None, saved_v=False):
    """``planner.routes`` on a GPU."""
    return planner.routes(shape, kernel_limits(shape, c_out, arch, num_sms), order, saved_v)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The execution plan for a shape. ``print`` shows it; times are modelled, not measured."""

    shape: Shape
    device: str  # what the plan is for
    chosen: PlannedRoute
    runners_up: tuple[PlannedRoute, ...]
    saves_v: bool  # V is saved for backward instead of projected again
    floor: float  # seconds; see ``planner.floor``

    @property
    def order(self) -> str:
        return self.chosen.route.order.name

    @property
    def route(self) -> Route:
        return self.chosen.route

    def __str__(self) -> str:
        s = self.shape
        lines = [
            f"double attention block, N={s.batch} C={s.channels} L={s.length} c_m={s.c_m} "
            f"c_n={s.c_n} heads={s.heads}, {s.itemsize} bytes per element, on {self.device}",
            f"  {self.route}",
            f"  {math.ceil(s.batch / self.route.batch_chunk)} batch chunk(s) of "
            f"{self.route.batch_chunk} samples; "
            f"V {'saved' if self.saves_v else 'recomputed'} for backward",
            f"  modelled forward {self.chosen.seconds * 1e6:.1f} µs (floor "
            f"{self.floor * 1e6:.1f} µs), backward {self.chosen.backward_seconds * 1e6:.1f} µs",
            "",
            f"  {'step':<26}{'GFLOP':>9}{'MB':>9}{'launches':>10}",
        ]
        for title, steps in (("forward", self.chosen.forward), ("backward", self.chosen.backward)):
            lines.append(f"  {title}")
            lines += [self._line(step) for step in steps]
        lines += ["", f"  {'runners-up, forward':<66}{'modelled µs':>12}"]
        for planned in self.runners_up:
            route = planned.route
            forward = str(route).split(";")[0]
            if route.batch_chunk < s.batch:
                forward += f", in chunks of {route.batch_chunk}"
            lines.append(f"  {forward:<66}{planned.seconds * 1e6:>12.1f}")
        return "\n".join(lines)

    def _line(self, step: Step) -> str:
        s = self.shape
        moved = step.bytes(s.itemsize) * s.batch
        flop = 2 * step.macs * s.batch / 1e9
        return f"    {step.name:<24}{flop:>9.2f}{moved / 1e6:>9.2f}{step.launches:>10}"


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
    """The execution plan of ``double_attention_block`` on a GPU for a given input shape.

    Args:
        x_shape: ``(N, C, *positions)``.
        c_m, c_n, heads, reconstruct, order, recompute: as in the block.
        dtype: of the input and the weights.
        device: a CUDA device. On a machine without one, the plan is for an H200.
        memory_format: of the input.

    Returns:
        A :class:`Plan`, with the order, the route (which steps are fused kernels and which vendor
        GEMMs), samples per batch chunk, modelled operations, bytes and launches of each step, the
        roofline bound, and the alternatives. The times come from a model of the kernels on an H200,
        not from measurements.

    Raises:
        ValueError: shape, channels, heads, order, recompute.
        TypeError: unsupported dtype, or ``reconstruct`` is not a bool.
        RuntimeError: ``device`` is not a CUDA device, or Triton is not installed.
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
            f"plan() describes the Triton backend, which needs a CUDA device; got {str(device)!r}. "
            "On other devices the operations of backend='torch' run."
        )
    if dtype not in checks.DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, checks.DTYPES))}, got {dtype}.")
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("plan() describes the Triton backend, and Triton is not installed.")
    from ...runtime import launch  # Triton is needed from here on

    batch, channels, length = shape[0], shape[1], math.prod(shape[2:])
    s = Shape(
        batch, channels, c_m, c_n, heads, length, dtype.itemsize, reconstruct,
        memory_format != torch.contiguous_format,
    )  # fmt: skip
    name, arch, num_sms = "an H200 (no GPU here)", "sm_90", 132
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(device)
        arch, num_sms = tiles.architecture(device), launch.num_sms(device)
    save_v = planner.saves_v(channels, c_m, c_n, heads, recompute)
    chosen, *others = kernel_routes(s, s.out_channels, arch, num_sms, ORDERS.get(order), save_v)
    return Plan(s, name, chosen, tuple(others), save_v, planner.floor(s))
