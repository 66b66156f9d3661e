"""How many launches the planned route of every named workload makes, at full size."""

import math

import pytest
import torch

from bench.workloads import WORKLOADS
from da_triton.ops.triton import routes
from da_triton.ops.triton.plan import kernel_routes
from da_triton.planning.shapes import Shape
from da_triton.runtime import launch
from support import launches
from support.numerics import DEVICE

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="counted without a GPU, which would run")


@pytest.fixture(autouse=True)
def on_132_processors(monkeypatch):
    monkeypatch.setattr(launch, "num_sms", lambda device: 132)


def counted(work, channels_last, masked):
    """The plan of a workload, and the names of what one step launches, forward and backward."""
    length = math.prod(work.positions)
    s = Shape(work.n, work.c, work.c_m, work.c_n, work.heads, length, 2, True, channels_last)
    plan = kernel_routes(s, work.c, "sm_90", 132)[0]

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    x = empty(s.batch, length, s.channels).mT if channels_last else empty(*s[:2], length)
    w = routes.Weights(
        empty(s.c_m, s.channels), empty(s.c_m), empty(s.c_n, s.channels),
        empty(s.c_n, s.channels), empty(s.c_n), empty(s.channels, s.c_m), empty(s.channels),
    )  # fmt: skip
    mask = empty(s.batch, length, dtype=torch.uint8) if masked else None
    o = routes.Options(s.heads, 1.0, 1.0, 1.0, True, True)
    with launches.count() as forward:
        out, lse, g, _ = routes.forward(x, w, mask, o, plan.route, False)
    with launches.count() as backward:
        routes.backward(torch.empty_like(out), x, w, mask, lse, g, None, o, plan.route)
    return s, plan, forward, backward


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
    copies = 2 * plan.route.to_channels_last
    most = (3 + 2 * merging) * batch_chunks if fused else 5 + merging + copies
    assert len(forward) <= most, forward
    merged, added = (f"{name}_kernel" in backward for name in ("gather_combine", "add"))
    again = plan.route.order.from_x and plan.route.gather == "fused"  # of B as GEMMs round it
    most = 12 + 2 * again + 3 * plan.route.backward_to_channels_last
    if plan.route.backward == "fused":
        most = 7 + 2 * merged + 3 * added
    assert len(backward) <= most, backward
