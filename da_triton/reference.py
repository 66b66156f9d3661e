"""Reference implementation: double attention in plain PyTorch, one line per formula of the paper.

Chen et al., "A²-Nets: Double Attention Networks", NeurIPS 2018, arXiv 1810.11579, equations 2 to 5.
Every other implementation is tested against this one. Written for readability, not speed.

The core works on ``(N, heads, channels, positions)``; the block on ``(N, channels, positions)``.
"""

import torch

from .precision import accumulator, converted
from .projection import split_heads


def gather_weights(b, mask=None, logit_scale=1.0):
    """``P = softmax over positions (logit_scale · B)``.

    An attention map whose positions are all masked gets zeros. Without a mask this is
    ``torch.softmax``: one of ``-inf`` alone, like one with ``+inf`` or NaN in it, gives NaN.
    """
    logits = b if logit_scale == 1 else logit_scale * b
    if mask is None:
        return logits.softmax(-1)
    logits = logits.masked_fill(~mask[:, None, None, :], -torch.inf)
    nothing_left = (logits == -torch.inf).all(-1, keepdim=True)
    return logits.masked_fill(nothing_left, 0).softmax(-1).masked_fill(nothing_left, 0)


def distribution_weights(v, softmax=True, logit_scale=1.0):
    """``Q = softmax over n (logit_scale · V)``, or ``logit_scale · V`` without the softmax."""
    logits = v if logit_scale == 1 else logit_scale * v
    return logits.softmax(-2) if softmax else logits


def join_extra(a, b, mask, extra):
    """Appends the extra tokens to the positions; they are never masked."""
    extra_a, extra_b = extra
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], extra_a.shape[-1])], -1)
    return torch.cat([a, extra_a], -1), torch.cat([b, extra_b], -1), mask


def gather(a, b, *, mask=None, extra=None, logit_scale=1.0):
    """``G = A Pᵀ``: n descriptors, each a weighted sum of the m features over positions."""
    if extra is not None:
        a, b, mask = join_extra(a, b, mask, extra)
    if mask is not None:
        a = a.masked_fill(~mask[:, None, None, :], 0)  # whatever it holds: it is masked
    return a @ gather_weights(b, mask, logit_scale).transpose(-1, -2)


def gather_partial(a, b, *, mask=None, extra=None, logit_scale=1.0):
    """Partial G to merge with others, a pivot μ and ``Σ exp(logit − μ)`` per attention map.

    ``G (N, heads, m, n)`` in the dtype of sums, the other two ``(N, heads, n)``; an attention map
    without positions has G = 0, μ = −inf and sum 0. G and the sum are differentiable, for a
    constant μ.
    """
    g = gather(a, b, mask=mask, extra=extra, logit_scale=logit_scale)
    if extra is not None:
        a, b, mask = join_extra(a, b, mask, extra)
    logits = (logit_scale * b).to(accumulator(b.dtype))
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None, :], -torch.inf)
    pivot, _, total = exponentials(logits, mask is not None)
    return g.to(total.dtype), pivot, total


def exponentials(logits, masked):
    """``max``, ``exp(logit − max)``, its sum over positions; −inf and zeros where masked."""
    largest = logits.detach().amax(-1)
    pivot = largest.masked_fill(largest == -torch.inf, 0) if masked else largest
    weights = (logits - pivot[..., None]).exp()
    return largest, weights, weights.sum(-1)


def distribute(g, v, *, scale=1.0, softmax=True, logit_scale=1.0):
    """``Z = scale · G Q``: every position's mixture of the n descriptors."""
    return scale * (converted(g, v.dtype) @ distribution_weights(v, softmax, logit_scale))


def block(
    x, weight_a, bias_a, weight_b, bias_b, weight_v, bias_v, weight_out, bias_out, *,
    heads, logit_scale, logit_scale_v, scale, softmax_v, residual, mask,
):  # fmt: skip
    """The complete block of the paper's figure: three convolutions, the core, one convolution, + X.

    ``residual``: added to the result, or None.
    """

    def convolution(x, weight, bias):
        out = weight @ x
        return out if bias is None else out + bias[:, None]

    def project(weight, bias):
        return split_heads(convolution(x, weight, bias), heads)

    a, b, v = project(weight_a, bias_a), project(weight_b, bias_b), project(weight_v, bias_v)
    g = gather(a, b, mask=mask, logit_scale=logit_scale)
    z = distribute(g, v, scale=scale, softmax=softmax_v, logit_scale=logit_scale_v).flatten(1, 2)
    y = z if weight_out is None else convolution(z, weight_out, bias_out)
    return y if residual is None else residual + y
