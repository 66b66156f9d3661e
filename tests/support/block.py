"""The block's kernels on a route of choice, and the definition of what they compute."""

import functools
from typing import NamedTuple

import torch

from da_triton import eager
from da_triton.kernels import block

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
    keep_v: bool = False


# What ``definition`` and ``run`` give: the block without its residual, then gradients.
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
    keep = None
    if case.masked:
        keep = torch.rand(2, case.length, generator=generator) > 0.4
        keep[0] = False
    upstream = normal(2, case.channels, case.length)
    move = functools.partial(torch.Tensor.to, device=DEVICE, dtype=dtype)
    keep = None if keep is None else keep.to(DEVICE)
    return move(x), block.Weights(*map(move, weights)), keep, move(upstream)


def definition(case, x, w, keep, upstream, dtype, logit_scale=0.7):
    """The definition's result and gradients, computed in ``dtype``."""
    leaves = [t.to(dtype).requires_grad_() for t in (x, *w)]
    x, a, bias_a, b, v, bias_v, out, bias_out = leaves
    y = eager.block(
        x, a, bias_a, b, None, v, bias_v, out, bias_out, heads=case.heads, logit_scale=logit_scale,
        logit_scale_v=0.9, scale=1.3, softmax_v=case.softmax_v, residual=x, keep=keep,
    )  # fmt: skip
    grads = torch.autograd.grad(y, leaves, upstream.to(dtype))
    return (y - x).detach(), *grads


def run(route, case, x, w, keep, upstream):
    """The kernels' result and gradients."""
    options = block.Options(case.heads, 0.7, 0.9, 1.3, case.softmax_v, True)
    mask = None if keep is None else keep.view(torch.uint8)
    out, lse, g, v = block.forward(x, w, mask, options, route, case.keep_v)
    assert (v is not None) == case.keep_v
    grads = block.backward(upstream, x, w, mask, lse, g, v, options, route, True)
    return out - x, *grads
