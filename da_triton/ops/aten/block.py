r"""The block of the ``torch`` backend: vendor GEMMs around its gather and distribute.

    order AZ    A, B, V = W X      G = A Pᵀ             Z = scale·G Q      Y = Wo Z + bo
          X-    M = X Pᵀ           G = Wa M + ba·1ᵀ      (A never exists)
          -H    H = scale·Wo G     Y = H Q + bo         (Z never exists)

Biases go where they are cheapest: bb cannot change a softmax over positions and is left out; rows
of P sum to 1, so ba is added to G; columns of Q sum to 1, so with H bo is added to H.

Everything here is a differentiable operation that can be transformed, traced and exported, and
needs no code for gradients. Where only autograd observes the call, float32 and float64 on a CPU
take the same orders through ``cpu_small`` and ``cpu_block`` instead. X is ``(N, C, L)``;
``residual``, of the output's shape, is added to it.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ... import tracing
from ...arguments import Options, Weights
from ...planning import planner
from ...planning.costs import ORDERS, Order
from ...precision import converted
from ...projection import project, split_heads
from ...tracing import transformed
from . import core as aten


def block(x: Tensor, w: Weights, mask, residual, o: Options) -> Tensor:
    """``(N, C, L)`` to ``(N, C or c_m, L)``; ``mask (N, L)`` and ``residual`` may be None.

    With ``recompute=True``, autograd saves x and the weights, and projects again in backward.
    """

    def composed(x, *w):
        return compose(x, Weights(*w), mask, residual, o, order)

    order = order_of(x, w, o)
    # Transforms of ``torch.func`` cannot follow a checkpoint.
    if o.recompute is not True or not torch.is_grad_enabled() or transformed():
        return composed(x, *w)
    return checkpoint(composed, x, *w, use_reentrant=False, preserve_rng_state=False)


def order_of(x: Tensor, w: Weights, o: Options) -> Order:
    """The association order, chosen by cost where none is named."""
    if o.order != "auto":
        return ORDERS[o.order]
    c_m, channels = tracing.sizes(w.a)
    c_n, length = tracing.sizes(w.b)[0], tracing.sizes(x)[2]
    sizes = channels, c_m, c_n, o.heads, length, x.element_size()
    return planner.choose_order(*sizes, w.out is not None, x.device.type == "cpu")


def compose(x: Tensor, w: Weights, mask, residual, o: Options, order: Order) -> Tensor:
    """The block in the given order; ``o.order`` is ignored."""
    heads, logit_scale, logit_scale_v, scale, softmax_v, *_ = o
    weight_a, bias_a, weight_b, weight_v, bias_v, weight_out, bias_out = w
    b = split_heads(project(x, weight_b, None), heads)
    if order.from_x:
        shared = x[:, None].expand(-1, heads, -1, -1)
        m = aten.gather(shared, b, mask=mask, logit_scale=logit_scale)
        g = converted(split_heads(weight_a, heads, 0), m.dtype) @ m
    else:
        a = split_heads(project(x, weight_a, None), heads)
        g = aten.gather(a, b, mask=mask, logit_scale=logit_scale)
    if bias_a is not None:
        g = g + _gathered_bias(converted(split_heads(bias_a, heads, 0), g.dtype), mask)
    v = split_heads(project(x, weight_v, bias_v), heads)

    if not order.through_h:
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


def _gathered_bias(bias: Tensor, mask: Tensor | None) -> Tensor:
    """The term that ba adds to G: ba, but 0 where a sample's positions are all masked."""
    bias = bias[:, :, None]
    return bias if mask is None else bias * mask.any(-1)[:, None, None, None]
