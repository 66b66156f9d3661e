r"""The block on a GPU: its launches and vendor GEMMs, forward and backward.

    gather        fused   pass 1 from X or from A, then ``combine``
                  unfused vendor GEMMs for B (and A), then the core's gather
    distribute    fused   pass 2, with H
                  unfused vendor GEMMs for V and the last convolution around the core

Any pair is a route; the planner chooses. Forward saves lse and G (and V, if requested) for
backward, which is fused in order XH or unfused in any order.

X is ``(N, C, L)``. G is ``(N, heads, m, n)`` with ba, lse ``(N, heads·n)``.
"""

from typing import Any, NamedTuple

import torch

from ...arguments import Options as Options
from ...arguments import Weights as Weights
from ...kernels import (
    block_backward,
    combine,
    project_distribute,
    project_gather,
    prologue,
    weight_gradients,
)
from ...kernels import distribute as core_distribute
from ...kernels import gather as core_gather
from ...kernels.prologue import formatted
from ...precision import accumulator
from ...projection import add_project, project
from ...runtime import launch
from . import gemms, unfused_backward
from .gemms import by_head, shared


class Gradients(NamedTuple):
    """Gradients of X and the weights (None or arbitrary where not needed), or which are needed."""

    x: Any
    a: Any
    bias_a: Any
    b: Any
    v: Any
    bias_v: Any
    out: Any
    bias_out: Any


EVERY = Gradients(*(True,) * 8)


def forward(x, w, mask, o, route, save_v):
    """``(out, lse, G, V or None)``, out and V in the memory format of X."""
    if not route.to_channels_last:
        return _forward(x, w, mask, o, route, save_v)
    copy, plain = formatted(x, True), o._replace(residual=False)
    out, lse, g, v = _forward(copy, w._replace(bias_out=None), mask, plain, route, save_v)
    out = formatted(out, False, x if o.residual else None, w.bias_out)
    return out, lse, g, formatted(v, False)


def _forward(x, w, mask, o, route, save_v):
    if not route.order.through_h or route.distribute == "unfused":
        return _unfused_forward(x, w, mask, o, route, save_v)
    out = launch.empty_rows_like(x, w.out.shape[0])
    v = launch.empty_rows_like(x, w.v.shape[0]) if save_v else None
    lse, g = combine.empty(x, w, o.heads)
    batched = x, mask, lse, g, out, v
    batch, size = x.shape[0], route.batch_chunk
    chunks = [batched] if batch <= size else [
        [None if t is None else t[i : i + size] for t in batched] for i in range(0, batch, size)
    ]  # fmt: skip
    for x_, mask_, lse_, g_, out_, v_ in chunks:
        h, _ = _gather(x_, w, mask_, lse_, g_, o, route)
        project_distribute.project_distribute(
            x_, w.v, w.bias_v, h, w.bias_out, out_, v_,
            heads=o.heads, logit_scale=o.logit_scale_v, softmax=o.softmax_v, residual=o.residual,
        )  # fmt: skip
    return out, lse, g, v


def _unfused_forward(x, w, mask, o, route, save_v):
    """Distribute with V in memory: through H, or through Z and the last product."""
    projected_v, start = None, None
    if save_v or route.gather == "fused":
        projected_v = project(x, w.v, w.bias_v)
    if not route.order.through_h and w.out is not None and (o.residual or w.bias_out is not None):
        start = launch.empty_rows_like(x, w.out.shape[0])
    lse, g = combine.empty(x, w, o.heads)
    d, v = _gather(x, w, mask, lse, g, o, route, with_v=projected_v is None, start=start)
    v, bias = (v, w.bias_v) if projected_v is None else (by_head(projected_v, o.heads), None)
    out = _distribute(x, v, bias, d, start, w, o, route.order.through_h)
    return out, lse, g, projected_v if save_v else None


def _gather(x, w, mask, lse, g, o, route, with_v=False, start=None):
    """Writes lse and G; returns H or G, which distribute, in the dtype of X, and V or None.

    ``with_v``: on the unfused route, V (by head, without its bias) comes from the same product.
    ``start``: receives X + bo for the last product, or None.
    """
    from_x, want_h = route.order.from_x, route.order.through_h
    small = {
        "heads": o.heads, "scale": o.scale, "mask": mask is not None, "from_x": from_x,
        "want_h": want_h,
    }  # fmt: skip
    adding = {"x": x if o.residual else None, "bias": w.bias_out, "start": start}
    if route.gather == "fused":
        if from_x:
            partials = project_gather.gather_from_x(x, w.b, mask, o.logit_scale)
        else:
            partials = project_gather.gather_from_a(x, w.a, w.b, mask, o.heads, o.logit_scale)
        _, h = combine.merge_partials(partials, w, lse, g, **small)
        return h if want_h else prologue.prepare(x, [w.v], g=g, **adding)[1], None

    source, v = _project(x, w, mask, o, from_x, with_v, adding)
    if (from_x or (want_h and o.heads > 1)) and gemms.fit(w, o.heads):
        partials = core_gather.gather_partials([source], o.logit_scale)
        _, h = combine.merge_partials(partials, w, lse, g, **small)
        return h if want_h else g.to(x.dtype), v
    lowp = _gather_unfused(source, w, lse, g, o, from_x)
    return gemms.reconstructing(g, w, o.heads, o.scale, lowp) if want_h else lowp, v


