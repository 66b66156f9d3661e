"""The block in Triton kernels: one operator forward, one backward, and its gradients.

``torch.ops.da_triton.block`` and ``block_backward`` are opaque to the compiler: order, route, batch
chunk and splits are planned inside from the actual sizes, so a compiled model is not compiled
again for another size, and what the operators return does not depend on the plan. Saved for
backward: the inputs, lse and G, and V if requested.

Second derivatives are taken through the operations of the ``torch`` backend.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ... import tracing
from ...arguments import Options, Weights
from ...planning import planner
from ...planning.costs import AZ, ORDERS, order_macs
from ...planning.shapes import Shape
from ...precision import accumulator, lse_dtype
from ...runtime import launch, tiles
from ...runtime.recorded import Recorded
from .. import direct
from ..aten import block as aten_block
from ..custom_op import (
    apply,
    as_owned_tensor,
    differentiable,
    of_tensors,
    run,
    scalars,
    vectorise,
    wants_graph,
)
from . import routes as kernels
from .plan import kernel_routes

WEIGHTS = ("weight_a", "bias_a", "weight_b", "weight_v", "bias_v", "weight_out", "bias_out")
MOST_RECORDED = 16  # backward passes per signature: they differ in needs and the gradient's strides


def block(x, w, mask, residual, o):
    """``(N, C, L)`` to ``(N, C or c_m, L)``; arguments as ``aten_block.block``."""
    fused = residual is not None and residual.dtype == x.dtype
    scales = scalars(o.logit_scale, o.logit_scale_v, o.scale)
    options = o.heads, *scales, o.softmax_v, fused, o.order, _saves_v(w, o)
    out = apply(Block, x, *w, mask, *options)[0]
    return out if residual is None or fused else residual + out


def _saves_v(w, o):
    c_m, channels = w.a.shape
    return planner.saves_v(channels, c_m, w.b.shape[0], o.heads, o.recompute)


class Call(direct.Call):
    """The kernels of one signature, launched without a dispatcher."""

    has_operator = True

    def plan(self, x, w, mask, o, residual):
        if x.shape[0] == 0 or not all(t is None or t.is_contiguous() for t in w):
            return False
        self.save_v, self.order = _saves_v(w, o), o.order
        self.options = o._replace(residual=residual)
        self.route = _route(x, w, o.heads, o.order, self.save_v)
        self.run = Recorded(super().run)  # type: ignore[method-assign, assignment]
        self.recorded_gradients: dict[Any, Recorded] = {}
        return True

    def gradients(self, needs, grad, *tensors):
        if tracing.watched() or type(grad) is not Tensor or grad.is_neg():
            return super().gradients(needs, grad, *tensors)
        key = needs, grad.stride()
        recorded = self.recorded_gradients.get(key)
        if recorded is None:
            # Hooks, and assignments to ``data``, may change what was saved.
            recorded = Recorded(functools.partial(super().gradients, needs), compared=True)
            if len(self.recorded_gradients) < MOST_RECORDED:
                self.recorded_gradients[key] = recorded
        return recorded(grad, *tensors)

    def forward(self, x, w, mask):
        if tracing.named():
            options = *self.options[:6], self.order, self.save_v
            out, lse, g, v = block_op(x, *w, mask, *options)
            return out, (lse, g, v if self.save_v else None)
        out, lse, g, v = kernels.forward(x, w, _bytes(mask), self.options, self.route, self.save_v)
        return out, (lse, g, v)

    def backward(self, grad, x, w, mask, saved, needs):
        lse, g, v = saved
        unlike = not all(t is None or t.is_contiguous() for t in w)  # the planned weights
        if unlike or tracing.named() or (tracing.watched() and not launch.is_recorded()):
            v = x.new_empty(0) if v is None else v
            options = *self.options[:6], self.order, list(needs)
            return run(block_backward_op, grad, x, *w, mask, lse, g, v, *options)
        needs = kernels.Gradients(*needs)
        found = kernels.backward(
            grad, x, w, _bytes(mask), lse, g, v, self.options, self.route, needs
        )
        return found._replace(x=_in_format_of(x, found.x)) if needs.x else found

    def plain(self, x, w, mask):
        return _compose(x, w, mask, self.options)


@torch.library.custom_op("da_triton::block", mutates_args=())
def block_op(
    x: Tensor,
    weight_a: Tensor,
    bias_a: Tensor | None,
    weight_b: Tensor,
    weight_v: Tensor,
    bias_v: Tensor | None,
    weight_out: Tensor | None,
    bias_out: Tensor | None,
    mask: Tensor | None,
    heads: int,
    logit_scale: float,
    logit_scale_v: float,
    scale: float,
    softmax_v: bool,
    residual: bool,
    order: str,
    save_v: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The block's result, lse, G, and V (empty if not saved)."""
    weights = _weights(weight_a, bias_a, weight_b, weight_v, bias_v, weight_out, bias_out)
    options = Options(heads, logit_scale, logit_scale_v, scale, softmax_v, residual)
    if x.shape[0] == 0:
        return _like_outputs(x, weight_a, weight_b, weight_out, heads, save_v)
    route = _route(x, weights, heads, order, save_v)
    out, lse, g, v = kernels.forward(x, weights, _bytes(mask), options, route, save_v)
    out = as_owned_tensor(_in_format_of(x, out))
    return out, lse, g, x.new_empty(0) if v is None else _in_format_of(x, v)


