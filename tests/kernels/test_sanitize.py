"""Every kernel on small odd shapes, for NVIDIA's memory checkers.

    DA_TRITON_PROVE=0 PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck \
        python -m pytest -m sanitize tests/kernels/test_sanitize.py

Without PyTorch's cache every tensor is an allocation of its own, whose end memcheck sees; without
proofs, no kernel is replaced. racecheck does not model asynchronous matrix products, and initcheck
reports pad rows that are read and whose products are not.
"""

import re
from pathlib import Path

import pytest
import torch

import da_triton
from da_triton.kernels import distribute, gather, gather_backward
from da_triton.ops.triton import routes
from da_triton.planning.costs import ORDERS, XH
from da_triton.planning.planner import Route
from support import launches
from support.numerics import DEVICE


def normal(*shape):
    return torch.randn(shape, device=DEVICE).half()


def mask_of(*shape):
    return (torch.rand(shape, device=DEVICE) > 0.3).view(torch.uint8)


def core(heads, m, n, length=37):
    """Gather and distribute, forward and backward, with a mask and without."""
    a, b, v = (normal(2, heads, c, length) for c in (m, n, n))
    for mask in (None, mask_of(2, length)):
        g, lse = gather.gather_forward([(a, b, mask)], 0.5)
        for softmax in (True, False):
            z = distribute.distribute_forward(g, v, 1.0, softmax, 0.5)
            dg, _ = distribute.distribute_backward(z, g, v, 1.0, softmax, 0.5, True, True)
        gather_backward.gradients(dg, a, b, mask, g, lse, None, 0.5, True, True)


def block(sizes, way, order, backward, batch=2, length=37):
    """The block on a route, forward and backward, in both memory formats."""
    c, c_m, c_n = sizes
    backward_order = XH if backward == "fused" else ORDERS[order]
    route = Route(ORDERS[order], way, way, backward, backward_order, 1 if way == "fused" else 2)
    shapes = (c_m, c), (c_m,), (c_n, c), (c_n, c), (c_n,), (c, c_m), (c,)
    w = routes.Weights(*(normal(*shape) for shape in shapes))
    x, mask = normal(batch, c, length), mask_of(batch, length)
    options = routes.Options(2, 0.5, 0.5, 1.0, True, True)
    for activations in (x, x.mT.contiguous().mT):
        out, lse, g, v = routes.forward(activations, w, mask, options, route, True)
        routes.backward(out, activations, w, mask, lse, g, v, options, route)


SMALL, BY_CHANNELS = (20, 6, 4), (130, 6, 68)
GROUPS = {
    "core-one_tile": lambda: core(2, 5, 9),
    "core-split_positions": lambda: core(1, 5, 3, 3001),
    "core-full_n": lambda: core(2, 130, 9),
    "core-tiled": lambda: core(1, 5, 514),
    "block-fused": lambda: block(SMALL, "fused", "XH", "fused"),
    "block-many_partials": lambda: block(SMALL, "fused", "XH", "fused", 1, 1153),
    "block-from_a": lambda: block(SMALL, "fused", "AH", "unfused"),
    "block-by_channels": lambda: block(BY_CHANNELS, "fused", "XH", "unfused"),
    "block-vendor_gemms_az": lambda: block(SMALL, "unfused", "AZ", "unfused"),
    "block-vendor_gemms_xh": lambda: block(SMALL, "unfused", "XH", "unfused"),
}


INTERPRETED = ("core-one_tile", "block-fused")  # the others take long without a GPU


@pytest.mark.sanitize
@pytest.mark.parametrize(
    "group", [pytest.param(g, marks=[pytest.mark.long] * (g not in INTERPRETED)) for g in GROUPS]
)
def test_kernels_run(group):
    GROUPS[group]()
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@pytest.mark.skipif(DEVICE == "cuda", reason="counts interpreted kernels; the GPU runs them")
def test_every_kernel_is_launched():
    folder = Path(da_triton.__file__).parent / "kernels"
    sources = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    with launches.count() as names:
        for run in GROUPS.values():
            run()
    assert {*re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE)} <= {*names}
