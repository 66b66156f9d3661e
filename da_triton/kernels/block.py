r"""The block on a GPU: which launches and library products make it, forward and backward.

    gather        fused   pass 1 from X or from A, then ``descriptors``
                  split   library products for B (and A), then the core's gather
    distribute    fused   pass 2, with H
                  split   library products for V and the last convolution around the core

Any pair is a route; the planner chooses. Forward leaves lse and G (and V, if asked to) for
backward, which is fused in order XH or split in any order.

X is ``(N, C, L)``. G is ``(N, heads, m, n)`` with ba, lse ``(N, heads·n)``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..projection import project
from . import (
    block_backward,
    configs,
    descriptors,
    launch,
    project_distribute,
    project_gather,
    weight_gradients,
)
from . import distribute as core_distribute
from . import gather as core_gather


class Weights(NamedTuple):
    """Matrices ``(out, in)``, contiguous, and biases; all in the dtype of X."""

    a: Tensor
    bias_a: Tensor | None
    b: Tensor
    v: Tensor
    bias_v: Tensor | None
    out: Tensor | None
    bias_out: Tensor | None


class Options(NamedTuple):
    """What the block computes."""

    heads: int
    logit_scale: float
    logit_scale_v: float
    scale: float
    softmax_v: bool
    residual: bool


def forward(x, w, keep, o, route, keep_v):
    """``(out, lse, G, V or None)``."""
    if not (route.order[1] == "H" and route.distribute == "fused"):
        lse, g, h = _gather(x, w, keep, o, route)
        v = project(x, w.v, w.bias_v)
        return _distribute(x, v, w, g, h, o), lse, g, v if keep_v else None
    out = launch.empty_rows_like(x, w.out.shape[0])
    v = launch.empty_rows_like(x, w.v.shape[0]) if keep_v else None
    found = []
    for i in range(0, x.shape[0], route.chunk):
        part = slice(i, i + route.chunk)
        lse, g, h = _gather(x[part], w, None if keep is None else keep[part], o, route)
        found.append((lse, g))
        project_distribute.project_distribute(
            x[part], w.v, w.bias_v, h, w.bias_out, out[part], None if v is None else v[part],
            heads=o.heads, logit_scale=o.logit_scale_v, softmax=o.softmax_v, residual=o.residual,
        )  # fmt: skip
    if len(found) > 1:
        lse, g = (torch.cat(parts) for parts in zip(*found, strict=True))
    return out, lse, g, v


def _gather(x, w, keep, o, route):
    """``(lse, G, H or None)``."""
    from_x, want_h = route.order[0] == "X", route.order[1] == "H"
    small = {"heads": o.heads, "scale": o.scale, "mask": keep is not None}
    if route.gather == "fused":
        if from_x:
            parts = project_gather.gather_from_x(x, w.b, keep, o.logit_scale)
        else:
            parts = project_gather.gather_from_a(x, w.a, w.b, keep, o.heads, o.logit_scale)
        lse, _, g, h = descriptors.from_parts(parts, w, from_x=from_x, want_h=want_h, **small)
        return lse, g, h
    b = _by_head(project(x, w.b, None), o.heads)
    # Rows of P sum to 1: with ba in A, it is in G too.
    a = _shared(x, o.heads) if from_x else _by_head(project(x, w.a, w.bias_a), o.heads)
    gathered, lse = core_gather.gather_forward([(a, b, keep)], o.logit_scale)
    lse = lse.flatten(1)
    if not from_x:
        return lse, gathered, _reconstructing(gathered, w, o) if want_h else None
    if _small_products_fit(w, o):
        return lse, *descriptors.from_gathered(gathered, lse, w, want_h=want_h, **small)
    g = w.a.unflatten(0, (o.heads, -1)).to(gathered.dtype) @ gathered
    if w.bias_a is not None:
        g = g + _gathered_bias(w.bias_a, lse, g)
    return lse, g, _reconstructing(g, w, o) if want_h else None


def _distribute(x, v, w, g, h, o):
    """The output from V, on the split route: through H if it is given, else through Z."""
    v = _by_head(v, o.heads)
    residual = x if o.residual else None
    if h is None:
        z = core_distribute.distribute_forward(g, v, o.scale, o.softmax_v, o.logit_scale_v)
        z = z.flatten(1, 2)
        if w.out is not None:
            return project(z, w.out, w.bias_out, add=residual)
        return z if residual is None else z.add_(residual)
    h = h.unflatten(2, (o.heads, -1)).transpose(1, 2)  # (N, heads, C', n)
    y = core_distribute.distribute_forward(h, v, 1.0, o.softmax_v, o.logit_scale_v)
    y = y.squeeze(1) if o.heads == 1 else y.sum(1, dtype=launch.accumulator(x.dtype))
    if w.bias_out is not None:
        y = y + w.bias_out[:, None]
    return (y if residual is None else y + residual).to(x.dtype)


class Gradients(NamedTuple):
    """Of X and the weights; None where not needed."""

    x: Tensor | None
    a: Tensor | None
    bias_a: Tensor | None
    b: Tensor | None
    v: Tensor | None
    bias_v: Tensor | None
    out: Tensor | None
    bias_out: Tensor | None


def backward(dout, x, w, keep, lse, g, v, o, route, need_x):
    """All gradients of the weights that are there, and of X if needed."""
    if route.backward == "fused":
        return _fused_backward(dout, x, w, keep, v, o, need_x)
    return _split_backward(dout, x, w, keep, lse, g, v, o, route, need_x)


def _fused_backward(dout, x, w, keep, v, o, need_x):
    """Pass 1 again for M, then two passes over X and dO. M makes G and lse anew on its way."""
    maps = w.b.shape[0]
    parts = project_gather.gather_from_x(x, w.b, keep, o.logit_scale)
    lse, m, g, h = descriptors.from_parts(
        parts, w, heads=o.heads, scale=o.scale, mask=keep is not None, from_x=True, want_m=True
    )
    # In channels-last memory, rows that start at multiples of 16 elements can be loaded at once.
    rows = -(-maps // 16) * 16 if x.stride(1) == 1 else maps
    both = launch.empty_rows_like(x, 2 * rows)
    dv, db = both[:, :maps], both[:, rows : rows + maps]
    parts = block_backward.distribute_side(
        x, dout, w.v, w.bias_v, v, h, dv,
        heads=o.heads, logit_scale=o.logit_scale_v, softmax=o.softmax_v,
    )  # fmt: skip
    dh, dg, dm, delta = descriptors.backward(parts, lse, m, w, heads=o.heads, scale=o.scale)
    dx = block_backward.gather_side(
        x, dout, w.b, w.v, dm, lse, delta, keep, dv, db,
        logit_scale=o.logit_scale, residual=o.residual, need_x=need_x,
    )  # fmt: skip
    dwa, dba, dwb, dwv, dbv, dwo, dbo = weight_gradients.weight_gradients(
        both, x, dh, g, dg, m, w.a, scale=o.scale
    )
    if not o.softmax_v:
        dbo = _sum_of_positions(dout)
    return Gradients(dx, dwa, dba, dwb, dwv, dbv, dwo, dbo)


def _split_backward(dout, x, w, keep, lse, g, v, o, route, need_x):
    """By hand, in library products around the core's backward kernels."""
    order = route.backward_order
    acc = g.dtype
    wide_a = w.a.unflatten(0, (o.heads, -1)).to(acc)
    v = _by_head(project(x, w.v, w.bias_v) if v is None else v, o.heads)
    b = _by_head(project(x, w.b, None), o.heads)
    distribute = {"softmax": o.softmax_v, "logit_scale": o.logit_scale_v}
    dwo = dbo = None
    if order[1] == "Z":
        dz = dout
        if w.out is not None:
            z = core_distribute.distribute_forward(g, v, o.scale, **distribute).flatten(1, 2)
            dwo, dbo = _outer(dout, z)
            dz = project(dout, w.out.t(), None)
        dg, dv = core_distribute.distribute_backward(
            _by_head(dz, o.heads), g, v, o.scale, need_g=True, need_v=True, **distribute
        )
    else:
        h = _reconstructing(g, w, o).unflatten(2, (o.heads, -1)).transpose(1, 2)
        dh, dv = core_distribute.distribute_backward(
            _shared(dout, o.heads), h, v, 1.0, need_g=True, need_v=True, **distribute
        )
        per_head = w.out.unflatten(1, (o.heads, -1)).transpose(0, 1).to(acc)
        dg = o.scale * (per_head.mT @ dh)
        dwo = o.scale * (dh @ g.mT).sum(0)  # (heads, C', m)
        dwo = dwo.transpose(0, 1).flatten(1).to(w.out.dtype)
        dbo = _sum_of_positions(dout)

    if keep is not None:
        dg = dg.masked_fill((lse == torch.inf).view(dg.shape[0], o.heads, 1, -1), 0)
    skip = dout if o.residual else None
    if order[0] == "A":
        a = _by_head(project(x, w.a, w.bias_a), o.heads)
        if route.gather == "fused":  # P from B as rounded here needs the lse and G of the same B
            g, lse = core_gather.gather_forward([(a, b, keep)], o.logit_scale)
        da, db = core_gather.gather_backward(dg, a, b, keep, g, lse, o.logit_scale, True, True)
        da = da.flatten(1, 2)
        dwa, dba = _outer(da, x)
        dx = project(da, w.a.t(), None, add=skip) if need_x else None
    else:
        shared = _shared(x, o.heads)
        m, lse = core_gather.gather_forward([(shared, b, keep)], o.logit_scale)
        dwa, dba = (dg @ m.mT).sum(0).flatten(0, 1).to(x.dtype), dg.sum((0, 3)).flatten()
        dx, db = core_gather.gather_backward(
            wide_a.mT @ dg, shared, b, keep, m, lse, o.logit_scale, need_x, True
        )
        if need_x:
            dx = dx.squeeze(1) if o.heads == 1 else dx.sum(1)
            dx = dx if skip is None else dx + skip
    dv, db = dv.flatten(1, 2), db.flatten(1, 2)
    if need_x:
        dx = project(db, w.b.t(), None, add=dx)
        dx = project(dv, w.v.t(), None, add=dx)
    (dwb, _), (dwv, dbv) = _outer(db, x), _outer(dv, x)
    return Gradients(dx, dwa, dba.to(x.dtype), dwb, dwv, dbv, dwo, dbo)


