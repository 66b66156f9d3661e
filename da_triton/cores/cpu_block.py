r"""The block on a CPU: one function with a gradient of its own, sample by sample, in pieces.

Position-major throughout: x is ``(N, L, C)`` and what has c channels is ``(g, l, c)``, for g of the
samples and a piece of l of their positions, all in the memory order of x, or of a copy where x's
own makes slow products: only views are transposed. k is ``heads`` where an order keeps heads apart
(gather: A-, distribute: -Z) and 1 where one product serves all maps (X-, -H).

    P = softmax over L of x Wbᵀ       F = x Waᵀ + ba (A-) or x (X-)     T = Fᵀ P  (g, k, m or C, n)
    Q = softmax over n of x Wvᵀ + bv  G = T (A-) or Wa T + ba (X-)      D = G (-Z) or Wo G (-H)
    Z = Q Dᵀ                          out = Z Woᵀ (-Z) or Z (-H), + bo, + x

Backward, with dZ = dout Wo (order -Z) or dout (-H):

    dD = dZᵀ Q   dQ = dZ D    dV = Q∘(dQ − Σ_n Q∘dQ)   dx = dV Wv, + dout
    dF = P dTᵀ   δ = Σ dT∘T   dB = P∘(F dT − δ)        dx += dB Wb + (dF Wa (A-) or dF (X-))

Order AZ of few positions and many maps ("short") forms neither T nor dT, but S = Q Pᵀ (g, k, l, l):

    Z = S F      dF = Sᵀ dZ   dS = dZ Fᵀ   dQ = dS P   dP = dSᵀ Q   dB = P∘(dP − Σ_l P∘dP)

Temporaries of a piece stay in the cache and in memory that the process already has: on a CPU, the
first touch of a page can cost more than the product that fills it. The P of a piece is its own
softmax; ``share``, the part of a map's whole mass that a piece has, is a factor on T and on dT.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .aten import sum_over_positions
from .cpu_products import (
    accumulate,
    add_product,
    as_given,
    empty_as,
    gathered_rows,
    join,
    lying_as,
    position_major,
    project,
    samples,
    softmax_,
    softmax_and_mass,
    softmax_backward,
    split,
    split_positions,
    times,
    watched,
)
from .operators import differentiable, unviewed, wants_graph


class Weights(NamedTuple):
    """Wa ``(c_m, C)``, Wb and Wv ``(c_n, C)``, Wo ``(C', c_m)`` and biases; or their gradients."""

    a: Any
    bias_a: Any
    b: Any
    v: Any
    bias_v: Any
    out: Any
    bias_out: Any


class Options(NamedTuple):
    order: str
    heads: int
    softmax_v: bool
    residual: bool
    recompute: bool

    def short(self, x: Tensor, w: Weights) -> bool:
        """Whether ``Q Pᵀ (g, k, L, L)`` makes Z with fewer operations than T does."""
        if self.order != "AZ" or len(split_positions(x)) != 1:
            return False
        c_m, c_n = len(w.a), len(w.b)
        return x.shape[1] * (c_m + c_n) * self.heads < 2 * c_m * c_n

    @property
    def gather_heads(self) -> int:
        return self.heads if self.order[0] == "A" else 1

    @property
    def distribute_heads(self) -> int:
        return self.heads if self.order[1] == "Z" else 1


def block(plain: Callable[..., Tensor], options: Options, keep, x: Tensor, *weights) -> Tensor:
    """``x (N, C, L)`` to ``(N, C', L)``; ``keep (N, L)`` or None.

    ``plain(x, *weights)`` is the same block in differentiable operations, for derivatives of its
    gradients.
    """
    if torch.is_grad_enabled() and any(z is not None and z.requires_grad for z in (x, *weights)):
        return Block.apply(plain, options, keep, x, *weights)
    return _block(x, Weights(*weights), keep, options, keeping=False)[0]


class Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plain, options, keep, x, *weights):
        out, kept = _block(x, Weights(*weights), keep, options, keeping=not options.recompute)
        ctx.plain, ctx.options = plain, options
        ctx.save_for_backward(keep, x, *weights, *kept)
        return unviewed(out)

    @staticmethod
    def backward(ctx, grad):
        keep, x, *rest = ctx.saved_tensors
        weights, kept = rest[: len(Weights._fields)], iter(rest[len(Weights._fields) :])
        needs = ctx.needs_input_grad[3:]
        if wants_graph(grad) or watched():
            return None, None, None, *differentiable(ctx.plain, (x, *weights), needs, grad)
        tokens, w = position_major(x), Weights(*weights)
        grad = lying_as(grad.transpose(1, 2), tokens)
        dx = empty_as(tokens, x.shape[1]) if needs[0] else None
        dw = Weights(
            *(torch.zeros_like(z) if need else None for z, need in zip(w, needs[1:], strict=True))
        )
        for n in samples(tokens):
            here = tokens[n], None if keep is None else keep[n], w, ctx.options
            if ctx.options.recompute:
                kept = iter(_forward(*here, None, keeping=True))
            _backward(*here, kept, grad[n], None if dx is None else dx[n], dw)
        return None, None, None, None if dx is None else as_given(dx, x), *dw


def _block(x, w, keep, options, keeping) -> tuple[Tensor, list[Tensor | None]]:
    """The output ``(N, C', L)``, and what ``_backward`` reads, if ``keeping``."""
    tokens = position_major(x)
    out = empty_as(tokens, len(w.a if w.out is None else w.out))
    kept: list[Tensor | None] = []
    for n in samples(tokens):
        here = None if keep is None else keep[n]
        kept += _forward(tokens[n], here, w, options, out[n], keeping)
    return as_given(out, x), kept


