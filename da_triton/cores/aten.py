"""The core in ATen operations: any device, differentiable twice, exportable.

Same arguments and results as ``eager``; the differences are those that save time: A is not copied
for extra tokens, scales are folded into the small matrix G, products are laid out so that the
result already has v's memory format. G has the maps' dtype.
"""

import torch

from ..eager import distribution_weights, gather_weights


def gather(a, b, *, keep=None, extra=None, logit_scale=1.0):
    """``G (N, heads, m, n)`` in the input's dtype."""
    if keep is not None:
        a = a.masked_fill(~keep[:, None, None, :], 0)
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
    g = (g if factor == 1.0 else factor * g).to(v.dtype)
    if v.stride(-2) == 1 and v.shape[1] == 1:
        return (q.transpose(-1, -2) @ g.transpose(-1, -2)).transpose(-1, -2)
    return g @ q
