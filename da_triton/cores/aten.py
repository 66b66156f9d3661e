"""The core in ATen operations: any device, differentiable twice, exportable.

``gather`` and ``distribute`` have the arguments and results of ``eager``; the differences are those
that save time: A is not copied for extra tokens, scales are folded into the small matrix G,
products are laid out so that the result already has v's memory format. G has the maps' dtype.

``gather_part``, ``gather_lse`` and ``gather_backward`` are for positions that are not all there
are, and work in the dtype of sums, as the kernels do.
"""

import torch

from ..eager import distribution_weights, exponentials, gather_weights, join_extra
from ..precision import accumulator, converted, lse_dtype


def gather(a, b, *, keep=None, extra=None, logit_scale=1.0):
    """``G (N, heads, m, n)`` in the input's dtype."""
    a = _kept_features(a, keep)
    if extra is None:
        return a @ gather_weights(b, keep, logit_scale).transpose(-1, -2)
    extra_a, extra_b = extra
    if keep is not None:
        keep = torch.cat([keep, keep.new_ones(keep.shape[0], extra_b.shape[-1])], -1)
    weights = gather_weights(torch.cat([b, extra_b], -1), keep, logit_scale).transpose(-1, -2)
    length = b.shape[-1]
    return a @ weights[:, :, :length] + extra_a @ weights[:, :, length:]


def distribute(g, v, *, scale=1.0, softmax=True, logit_scale=1.0):
    """``Z (N, heads, m, L)`` in v's dtype."""
    q = distribution_weights(v, softmax, logit_scale) if softmax else v
    factor = scale if softmax else scale * logit_scale
    g = converted(g if factor == 1.0 else factor * g, v.dtype)
    if v.stride(-2) == 1 and v.shape[1] == 1:
        return (q.transpose(-1, -2) @ g.transpose(-1, -2)).transpose(-1, -2)
    return g @ q


def gather_part(a, b, *, keep=None, extra=None, logit_scale=1.0):
    """``eager.gather_part``; nothing is rounded to the maps' dtype on the way."""
    if extra is not None:
        a, b, keep = join_extra(a, b, keep, extra)
    logits = scaled_logits(b, keep, logit_scale)
    pivot, weights, total = exponentials(logits, keep is not None)
    g = _kept_features(a, keep).to(weights.dtype) @ weights.mT
    return g / total.masked_fill(total == 0, 1)[:, :, None], pivot, total


def gather_lse(a, b, **options):
    """``G (N, heads, m, n)`` and log-sum-exp ``(N, heads, n)``, +inf where no position is left."""
    g, pivot, total = gather_part(a, b, **options)
    statistics, nothing = lse_dtype(b.dtype), total == 0
    lse = pivot.to(statistics) + total.masked_fill(nothing, 1).to(statistics).log()
    return g, lse.masked_fill(nothing, torch.inf)


def gather_backward(dg, a, b, keep, g, lse, dlse, logit_scale, need_a, need_b):
    """dA and dB of some positions from the G and lse of all; None where not needed."""
    weights = weights_from_lse(scaled_logits(b, keep, logit_scale), lse)
    da = (dg @ weights).to(a.dtype) if need_a else None
    if not need_b:
        return da, None
    delta = (dg * g).sum(-2)
    if dlse is not None:
        delta = delta - dlse.to(delta.dtype)
    db = weights * (dg.mT @ _kept_features(a, keep).to(dg.dtype) - delta[..., None])
    return da, (logit_scale * db).to(b.dtype)


def scaled_logits(b, keep, logit_scale):
    """The gather's logits in the dtype of sums, −inf where a position is masked."""
    logits = b.to(accumulator(b.dtype))
    logits = logits if logit_scale == 1 else logit_scale * logits
    return logits if keep is None else logits.masked_fill(~keep[:, None, None, :], -torch.inf)


def weights_from_lse(logits, lse):
    """``P = exp(logits − lse)``: lse is taken away in two parts, as ``kernels.tiles`` does."""
    pivot = lse.to(logits.dtype)
    rest = (pivot - lse).nan_to_num(0).to(logits.dtype)  # inf − inf, where nothing is left to weigh
    return (logits - pivot[..., None]).exp() * rest.exp()[..., None]


def _kept_features(a, keep):
    """A masked position may hold anything."""
    return a if keep is None else a.masked_fill(~keep[:, None, None, :], 0)
