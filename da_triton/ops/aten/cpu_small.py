r"""The block on a CPU for small inputs: the fewest operations, in one tile.

Channel-major, ``(C, L)`` for one sample and ``(N, C, L)`` for several, whatever the memory format
of x: only the result and dX are made in that, and, where products are large (``rows``), everything
else with positions. Letters as in ``cpu_block``, transposed:

    P = softmax over L of Wb x       F = Wa x + ba (A-) or x (X-)      T = F Pᵀ
    Q = softmax over n of Wv x + bv  G = T (A-) or Wa T + ba (X-)      D = G (-Z) or Wo G + bo (-H)
    Z = D Q                          out = Wo Z + bo (-Z) or Z (-H), + x

Order AZ of few positions and many descriptors ("short") forms no T, but S = Pᵀ Q and Z = F S.
"""

from typing import Any

import torch
from torch import Tensor

from ...arguments import Options, Weights
from ...planning.costs import AZ
from .. import direct
from . import block as aten_block
from .core import POSITIONS_PER_PRODUCT

# Measured on one and two threads, forward and training step, (N, C, c, L) from (1, 16, 8, 64) to
# (4, 2048, 512, 49). Above, cpu_block is faster: its tiles stay in the cache, and it multiplies
# weights with the positions of all samples at once.
MOST_ELEMENTS = 2**18  # of x
MOST_WEIGHTS = 2**18  # elements of Wa, counted once per sample
# On several threads, where PyTorch convolves float32 with oneDNN, products of at least this many
# multiplications are faster as convolutions, unless a side of the matrices is narrow.
CONVOLVED_MULTIPLICATIONS, NARROW = 2**23, 64
FEW_COLUMNS = 2**8  # products with no more do not copy their first matrix to transpose it


