r"""The block on a CPU for small inputs: the fewest operations, in one piece.

Channel-major, ``(C, L)`` for one sample and ``(N, C, L)`` for several, whatever the memory format
of x: only the result and dX are made in it. Letters as in ``cpu_block``, transposed:

    P = softmax over L of Wb x       F = Wa x + ba (A-) or x (X-)      T = F Pᵀ
    Q = softmax over n of Wv x + bv  G = T (A-) or Wa T + ba (X-)      D = G (-Z) or Wo G + bo (-H)
    Z = D Q                          out = Wo Z + bo (-Z) or Z (-H), + x

Order AZ of few positions and many maps ("short") forms no T, but S = Pᵀ Q and Z = F S.
"""

from typing import Any

import torch
from torch import Tensor

from ..arguments import Options, Weights
from . import aten_block, direct
from .aten import WIDE_CHUNK

# Measured on one and two threads, forward and training step, (N, C, c, L) from (1, 16, 8, 64) to
# (4, 2048, 512, 49). Beyond, cpu_block is faster: its pieces stay in the cache, and it multiplies
# weights with the positions of all samples at once.
MOST_ELEMENTS = 2**18  # of x
MOST_WEIGHTS = 2**18  # elements of Wa, counted for each sample
# On several threads, projections with larger weights are faster as convolutions.
CONVOLVED_WEIGHTS, CONVOLVED_POSITIONS = 2**17, 2**7  # elements of Wa


