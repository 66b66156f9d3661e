"""The block's kernels on a route of choice, and the definition of what they compute."""

import functools
from typing import NamedTuple

import torch

from da_triton import reference
from da_triton.ops.triton import routes
from da_triton.planning.costs import AH, AZ, ORDERS, XH, XZ
from da_triton.planning.planner import Route

from .numerics import DEVICE


class Case(NamedTuple):
    """Sizes of a batch of two, and options."""

    heads: int
    channels: int
    c_m: int
    c_n: int
    length: int
    masked: bool = False
    softmax_v: bool = True
    save_v: bool = False


FUSED = Route(XH, "fused", "fused", "fused", XH, 2)
ROUTES = {
    "fused_xh": FUSED,
    "fused_xh_in_batch_chunks": FUSED._replace(batch_chunk=1),
    "fused_ah": FUSED._replace(order=AH),
    "fused_gather": Route(XZ, "fused", "unfused", "unfused", AH, 2),
    "fused_gather_a": Route(AZ, "fused", "unfused", "unfused", AZ, 2),
    "fused_distribute": Route(AH, "unfused", "fused", "unfused", XH, 2),
    "fused_gather_h": Route(XH, "fused", "unfused", "unfused", XH, 2),
    "fused_gather_a_h": Route(AH, "fused", "unfused", "unfused", AH, 2),
    "fused_distribute_x": Route(XH, "unfused", "fused", "fused", XH, 2),
    **{f"unfused_{o}": Route(o, "unfused", "unfused", "unfused", o, 2) for o in ORDERS.values()},
    "unfused_copied": Route(AZ, "unfused", "unfused", "unfused", AZ, 2, True, True),
    "unfused_copied_XH": Route(XH, "unfused", "unfused", "unfused", XH, 2, True, True),
}
CASES = {
    "plain": Case(1, 64, 32, 32, 196),
    "odd": Case(2, 40, 24, 12, 49, masked=True, save_v=True),
    "no_softmax": Case(4, 64, 32, 32, 96, softmax_v=False),
    "wide": Case(1, 160, 48, 20, 80, save_v=True),
    "a_map_a_head": Case(2, 40, 16, 2, 50, masked=True),
    # n too large for a tile with all channels; more than any program holds
    "large_n": Case(3, 64, 24, 390, 66, masked=True, save_v=True),
    "no_tile": Case(1, 48, 16, 520, 50, masked=True),
}
# Results of ``definition`` and ``run``: the block without its residual, then gradients.
NAMES = ("out", "x", "a", "bias_a", "b", "v", "bias_v", "out_weight", "bias_out")


def inputs(case, dtype, channels_last):
    """X, weights, mask (all of the first sample is masked) or None, upstream gradient."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = normal(2, case.channels, case.length)
    x = x.mT.contiguous().mT if channels_last else x
    sizes = (
        (case.c_m, case.channels, 1), (case.c_n, case.channels, 3), (case.c_n, case.channels, 3),
        (case.channels, case.c_m, 1),
    )  # fmt: skip
    a, b, v, out = (gain * normal(o, i) / i**0.5 for o, i, gain in sizes)
    weights = (a, normal(case.c_m), b, v, normal(case.c_n), out, normal(case.channels))
    mask = None
    if case.masked:
        mask = torch.rand(2, case.length, generator=generator) > 0.4
        mask[0] = False
    upstream = normal(2, case.channels, case.length)
    move = functools.partial(torch.Tensor.to, device=DEVICE, dtype=dtype)
    mask = None if mask is None else mask.to(DEVICE)
    return move(x), routes.Weights(*map(move, weights)), mask, move(upstream)


def definition(case, x, w, mask, upstream, dtype, logit_scale=0.7):
    """The definition's result and gradients, computed in ``dtype``."""
    leaves = [t.to(dtype).requires_grad_() for t in (x, *w)]
    x, a, bias_a, b, v, bias_v, out, bias_out = leaves
    y = reference.block(
        x, a, bias_a, b, None, v, bias_v, out, bias_out, heads=case.heads, logit_scale=logit_scale,
        logit_scale_v=0.9, scale=1.3, softmax_v=case.softmax_v, residual=x, mask=mask,
    )  # fmt: skip
    grads = torch.autograd.grad(y, leaves, upstream.to(dtype))
    return (y - x).detach(), *grads


def run(route, case, x, w, mask, upstream):
    """The kernels' result and gradients."""
    options = routes.Options(case.heads, 0.7, 0.9, 1.3, case.softmax_v, True)
    mask = None if mask is None else mask.view(torch.uint8)
    out, lse, g, v = routes.forward(x, w, mask, options, route, case.save_v)
    assert (v is not None) == case.save_v
    grads = routes.backward(upstream, x, w, mask, lse, g, v, options, route)
    return out - x, *grads