def _small_products_fit(w, o):
    size, device = w.a.element_size(), w.a.device
    c_m = w.a.shape[0] // o.heads
    return configs.fits("descriptors", size, c_m, 1, configs.architecture(device))


def _by_head(y, heads):
    """``(N, channels, L)`` as ``(N, heads, channels / heads, L)``."""
    return y.unflatten(1, (heads, -1))


def _shared(x, heads):
    """X for each head, without a copy."""
    return x[:, None].expand(-1, heads, -1, -1)


def _gathered_bias(bias, lse, g):
    """What ba adds to G: itself, but nothing to a map whose positions are all masked."""
    bias = bias.to(g.dtype).view(1, g.shape[1], -1, 1)
    return torch.where((lse == torch.inf).view(g.shape[0], g.shape[1], 1, -1), 0.0, bias)


def _reconstructing(g, w, o):
    """``H = scale · Wo G``, ``(N, C', maps)`` in the dtype of the weights."""
    if _small_products_fit(w, o):
        return descriptors.reconstructing(g, w, heads=o.heads, scale=o.scale)
    per_head = w.out.unflatten(1, (o.heads, -1)).transpose(0, 1).to(g.dtype)
    h = o.scale * (per_head @ g)  # (N, heads, C', n)
    return h.transpose(1, 2).flatten(2).to(w.a.dtype)


def _outer(t, x):
    """``Σ_N Σ_L t xᵀ``, ``(rows, C)``, and ``Σ_N Σ_L t``, ``(rows,)``, in the dtype of x.

    One product of all positions in channels-last memory. In NCHW a product for each sample would
    write a matrix for each: a kernel adds chunks of positions of the whole batch instead.
    """
    acc, arch = launch.accumulator(x.dtype), configs.architecture(x.device)
    if x.stride(1) == t.stride(1) == 1 and x.shape[1] > 1 < t.shape[1]:
        rows, columns = (y.transpose(1, 2).flatten(0, 1) for y in (t, x))
        return rows.t() @ columns, _sum_of_positions(t)
    if configs.fits("outer", x.element_size(), x.shape[1], t.shape[1], arch):
        parts, sums = weight_gradients.outer(t, x)
        return parts.sum(0).to(x.dtype), sums.sum(0).to(x.dtype)
    parts = torch.bmm(t, x.transpose(1, 2))
    return parts.sum(0, dtype=acc).to(x.dtype), _sum_of_positions(t)


def _sum_of_positions(y):
    return y.sum((0, 2), dtype=launch.accumulator(y.dtype)).to(y.dtype)