def _project(x, w, mask, o, from_x, with_v, adding):
    """Inputs of the core's gather, by head: ``(X or A, B, mask)``; and V, if wanted."""
    weights = [] if from_x else [w.a]
    weights += [w.b, w.v] if with_v else [w.b]
    matrices, _ = prologue.prepare(x, weights, **adding)
    projected = gemms.project_abv(x, matrices, [len(weight) for weight in weights], o.heads)
    v = projected.pop() if with_v else None
    return (shared(x, o.heads) if from_x else projected[0], projected[-1], mask), v


def _gather_unfused(source, w, lse, g, o, from_x):
    """Writes lse and G with the core's kernel; returns G in the input dtype."""
    results = g, lse.unflatten(1, (o.heads, -1))
    lowp = torch.empty_like(g, dtype=source[0].dtype)
    if not from_x:
        core_gather.gather_forward([source], o.logit_scale, w.bias_a, lowp, *results)
        return lowp
    m, _ = core_gather.gather_forward([source], o.logit_scale, lse=results[1])
    g.copy_(w.a.unflatten(0, (o.heads, -1)).to(g.dtype) @ m)
    if w.bias_a is not None:
        g += _gathered_bias(w.bias_a, results[1], g)
    return lowp.copy_(g)


def _gathered_bias(bias, lse, g):
    """The term that ba adds to G: ba, but 0 for an attention map with all positions masked."""
    bias = bias.to(g.dtype).view(1, g.shape[1], -1, 1)
    return torch.where((lse == torch.inf)[:, :, None], 0.0, bias)


def _distribute(x, v, bias, d, start, w, o, through_h):
    """The output on the unfused route, from V (by head) and its bias, or None."""
    if not through_h:
        z = core_distribute.distribute_forward(d, v, o.scale, o.softmax_v, o.logit_scale_v, bias)
        z = z.flatten(1, 2)
        if start is not None:
            return add_project(start, z, w.out)
        if w.out is not None:
            return project(z, w.out, None)
        return z.add_(x) if o.residual else z
    h = d.unflatten(2, (o.heads, -1)).transpose(1, 2)  # (N, heads, C', n)
    softmax = o.softmax_v, o.logit_scale_v
    if o.heads == 1:
        start = x[:, None] if o.residual else None
        added = {"start": start, "bias_out": w.bias_out}
        return core_distribute.distribute_forward(h, v, 1.0, *softmax, bias, **added).squeeze(1)
    y = core_distribute.distribute_forward(h, v, 1.0, *softmax, bias)
    y = y.sum(1, dtype=accumulator(x.dtype))
    if w.bias_out is not None:
        y = y + w.bias_out[:, None]
    return (y + x if o.residual else y).to(x.dtype)


def backward(dout, x, w, mask, lse, g, v, o, route, needs=EVERY):
    """Gradients of X and of the weights that are present, where needed."""
    if route.backward == "fused":
        return _fused_backward(dout, x, w, mask, v, o, needs)
    if route.backward_to_channels_last:
        dout, x, v = formatted(dout, True), formatted(x, True), formatted(v, True)
    found = Gradients(*unfused_backward.backward(dout, x, w, mask, lse, g, v, o, route, needs))
    if route.backward_to_channels_last and needs.x:
        del dout, x, v
        return found._replace(x=formatted(found.x, False))
    return found


def _fused_backward(dout, x, w, mask, v, o, needs):
    """Repeats pass 1 for M, and with it lse and G, then makes two passes over X and dO."""
    total_n = w.b.shape[0]
    partials = project_gather.gather_from_x(x, w.b, mask, o.logit_scale)
    lse, g = combine.empty(x, w, o.heads)
    m, h = combine.merge_partials(
        partials, w, lse, g, heads=o.heads, scale=o.scale, mask=mask is not None, from_x=True,
        want_m=True,
    )  # fmt: skip
    # In channels-last memory, rows that start at multiples of 16 elements have vector loads.
    rows = -(-total_n // 16) * 16 if x.stride(1) == 1 else total_n
    both = launch.empty_rows_like(x, 2 * rows)
    dv, db = both[:, :total_n], both[:, rows : rows + total_n]
    partials = block_backward.block_bwd_distribute(
        x, dout, w.v, w.bias_v, v, h, dv,
        heads=o.heads, logit_scale=o.logit_scale_v, softmax=o.softmax_v,
    )  # fmt: skip
    dh, dg, dm, delta, lse = combine.combine_backward(
        partials, lse, m, w, heads=o.heads, scale=o.scale
    )
    dx = None
    if needs.x or needs.b:
        dx = block_backward.block_bwd_gather(
            x, dout, w.b, w.v, dm, lse, delta, mask, dv, db,
            logit_scale=o.logit_scale, residual=o.residual, need_x=needs.x,
        )  # fmt: skip
    if not any(needs[1:]):
        return Gradients(dx, *[None] * 7)
    dwa, dba, dwb, dwv, dbv, dwo, dbo = weight_gradients.weight_gradients(
        both, x, dh, g, dg, m, w.a, scale=o.scale
    )
    if needs.bias_out and not o.softmax_v:
        dbo = dout.sum((0, 2), dtype=accumulator(x.dtype)).to(x.dtype)
    return Gradients(dx, dwa, dba, dwb, dwv, dbv, dwo, dbo)