def _forward(x, keep, w, options, out, keeping) -> list[Tensor | None]:
    """Writes ``out (g, L, C')``, unless None; returns what ``_backward`` reads, if ``keeping``."""
    from_x, to_z = options.order[0] == "X", options.order[1] == "Z"
    heads, k = options.heads, options.gather_heads
    pieces = split_positions(x)
    short = options.short(x, w)
    kept: list[Any] = []
    parts: list[Tensor] = []
    masses: list[Any] = []
    for piece in pieces:
        here = None if keep is None else keep[:, piece]
        rows = gathered_rows(x[:, piece], here)
        p, mass = softmax_and_mass(project(rows, w.b), len(pieces) == 1, here)
        f = rows if from_x else project(rows, w.a, w.bias_a)
        if not short:
            parts.append(sum_over_positions(split(f, k).mT, split(p, k).mT))
        masses.append(mass)
        if keeping:
            kept += [p, None if from_x else f]
    t: Any = None
    share = None
    if len(pieces) > 1:
        share = torch.stack(masses).softmax(0).unflatten(-1, (k, -1)).unsqueeze(-2)
        if keep is not None:
            share.nan_to_num_(0)  # where no piece has any mass
        t = torch.stack(parts).mul_(share).sum(0)
    elif not short:
        t = parts[0]

    g = t
    if from_x:
        g = w.a.unflatten(0, (heads, -1)) @ split(t[:, 0], heads)
        if w.bias_a is not None:
            bias = w.bias_a.view(heads, -1, 1)
            g.add_(bias if keep is None else bias * keep.any(1)[:, None, None, None])
    d = g
    if not to_z:
        d = join(w.out.unflatten(1, (heads, -1)).transpose(0, 1) @ g)[:, None]

    for piece in pieces:
        q = project(x[:, piece], w.v, w.bias_v)
        if options.softmax_v:
            softmax_(q, heads)
        if short:
            d = split(q, heads) @ split(p, heads).mT
        z = None
        if to_z:
            z = join(times(d, split(f, heads)) if short else times(split(q, heads), d.mT))
        if keeping:
            kept += [q, z]
        if out is None:
            continue
        y = out[:, piece]
        bias = 0 if w.bias_out is None else w.bias_out
        if options.residual:
            torch.add(x[:, piece], bias, out=y)
        else:
            y[:] = bias
        if z is None:
            add_product(y, q, d[:, 0].mT)
        elif w.out is None:
            y.add_(z)
        else:
            add_product(y, z, w.out.T)
    return [t, g, d, share, *kept] if keeping else []


def _backward(x, keep, w, options, kept, grad, dx, dw) -> None:
    """Writes ``dx (g, L, C)``, unless None, and adds to ``dw``."""
    from_x, to_z = options.order[0] == "X", options.order[1] == "Z"
    heads, k = options.heads, options.distribute_heads
    pieces = split_positions(x)
    t, g, d, share = (next(kept) for _ in range(4))
    maps = [(next(kept), next(kept)) for _ in pieces]
    short = t is None

    dd: Any = None
    df: Any = None
    for piece in pieces:
        rows, dout, q, z = x[:, piece], grad[:, piece], next(kept), next(kept)
        dz = dout if z is None or w.out is None else project(dout, w.out.T)
        if w.out is not None and to_z:
            accumulate(dw.out, dout, z)
        if dw.bias_out is not None:
            dw.bias_out.add_(dout.sum((0, 1)))
        if short:
            p, f = maps[0]
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
            dx[:, piece] = dout if options.residual else 0
            add_product(dx[:, piece], dv, w.v)

    if not short:
        dg = dd
        if not to_z:
            dd = split(dd[:, 0], heads)
            if dw.out is not None:
                dw.out.unflatten(1, (heads, -1)).add_((dd @ g.mT).sum(0).transpose(0, 1))
            dg = w.out.unflatten(1, (heads, -1)).permute(1, 2, 0) @ dd
        dt = dg
        if from_x:
            if dw.bias_a is not None:
                some = dg if keep is None else dg[keep.any(1)]
                dw.bias_a.add_(some.sum((0, 3)).flatten())
            if dw.a is not None:
                dw.a.add_((dg @ split(t[:, 0], heads).mT).sum(0).flatten(0, 1))
            dt = join(w.a.unflatten(0, (heads, -1)).mT @ dg)[:, None]
        delta = (dt * t).sum(2, keepdim=True)

    k = options.gather_heads
    for i, piece in enumerate(pieces):
        rows = gathered_rows(x[:, piece], None if keep is None else keep[:, piece])
        p, f = maps[i]
        if short:
            db = dp.sub_((dp * p).sum(1, keepdim=True)).mul_(p)
        else:
            dt_, delta_ = (dt, delta) if share is None else (dt * share[i], delta * share[i])
            db = join(times(split(rows if f is None else f, k), dt_)).sub_(join(delta_)).mul_(p)
            df = None if f is None else join(times(split(p, k), dt_.mT))
        accumulate(dw.b, db, rows)
        if df is not None:
            accumulate(dw.a, df, rows)
            if dw.bias_a is not None:
                dw.bias_a.add_(df.sum((0, 1)))
        if dx is None:
            continue
        add_product(dx[:, piece], db, w.b)
        if df is None:
            add_product(dx[:, piece], p, dt_[:, 0].mT)
        else:
            add_product(dx[:, piece], df, w.a)
