r"""The block on a CPU: one function with a gradient of its own, sample by sample, in tiles.

Position-major throughout: x is ``(N, L, C)`` and what has c channels is ``(g, l, c)``, for g of the
samples and a tile of l of their positions, all in the memory order of x, or of a copy where x's
own makes slow products: only views are transposed. k is ``heads`` where an order keeps heads apart
(gather: A-, distribute: -Z) and 1 where one product serves all heads (X-, -H).

    P = softmax over L of x Wbᵀ       F = x Waᵀ + ba (A-) or x (X-)     T = Fᵀ P  (g, k, m or C, n)
    Q = softmax over n of x Wvᵀ + bv  G = T (A-) or Wa T + ba (X-)      D = G (-Z) or Wo G (-H)
    Z = Q Dᵀ                          out = Z Woᵀ (-Z) or Z (-H), + bo, + x

Backward, with dZ = dout Wo (order -Z) or dout (-H):

    dD = dZᵀ Q   dQ = dZ D    dV = Q∘(dQ − Σ_n Q∘dQ)   dx = dV Wv, + dout
    dF = P dTᵀ   δ = Σ dT∘T   dB = P∘(F dT − δ)        dx += dB Wb + (dF Wa (A-) or dF (X-))

Order AZ of few positions and many descriptors ("short") forms neither T nor dT, but S = Q Pᵀ (g, k,
l, l):

    Z = S F      dF = Sᵀ dZ   dS = dZ Fᵀ   dQ = dS P   dP = dSᵀ Q   dB = P∘(dP − Σ_l P∘dP)

Temporaries of a tile stay in the cache and in memory that is already mapped: on a CPU, the first
touch of a page can cost more than the product that fills it. The P of a tile is its own
softmax; ``mass``, the tile's part of an attention map's softmax mass, is a factor on T and on dT.
"""

from typing import Any

import torch
from torch import Tensor

from ...arguments import Options, Weights
from ...planning.costs import AZ
from .. import direct
from . import block as aten_block
from .core import sum_over_positions
from .cpu_products import (
    accumulate,
    add_product,
    empty_as,
    few_descriptors,
    gathered_rows,
    join,
    match_layout,
    position_major,
    position_tiles,
    project,
    restore_layout,
    samples,
    softmax_,
    softmax_and_lse,
    softmax_backward,
    split,
    times,
)


class Call(direct.Call):
    """Large inputs, and inputs with a mask."""

    def plan(self, x: Tensor, w: Weights, mask: Any, o: Options, residual: bool) -> bool:
        if few_descriptors(x, len(w.b)):
            return False
        self.order = order = aten_block.order_of(x, w, o)
        self.o = o._replace(residual=residual)
        self.factors = Weights(
            o.scale, o.scale, o.logit_scale, o.logit_scale_v, o.logit_scale_v, 1, 1
        )
        few = x.shape[2] * (len(w.a) + len(w.b)) * o.heads < 2 * len(w.a) * len(w.b)
        self.short = few and order == AZ and len(position_tiles(x[:1].mT)) == 1
        self.gather_heads = 1 if order.from_x else o.heads
        self.distribute_heads = 1 if order.through_h else o.heads
        return True

    def forward(self, x, w, mask):
        return _block(x, self._scaled(w), mask, self, save=self.o.recompute is not True)

    def backward(self, grad, x, w, mask, saved, needs):
        tokens, w = position_major(x), self._scaled(w)
        grad = match_layout(grad.transpose(1, 2), tokens)
        dx = empty_as(tokens, x.shape[1]) if needs[0] else None
        dw = Weights(
            *(torch.zeros_like(z) if need else None for z, need in zip(w, needs[1:], strict=True))
        )
        saved = iter(saved)
        for n in samples(tokens):
            here = tokens[n], None if mask is None else mask[n], w, self
            if self.o.recompute is True:
                saved = iter(_forward(*here, None, save=True))
            _backward(*here, saved, grad[n], None if dx is None else dx[n], dw)
        return None if dx is None else restore_layout(dx, x), *self._scaled(dw)

    def _scaled(self, w: Weights) -> Weights:
        """Folds the scales into the weights, or into their gradients."""
        pairs = zip(w, self.factors, strict=True)
        return Weights(*(z if z is None or factor == 1 else factor * z for z, factor in pairs))

    def plain(self, x, w, mask):
        return aten_block.compose(x, w, mask, x if self.o.residual else None, self.o, self.order)


def _block(x, w, mask, call, save) -> tuple[Tensor, list[Tensor | None]]:
    """The output ``(N, C', L)``, and what ``_backward`` reads, if ``save``."""
    tokens = position_major(x)
    out = empty_as(tokens, len(w.a if w.out is None else w.out))
    saved: list[Tensor | None] = []
    for n in samples(tokens):
        here = None if mask is None else mask[n]
        saved += _forward(tokens[n], here, w, call, out[n], save)
    return restore_layout(out, x), saved


