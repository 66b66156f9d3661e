"""The choice of the association order, and its cost model."""

import itertools
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import da_triton
from bench.workloads import WORKLOADS
from da_triton.ops.triton import block as triton_block  # noqa: F401, its FLOP formulas, before a counter looks
from da_triton.ops.triton import routes
from da_triton.ops.triton.plan import kernel_limits
from da_triton.planning import planner
from da_triton.planning.costs import (
    AH,
    AZ,
    ORDERS,
    XH,
    distribute_steps,
    fused_backward_steps,
    gather_steps,
    order_cost,
    orders,
    unfused_backward_steps,
)
from da_triton.planning.planner import Route, choose_order, intervals, seconds
from da_triton.planning.shapes import Shape
from support.numerics import DEVICE


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("order", ORDERS.values(), ids=str)
def test_operations_are_those_that_run(order, heads, backend):
    """PyTorch's own counter, which counts a MAC as two, over the block as it runs."""
    c, c_m, c_n, length, batch = 24, 12, 8, 30, 3
    x = torch.randn(batch, c, length, device=DEVICE)
    weights = [torch.randn(s, device=DEVICE) for s in ((c_m, c), (c_n, c), (c_n, c), (c, c_m))]
    w = [None] * 8
    w[::2] = weights
    with FlopCounterMode(display=False) as counter:
        da_triton.double_attention_block(x, *w, heads=heads, order=order.name, backend=backend)
    cost = order_cost(order, c, c_m, c_n, heads, length)
    counted = 2 * batch * (cost.macs + cost.small_macs)
    assert counter.get_total_flops() == counted


