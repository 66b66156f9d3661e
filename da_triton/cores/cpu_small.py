r"""The block on a CPU for small inputs: the fewest operations, in one piece.

Channel-major, ``(C, L)`` for one sample and ``(N, C, L)`` for several, whatever the memory format
of x: only the result and dX are made in it. Letters as in ``cpu_block``, transposed:

    P = softmax over L of Wb x       F = Wa x + ba (A-) or x (X-)      T = F Pᵀ
    Q = softmax over n of Wv x + bv  G = T (A-) or Wa T + ba (X-)      D = G (-Z) or Wo G + bo (-H)
    Z = D Q                          out = Wo Z + bo (-Z) or Z (-H), + x
"""

from typing import Any

import torch
from torch import Tensor

from ..arguments import Options, Weights
from . import aten_block, direct
from .aten import WIDE_CHUNK

MOST_ELEMENTS = 2**18  # of x


class Call(direct.Call):
    """For several heads in the paper's order, for one head in any."""

    def plan(self, x: Tensor, w: Weights, keep: Any, o: Options, residual: bool) -> bool:
        batch, _, length = x.shape
        order = aten_block.order_of(x, w, o)
        if o.heads > 1 and o.order == "auto":
            order = "AZ"
        small = keep is None and 0 < x.numel() <= MOST_ELEMENTS and length <= WIDE_CHUNK
        if not small or (o.heads > 1 and order != "AZ"):
            return False
        self.o, self.residual = o._replace(order=order), residual
        self.from_x, self.to_z = order[0] == "X", order[1] == "Z"
        self.batch, self.heads = batch, o.heads
        self.one = batch == 1
        if self.one:
            self.maps_shape, self.grad_shape = self.maps_shape[1:], self.grad_shape[1:]
        self.product: Any = torch.mm if self.one else torch.bmm
        self.sum: Any = torch.addmm if self.one else torch.baddbmm
        self.core: Any = torch.mm if self.one and o.heads == 1 else torch.bmm
        return True

    def forward(self, x, w, keep):
        out, kept = self._forward(x, w)
        return out, () if self.o.recompute is True else kept

    def _forward(self, x, w):
        o, kept_f, kept_t, kept_g, kept_z = self.o, None, None, None, None
        p = _scaled(self._times(w.b, x), o.logit_scale).softmax(-1)
        if self.from_x:
            kept_t = self.product(x, p.mT)
            g = self._affine(w.a, kept_t, w.bias_a)
        else:
            kept_f = self._affine(w.a, x, w.bias_a)
            g = self.core(self._split(kept_f), self._split(p).mT)
        d = g = _scaled(g, o.scale)
        q = self._split(_scaled(self._affine(w.v, x, w.bias_v), o.logit_scale_v))
        if o.softmax_v:
            q = q.softmax(-2)
        if self.to_z:
            out = kept_z = self._join(self.core(g, q))
            if w.out is not None:
                out = self._affine(w.out, kept_z, w.bias_out, rows=self.channels_last)
            if self.residual:
                out = out + x if out is kept_z else out.add_(x)
        else:
            kept_g, d = g, self._affine(w.out, g, w.bias_out if o.softmax_v else None)
            out = self.sum(x, d, q) if self.residual else self.product(d, q)
            if not o.softmax_v and w.bias_out is not None:
                out.add_(w.bias_out.unsqueeze(-1))
        return out, (p, kept_f, kept_t, kept_g, q, d, kept_z)

    def backward(self, grad, x, w, keep, kept, needs):
        o = self.o
        p, f, t, g, q, d, z = kept or self._forward(x, w)[1]
        need_x, need_a, need_bias_a, need_b, need_v, need_bias_v, need_out, need_bias_out = needs

        last = self.to_z and w.out is not None
        dz = self._split(self._times(w.out.mT, grad) if last else grad)
        dd, dv = self.core(dz, q.mT), self.core(d.mT, dz)
        if o.softmax_v:
            dv = torch._softmax_backward_data(dv, q, q.dim() - 2, q.dtype)
        dv = _scaled(self._join(dv), o.logit_scale_v)
        dg = _scaled(dd if self.to_z else self._times(w.out.mT, dd), o.scale)
        dt = self._times(w.a.mT, dg) if self.from_x else dg
        dp = self._join(self.core(dt.mT, x if self.from_x else self._split(f)))
        db = _scaled(torch._softmax_backward_data(dp, p, p.dim() - 1, p.dtype), o.logit_scale)
        df = None
        if not self.from_x and (need_x or need_a):
            df = self._join(self.core(dt, self._split(p)))
        return (
            self._dx(grad, w, db, dv, *((dt, p) if self.from_x else (w.a.mT, df)))
            if need_x
            else None,
            self._outer(*((dg, t) if self.from_x else (df, x))) if need_a else None,
            self._sum(self._join(dg)) if need_bias_a else None,
            self._outer(db, x) if need_b else None,
            self._outer(dv, x) if need_v else None,
            self._sum(dv) if need_bias_v else None,
            self._outer(*((grad, z) if self.to_z else (dd, g))) if need_out else None,
            self._sum(grad if self.to_z or not o.softmax_v else dd) if need_bias_out else None,
        )

    def _dx(self, grad, w, db, dv, left, right) -> Tensor:
        """X's gradient, ``left right`` part of it, in X's memory format."""
        terms = [(left, right), (w.v.mT, dv), (w.b.mT, db)]
        if self.channels_last:
            grad, terms = grad.mT, [(y.mT, z.mT) for z, y in terms]
        total = None
        for y, z in terms:
            if not self.one:
                y, z = y.expand(self.batch, -1, -1), z.expand(self.batch, -1, -1)
            if total is not None:
                self.sum(total, y, z, out=total)
            else:
                total = self.sum(grad, y, z) if self.residual else self.product(y, z)
        return total.mT if self.channels_last else total

    def _shared(self, w: Tensor) -> Tensor:
        return w if self.one else w.expand(self.batch, -1, -1)

    def _times(self, w: Tensor, x: Tensor) -> Tensor:
        return self.product(self._shared(w), x)

    def _affine(self, w: Tensor, x: Tensor, bias: Tensor | None, rows: bool = False) -> Tensor:
        """``w x + bias``; with ``rows``, channels are adjacent in its memory."""
        w = self._shared(w)
        if rows:
            y = self.product(x.mT, w.mT) if bias is None else self.sum(bias, x.mT, w.mT)
            return y.mT
        return self.product(w, x) if bias is None else self.sum(bias.unsqueeze(-1), w, x)

    def _outer(self, dy: Tensor, x: Tensor) -> Tensor:
        """A weight's gradient."""
        found = self.product(dy, x.mT)
        return found if self.one else found.sum(0)

    def _sum(self, dy: Tensor) -> Tensor:
        """A bias's gradient."""
        return dy.sum(-1) if self.one else dy.sum((0, 2))

    def _split(self, x: Tensor) -> Tensor:
        """Heads apart, joined with the batch."""
        return x if self.heads == 1 else x.reshape(self.batch * self.heads, -1, x.shape[-1])

    def _join(self, x: Tensor) -> Tensor:
        if self.heads == 1:
            return x
        return x.view(*(() if self.one else (self.batch,)), -1, x.shape[-1])

    def plain(self, x, w, keep):
        x = x if x.dim() == 3 else x[None]
        return aten_block.compose(x, w, keep, x if self.residual else None, self.o)


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x.mul_(factor)