class Call(direct.Call):
    """For several heads in the paper's order, for one head in any."""

    def plan(self, x: Tensor, w: Weights, keep: Any, o: Options, residual: bool) -> bool:
        batch, _, length = x.shape
        order = "AZ" if o.heads > 1 and o.order == "auto" else aten_block.order_of(x, w, o)
        if (
            keep is not None
            or not 0 < x.numel() <= MOST_ELEMENTS
            or length > WIDE_CHUNK
            or batch * w.a.numel() > MOST_WEIGHTS
            or (o.heads > 1 and order != "AZ")
        ):
            return False
        self.o, self.residual = o._replace(order=order), residual
        self.from_x, self.to_z = order[0] == "X", order[1] == "Z"
        self.batch, self.heads = batch, o.heads
        self.one = batch == 1
        if self.one:
            self.maps_shape, self.grad_shape = self.maps_shape[1:], self.grad_shape[1:]
        few = length * (len(w.a) + len(w.b)) * o.heads < 2 * len(w.a) * len(w.b)
        self.short = few and order == "AZ"
        self.large = w.a.numel() >= CONVOLVED_WEIGHTS and length >= CONVOLVED_POSITIONS
        self.mm: Any = torch.mm if self.one else torch.bmm
        self.addmm: Any = torch.addmm if self.one else torch.baddbmm
        self.core: Any = torch.mm if self.one and o.heads == 1 else torch.bmm
        self.t: Any = torch.t if self.core is torch.mm else _transposed
        return True

    def forward(self, x, w, keep):
        out, kept = self._forward(x, self._spread(w))
        return out, () if self.o.recompute is True else kept

    def _forward(self, x, w):
        o, mm, t = self.o, self.mm, self.t
        g: Any = None
        kept_f = kept_t = kept_g = kept_z = d = g
        p = _scaled(self._project(w.b, x, None), o.logit_scale).softmax(-1)
        if self.from_x:
            kept_t = mm(x, t(p))
            g = self._affine(w.a, kept_t, w.bias_a)
        else:
            kept_f = self._project(w.a, x, w.bias_a)
            if not self.short:
                g = self.core(self._split(kept_f), t(self._split(p)))
        if not self.short:
            d = g = _scaled(g, o.scale)
        q = self._split(_scaled(self._project(w.v, x, w.bias_v), o.logit_scale_v))
        if o.softmax_v:
            q = q.softmax(-2)
        if self.short:
            d = _scaled(self.core(t(self._split(p)), q), o.scale)
            out = kept_z = self._join(self.core(self._split(kept_f), d))
        elif self.to_z:
            out = kept_z = self._join(self.core(g, q))
        if self.to_z:
            if w.out is not None and self.channels_last:
                out = t(mm(t(kept_z), t(w.out)))
                out = out if w.bias_out is None else out.add_(w.bias_out.unsqueeze(-1))
            elif w.out is not None:
                out = self._project(w.out, kept_z, w.bias_out)
            if self.residual:
                out = out + x if out is kept_z else out.add_(x)
        else:
            kept_g, d = g, self._affine(w.out, g, w.bias_out if o.softmax_v else None)
            out = self.addmm(x, d, q) if self.residual else mm(d, q)
            if not o.softmax_v and w.bias_out is not None:
                out.add_(w.bias_out.unsqueeze(-1))
        return out, (p, kept_f, kept_t, kept_g, q, d, kept_z)

    def backward(self, grad, x, w, keep, kept, needs):
        o, mm, core, t, w = self.o, self.mm, self.core, self.t, self._spread(w)
        p, f, kept_t, g, q, d, z = kept or self._forward(x, w)[1]
        need_x, need_a, need_bias_a, need_b, need_v, need_bias_v, need_out, need_bias_out = needs

        dz = self._split(grad if not self.to_z or w.out is None else mm(t(w.out), grad))
        if self.short:
            ds = _scaled(core(t(self._split(f)), dz), o.scale)
            dp, dv = core(q, t(ds)), core(self._split(p), ds)
            df: Any = core(dz, t(d))
        else:
            dd, dv = core(dz, t(q)), core(t(d), dz)
            dg = _scaled(dd if self.to_z else mm(t(w.out), dd), o.scale)
            dt = mm(t(w.a), dg) if self.from_x else dg
            dp = core(t(dt), x if self.from_x else self._split(f))
            df = None if self.from_x else core(dt, self._split(p))
        if o.softmax_v:
            dv = torch._softmax_backward_data(dv, q, q.dim() - 2, q.dtype)
        dv = _scaled(self._join(dv), o.logit_scale_v)
        dp, df = self._join(dp), df if df is None else self._join(df)
        db = _scaled(torch._softmax_backward_data(dp, p, p.dim() - 1, p.dtype), o.logit_scale)

        dx = da = dbias_a = dwb = dwv = dbias_v = dout = dbias_out = None
        if need_x:
            first = (dt, p) if self.from_x else (t(w.a), df)
            dx = self._dx(grad, first, (t(w.v), dv), (t(w.b), db))
        if need_a:
            da = self._summed(mm(dg, t(kept_t)) if self.from_x else mm(df, t(x)))
        if need_bias_a:
            dbias_a = self._bias(df if self.short else self._join(dg))
        if need_b:
            dwb = self._summed(mm(db, t(x)))
        if need_v:
            dwv = self._summed(mm(dv, t(x)))
        if need_bias_v:
            dbias_v = self._bias(dv)
        if need_out:
            dout = self._summed(mm(grad, t(z)) if self.to_z else mm(dd, t(g)))
        if need_bias_out:
            dbias_out = self._bias(grad if self.to_z or not o.softmax_v else dd)
        return dx, da, dbias_a, dwb, dwv, dbias_v, dout, dbias_out

    def _dx(self, grad: Tensor, *terms: Any) -> Tensor:
        """X's gradient, a sum of products, in X's memory format."""
        if self.channels_last:
            grad, terms = self.t(grad), tuple((self.t(z), self.t(y)) for y, z in terms)
        (y, z), *others = terms
        total = self.addmm(grad, y, z) if self.residual else self.mm(y, z)
        for y, z in others:
            self.addmm(total, y, z, out=total)
        return self.t(total) if self.channels_last else total

    def _spread(self, w: Weights) -> Weights:
        """One matrix for each sample."""
        if self.one:
            return w
        shape = self.batch, -1, -1
        out = w.out if w.out is None else w.out.expand(shape)
        return w._replace(a=w.a.expand(shape), b=w.b.expand(shape), v=w.v.expand(shape), out=out)

    def _project(self, w: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """A projection of all positions."""
        if not self.large or torch.get_num_threads() == 1:
            return self._affine(w, x, bias)
        maps = x.view(self.batch, -1, x.shape[-1], 1)
        w = w if self.one else w[0]
        y = torch.conv2d(maps, w[..., None, None], bias)
        return y.view(*x.shape[:-2], -1, x.shape[-1])

    def _affine(self, w: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.mm(w, x) if bias is None else self.addmm(bias.unsqueeze(-1), w, x)

    def _summed(self, dw: Tensor) -> Tensor:
        return dw if self.one else dw.sum(0)

    def _bias(self, dy: Tensor) -> Tensor:
        """A bias's gradient."""
        return dy.sum(-1) if self.one else dy.sum((0, 2))

    def _split(self, x: Tensor) -> Tensor:
        """Heads apart, joined with the batch."""
        return x if self.heads == 1 else x.reshape(self.batch * self.heads, -1, x.shape[-1])

    def _join(self, x: Tensor) -> Tensor:
        return x if self.heads == 1 else x.view(*self.grad_shape[:-2], -1, x.shape[-1])

    def plain(self, x, w, keep):
        x = x if x.dim() == 3 else x[None]
        return aten_block.compose(x, w, keep, x if self.residual else None, self.o)


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(-2, -1)


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x.mul_(factor)
