"""Packed sequences in ATen operations, one sequence after another: no padding, no copies.

Products, written in place, and the softmax over positions run per sequence. Everything else is one
operation for adjacent sequences that together fit the cache: on a CPU, the first touch of a page
costs more than what is computed there. Gradients are written out. This is usually faster than fewer
calls on padded batches; very short sequences of few channels are the exception.
"""

import functools
from typing import Any

import torch

from ...precision import HALF, accumulator, converted, lse_dtype
from . import core as aten

WORK = 2**16  # elements of a tensor in one operation on several sequences
# Positions per sequence below which a softmax over adjacent ones is slower than to transpose first.
FEW = 128


def gather(a, b, mask, extra_a, extra_b, lengths, logit_scale):
    """``G (S, heads, m, n)`` in the dtype of sums, zeros for an empty sequence; without lse."""
    dtype = aten.product_dtype(b)
    g = a.new_empty((len(lengths), a.shape[1], a.shape[2], b.shape[2]), dtype=dtype)
    features, each = _split(converted(aten.masked_features(a, mask), dtype), lengths), g.unbind()

    def use(s, p, extra_p):
        _product(features[s], p, each[s])
        if extra_p is not None:
            each[s].add_(converted(extra_a[s], dtype) @ extra_p)
        total = _total(p, extra_p)
        if total is not None:
            each[s].div_(total)

    _with_weights(use, b, mask, extra_b, lengths, logit_scale, dtype)
    return converted(g, accumulator(b.dtype)), b.new_empty(0, dtype=lse_dtype(b.dtype))


def gather_backward(dg, a, b, mask, extra_a, extra_b, g, _lse, lengths, logit_scale, needs):
    """Gradients of a, b and the tokens; None where not needed."""
    inputs = (a, b, extra_a, extra_b)
    da, db = (
        empty_like(x, x.shape[2], dg.dtype) if need else None
        for x, need in zip(inputs[:2], needs[:2], strict=True)
    )
    tokens = [
        torch.zeros_like(x, dtype=dg.dtype) if need else None
        for x, need in zip(inputs[2:], needs[2:], strict=True)
    ]
    scales = {"beta": logit_scale, "alpha": logit_scale}
    each, delta = dg.unbind(), (dg * g).sum(-2, keepdim=True).neg().unbind()
    features = _split(converted(aten.masked_features(a, mask), dg.dtype), lengths)
    of_a, of_b = _split(da, lengths), _split(db, lengths)

    def use_source(s, x, p, dx, dy):
        if dx is not None:
            torch.bmm(each[s], p.mT, out=dx)
        if dy is not None and p.stride(-2) == 1:
            torch.baddbmm(delta[s].mT, each[s].mT, x, out=dy, **scales).mul_(p.mT)
        elif dy is not None:
            dy.copy_(torch.baddbmm(delta[s], x.mT, each[s], **scales).mul_(p).mT)

    def use(s, p, extra_p):
        total = _total(p, extra_p)
        if total is not None:
            p /= total
            extra_p = None if extra_p is None else extra_p / total
        use_source(s, features[s], p, of_a[s], of_b[s])
        if extra_p is not None:
            of_tokens = (None if y is None else y[s] for y in tokens)
            use_source(s, converted(extra_a[s], dg.dtype), extra_p, *of_tokens)

    _with_weights(use, b, mask, extra_b, lengths, logit_scale, dg.dtype)
    grads = (da, db, *tokens)
    return [y if y is None else converted(y, x.dtype) for x, y in zip(inputs, grads, strict=True)]


def _with_weights(use, b, mask, extra_b, lengths, logit_scale, dtype):
    """Calls ``use`` per sequence: with its number, the weights ``(heads, L, n)`` of its positions,
    and those of its tokens or None. Nothing holds these, so the next ones reuse their memory."""
    s = 0
    for group, b_, mask_ in _groups(lengths, b, mask):
        logits = aten.logits_in(b_, logit_scale, dtype)
        if mask_ is not None:
            logits = logits.masked_fill(~mask_, -torch.inf)
        few = logits.shape[-1] < FEW * len(group)
        rows = logits.mT.contiguous() if few else logits.mT
        for x in rows.split(group, -2):
            tokens = None
            if extra_b is not None and x.shape[-2]:
                tokens = aten.logits_in(extra_b[s], logit_scale, x.dtype).mT
            use(s, *_weights(x, tokens, mask_ is not None, dtype))
            s += 1


def _weights(rows, tokens, masked, dtype):
    length = rows.shape[-2]
    if tokens is not None:
        rows = torch.cat([rows, tokens], -2)
    p = rows.mT.softmax(-1).mT if rows.stride(-2) == 1 else rows.softmax(-2)
    if masked:  # where all are masked
        p.masked_fill_((rows == -torch.inf).all(-2, keepdim=True), 0)
    p = converted(p, dtype)
    return (p, None) if tokens is None else (p[:, :length], p[:, length:])