def test_costs_are_those_of_the_derivation():
    c, m, n, h, length = 24, 12, 8, 2, 30
    table = {
        "AZ": length * (c * m + 2 * c * n + 2 * m * n // h + m * c),
        "XZ": length * (3 * c * n + m * n // h + m * c) + m * c * n // h,
        "AH": length * (c * m + 2 * c * n + m * n // h + c * n) + c * m * n // h,
        "XH": length * 4 * c * n + 2 * m * c * n // h,
    }
    for order, expected in table.items():
        cost = order_cost(ORDERS[order], c, m, n, h, length)
        assert cost.macs + cost.small_macs == expected


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("reconstruct", [True, False])
def test_the_cheapest_order_is_chosen(itemsize, reconstruct):
    """By brute force over shapes and lengths."""
    for c, m, n, heads, length in itertools.product(
        (64, 512), (32, 256), (16, 256), (1, 4), (1, 49, 196, 784, 6400, 10**6)
    ):
        times = {
            o: seconds(order_cost(o, c, m, n, heads, length, reconstruct), itemsize)
            for o in orders(reconstruct)
        }
        chosen = choose_order(c, m, n, heads, length, itemsize, reconstruct)
        assert times[chosen] == pytest.approx(min(times.values()), rel=1e-9)


def test_intervals_cover_every_length_once():
    found = intervals(512, 256, 256, 1, 2, True)
    assert found[0][0] == 1
    assert found[-1][1] == float("inf")
    for (_, end, _), (start, _, _) in itertools.pairwise(found):
        assert end == start


def test_few_positions_take_the_papers_order_and_few_descriptors_the_fused_one():
    """The two extremes: conv4 of a ResNet, and n = 19 for segmentation."""
    assert choose_order(1024, 512, 512, 1, 196, 2, True) == AZ
    assert choose_order(512, 512, 19, 1, 8192, 2, True) == XH


# --- the kernels' plans ---------------------------------------------------------------------------

ROUTES = [
    Route(order, gather, distribute, backward, backward_order, 2)
    for order in ORDERS.values()
    for gather in ("fused", "unfused")
    for distribute in (("fused", "unfused") if order.through_h else ("unfused",))
    for backward, backward_order in (("fused", XH), ("unfused", order))
]


@pytest.mark.skipif(DEVICE == "cuda", reason="counted in the interpreter, not on a GPU")
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_modelled_operations_are_those_that_run(route, heads):
    """Every product that a route makes, in kernels and in libraries, on sizes that fill tiles."""
    from support import traffic

    s = Shape(2, 64, 64, 64, heads, 64, 4, True)
    x = torch.randn(s.batch, s.channels, s.length)
    shapes = ((s.c_m, s.channels), (s.c_n, s.channels), (s.c_n, s.channels), (s.channels, s.c_m))
    a, b, v, out = (torch.randn(shape) for shape in shapes)
    w = routes.Weights(a, torch.randn(s.c_m), b, v, None, out, None)
    o = routes.Options(heads, 1.0, 1.0, 1.0, True, True)
    core = limits_of(s).core
    both_split = route.gather == route.distribute == "unfused"

    # In place, PyTorch's counter has no formula for it.
    formulas = {torch.ops.aten.baddbmm_: lambda start, a, b, **_: 2 * math.prod(a) * b[2]}

    def counted(function, *args):
        with (
            FlopCounterMode(display=False, custom_mapping=formulas) as library,
            traffic.count() as launches,
        ):
            result = function(*args)
        return library.get_total_flops() + sum(k.dot_flop for k in launches), result

    forward, (_, lse, g, _) = counted(routes.forward, x, w, None, o, route, False)
    steps = [
        *gather_steps(
            s,
            route.order,
            32 * (route.gather == "fused"),
            1,
            with_v=both_split,
        ),
        *distribute_steps(
            s,
            route.order,
            32 * (route.distribute == "fused"),
            core,
            True,
            v_is_there=both_split,
        ),
    ]
    assert forward == 2 * s.batch * sum(step.macs for step in steps)

    args = torch.randn_like(x), x, w, None, lse, g, None, o, route
    backward, _ = counted(routes.backward, *args)
    if route.backward == "fused":
        steps = fused_backward_steps(s, 1, 32)
    else:
        steps = unfused_backward_steps(s, route.backward_order, core)
    ways = route.backward, route.gather, route.order.from_x
    again = 0
    if ways == ("unfused", "fused", True) and not route.backward_order.from_x:
        again = s.length * s.c_n * s.c_m // heads  # G of B as the vendor GEMM rounds it
    assert backward == 2 * s.batch * (again + sum(step.macs for step in steps))


def limits_of(s, arch="sm_90", num_sms=132):
    return kernel_limits(s, s.out_channels, arch, num_sms)


def shape_of(work, itemsize=2):
    length = torch.Size(work.positions).numel()
    return Shape(
        work.n, work.c, work.c_m, work.c_n, work.heads, length, itemsize, True,
        length * itemsize % 8 == 0,
    )  # fmt: skip


@pytest.mark.parametrize("work", WORKLOADS, ids=lambda w: w.name)
def test_the_chosen_route_is_the_cheapest_of_all_that_fit(work):
    s = shape_of(work)
    found = planner.routes(s, limits_of(s))
    assert [o.seconds for o in found] == sorted(o.seconds for o in found)
    for order in ORDERS.values():
        only = planner.routes(s, limits_of(s), order)
        assert all(o.route.order == order for o in only)
        assert only[0].seconds >= found[0].seconds
        assert {o.route for o in only} <= {o.route for o in found}
    for option in found:
        assert option.seconds >= planner.floor(s)


@pytest.mark.parametrize("itemsize", [4, 8])
def test_wide_dtypes_take_the_split_route(itemsize):
    s = shape_of(WORKLOADS[2], itemsize)
    for option in planner.routes(s, limits_of(s)):
        assert (option.route.gather, option.route.distribute) == ("unfused", "unfused")
        assert option.route.backward == "unfused"


def test_no_route_that_spills_is_offered():
    """Far too many channels and descriptors for any fused kernel of pass 1 or backward."""
    s = Shape(4, 2048, 512, 512, 1, 784, 2, True)
    limits = limits_of(s)
    assert not limits.gather_from_x
    assert not limits.backward
    for option in planner.routes(s, limits):
        assert option.route.gather == "unfused" or not option.route.order.from_x
        assert option.route.backward == "unfused"


def test_batch_chunks_keep_x_in_the_cache():
    s = Shape(64, 256, 64, 64, 1, 6400, 2, True)
    route = planner.routes(s, limits_of(s), XH)[0].route
    assert route.gather == route.distribute == "fused"
    per_sample = s.channels * s.length * s.itemsize
    assert 1 < route.batch_chunk * per_sample <= planner.CACHE < 2 * route.batch_chunk * per_sample


@pytest.mark.parametrize(("value", "expected"), [(True, False), (False, True), ("auto", False)])
def test_v_is_saved_only_if_requested(value, expected):
    """Projecting it again is under a tenth of a step at every ratio of channels here."""
    for c, m, n in itertools.product((16, 256, 2048), (8, 128, 512), (8, 128, 512)):
        saved = planner.saves_v(c, m, n, 1, value)
        assert saved == expected or (value == "auto" and n > m)


def test_plan_shows_what_would_run():
    plan = da_triton.plan((16, 256, 80, 80), 64, 64)
    text = str(plan)
    assert plan.order == plan.route.order.name
    assert plan.order in text
    for step in (*plan.chosen.forward, *plan.chosen.backward):
        assert step.name in text
    for option in plan.runners_up:
        assert f"{option.seconds * 1e6:.1f}" in text
    assert "modelled" in text
    assert plan == da_triton.plan((16, 256, 6400), 64, 64)


def test_plan_of_an_order_of_choice():
    plan = da_triton.plan((2, 64, 7, 7), 32, 32, heads=2, order="AH", recompute=False)
    assert plan.order == "AH"
    assert plan.saves_v
    assert all(option.route.order == AH for option in plan.runners_up)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (((16, 256), 64, 64), {}, ValueError, "x_shape must be"),
        (((0, 256, 9), 64, 64), {}, ValueError, "x_shape must be"),
        (((1, 256, 9), 0, 64), {}, ValueError, "c_m must be a positive integer"),
        (((1, 256, 9), 64, 64), {"heads": 3}, ValueError, "heads must divide"),
        (((1, 256, 9), 64, 64), {"order": "ZA"}, ValueError, "order must be one of"),
        (((1, 256, 9), 64, 64), {"recompute": 1}, ValueError, "recompute must be one of"),
        (((1, 256, 9), 64, 64), {"dtype": torch.int8}, TypeError, "dtype must be one of"),
        (((1, 256, 9), 64, 64), {"device": "cpu"}, RuntimeError, "needs a CUDA device"),
    ],
)
def test_plan_errors(arguments, options, error, message):
    with pytest.raises(error, match=message):
        da_triton.plan(*arguments, **options)