@block_op.register_fake
def _(
    x, weight_a, bias_a, weight_b, weight_v, bias_v, weight_out, bias_out, mask, heads,
    logit_scale, logit_scale_v, scale, softmax_v, residual, order, save_v,
):  # fmt: skip
    return _like_outputs(x, weight_a, weight_b, weight_out, heads, save_v)


def _like_outputs(x, weight_a, weight_b, weight_out, heads, save_v):
    batch, c_m, total_n = x.shape[0], weight_a.shape[0], weight_b.shape[0]
    out = launch.empty_rows_like(x, c_m if weight_out is None else weight_out.shape[0])
    lse = x.new_empty((batch, total_n), dtype=lse_dtype(x.dtype))
    g = x.new_empty((batch, heads, c_m // heads, total_n // heads), dtype=accumulator(x.dtype))
    return out, lse, g, launch.empty_rows_like(x, total_n) if save_v else x.new_empty(0)


@torch.library.custom_op("da_triton::block_backward", mutates_args=())
def block_backward_op(
    dout: Tensor,
    x: Tensor,
    weight_a: Tensor,
    bias_a: Tensor | None,
    weight_b: Tensor,
    weight_v: Tensor,
    bias_v: Tensor | None,
    weight_out: Tensor | None,
    bias_out: Tensor | None,
    mask: Tensor | None,
    lse: Tensor,
    g: Tensor,
    v: Tensor,
    heads: int,
    logit_scale: float,
    logit_scale_v: float,
    scale: float,
    softmax_v: bool,
    residual: bool,
    order: str,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x, weight_a, bias_a, weight_b, weight_v, bias_v, weight_out and bias_out.

    ``needs``: which of them; the others are empty.
    """
    weights = _weights(weight_a, bias_a, weight_b, weight_v, bias_v, weight_out, bias_out)
    if x.shape[0] == 0:
        inputs: Any = zip((x, *weights), needs, strict=True)
        return [torch.zeros_like(t) if need else x.new_empty(0) for t, need in inputs]
    options = Options(heads, logit_scale, logit_scale_v, scale, softmax_v, residual)
    v_ = v if v.dim() == 3 else None
    route = _route(x, weights, heads, order, v_ is not None)
    wanted = kernels.Gradients(*needs)
    found = kernels.backward(dout, x, weights, _bytes(mask), lse, g, v_, options, route, wanted)
    grads = [y if need else x.new_empty(0) for y, need in zip(found, needs, strict=True)]
    if needs[0]:
        grads[0] = _in_format_of(x, grads[0])
    return grads


@block_backward_op.register_fake
def _(
    dout, x, weight_a, bias_a, weight_b, weight_v, bias_v, weight_out, bias_out, mask, lse, g, v,
    heads, logit_scale, logit_scale_v, scale, softmax_v, residual, order, needs,
):  # fmt: skip
    inputs = (x, weight_a, bias_a, weight_b, weight_v, bias_v, weight_out, bias_out)
    given = zip(inputs, needs, strict=True)
    _, *grads = (x.new_empty(t.shape if need else 0) for t, need in given)
    return [launch.empty_rows_like(x, x.shape[1]) if needs[0] else x.new_empty(0), *grads]


def _setup(ctx, inputs, output):
    *tensors, ctx.heads, ls, lsv, scale, softmax, residual, ctx.order, _ = inputs
    ctx.scalars = (ls, lsv, scale, softmax, residual)
    _, lse, g, v = output
    ctx.mark_non_differentiable(lse, g, v)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, lse, g, v)


def _gradients(ctx, dout, *_):
    *tensors, lse, g, v = ctx.saved_tensors
    needs = ctx.needs_input_grad[:8]
    nothing = (None,) * 9  # the mask and the options
    if dout is None or not any(needs):
        return (None,) * 8 + nothing
    if wants_graph(dout):
        grads = differentiable(_composition(ctx, tensors[8]), tensors[:8], needs, dout)
        return *grads, *nothing
    options = ctx.heads, *ctx.scalars, ctx.order, list(needs)
    found = run(block_backward_op, dout, *tensors, lse, g, v, *options)
    return *(y if need else None for y, need in zip(found, needs, strict=True)), *nothing


def _composition(ctx, mask):
    o = Options(ctx.heads, *ctx.scalars)
    return lambda x, *weights: _compose(x, weights, mask, o)


def _compose(x, w, mask, o):
    """The same in differentiable operations."""
    residual = x if o.residual else None
    return aten_block.compose(x, Weights(*w), mask, residual, o, AZ)


vectorise(block_op, shared=WEIGHTS)
vectorise(block_backward_op, joined=False)
block_op.register_autograd(_gradients, setup_context=_setup)
block_of_tensors, block_backward_of_tensors = map(of_tensors, (block_op, block_backward_op))


class Block(torch.autograd.Function):
    """``block_op`` with its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x, weight_a, bias_a, weight_b, weight_v, bias_v, weight_out, bias_out, mask, heads,
        logit_scale, logit_scale_v, scale, softmax_v, residual, order, save_v,
    ):  # fmt: skip
        return run(
            block_op, x, weight_a, bias_a, weight_b, weight_v, bias_v, weight_out, bias_out, mask,
            heads, logit_scale, logit_scale_v, scale, softmax_v, residual, order, save_v,
        )  # fmt: skip

    setup_context = staticmethod(_setup)
    backward = staticmethod(_gradients)


def _weights(*given) -> kernels.Weights:
    contiguous: list[Any] = [None if w is None else w.contiguous() for w in given]
    return kernels.Weights(*contiguous)


def _bytes(mask):
    return None if mask is None else mask.view(torch.uint8)


def _in_format_of(x, y):
    """y in the memory format of the fake implementation; copied only if its own differs."""
    if launch.is_channels_last(x.unsqueeze(1)):
        return y.transpose(1, 2).contiguous().transpose(1, 2)
    return y.contiguous()


def _route(x, weights, heads, order, saved_v):
    c_out = x.shape[1] if weights.out is None else weights.out.shape[0]
    shape = Shape(
        x.shape[0], x.shape[1], weights.a.shape[0], weights.b.shape[0], heads, x.shape[2],
        x.element_size(), weights.out is not None, launch.channels_last(x),
    )  # fmt: skip
    device = tiles.architecture(x.device), launch.num_sms(x.device)
    return kernel_routes(shape, c_out, *device, ORDERS.get(order), saved_v)[0].route


@register_flop_formula([torch.ops.da_triton.block, torch.ops.da_triton.block_of_tensors])
def block_flops(
    x, weight_a, bias_a, weight_b, weight_v, bias_v, weight_out, bias_out, mask, heads,
    logit_scale, logit_scale_v, scale, softmax_v, residual, order, save_v, **_,
):  # fmt: skip
    """A MAC counts as two. "auto" counts as the paper's order, whatever the plan is."""
    return 2 * _macs(x, weight_a, weight_b, weight_out, heads, order)


@register_flop_formula(
    [torch.ops.da_triton.block_backward, torch.ops.da_triton.block_backward_of_tensors]
)
def block_backward_flops(
    dout, x, weight_a, bias_a, weight_b, weight_v, bias_v, weight_out, bias_out, mask, lse, g, v,
    heads, logit_scale, logit_scale_v, scale, softmax_v, residual, order, needs, **_,
):  # fmt: skip
    """The forward FLOPs once for dX, once for the weights; recomputation is not counted."""
    passes = needs[0] + any(needs[1:])
    return 2 * passes * _macs(x, weight_a, weight_b, weight_out, heads, order)


def _macs(x, weight_a, weight_b, weight_out, heads, order):
    batch, channels, length = x
    sizes = batch, channels, weight_a[0], weight_b[0], heads, length
    s = Shape(*sizes, itemsize=1, reconstruct=weight_out is not None)
    return order_macs(s, ORDERS.get(order, AZ))
