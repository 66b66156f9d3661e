"""The choice of the association order, and its cost model."""

import itertools
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import da_triton
from bench.problems import BACKWARD, FORWARD
from bench.providers import CHANNELS_LAST, LAYOUTS
from bench.workloads import WORKLOADS
from da_triton.ops.triton import block as triton_block  # noqa: F401, its FLOP formulas, before a counter looks
from da_triton.ops.triton import routes
from da_triton.ops.triton.plan import kernel_limits, kernel_routes
from da_triton.planning import calibration, planner
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


def shape_of(work, itemsize=2, channels_last=False):
    length = torch.Size(work.positions).numel()
    sizes = work.n, work.c, work.c_m, work.c_n, work.heads, length
    return Shape(*sizes, itemsize, True, channels_last)


each_format = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])


@each_format
@pytest.mark.parametrize("work", WORKLOADS, ids=lambda w: w.name)
def test_the_chosen_route_is_the_cheapest_of_all_that_fit(work, channels_last):
    s = shape_of(work, channels_last=channels_last)
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


def test_a_batch_chunk_keeps_x_in_the_cache():
    """Two fused passes are planned for the whole batch, and in chunks that fit the L2."""
    s = Shape(64, 256, 64, 64, 1, 6400, 2, True)
    ways = [way.fields for way in planner.forwards(s, limits_of(s), XH)]
    fused = [way for way in ways if way["gather"] == way["distribute"] == "fused"]
    found = {way["batch_chunk"] for way in fused}
    per_sample = s.channels * s.length * s.itemsize
    chunk = min(found)
    assert found == {chunk, s.batch}
    assert 1 < chunk * per_sample <= planner.CACHE < 2 * chunk * per_sample
    assert all(way in fused or way["batch_chunk"] == s.batch for way in ways)


def test_copies_to_channels_last_memory_are_for_rows_that_slow_vendor_gemms_down():
    """In half precision, with rows that 16 bytes do not divide, on routes without fused kernels."""
    s = Shape(4, 2048, 512, 512, 1, 49, 2, True)
    others = [
        s._replace(length=48), s._replace(channels=2046), s._replace(channels_last=True),
        s._replace(itemsize=4),
    ]  # fmt: skip
    for other in others:
        for route, *_ in planner.routes(other, limits_of(other)):
            assert not route.to_channels_last
            assert not route.backward_to_channels_last
    found = [way for o in ORDERS.values() for way in planner.forwards(s, limits_of(s), o)]
    copied = [way for way in found if way.fields["to_channels_last"]]
    assert len(copied) == len(ORDERS)
    assert all(way.fields["gather"] == way.fields["distribute"] == "unfused" for way in copied)
    for way in copied:
        *products, copies = way.parts
        assert all(part.shape.channels_last for part in products)
        # X and the result, read and written, and X to be added.
        assert copies.steps[0].elements == (2 * 2 + 1) * 2048 * 49
        assert copies.steps[0].launches == 2
    back = [way for way in planner.backwards(s, limits_of(s), saved_v=True) if len(way.parts) > 1]
    assert {way.fields["backward_order"] for way in back} == set(ORDERS.values())
    assert {way.parts[1].steps[0].launches for way in back} == {4}
    assert {way.parts[1].steps[0].elements for way in back} == {2 * (3 * 2048 + 512) * 49}


# --- the calibration ------------------------------------------------------------------------------


