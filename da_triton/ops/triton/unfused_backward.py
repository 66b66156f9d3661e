r"""The block's backward pass in vendor GEMMs around the core's kernels, in any order.

    A, B, V   [A;] B, V = W X              one product, of stacked weights
    distribution    Z-   dZ = Woᵀ dO, then dV, Q, Z and dG = dZ Qᵀ        dWo = dO Zᵀ
                    H-   dV, Q and dH = dO Qᵀ, then dG = scale · Woᵀ dH   dWo = scale · dH Gᵀ
    gather          A-   δ, then dA and dB
                    X-   M again, dM = Waᵀ dG, then dX (its part) and dB  dWa = dG Mᵀ
    dX = Wᵀ [dA;] dB, dV (+ dO)            one product
    dW = [dA;] dB, dV · Xᵀ                 one kernel and the sum of its partials

dA, dB and dV are adjacent in memory, like A, B and V. A has no bias here: ba is in G, and where it
is not in dP, it is taken out of δ.
"""

import torch

from ...kernels import delta, prologue, weight_gradients
from ...kernels import distribute as core_distribute
from ...kernels import gather as core_gather
from ...kernels.gather_backward import gather_backward
from ...projection import project
from ...runtime import launch
from . import gemms
from .gemms import by_head, shared


def backward(dout, x, w, mask, lse, g, v, o, route, needs):
    """dX, dWa, dba, dWb, dWv, dbv, dWo, dbo; None or arbitrary where not in ``needs``."""
    order = route.backward_order
    from_x, through_h = order.from_x, order.through_h
    weights = [w.b, w.v] if from_x else [w.a, w.b, w.v]
    rows = [len(weight) for weight in weights]
    matrices, lowp = prologue.prepare(x, weights, g=g)
    if v is None:
        *a, b, v = gemms.project_abv(x, matrices, rows, o.heads)
        bias_v = w.bias_v
    else:
        *a, b = gemms.project_abv(x, matrices, rows[:-1], o.heads)
        v, bias_v = by_head(v, o.heads), None
    runs = [rows] if len(matrices) == 1 else [[r] for r in rows]
    grads = [launch.empty_rows_like(x, sum(run)) for run in runs]
    parts = [t for grad, run in zip(grads, runs, strict=True) for t in grad.split(run, 1)]
    *da, db, dv = (by_head(t, o.heads) for t in parts)

    # dV, and Q, in the memory of dB until that is computed.
    through = _through_h if through_h else _through_z
    partials, dwo, dbo = through(dout, w, g, lowp, v, bias_v, dv, db, o, needs)

    dx = dout if o.residual and needs.x else None
    needs_a, needs_b = needs.a or needs.bias_a, needs.x or needs.b
    dwa = dba = None
    if from_x and (needs_a or needs_b):
        dx, dwa, dba = _into_x(partials, x, b, mask, lse, w, db, o, dx, needs)
    elif needs_a or needs_b:
        (a,), (grad_a,), bias_a = a, da, w.bias_a
        if route.gather == "fused" and route.order.from_x:
            # Pass 1 took B before rounding; P of this B needs an lse and a G of its own.
            g, lse = core_gather.gather_forward([(a, b, mask)], o.logit_scale)
            bias_a = None
        dg, correction, lse = delta.lowp_and_delta(
            partials, g, x.dtype, lse, bias=bias_a, mask=mask is not None
        )
        grad_a = grad_a if needs.x or needs_a else None
        grad_b = db if needs_b else None
        gather_backward(dg, correction, a, b, mask, lse, grad_a, grad_b, o.logit_scale)
    if needs.x:
        for grad, matrix in zip(grads, matrices, strict=True):
            dx = project(grad, matrix.t(), None, add=dx)
    del matrices, lowp, a, b, v, partials  # before the partials of the weights' gradients
    wanted = [needs.b, needs.v or needs.bias_v]
    wanted = wanted if from_x else [needs_a, *wanted]
    if len(runs) == 1:
        wanted = [any(wanted)]
    found: list = []
    for grad, run, need in zip(grads, runs, wanted, strict=True):
        found += weight_gradients.products(grad, x, *run) if need else [(None, None)] * len(run)
    if not from_x:
        dwa, dba = found.pop(0)
    (dwb, _), (dwv, dbv) = found
    return dx, dwa, dba, dwb, dwv, dbv, dwo, dbo


def _through_z(dout, w, g, lowp, v, bias_v, dv, q, o, needs):
    """Partials of dG, dWo and dbo; writes dV, and Q where available."""
    dz, z = dout, None
    if w.out is not None:
        dz = project(dout, w.out.t(), None)
        z = launch.empty_rows_like(dz, len(w.a)) if needs.out or needs.bias_out else None
    partials = core_distribute.backward_partials(
        by_head(dz, o.heads), lowp, v, bias_v, dv, None if z is None else by_head(z, o.heads), q,
        scale=o.scale, softmax=o.softmax_v, logit_scale=o.logit_scale_v,
    )  # fmt: skip
    if z is None:
        return partials, None, None
    ((dwo, dbo),) = weight_gradients.products(dout, z, len(w.out))
    return partials, dwo, dbo


def _through_h(dout, w, g, lowp, v, bias_v, dv, q, o, needs):
    """``_through_z`` without Z; dG from dH in one partial."""
    h = gemms.reconstructing(g, w, o.heads, o.scale)
    h = h.unflatten(2, (o.heads, -1)).transpose(1, 2)  # (N, heads, C', n)
    dh = core_distribute.backward_partials(
        shared(dout, o.heads), h, v, bias_v, dv, None, q,
        scale=1.0, softmax=o.softmax_v, logit_scale=o.logit_scale_v,
    ).sum(2)  # fmt: skip
    per_head = w.out.unflatten(1, (o.heads, -1)).transpose(0, 1).to(g.dtype)
    dwo = dbo = None
    if needs.out:
        dwo = o.scale * (dh @ g.mT).sum(0)  # (heads, C', m)
        dwo = dwo.transpose(0, 1).flatten(1).to(w.out.dtype)
    if needs.bias_out:
        dbo = dout.sum((0, 2), dtype=g.dtype).to(dout.dtype)
    return (o.scale * (per_head.mT @ dh))[:, :, None], dwo, dbo


def _into_x(partials, x, b, mask, lse, w, db, o, dx, needs):
    """``dx`` with the gather's part of it, or None; dWa and dba; writes dB, if needed."""
    dg = partials.sum(2)
    if mask is not None:
        dg = dg.masked_fill((lse == torch.inf).view(dg.shape[0], o.heads, 1, -1), 0)
    copies = shared(x, o.heads)
    m, lse = core_gather.gather_forward([(copies, b, mask)], o.logit_scale)
    dwa = (dg @ m.mT).sum(0).flatten(0, 1).to(x.dtype) if needs.a else None
    dba = dg.sum((0, 3)).flatten().to(x.dtype) if needs.bias_a else None
    if not (needs.x or needs.b):
        return None, dwa, dba
    dm = w.a.unflatten(0, (o.heads, -1)).to(dg.dtype).mT @ dg
    dm, correction, lse = delta.lowp_and_delta(dm[:, :, None], m, x.dtype, lse)
    through_m = launch.empty_activations_like(copies) if needs.x else None
    gather_backward(dm, correction, copies, b, mask, lse, through_m, db, o.logit_scale)
    if through_m is not None:
        through_m = through_m.squeeze(1) if o.heads == 1 else through_m.sum(1)
        dx = through_m if dx is None else through_m.add_(dx)
    return dx, dwa, dba