def _total(p, extra_p):
    """Sums of weights over many positions, not exactly 1: see ``aten.gather``."""
    if p.shape[-2] <= aten.POSITIONS_PER_PRODUCT or p.dtype in HALF:
        return None
    total = p.sum(-2, keepdim=True)
    if extra_p is not None:
        total += extra_p.sum(-2, keepdim=True)
    return total.masked_fill_(total == 0, 1)


def distribute(g, v, lengths, scale, softmax, logit_scale):
    """``Z (1, heads, m, total)`` in v's dtype and memory format."""
    dtype = aten.product_dtype(v)
    z = empty_like(v, g.shape[2], dtype)
    each = iter(converted(g if scale == 1 else scale * g, dtype).unbind())
    for group, v_, out in _groups(lengths, v, z):
        q = converted(_distribution_weights(v_, softmax, logit_scale, dtype), dtype)
        for q_, z_ in zip(q.split(group, -1), out.split(group, -1), strict=True):
            torch.bmm(next(each), q_, out=z_)
    return converted(z, v.dtype)


def distribute_backward(dz, g, v, lengths, scale, softmax, logit_scale, need_g, need_v):
    """dG in the dtype of sums and dV; None where not needed."""
    dtype = accumulator(v.dtype)
    dg: Any = g.new_empty(g.shape, dtype=dtype) if need_g else None
    dv = empty_like(v, v.shape[2]) if need_v else None
    softmax_backward = functools.partial(torch._softmax_backward_data, input_dtype=dtype)
    each = iter(converted(g if scale == 1 else scale * g, dtype).mT.unbind())
    sums = iter(dg.unbind() if need_g else ())
    for group, dz_, v_, out in _groups(lengths, dz, v, dv):
        q = _distribution_weights(v_, softmax, logit_scale, dtype)
        dz_, dq = converted(dz_, dtype), torch.empty_like(q) if need_v else q
        parts = zip(*(x.split(group, -1) for x in (dz_, q, dq)), strict=True)
        for dz_s, q_s, dq_s in parts:
            if need_g:
                _product(dz_s, q_s.mT, next(sums))
            if need_v:
                torch.bmm(next(each), dz_s, out=dq_s)
        if need_v:
            if softmax:
                dq = _over_n(softmax_backward, dq, q)
            out.copy_(dq if logit_scale == 1 else logit_scale * dq)
    if need_g and scale != 1:
        dg *= scale
    return dg, dv


def _distribution_weights(v, softmax, logit_scale, dtype):
    logits = aten.logits_in(v, logit_scale, dtype)
    return _over_n(torch.softmax, logits) if softmax else logits


def _over_n(function, *tensors):
    """A softmax over n in the input's memory format: torch.softmax makes contiguous copies."""
    if tensors[0].stride(-1) == 1:
        return function(*tensors, -2)
    return function(*(x.mT for x in tensors), -1).mT


def _product(x, rows, out):
    """A sum over positions: ``x @ rows`` in ``out``."""
    if x.shape[-1] > aten.POSITIONS_PER_PRODUCT:
        out.copy_(aten.sum_over_positions(x, rows.mT))
    else:
        torch.bmm(x, rows, out=out)


def _groups(lengths, x, *others):
    """Lengths of sequences that share operations, and views ``(…, positions)`` of each tensor."""
    most = WORK // (x.shape[1] * x.shape[2])
    groups: list[list[int]] = [[]]
    total = 0
    for length in lengths:
        total += length
        if total > most and groups[-1]:
            groups.append([])
            total = length
        groups[-1].append(length)
    sizes = [sum(group) for group in groups]
    nothing = [None] * len(sizes)
    views = (nothing if y is None else y[0].split(sizes, -1) for y in (x, *others))
    return zip(groups, *views, strict=True)


def _split(x, lengths):
    """``(1, …, total)`` as views ``(…, length)``."""
    return [None] * len(lengths) if x is None else x[0].split(lengths, -1)


def empty_like(x, channels, dtype=None):
    """Uninitialised ``(1, heads, channels, total)`` in the memory format of ``x``."""
    _, heads, _, total = x.shape
    if channels_last(x):
        return x.new_empty((1, total, heads, channels), dtype=dtype).permute(0, 2, 3, 1)
    return x.new_empty((1, heads, channels, total), dtype=dtype)


def channels_last(x):
    """Whether channels, not positions, are adjacent in memory."""
    return x.dim() > 1 and x.stride(-1) != 1 and x.stride(-2) == 1
