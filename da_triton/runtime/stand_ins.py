r"""Each launcher in ATen operations: a kernel's reference in a proof, in float64, and its
replacement where it is wrong.

A function has the name, the arguments and the results of its launcher; partial results come as one
partial. Formulas are those of the launchers' modules.
"""

import torch

from ..precision import accumulator, lse_dtype
from . import launch


def _dot(x, y):
    """``x @ y`` with sums, and results, in the accumulator's dtype, as in the kernels."""
    acc = accumulator(x.dtype)
    return x.to(acc) @ y.to(acc)


def _project(x, weight, bias):
    """``W x + bias`` in the accumulator's dtype."""
    y = _dot(weight, x)
    return y if bias is None else y + bias.to(y.dtype)[:, None]


def gather_forward(sources, logit_scale, bias=None, lowp=None, g=None, lse=None):
    a, b, mask = sources[0]
    batch, heads, c_m, _ = a.shape
    c_n = b.shape[2]
    if g is None:
        g = a.new_empty((batch, heads, c_m, c_n), dtype=accumulator(a.dtype))
    if lse is None:
        lse = a.new_empty((batch, heads, c_n), dtype=lse_dtype(a.dtype))
    acc, mx, total = merged(*gather_partials(sources, logit_scale))
    nothing = total == 0 if mask is not None else torch.zeros_like(total, dtype=torch.bool)
    lse.copy_((mx + total.log()).masked_fill(nothing, torch.inf).view(lse.shape))
    found = (acc / total[..., None]).masked_fill(nothing[..., None], 0)
    found = found.view(batch, heads, c_n, c_m).mT
    if bias is not None:
        reached = ~nothing.view(batch, heads, 1, c_n)
        found = found + bias.to(found.dtype).view(heads, c_m, 1) * reached
    g.copy_(found)
    if lowp is not None:
        lowp.copy_(found)
    return g, lse


def gather_partials(sources, logit_scale):
    partials = []
    for a, b, mask in sources:
        partials.append(_partials(a, b.to(accumulator(b.dtype)) * logit_scale, mask))
    return tuple(torch.cat(each, 1) for each in zip(*partials, strict=True))


def _partials(a, z, mask):
    """Partial gather of features a and logits z, ``(N, heads, channels, L)``."""
    if mask is not None:
        masked = ~mask.bool()[:, None, None]
        a, z = a.masked_fill(masked, 0), z.masked_fill(masked, -torch.inf)
    mx = z.amax(-1)
    p = (z - mx.masked_fill(mx == -torch.inf, 0)[..., None]).exp()
    acc = _dot(p.to(a.dtype), a.mT)
    return tuple(t.flatten(1, 2)[:, None] for t in (acc, mx, p.sum(-1)))


def merged(acc, mx, total):
    """``(acc, mx, sum)`` of all partials, each without the axis of partials."""
    largest = mx.amax(1)
    weight = (mx - largest.masked_fill(largest == -torch.inf, 0)[:, None]).exp()
    return (acc * weight[..., None]).sum(1), largest, (total * weight).sum(1)


def gather_from_x(x, weight_b, mask, logit_scale):
    return _partials(x[:, None], _logits(x, weight_b, logit_scale)[:, None], mask)


def gather_from_a(x, weight_a, weight_b, mask, heads, logit_scale):
    a, b = (_project(x, w, None).to(x.dtype) for w in (weight_a, weight_b))
    a, b = (t.unflatten(1, (heads, -1)) for t in (a, b))
    return _partials(a, b.to(accumulator(x.dtype)) * logit_scale, mask)


def _logits(x, weight, scale):
    return _project(x, weight, None) * scale


def gather_backward(dg, correction, a, b, mask, lse, da, db, logit_scale):
    batch, heads, c_n, _ = b.shape
    acc = accumulator(a.dtype)
    z = b.to(lse.dtype) * logit_scale
    p = (z - lse.view(batch, heads, c_n, 1)).exp().to(acc)
    hidden = None if mask is None else ~mask.bool()[:, None, None]
    if hidden is not None:
        p = p.masked_fill(hidden, 0)
    if da is not None:
        da.copy_(_dot(dg, p))
    if db is not None:
        dp = _dot(dg.mT, a) - correction.view(batch, heads, c_n, 1)
        grad = logit_scale * p * dp
        db.copy_(grad if hidden is None else grad.masked_fill(hidden, 0))


def distribute_forward(g, v, scale, softmax, logit_scale, bias=None, start=None, bias_out=None):
    q = _weights(v, bias, softmax, logit_scale).to(v.dtype)
    z = _dot(g.to(v.dtype), q)
    z = scale * (z if start is None else z + start)
    if bias_out is not None:
        z = z + bias_out.to(z.dtype)[:, None]
    return launch.empty_activations_like(v, g.shape[2]).copy_(z)


def distribute_backward(dz, g, v, scale, softmax, logit_scale, need_g, need_v):
    dv = launch.empty_activations_like(v) if need_v else None
    found = _distribute_gradients(dz, g, v, None, dv, scale, softmax, logit_scale)
    return found if need_g else None, dv


def backward_partials(dz, g, v, bias, dv, z, q, *, scale, softmax, logit_scale):
    if z is not None:
        z.copy_(distribute_forward(g, v, scale, softmax, logit_scale, bias))
    return _distribute_gradients(dz, g, v, bias, dv, scale, softmax, logit_scale)[:, :, None]


def _weights(v, bias, softmax, logit_scale):
    v = v.to(accumulator(v.dtype))
    if bias is not None:
        v = v + bias.to(v.dtype).view(v.shape[1], v.shape[2], 1)
    return (v * logit_scale).softmax(2) if softmax else v * logit_scale