class Call(direct.Call):
    """Several heads in the paper's order, or one head in any order."""

    def plan(self, x: Tensor, w: Weights, mask: Any, o: Options, residual: bool) -> bool:
        batch, _, length = x.shape
        self.order = order = (
            AZ if o.heads > 1 and o.order == "auto" else aten_block.order_of(x, w, o)
        )
        if (
            mask is not None
            or not 0 < x.numel() <= MOST_ELEMENTS
            or length > POSITIONS_PER_PRODUCT
            or batch * w.a.numel() > MOST_WEIGHTS
            or (o.heads > 1 and order != AZ)
        ):
            return False
        self.o, self.residual = o, residual
        self.from_x, self.to_z = order.from_x, not order.through_h
        self.batch, self.heads = batch, o.heads
        self.one = batch == 1
        if self.one:
            self.x_shape, self.grad_shape = self.x_shape[1:], self.grad_shape[1:]
        few = length * (len(w.a) + len(w.b)) * o.heads < 2 * len(w.a) * len(w.b)
        self.short = few and order == AZ
        self.mm: Any = torch.mm if self.one else torch.bmm
        self.addmm: Any = torch.addmm if self.one else torch.baddbmm
        self.bmm: Any = torch.mm if self.one and o.heads == 1 else torch.bmm
        self.t: Any = torch.t if self.bmm is torch.mm else _transposed
        self.softmax: Any = torch.softmax
        self.softmax_backward: Any = torch._softmax_backward_data
        wide = x.dtype == torch.float32 and min(*w.a.shape, length) > NARROW
        large = wide and w.a.numel() * length >= CONVOLVED_MULTIPLICATIONS
        if large:
            self.mm, self.addmm, self.bmm = _product, _added_product, _product
        self.project: Any = self.mm
        self.rows = large and self.channels_last and o.heads == 1
        if self.rows:
            self.project = self.bmm = _product_in_rows
            self.softmax, self.softmax_backward = _softmax_in_rows, _softmax_in_rows_backward
        return True

    def forward(self, x, w, mask):
        out, saved = self._forward(x, self._spread(w))
        return out, () if self.o.recompute is True else saved

    def _forward(self, x, w):
        o, mm, t = self.o, self.mm, self.t
        g: Any = None
        saved_f = saved_t = saved_g = saved_z = d = g
        p = self.softmax(_scaled(self.project(w.b, x), o.logit_scale), -1)
        if self.from_x:
            saved_t = t(mm(p, t(x))) if self.channels_last else mm(x, t(p))
            g = self._affine(w.a, saved_t, w.bias_a)
        else:
            saved_f = self._affine(w.a, x, w.bias_a)
            if not self.short:
                g = self.bmm(self._split(saved_f), t(self._split(p)))
        if not self.short:
            d = g = _scaled(g, o.scale)
        q = self._split(_scaled(self._affine(w.v, x, w.bias_v), o.logit_scale_v))
        if o.softmax_v:
            q = self.softmax(q, -2)
        if self.short:
            d = _scaled(self.bmm(t(self._split(p)), q), o.scale)
            out = saved_z = self._join(self.bmm(self._split(saved_f), d))
        elif self.to_z:
            out = saved_z = self._join(self.bmm(g, q))
        if self.to_z:
            if w.out is not None:
                out = self._affine(w.out, saved_z, w.bias_out, self.channels_last)
            if self.residual:
                out = out + x if out is saved_z else out.add_(x)
        else:
            saved_g, d = g, self._affine(w.out, g, w.bias_out if o.softmax_v else None)
            out = self._sum(x if self.residual else None, (d, q))
            if not o.softmax_v and w.bias_out is not None:
                out.add_(w.bias_out.unsqueeze(-1))
        return out, (p, saved_f, saved_t, saved_g, q, d, saved_z)

    def backward(self, grad, x, w, mask, saved, needs):
        o, mm, bmm, t, w = self.o, self.mm, self.bmm, self.t, self._spread(w)
        p, f, saved_t, g, q, d, z = saved or self._forward(x, w)[1]
        need_x, need_a, need_bias_a, need_b, need_v, need_bias_v, need_out, need_bias_out = needs

        dz = grad if not self.to_z or w.out is None else self.project(t(w.out), grad)
        dz = self._split(dz)
        if self.short:
            ds = _scaled(bmm(t(self._split(f)), dz), o.scale)
            dp, dv = bmm(q, t(ds)), bmm(self._split(p), ds)
            df: Any = bmm(dz, t(d))
        else:
            dd, dv = bmm(dz, t(q)), bmm(t(d), dz)
            dg = _scaled(dd if self.to_z else mm(t(w.out), dd), o.scale)
            dt = mm(t(w.a), dg) if self.from_x else dg
            dp = bmm(t(dt), x if self.from_x else self._split(f))
            df = None if self.from_x else bmm(dt, self._split(p))
        if o.softmax_v:
            dv = self.softmax_backward(dv, q, -2, q.dtype)
        dv = _scaled(self._join(dv), o.logit_scale_v)
        dp, df = self._join(dp), df if df is None else self._join(df)
        db = _scaled(self.softmax_backward(dp, p, -1, p.dtype), o.logit_scale)

        dx = da = dbias_a = dwb = dwv = dbias_v = dout = dbias_out = None
        if need_x:
            first = (dt, p) if self.from_x else (t(w.a), df)
            dx = self._sum(grad if self.residual else None, first, (t(w.v), dv), (t(w.b), db))
        xt = t(x)
        if need_a:
            da = self._summed(mm(dg, t(saved_t)) if self.from_x else mm(df, xt))
        if need_bias_a:
            dbias_a = self._bias(df if self.short else self._join(dg))
        if need_b:
            dwb = self._summed(mm(db, xt))
        if need_v:
            dwv = self._summed(mm(dv, xt))
        if need_bias_v:
            dbias_v = self._bias(dv)
        if need_out:
            dout = self._summed(mm(grad, t(z)) if self.to_z else mm(dd, t(g)))
        if need_bias_out:
            dbias_out = self._bias(grad if self.to_z or not o.softmax_v else dd)
        return dx, da, dbias_a, dwb, dwv, dbias_v, dout, dbias_out

    def _sum(self, x: Tensor | None, *terms: Any) -> Tensor:
        """A sum of products, and of x, in the memory format of the call's x."""
        t, channels_last = self.t, self.channels_last
        if channels_last:
            x, terms = x if x is None else t(x), tuple((t(z), t(y)) for y, z in terms)
        (y, z), *others = terms
        total = self.mm(y, z) if x is None else self.addmm(x, y, z)
        for y, z in others:
            self.addmm(total, y, z, out=total)
        return t(total) if channels_last else total

    def _spread(self, w: Weights) -> Weights:
        """One matrix per sample, without copies."""
        if self.one:
            return w
        shape = self.batch, -1, -1
        out = w.out if w.out is None else w.out.expand(shape)
        return w._replace(a=w.a.expand(shape), b=w.b.expand(shape), v=w.v.expand(shape), out=out)

    def _affine(self, w: Tensor, x: Tensor, bias: Tensor | None, rows: bool = False) -> Tensor:
        if rows or self.rows:
            x, w = self.t(x), self.t(w)
            return self.t(self.mm(x, w) if bias is None else self.addmm(bias, x, w))
        return self.mm(w, x) if bias is None else self.addmm(bias.unsqueeze(-1), w, x)

    def _summed(self, dw: Tensor) -> Tensor:
        return dw if self.one else dw.sum(0)

    def _bias(self, dy: Tensor) -> Tensor:
        """The gradient of a bias."""
        return dy.sum(-1) if self.one else dy.sum((0, 2))

    def _split(self, x: Tensor) -> Tensor:
        """Splits the heads, and folds them into the batch."""
        return x if self.heads == 1 else x.reshape(self.batch * self.heads, -1, x.shape[-1])

    def _join(self, x: Tensor) -> Tensor:
        return x if self.heads == 1 else x.view(*self.grad_shape[:-2], -1, x.shape[-1])

    def plain(self, x, w, mask):
        x = x if x.dim() == 3 else x[None]
        return aten_block.compose(x, w, mask, x if self.residual else None, self.o, self.order)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``mm`` or ``bmm``, as convolutions of one pixel where these are faster."""
    if not _convolved(a, b):
        return torch.mm(a, b) if a.dim() == 2 else torch.bmm(a, b)
    if a.dim() == 3 and a.stride(0) == 0:
        return _products(a[0], b.contiguous())
    if a.dim() == 3 and b.stride(0) == 0:
        return _transposed(_products(b[0].t(), _transposed(a.contiguous())))
    if a.dim() == 3:
        return torch.bmm(a, b)
    (m, k), n = a.shape, b.shape[1]
    if a.stride(-1) != 1 and b.stride(-1) == 1 and m > n:
        return torch.conv_transpose2d(b.view(1, k, 1, n), a.t().view(k, m, 1, 1)).view(m, n)
    if a.stride(-1) != 1 and n <= FEW_COLUMNS:
        return torch.mm(a, b)
    # An image of m pixels, in channels_last.
    image = a.contiguous().as_strided((1, k, 1, m), (k * m, 1, k * m, k))
    if b.stride(-1) == 1:
        return torch.conv_transpose2d(image, b.view(k, n, 1, 1)).view(n, m).t()
    return torch.conv2d(image, b.t().view(n, k, 1, 1)).view(n, m).t()


def _products(a: Tensor, b: Tensor) -> Tensor:
    """One matrix times several, in the memory format of these."""
    b = b.unsqueeze(2)
    if a.stride(-1) == 1:
        return torch.conv2d(b, a[..., None, None]).squeeze(2)
    return torch.conv_transpose2d(b, a.t()[..., None, None]).squeeze(2)


def _added_product(x: Tensor, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    if not _convolved(a, b):
        return (torch.addmm if a.dim() == 2 else torch.baddbmm)(x, a, b, out=out)
    return _product(a, b).add_(x) if out is None else out.add_(_product(a, b))


def _convolved(a: Tensor, b: Tensor) -> bool:
    multiplications = a.shape[-2] * a.shape[-1] * b.shape[-1]
    return multiplications >= CONVOLVED_MULTIPLICATIONS and torch.get_num_threads() > 1


def _product_in_rows(a: Tensor, b: Tensor) -> Tensor:
    """``_product`` for matrices with contiguous columns."""
    return _transposed(_product(_transposed(b), _transposed(a)))


def _softmax_in_rows(x: Tensor, dim: int) -> Tensor:
    return _transposed(_transposed(x).softmax(-3 - dim))


def _softmax_in_rows_backward(dy: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    dy, y = _transposed(dy), _transposed(y)
    return _transposed(torch._softmax_backward_data(dy, y, -3 - dim, dtype))


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(-2, -1)


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x.mul_(factor)
