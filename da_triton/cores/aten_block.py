r"""The block of the ``torch`` backend: library products around its gather and distribute.

    order AZ    A, B, V = W X      G = A Pᵀ             Z = scale·G Q      Y = Wo Z + bo
          X-    M = X Pᵀ           G = Wa M + ba·1ᵀ      (A never exists)
          -H    H = scale·Wo G     Y = H Q + bo         (Z never exists)

Biases go where they are cheapest: bb cannot change a softmax over positions and is left out; rows
of P sum to 1, so ba is added to G; columns of Q sum to 1, so with H bo is added to H.

Everything here is a differentiable operation that can be transformed, traced and exported, and
needs no code for gradients. Where nothing but autograd watches, a CPU's float32 and float64 take
the same orders through ``cpu_block`` instead. X is ``(N, C, L)``; ``residual``, of the
output's shape, is added to it.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import planner, tracing
from ..precision import converted
from ..projection import project, split_heads
from ..tracing import transformed
from . import aten, cpu_block, cpu_products


def block(x: Tensor, w, keep, residual, o) -> Tensor:
    """``(N, C, L)`` to ``(N, C or c_m, L)``.

    With ``recompute=True``, autograd keeps x and the weights, and projects again in backward.
    """
    names = ("weight_a", "bias_a", "weight_b", "weight_v", "bias_v", "weight_out", "bias_out")
    weights = dict(zip(names, w, strict=True))
    options = o._asdict() | {"keep": keep, "residual": residual}
    order, recompute = options.pop("order"), options.pop("recompute")
    del options["backend"]
    order = _order(x, weights, options["heads"]) if order == "auto" else order
    given = [x, *(w for w in weights.values() if w is not None)]
    own_residual = options["residual"] is None or options["residual"] is x
    on_a_cpu = own_residual and cpu_products.suits(given)  # a graph is not asked for its sizes
    if on_a_cpu and not cpu_products.too_narrow(x, len(weights["weight_b"])):
        return _on_a_cpu(x, weights, order=order, recompute=recompute is True, **options)
    composed: Any = functools.partial(compose, order=order, **options)
    # Transforms of ``torch.func`` cannot follow a checkpoint.
    if recompute is not True or not torch.is_grad_enabled() or transformed():
        return composed(x, **weights)
    return checkpoint(composed, x, **weights, use_reentrant=False, preserve_rng_state=False)


def _order(x, weights, heads):
    c_m, channels = tracing.sizes(weights["weight_a"])
    c_n, length = tracing.sizes(weights["weight_b"])[0], tracing.sizes(x)[2]
    sizes = channels, c_m, c_n, heads, length, x.element_size()
    reconstruct = weights["weight_out"] is not None
    return planner.choose_order(*sizes, reconstruct, x.device.type == "cpu")


def _on_a_cpu(
    x, weights, *, order, heads, logit_scale, logit_scale_v, scale, softmax_v, residual, keep,
    recompute,
):  # fmt: skip
    """The same in one function with a gradient of its own; scales become part of the weights."""
    factors = dict.fromkeys(("weight_a", "bias_a"), scale)
    factors |= {"weight_b": logit_scale, "weight_v": logit_scale_v, "bias_v": logit_scale_v}
    weights = {
        name: w if w is None or factors.get(name, 1) == 1 else factors[name] * w
        for name, w in weights.items()
    }

    add_x = residual is not None

    def plain(x, *values):
        named = dict(zip(weights, values, strict=True))
        return compose(
            x, **named, heads=heads, logit_scale=1.0, logit_scale_v=1.0, scale=1.0,
            softmax_v=softmax_v, residual=x if add_x else None, keep=keep, order=order,
        )  # fmt: skip

    options = cpu_block.Options(order, heads, softmax_v, add_x, recompute)
    return cpu_block.block(plain, options, keep, x, *weights.values())


def compose(
    x, weight_a, bias_a, weight_b, weight_v, bias_v, weight_out, bias_out, *,
    heads, logit_scale, logit_scale_v, scale, softmax_v, residual, keep, order,
):  # fmt: skip
    b = split_heads(project(x, weight_b, None), heads)
    if order[0] == "X":
        shared = x[:, None].expand(-1, heads, -1, -1)
        m = aten.gather(shared, b, keep=keep, logit_scale=logit_scale)
        g = converted(split_heads(weight_a, heads, 0), m.dtype) @ m
    else:
        a = split_heads(project(x, weight_a, None), heads)
        g = aten.gather(a, b, keep=keep, logit_scale=logit_scale)
    if bias_a is not None:
        g = g + _gathered_bias(converted(split_heads(bias_a, heads, 0), g.dtype), keep)
    v = split_heads(project(x, weight_v, bias_v), heads)

    if order[1] == "Z":
        z = aten.distribute(g, v, scale=scale, softmax=softmax_v, logit_scale=logit_scale_v)
        z = z.flatten(1, 2)
        if weight_out is None:
            return z if residual is None else residual + z
        return project(z, weight_out, bias_out, add=residual)
    per_head = split_heads(weight_out, heads).transpose(0, 1)  # (heads, C, m)
    h = scale * (converted(per_head, g.dtype) @ g)
    if bias_out is not None and softmax_v:
        h = h + (converted(bias_out, h.dtype) * (1 / heads))[:, None]
    y = aten.distribute(h, v, softmax=softmax_v, logit_scale=logit_scale_v)
    y = y.squeeze(1) if heads == 1 else y.sum(1)
    if bias_out is not None and not softmax_v:
        y = y + bias_out[:, None]
    return y if residual is None else residual + y


def _gathered_bias(bias: Tensor, keep: Tensor | None) -> Tensor:
    """What ba adds to G: itself, but nothing where a sample's positions are all masked."""
    bias = bias[:, :, None]
    return bias if keep is None else bias * keep.any(-1)[:, None, None, None]