def test_the_calibration_is_exact_where_it_was_made():
    for part, points in calibration.points().items():
        for place, log2_ratio in points.items():
            *sizes, _, last = place
            c, m, n, heads, samples, positions = (round(2**x) for x in sizes)
            s = Shape(samples, c, m, n, heads, positions // samples, 2, True, bool(last))
            assert calibration.ratio(part, s, samples) == pytest.approx(2**log2_ratio)


def test_between_shapes_the_calibration_is_between_their_ratios(monkeypatch):
    def place(c, positions):
        return calibration.place_of(Shape(1, c, 64, 64, 1, positions, 2, True), 1)

    table = {"a": {place(64, 2**10): 0.0, place(64, 2**14): 2.0}}
    monkeypatch.setattr(calibration, "points", lambda: table)
    monkeypatch.setattr(calibration, "weights", calibration.weights.__wrapped__)
    ratios = [
        math.log2(calibration.ratio("a", Shape(1, 64, 64, 64, 1, 2**k, 2, True), 1))
        for k in range(10, 15)
    ]
    assert ratios == pytest.approx([0, 2 / (9**3 + 1), 1, 2 - 2 / (9**3 + 1), 2])
    s = Shape(1, 64, 64, 64, 1, 2**12, 2, True)
    assert calibration.ratio("unknown", s, 1) == pytest.approx(2)


def test_the_table_predicts_its_rows_from_the_others():
    """Within 25 % in the geometric mean."""
    errors = []
    for known in calibration.points().values():
        for place, log2_ratio in known.items():
            others = {other: r for other, r in known.items() if other != place}
            if others:
                near = {o: math.dist(place, o) ** (-2 * calibration.POWER) for o in others}
                found = sum(near[o] * others[o] for o in others) / sum(near.values())
                errors.append(abs(found - log2_ratio))
    assert len(errors) > 800
    assert sum(errors) / len(errors) < math.log2(1.25)


def test_aligned_rows_are_not_priced_as_unaligned_ones(monkeypatch):
    """Of 192 positions beside 196, which 16 bytes do not divide, and 784."""

    def shape(length):
        return Shape(8, 512, 256, 256, 1, length, 2, True)

    lengths = {196: 2.0, 400: 0.0, 784: 0.0}
    table = {"a": {calibration.place_of(shape(n), 8): ratio for n, ratio in lengths.items()}}
    monkeypatch.setattr(calibration, "points", lambda: table)
    monkeypatch.setattr(calibration, "weights", calibration.weights.__wrapped__)
    assert calibration.ratio("a", shape(192), 8) < 1.25
    assert calibration.ratio("a", shape(204), 8) > 3
    assert shape(196).alignment == 8
    assert shape(1).alignment == 16


def test_an_empty_table_prices_everything_at_its_roofline(monkeypatch):
    monkeypatch.setattr(calibration, "points", dict)
    monkeypatch.setattr(calibration, "weights", calibration.weights.__wrapped__)
    assert calibration.ratio("a", Shape(1, 64, 64, 64, 1, 64, 2, True), 1) == 1


def test_a_backward_pass_from_a_gathers_again_after_a_fused_gather_from_x():
    s = Shape(16, 256, 64, 64, 1, 6400, 2, True)
    limits = limits_of(s)
    back = next(w for w in planner.backwards(s, limits) if w.fields["backward_order"] == AZ)
    again = planner.gathering_again(back, limits)
    assert [step.name for step in again.steps[len(back.steps) :]] == ["gather"]
    assert again.seconds > back.seconds
    others = [w for w in planner.backwards(s, limits) if w.fields["backward_order"].from_x]
    assert others
    assert all(planner.gathering_again(w, limits) == w for w in others)


def test_a_table_with_other_columns_is_rejected(tmp_path, monkeypatch):
    path = tmp_path / "calibration.json"
    path.write_text('{"columns": ["part"], "rows": []}')
    monkeypatch.setattr(calibration, "FILE", path)
    with pytest.raises(ValueError, match=r"the columns of .* are \['part'\], and not"):
        calibration.points.__wrapped__()


@each_format
@pytest.mark.parametrize("work", WORKLOADS, ids=lambda w: w.name)
def test_every_part_of_a_named_workload_is_calibrated(work, channels_last):
    s = shape_of(work, channels_last=channels_last)
    ways = [way for order in ORDERS.values() for way in planner.forwards(s, limits_of(s), order)]
    ways += planner.backwards(s, limits_of(s))
    for part in (part for way in ways for part in way.parts):
        if part.shape == s or channels_last:
            known = calibration.points()[part.name]
            assert calibration.place_of(s, part.samples) in known, part.name


def test_plans_agree_with_the_modelled_launches():
    """Within 20 % on every named workload, in both memory formats and both directions."""
    from bench import model

    rows = model.totals(model.kept(str(model.KEPT))).set_index(model.PASS)
    for work, layout in itertools.product((w for w in WORKLOADS if not w.small), LAYOUTS):
        s = shape_of(work, channels_last=layout == CHANNELS_LAST)
        saved_v = planner.saves_v(s.channels, s.c_m, s.c_n, s.heads, "auto")
        chosen = kernel_routes(s, s.channels, "sm_90", 132, None, saved_v)[0]
        for mode, planned in ((FORWARD, chosen.seconds), (BACKWARD, chosen.backward_seconds)):
            modelled = rows.loc[("H200", work.name, layout, mode), "modelled"]
            assert 1 / 1.2 < planned * 1e6 / modelled < 1.2, (work.name, layout, mode)


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
