"""The block where nothing but autograd sees it: one node, from tensors as given to the result.

A backend says in a :class:`Call` what it does for one signature. Operators are not dispatched, and
a view has no node of its own; only a cast has one.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import tracing
from ..arguments import Options, Weights
from .operators import differentiable, unviewed, wants_graph


class Call:
    """The block for one signature, prepared on tensors of it, of which it keeps none.

    ``weights`` are the arguments of ``double_attention_block`` in its order, bias_b among them.
    """

    see: Any = staticmethod(Tensor.view)
    has_operator = False  # for a backward pass that is watched

    def __init__(self, x: Tensor, weights: Any) -> None:
        self.device = x.device.type
        self.wants_gradient = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (x, *weights)
        )
        self.maps_shape: Any = (*x.shape[:2], x.shape[2:].numel())
        # Tuples of ints: ``view`` parses them faster than a torch.Size.
        self.shapes: Any = [None if w is None else tuple(w.shape[:2]) for w in weights]
        last = weights[0] if weights[6] is None else weights[6]
        self.out_shape = (x.shape[0], last.shape[0], *x.shape[2:])
        self.mask_shape = (x.shape[0], self.maps_shape[2])
        self.grad_shape: Any = (x.shape[0], last.shape[0], self.maps_shape[2])
        self.channels_last = x.stride(1) == 1 and x.stride(-1) != 1

    @classmethod
    def prepare(cls, x: Tensor, weights: Any, mask: Any, o: Options, residual: bool) -> Any:
        """A call, or None for tensors that this one does not take.

        ``residual``: adds x, in its own dtype.
        """
        call = cls(x, weights)
        try:
            call.as_matrices(x, weights, mask)
        except RuntimeError:
            call.see = Tensor.reshape  # copies
        x, w, keep = call.as_matrices(x, weights, mask)
        return call if call.plan(x, w, keep, o, residual) else None

    def plan(self, x: Tensor, w: Weights, keep: Any, o: Options, residual: bool) -> bool:
        """Decides what metadata decides; False where this call does not apply."""
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
        keep = None if mask is None else see(mask, *self.mask_shape)
        return see(x, *self.maps_shape), w, keep

    def forward(self, x: Tensor, w: Weights, keep: Any) -> tuple[Tensor, Any]:
        """The result ``(N, C', L)``, and tensors (or None) for ``backward``."""
        raise NotImplementedError

    def backward(
        self, grad: Tensor, x: Tensor, w: Weights, keep: Any, kept: Any, needs: Any
    ) -> Any:
        """Gradients of x and of the weights, where ``needs`` says so."""
        raise NotImplementedError

    def plain(self, x: Tensor, w: Weights, keep: Any) -> Tensor:
        """The same in differentiable operations."""
        raise NotImplementedError

    def composed(self, bias_b: Tensor | None, mask: Tensor | None) -> Callable[..., Tensor]:
        """``plain`` on tensors as they were given, all but ``bias_b`` and the mask."""

        def forward(x, weight_a, bias_a, weight_b, *others):
            weights = weight_a, bias_a, weight_b, bias_b, *others
            return self.plain(*self.as_matrices(x, weights, mask)).reshape(self.out_shape)

        return forward

    def __call__(self, x: Tensor, weights: Any, mask: Tensor | None) -> Tensor:
        if self.wants_gradient:
            return Block.apply(self, mask, x, *weights)
        out, _ = self.forward(*self.as_matrices(x, weights, mask))
        return self.as_given(out)

    def as_given(self, out: Tensor) -> Tensor:
        """``(N, C', L)`` with the positions and the memory format of x."""
        out = out.view(*self.out_shape)
        if not self.channels_last:
            return out.contiguous()
        return out if out.stride(1) == 1 else out.movedim(1, -1).contiguous().movedim(-1, 1)


class Block(torch.autograd.Function):
    """Without ``setup_context``: no transform of ``torch.func`` gets here."""

    @staticmethod
    def forward(ctx, call, mask, x, *weights):
        out, kept = call.forward(*call.as_matrices(x, weights, mask))
        ctx.call = call
        ctx.save_for_backward(mask, x, *weights, *kept)
        return unviewed(call.as_given(out))

    @staticmethod
    def backward(ctx, grad):
        call = ctx.call
        mask, x, *rest = ctx.saved_tensors
        weights, kept = rest[:8], rest[8:]
        a, bias_a, b, bias_b, v, bias_v, out, bias_out = weights
        _, _, need_x, need_a, need_bias_a, need_b, need_bias_b, *others = ctx.needs_input_grad
        need_v, need_bias_v, need_out, need_bias_out = others
        needs = [need_x, need_a, need_bias_a, need_b, *others]
        with _autocast_off(call.device):
            if not any(needs):
                found: Any = (None,) * 8
            elif wants_graph(grad) or (tracing.watched() and not call.has_operator):
                given = x, a, bias_a, b, v, bias_v, out, bias_out
                found = differentiable(call.composed(bias_b, mask), given, needs, grad)
            else:
                grad = grad.reshape(*call.grad_shape)
                found = call.backward(grad, *call.as_matrices(x, weights, mask), kept, needs)
        dx, da, dbias_a, db, dv, dbias_v, dout, dbias_out = found
        return (
            None,
            None,
            dx.view(*x.shape) if need_x else None,
            da.view(*a.shape) if need_a else None,
            dbias_a if need_bias_a else None,
            db.view(*b.shape) if need_b else None,
            torch.zeros_like(bias_b) if need_bias_b else None,
            dv.view(*v.shape) if need_v else None,
            dbias_v if need_bias_v else None,
            dout.view(*out.shape) if need_out else None,
            dbias_out if need_bias_out else None,
        )


def _autocast_off(kind: str) -> Any:
    """Backward may run where autocast is on."""
    if tracing.autocast_dtype(kind) is None:
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)
