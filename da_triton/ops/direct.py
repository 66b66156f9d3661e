"""The block as a single autograd node, for calls that nothing but autograd observes.

A backend implements a :class:`Call`, prepared once per signature. No operator is dispatched, and
views have no nodes of their own; only casts do.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import tracing
from ..arguments import Options, Weights
from ..projection import channels_last, in_format
from .custom_op import as_owned_tensor, differentiable, wants_graph


class Call:
    """The block for one signature, prepared from such tensors, none of which it keeps.

    ``weights`` are the arguments of ``double_attention_block`` in its order, bias_b among them.
    """

    see: Any = staticmethod(Tensor.view)
    has_operator = False  # for a backward pass that is intercepted

    def __init__(self, x: Tensor, weights: Any) -> None:
        self.device = x.device.type
        self.wants_gradient = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (x, *weights)
        )
        self.x_shape: Any = (*x.shape[:2], x.shape[2:].numel())
        # Tuples of ints: ``view`` parses them faster than a torch.Size.
        self.shapes: Any = [None if w is None else tuple(w.shape[:2]) for w in weights]
        last = weights[0] if weights[6] is None else weights[6]
        self.out_shape = (x.shape[0], last.shape[0], *x.shape[2:])
        self.mask_shape = (x.shape[0], self.x_shape[2])
        self.grad_shape: Any = (x.shape[0], last.shape[0], self.x_shape[2])
        self.channels_last = channels_last(x)

    @classmethod
    def prepare(cls, x: Tensor, weights: Any, mask: Any, o: Options, residual: bool) -> Any:
        """Returns a call, or None if it does not support these tensors.

        ``residual``: adds x, in its own dtype.
        """
        call = cls(x, weights)
        try:
            call.as_matrices(x, weights, mask)
        except RuntimeError:
            call.see = Tensor.reshape  # copies
        x, w, mask = call.as_matrices(x, weights, mask)
        return call if call.plan(x, w, mask, o, residual) else None

    def plan(self, x: Tensor, w: Weights, mask: Any, o: Options, residual: bool) -> bool:
        """Plans from metadata alone; False where this call does not apply."""
        raise NotImplementedError

    def as_matrices(self, x: Tensor, weights: Any, mask: Tensor | None) -> Any:
        """``(x (N, C, L), Weights, mask (N, L) or None)``: views where these exist."""
        see = self.see
        a, bias_a, b, _, v, bias_v, out, bias_out = weights
        shape_a, _, shape_b, _, shape_v, _, shape_out, _ = self.shapes
        w = Weights(
            see(a, *shape_a), bias_a, see(b, *shape_b), see(v, *shape_v), bias_v,
            None if out is None else see(out, *shape_out), bias_out,
        )  # fmt: skip
        mask = None if mask is None else see(mask, *self.mask_shape)
        return see(x, *self.x_shape), w, mask

    def forward(self, x: Tensor, w: Weights, mask: Any) -> tuple[Tensor, Any]:
        """The result ``(N, C', L)``, and tensors (or None) for ``backward``."""
        raise NotImplementedError

    def backward(
        self, grad: Tensor, x: Tensor, w: Weights, mask: Any, saved: Any, needs: Any
    ) -> Any:
        """Gradients of x and of the weights, where ``needs`` says so."""
        raise NotImplementedError

    def plain(self, x: Tensor, w: Weights, mask: Any) -> Tensor:
        """The same in differentiable operations."""
        raise NotImplementedError

    def composed(self, bias_b: Tensor | None, mask: Tensor | None) -> Callable[..., Tensor]:
        """``plain`` as a function of the tensors as given, without ``bias_b`` and the mask."""

        def forward(x, weight_a, bias_a, weight_b, *others):
            weights = weight_a, bias_a, weight_b, bias_b, *others
            return self.plain(*self.as_matrices(x, weights, mask)).reshape(self.out_shape)

        return forward

    def __call__(self, x: Tensor, weights: Any, mask: Tensor | None) -> Tensor:
        if self.wants_gradient:
            return Block.apply(self, x, mask, *weights)
        return self.run(x, mask, *weights)[0]

    def run(self, x: Tensor, mask: Tensor | None, *weights: Any) -> Any:
        """The result, laid out like x, and the tensors saved for ``gradients``."""
        out, saved = self.forward(*self.as_matrices(x, weights, mask))
        return self.restore_layout(out), *saved

    def gradients(self, needs: Any, grad: Tensor, *tensors: Any) -> Any:
        """Gradients of x and of the weights, without bias_b.

        ``tensors``: the inputs of ``run`` and what it saved.
        """
        x, mask, *others = tensors
        weights, saved = others[:8], others[8:]
        x_, w, mask = self.as_matrices(x, weights, mask)
        found = self.backward(grad.reshape(*self.grad_shape), x_, w, mask, saved, needs)
        dx, da, dbias_a, db, dv, dbias_v, dout, dbias_out = found
        need_x, need_a, need_bias_a, need_b, need_v, need_bias_v, need_out, need_bias_out = needs
        return (
            dx.view(*x.shape) if need_x else None,
            da.view(*weights[0].shape) if need_a else None,
            dbias_a if need_bias_a else None,
            db.view(*weights[2].shape) if need_b else None,
            dv.view(*weights[4].shape) if need_v else None,
            dbias_v if need_bias_v else None,
            dout.view(*weights[6].shape) if need_out else None,
            dbias_out if need_bias_out else None,
        )

    def restore_layout(self, out: Tensor) -> Tensor:
        """``(N, C', L)`` with the positions and the memory format of x."""
        out = out.view(*self.out_shape)
        made_so = self.channels_last and out.stride(1) == 1
        return out if made_so else in_format(out, self.channels_last)


class Block(torch.autograd.Function):
    """Has no ``setup_context``: transforms of ``torch.func`` never get here."""

    @staticmethod
    def forward(ctx, call, *tensors):
        out, *saved = call.run(*tensors)
        ctx.call = call
        ctx.save_for_backward(*tensors, *saved)
        return as_owned_tensor(out) if out._is_view() else out

    @staticmethod
    def backward(ctx, grad):
        call = ctx.call
        if tracing.autocast_dtype(call.device) is not None:
            with torch.autocast(call.device, enabled=False):
                return Block.backward(ctx, grad)
        tensors = ctx.saved_tensors
        _, need_x, _, need_a, need_bias_a, need_b, need_bias_b, *others = ctx.needs_input_grad
        needs = need_x, need_a, need_bias_a, need_b, *others
        if not any(needs):
            found: Any = (None,) * 8
        elif wants_graph(grad) or (tracing.watched() and not call.has_operator):
            x, mask, *weights = tensors[:10]
            bias_b = weights.pop(3)
            found = differentiable(call.composed(bias_b, mask), (x, *weights), needs, grad)
        else:
            found = call.gradients(needs, grad, *tensors)
        bias_b = torch.zeros_like(tensors[5]) if need_bias_b else None
        return None, found[0], None, *found[1:4], bias_b, *found[4:]
