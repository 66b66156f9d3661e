"""How many launches the planned route of every named workload makes, at full size."""

import math

import pytest
import torch

from bench.workloads import WORKLOADS
from da_triton.ops.triton import routes
from da_triton.ops.triton.plan import kernel_routes
from da_triton.planning.costs import AH, AZ
from da_triton.planning.planner import Route
from da_triton.planning.shapes import Shape
from da_triton.runtime import launch
from support import launches
from support.numerics import DEVICE

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="counted without a GPU, which would run")

UNFUSED = Route(AZ, "unfused", "unfused", "unfused", AZ, 4)


@pytest.fixture(autouse=True)
def on_132_processors(monkeypatch):
    monkeypatch.setattr(launch, "num_sms", lambda device: 132)


def counted(work, channels_last, masked):
    """The plan of a workload, and the names of what one step launches, forward and backward."""
    length = math.prod(work.positions)
    s = Shape(work.n, work.c, work.c_m, work.c_n, work.heads, length, 2, True, channels_last)
    plan = kernel_routes(s, work.c, "sm_90", 132)[0]
    return s, plan, *launched(s, plan.route, masked)


def launched(s, route, masked=False):
    """The names of what a block launches, forward and backward."""

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    length = s.length
    x = empty(s.batch, length, s.channels).mT if s.channels_last else empty(*s[:2], length)
    w = routes.Weights(
        empty(s.c_m, s.channels), empty(s.c_m), empty(s.c_n, s.channels),
        empty(s.c_n, s.channels), empty(s.c_n), empty(s.channels, s.c_m), empty(s.channels),
    )  # fmt: skip
    mask = empty(s.batch, length, dtype=torch.uint8) if masked else None
    o = routes.Options(s.heads, 1.0, 1.0, 1.0, True, True)
    with launches.count() as forward:
        out, lse, g, _ = routes.forward(x, w, mask, o, route, False)
    with launches.count() as backward:
        routes.backward(torch.empty_like(out), x, w, mask, lse, g, None, o, route)
    return forward, backward


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("work", WORKLOADS, ids=lambda w: w.name)
def test_launches_are_few_and_those_of_the_model(work, channels_last, masked):
    s, plan, forward, backward = counted(work, channels_last, masked)
    batch_chunks = math.ceil(s.batch / plan.route.batch_chunk)
    assert len(forward) == batch_chunks * sum(step.launches for step in plan.forward), forward
    assert len(backward) == sum(step.launches for step in plan.backward), backward
    fused = plan.route.gather == plan.route.distribute == "fused"
    # Few samples of many positions: partials are merged apart from the products.
    merging = not {"gather_combine_kernel", "product_kernel"}.isdisjoint(forward)
    more = merging + 2 * plan.route.to_channels_last + ("statistics_kernel" in forward)
    most = (3 + 2 * merging) * batch_chunks if fused else 5 + more
    assert len(forward) <= most, forward
    merged, added = (f"{name}_kernel" in backward for name in ("gather_combine", "add"))
    again = plan.route.order.from_x and plan.route.gather == "fused"  # of B as GEMMs round it
    most = 12 + 2 * again + 3 * plan.route.backward_to_channels_last
    if plan.route.backward == "fused":
        most = 7 + 2 * merged + 3 * added
    assert len(backward) <= most, backward


def test_the_last_kernel_through_h_adds_bias_and_residual():
    s = Shape(4, 512, 256, 256, 1, 784, 2, True)
    route = UNFUSED._replace(order=AH)
    forward, _ = launched(s, route)
    assert forward[-3:] == ["gather_combine_kernel", "aten::baddbmm_", "full_n_kernel"]
    assert len(forward) == 6
    forward, _ = launched(s._replace(heads=4), route)  # partial results of the heads are added
    assert forward.index("full_n_kernel") < len(forward) - 2


def test_a_result_is_copied_back_and_added_to_in_one_launch():
    s = Shape(4, 1024, 256, 256, 1, 49, 2, True)
    there, _ = launched(s._replace(channels_last=True), UNFUSED)
    copied, _ = launched(s, UNFUSED._replace(to_channels_last=True))
    assert copied.count("operands_kernel") == there.count("operands_kernel") + 2
    assert "aten::addmm_" in there
    assert "aten::addmm_" not in copied