def _distribute_gradients(dz, g, v, bias, dv, scale, softmax, logit_scale):
    """dG; writes dV unless None."""
    q = _weights(v, bias, softmax, logit_scale)
    if dv is not None:
        dq = _dot(g.to(v.dtype).mT, dz) * (scale * logit_scale)
        dv.copy_(_through_softmax(q, dq, 2) if softmax else dq)
    return _dot(dz, q.to(v.dtype).mT) * scale


def _through_softmax(q, dq, axis):
    return q * (dq - (q * dq).sum(axis, keepdim=True))


def project_distribute(
    x, weight_v, bias_v, h, bias_out, out, v, *, heads, logit_scale, softmax, residual
):
    own = _project(x, weight_v, bias_v)
    if v is not None:
        v.copy_(own)
    q = _weights(own.unflatten(1, (heads, -1)), None, softmax, logit_scale).flatten(1, 2)
    y = _project(q.to(x.dtype), h, bias_out)
    out.copy_(y + x if residual else y)


def block_bwd_distribute(x, dout, weight_v, bias_v, v, h, dv, *, heads, logit_scale, softmax):
    own = _project(x, weight_v, bias_v) if v is None else v
    q = _weights(own.unflatten(1, (heads, -1)), None, softmax, logit_scale)
    dq = _dot(h.mT, dout).unflatten(1, (heads, -1)) * logit_scale
    dv.copy_((_through_softmax(q, dq, 2) if softmax else dq).flatten(1, 2))
    return _dot(q.flatten(1, 2).to(x.dtype), dout.mT)[:, None]


def block_bwd_gather(
    x, dout, weight_b, weight_v, dm, lse, delta, mask, dv, db, *, logit_scale, residual, need_x
):
    acc = accumulator(x.dtype)
    p = (_logits(x, weight_b, logit_scale) - lse[..., None]).exp().to(acc)
    grad = logit_scale * p * (_dot(dm.mT, x) - delta[..., None])
    if mask is not None:
        hidden = ~mask.bool()[:, None]
        p, grad = p.masked_fill(hidden, 0), grad.masked_fill(hidden, 0)
    db.copy_(grad)
    if not need_x:
        return None
    dx = _dot(dm, p)
    for weight, gradient in ((weight_b, db), (weight_v, dv)):
        dx = dx + _dot(weight.mT, gradient)
    return launch.empty_rows_like(x, x.shape[1]).copy_(dx + dout if residual else dx)


def merge_partials(
    partials, weights, lse, g, *, heads, scale, mask, from_x, want_m=False, want_h=True
):
    acc, mx, total = merged(*partials)
    nothing = total == 0
    lse.copy_((mx + total.log()).masked_fill(nothing, torch.inf) if mask else mx + total.log())
    total = total.masked_fill(nothing, 1) if mask else total
    found = (acc / total[..., None]).mT  # (N, features, total_n)
    m = found.contiguous() if want_m else None
    per_head = found.unflatten(2, (heads, -1)).movedim(2, 1)
    if from_x:
        per_head = weights.a.unflatten(0, (heads, -1)).to(found.dtype) @ per_head
    if weights.bias_a is not None:
        reached = ~nothing.view(len(found), heads, 1, -1) if mask else 1
        per_head = per_head + weights.bias_a.to(found.dtype).view(heads, -1, 1) * reached
    g.copy_(per_head)
    return m, reconstructing(g, weights, heads=heads, scale=scale) if want_h else None


def reconstructing(g, weights, *, heads, scale):
    per_head = weights.out.unflatten(1, (heads, -1)).transpose(0, 1).to(g.dtype)
    h = (scale * (per_head @ g)).transpose(1, 2).flatten(2)
    return h.to(weights.a.dtype).contiguous()


def combine_backward(partials, lse, m, weights, *, heads, scale):
    dh = partials.sum(1).mT.contiguous()
    batch = len(dh)
    per_head = weights.out.unflatten(1, (heads, -1)).transpose(0, 1).to(dh.dtype)
    dg = scale * (per_head.mT @ dh.unflatten(2, (heads, -1)).transpose(1, 2))
    dg = dg.masked_fill((lse == torch.inf).view(batch, heads, 1, -1), 0)
    dm = weights.a.unflatten(0, (heads, -1)).to(dg.dtype).mT @ dg
    dm = dm.transpose(1, 2).flatten(2).to(weights.a.dtype).contiguous()
    return dh, dg.contiguous(), dm, (dm.to(m.dtype) * m).sum(1), lse


def outer_product(t, x):
    acc = accumulator(x.dtype)
    partials = torch.einsum("nkl,ncl->kc", t.to(acc), x.to(acc))
    return partials[None], t.sum((0, 2), dtype=acc)[None]


def weight_gradients(t, x, dh, g, dg, m, like, *, scale):
    heads, total_n = g.shape[1], dh.shape[2]
    (partials,), (sums,) = outer_product(t, x)
    half = t.shape[1] // 2
    by_head = dh.unflatten(2, (heads, -1))
    dwo = scale * torch.einsum("nohk,nhmk->ohm", by_head, g).flatten(1)
    dwa = torch.einsum("nhmk,nchk->hmc", dg, m.unflatten(2, (heads, -1))).flatten(0, 1)
    found = (
        dwa, dg.sum((0, 3)).flatten(),
        partials[half : half + total_n], partials[:total_n], sums[:total_n],
        dwo, by_head[:, :, 0].sum((0, 2)),
    )  # fmt: skip
    return tuple(t.to(like.dtype).contiguous() for t in found)
