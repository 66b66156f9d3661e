"""Bytes, sectors, operations and launches of the planned block, counted on interpreted kernels.

For named workloads, the fastest route in fused kernels by the planner's model: its tiles and splits
for the full batch on a GPU with 132 SMs, run on one sample, and of long ones on a part, by programs
that work as many positions each as they would on the whole.
"""

import dataclasses

import pytest
import torch

from bench.workloads import WORKLOADS
from da_triton.ops.triton import routes
from da_triton.ops.triton.plan import kernel_limits, kernel_routes
from da_triton.planning.costs import AH, XH, distribute_steps, fused_backward_steps, gather_steps
from da_triton.planning.planner import Route
from da_triton.planning.shapes import CoreLimits, Shape
from da_triton.runtime import launch, tiles
from support.numerics import DEVICE

pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda", reason="counted in the interpreter, not on a GPU"),
    pytest.mark.xdist_group("block_traffic"),  # counted once, in one process
]

LONGEST = 2**12
NAMED = {work.name: work for work in WORKLOADS}


def routes_of(work):
    """The shape, and routes of a workload, the planned one first."""
    length = torch.Size(work.positions).numel()
    s = Shape(work.n, work.c, work.c_m, work.c_n, work.heads, length, 2, True)
    return s, [option.route for option in kernel_routes(s, work.c, "sm_90", 132)]


def fused(route):
    return route.gather == route.distribute == "fused"


def fastest_fused(work, order):
    """The shape, and the first route in fused kernels, backward too where they have tiles."""
    s, found = routes_of(work)
    route = next(route for route in found if fused(route) and route.order == order)
    if kernel_limits(s, s.channels, "sm_90", 132).backward:
        route = route._replace(backward="fused", backward_order=XH, backward_to_channels_last=False)
    return s, route


# Bytes of the forward pass over those of the floor: requested, and what each launch has to fetch or
# write at least once. Two passes over X and one over the result are 1.5 of it (1 where X is too
# large for the cache); the rest are partial sums and, from A, the weights that every tile of
# positions loads again, as in any GEMM. What is loaded twice comes from the
# L2 cache. Of one sample; weights are the whole batch's.
LIMITS = {
    ("yolo_p3", AH): (2.3, 1.65),
    ("yolo_p3", XH): (2.3, 1.75),
    ("ddpm_64", XH): (2.5, 2.15),
    ("seg_19", XH): (2.1, 1.8),  # with M and G between small launches, which the cache holds
    ("volume_128", AH): (1.25, 1.05),
    ("volume_128", XH): (1.25, 1.05),
    ("yolo_p5", AH): (8.3, 3.7),
}


@dataclasses.dataclass(frozen=True)
class Count:
    shape: Shape
    route: Route
    forward: list
    backward: list


@pytest.fixture(scope="module")
def counted():
    """Counts of each workload in each layout, made once."""
    cache = {}

    def measure(case, channels_last, monkeypatch):
        key = case, channels_last
        if key not in cache:
            cache[key] = _measure(*case, channels_last, monkeypatch)
        return cache[key]

    return measure


def _measure(name, order, channels_last, monkeypatch):
    from support import traffic

    s, route = fastest_fused(NAMED[name], order)
    length = min(s.length, LONGEST)
    num_sms = max(1, 132 * length // s.length // min(s.batch, route.batch_chunk))
    launch.forget()
    monkeypatch.setattr(launch, "num_sms", lambda device: num_sms)
    s = s._replace(batch=1, length=length)

    def normal(*shape):
        return torch.randn(shape).bfloat16()

    x = normal(1, s.channels, s.length)
    x = x.mT.contiguous().mT if channels_last else x
    w = routes.Weights(
        normal(s.c_m, s.channels), normal(s.c_m), normal(s.c_n, s.channels),
        normal(s.c_n, s.channels), normal(s.c_n), normal(s.channels, s.c_m), normal(s.channels),
    )  # fmt: skip
    o = routes.Options(s.heads, 1.0, 1.0, 1.0, True, True)
    with traffic.count() as forward:
        _, lse, g, _ = routes.forward(x, w, None, o, route, False)
    backward = []
    if route.backward == "fused":
        dout = torch.randn_like(x)
        with traffic.count() as backward:
            routes.backward(dout, x, w, None, lse, g, None, o, route)
    return Count(s, route, forward, backward)


each_case = pytest.mark.parametrize(
    ("case", "channels_last"),
    [(case, False) for case in LIMITS]
    + [(case, True) for case in LIMITS if case[0] in ("yolo_p3", "seg_19")],
    ids=lambda value: "-".join(map(str, value)) if value in LIMITS else ["nchw", "nhwc"][value],
)


def test_the_memory_bound_workloads_are_fused():
    planned = {w.name: routes_of(w)[1][0] for w in WORKLOADS}
    names = {name for name, route in planned.items() if fused(route)}
    assert names >= {"yolo_p3", "ddpm_64", "hires_256", "volume_128"}
    backward = {name for name in names if planned[name].backward == "fused"}
    assert backward >= {"yolo_p3", "ddpm_64", "hires_256", "volume_128"}


@each_case
def test_requested_bytes(case, channels_last, counted, monkeypatch):
    count = counted(case, channels_last, monkeypatch)
    s = count.shape
    reads = 1 if s.channels * NAMED[case[0]].length * 2 <= 25e6 else 2
    floor = 2 * s.length * (reads * s.channels + s.out_channels)
    requested, fetched = LIMITS[case]
    assert sum(k.bytes for k in count.forward) <= requested * floor
    assert sum(k.distinct_bytes for k in count.forward) <= fetched * floor


@each_case
def test_sectors(case, channels_last, counted, monkeypatch):
    count = counted(case, channels_last, monkeypatch)
    aligned = channels_last or count.shape.length % 16 == 0
    for kernel in (*count.forward, *count.backward):
        if kernel.load_sectors:
            ratio = 32 * kernel.load_sectors / kernel.load_bytes
            assert ratio <= (1.1 if aligned else 1.35), (kernel.kernel, ratio)


@each_case
def test_operations(case, channels_last, counted, monkeypatch):
    """Those of the planner's model, with sizes rounded up to tiles and descriptors in two parts."""
    count = counted(case, channels_last, monkeypatch)
    s, route = count.shape, count.route
    n = s.c_n // s.heads
    lowp = s._replace(
        length=-(-s.length // 128) * 128, c_n=s.heads * tiles._power(n, 16 if s.heads == 1 else 1)
    )
    if s.c_n < 32:
        lowp = lowp._replace(c_n=32)
    small = {"combine", "combine, backward", "other weights"}
    steps = [
        *gather_steps(lowp, route.order, 64, 1),
        *distribute_steps(lowp, route.order, 64, CoreLimits(128, 64, 64), True),
    ]
    partials = {"other weights": 3}
    for steps_, kernels in (
        (steps, count.forward),
        (fused_backward_steps(lowp, 1, 64), count.backward),
    ):
        if kernels:
            model = sum(
                2 * step.macs * (partials.get(step.name, 2) if step.name in small else 1)
                for step in steps_
            )
            assert sum(k.dot_flop for k in kernels) <= 1.05 * model


@each_case
def test_no_atomics(case, channels_last, counted, monkeypatch):
    count = counted(case, channels_last, monkeypatch)
    assert not any(k.atomics for k in (*count.forward, *count.backward))