def _forward(x, mask, w, call, out, save) -> list[Tensor | None]:
    """Writes ``out (g, L, C')``, unless None; returns what ``_backward`` reads, if ``save``."""
    options, short = call.o, call.short
    from_x, through_h = call.order.from_x, call.order.through_h
    heads, k = options.heads, call.gather_heads
    tiles = position_tiles(x)
    saved: list[Any] = []
    parts: list[Tensor] = []
    lses: list[Any] = []
    for tile in tiles:
        here = None if mask is None else mask[:, tile]
        rows = gathered_rows(x[:, tile], here)
        p, lse = softmax_and_lse(project(rows, w.b), len(tiles) == 1, here)
        f = rows if from_x else project(rows, w.a, w.bias_a)
        if not short:
            parts.append(sum_over_positions(split(f, k).mT, split(p, k).mT))
        lses.append(lse)
        if save:
            saved += [p, None if from_x else f]
    t: Any = None
    mass = None
    if len(tiles) > 1:
        mass = torch.stack(lses).softmax(0).unflatten(-1, (k, -1)).unsqueeze(-2)
        if mask is not None:
            mass.nan_to_num_(0)  # where no tile has any mass
        t = torch.stack(parts).mul_(mass).sum(0)
    elif not short:
        t = parts[0]

    g = t
    if from_x:
        g = w.a.unflatten(0, (heads, -1)) @ split(t[:, 0], heads)
        if w.bias_a is not None:
            bias = w.bias_a.view(heads, -1, 1)
            g.add_(bias if mask is None else bias * mask.any(1)[:, None, None, None])
    d = g
    if through_h:
        d = join(w.out.unflatten(1, (heads, -1)).transpose(0, 1) @ g)[:, None]

    for tile in tiles:
        q = project(x[:, tile], w.v, w.bias_v)
        if options.softmax_v:
            softmax_(q, heads)
        if short:
            d = split(q, heads) @ split(p, heads).mT
        z = None
        if not through_h:
            z = join(times(d, split(f, heads)) if short else times(split(q, heads), d.mT))
        if save:
            saved += [q, z]
        if out is None:
            continue
        y = out[:, tile]
        bias = 0 if w.bias_out is None else w.bias_out
        if options.residual:
            torch.add(x[:, tile], bias, out=y)
        else:
            y[:] = bias
        if z is None:
            add_product(y, q, d[:, 0].mT)
        elif w.out is None:
            y.add_(z)
        else:
            add_product(y, z, w.out.T)
    return [t, g, d, mass, *saved] if save else []


def _backward(x, mask, w, call, saved, grad, dx, dw) -> None:
    """Writes ``dx (g, L, C)``, unless None, and adds to ``dw``."""
    options = call.o
    from_x, through_h = call.order.from_x, call.order.through_h
    heads, k = options.heads, call.distribute_heads
    tiles = position_tiles(x)
    t, g, d, mass = (next(saved) for _ in range(4))
    projected = [(next(saved), next(saved)) for _ in tiles]
    short = t is None

    dd: Any = None
    df: Any = None
    for tile in tiles:
        rows, dout, q, z = x[:, tile], grad[:, tile], next(saved), next(saved)
        dz = dout if z is None or w.out is None else project(dout, w.out.T)
        if w.out is not None and not through_h:
            accumulate(dw.out, dout, z)
        if dw.bias_out is not None:
            dw.bias_out.add_(dout.sum((0, 1)))
        if short:
            p, f = projected[0]
            ds = times(split(dz, k), split(f, k).mT)
            df = join(times(split(dz, k).mT, d).mT)
            dp = join(times(split(q, k).mT, ds).mT)
            dv = join(times(ds, split(p, k)))
        else:
            part = sum_over_positions(split(dz, k).mT, split(q, k).mT)
            dd = part if dd is None else dd.add_(part)
            dv = join(times(split(dz, k), d))
        if options.softmax_v:
            dv = softmax_backward(dv, q, heads)
        accumulate(dw.v, dv, rows)
        if dw.bias_v is not None:
            dw.bias_v.add_(dv.sum((0, 1)))
        if dx is not None:
            dx[:, tile] = dout if options.residual else 0
            add_product(dx[:, tile], dv, w.v)

    if not short:
        dg = dd
        if through_h:
            dd = split(dd[:, 0], heads)
            if dw.out is not None:
                dw.out.unflatten(1, (heads, -1)).add_((dd @ g.mT).sum(0).transpose(0, 1))
            dg = w.out.unflatten(1, (heads, -1)).permute(1, 2, 0) @ dd
        dt = dg
        if from_x:
            if dw.bias_a is not None:
                some = dg if mask is None else dg[mask.any(1)]
                dw.bias_a.add_(some.sum((0, 3)).flatten())
            if dw.a is not None:
                dw.a.add_((dg @ split(t[:, 0], heads).mT).sum(0).flatten(0, 1))
            dt = join(w.a.unflatten(0, (heads, -1)).mT @ dg)[:, None]
        delta = (dt * t).sum(2, keepdim=True)

    k = call.gather_heads
    for i, tile in enumerate(tiles):
        rows = gathered_rows(x[:, tile], None if mask is None else mask[:, tile])
        p, f = projected[i]
        if short:
            db = dp.sub_((dp * p).sum(1, keepdim=True)).mul_(p)
        else:
            dt_, delta_ = (dt, delta) if mass is None else (dt * mass[i], delta * mass[i])
            db = join(times(split(rows if f is None else f, k), dt_)).sub_(join(delta_)).mul_(p)
            df = None if f is None else join(times(split(p, k), dt_.mT))
        accumulate(dw.b, db, rows)
        if df is not None:
            accumulate(dw.a, df, rows)
            if dw.bias_a is not None:
                dw.bias_a.add_(df.sum((0, 1)))
        if dx is None:
            continue
        add_product(dx[:, tile], db, w.b)
        if df is None:
            add_product(dx[:, tile], p, dt_[:, 0].mT)
        else:
            add_product(dx[:, tile], df, w.a)
