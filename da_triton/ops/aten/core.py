"""The core in ATen operations: any device, differentiable twice, exportable.

``gather`` and ``distribute`` have the arguments and results of ``reference``, and differ only where
that saves time or digits: A is not copied for extra tokens, scales are folded into G, products are
laid out so that the result already has v's memory format, logits are scaled in the dtype of sums,
and means over many positions are as accurate as over few. G has the dtype of the products: that of
the inputs, but float32 for many positions of float16.

``gather_partial``, ``gather_lse`` and ``gather_backward`` are for part of the positions, and work
in the dtype of sums, as the kernels do.
"""

import torch
from torch import Tensor

from ...precision import HALF, POLICIES, accumulator, converted, lse_dtype
from ...reference import distribution_weights, exponentials, gather_weights, join_extra
from ...tracing import exporting, transformed

# On a CPU, in float32 or float64 and in half precision. Libraries add positions sequentially: 10^6
# equal terms in one float32 sum are wrong by 10^-3.
POSITIONS_PER_PRODUCT, POSITIONS_PER_HALF_PRODUCT = 2**11, 2**16


def gather(a, b, *, mask=None, extra=None, logit_scale=1.0):
    """``G (N, heads, m, n)``."""
    dtype = product_dtype(b)
    a = masked_features(a, mask)
    if extra is not None:
        extra_a, extra_b = extra
        b = torch.cat([b, extra_b], -1)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], extra_b.shape[-1])], -1)
    weights = converted(gather_weights(logits_in(b, logit_scale, dtype), mask), dtype)
    several = dtype not in HALF and positions_per_product(weights) is not None
    total = weights.sum(-1) if several else None
    if extra is None:
        g = sum_over_positions(a, weights)
    else:
        weights, extra_weights = weights.split([a.shape[-1], extra_a.shape[-1]], -1)
        g = sum_over_positions(a, weights) + converted(extra_a, dtype) @ extra_weights.transpose(
            -1, -2
        )
    if total is None:
        return g
    return g / total.masked_fill(total == 0, 1)[:, :, None]  # softmax adds sequentially, too


def distribute(g, v, *, scale=1.0, softmax=True, logit_scale=1.0):
    """``Z (N, heads, m, L)`` in v's dtype."""
    dtype = product_dtype(v)
    factor = scale if softmax else scale * logit_scale
    g = converted(g if factor == 1.0 else factor * g, dtype)
    q = distribution_weights(logits_in(v, logit_scale, dtype)) if softmax else v
    q = converted(q, dtype)
    pairs = [(g, q)]
    positions = positions_per_product(q) if g.requires_grad else None
    if positions is not None:  # dG is a sum over positions
        slices = q.split(positions, -1)
        pairs = list(zip(g.expand(len(slices), *g.shape).unbind(), slices, strict=True))
    if v.stride(-2) == 1 and v.shape[1] == 1:
        return converted(
            _cat([x.transpose(-1, -2) @ y.transpose(-1, -2) for y, x in pairs], -2), v.dtype
        ).transpose(-1, -2)
    return converted(_cat([y @ x for y, x in pairs], -1), v.dtype)


def gather_partial(a, b, *, mask=None, extra=None, logit_scale=1.0):
    """``reference.gather_partial``; nothing is rounded to the input dtype on the way."""
    if extra is not None:
        a, b, mask = join_extra(a, b, mask, extra)
    logits = scaled_logits(b, mask, logit_scale)
    pivot, weights, total = exponentials(logits, mask is not None)
    g = sum_over_positions(masked_features(a, mask), weights)
    return g / total.masked_fill(total == 0, 1)[:, :, None], pivot, total


def gather_lse(a, b, **options):
    """``G (N, heads, m, n)`` and log-sum-exp ``(N, heads, n)``, +inf where no position is left."""
    g, pivot, total = gather_partial(a, b, **options)
    statistics, nothing = lse_dtype(b.dtype), total == 0
    lse = pivot.to(statistics) + total.masked_fill(nothing, 1).to(statistics).log()
    return g, lse.masked_fill(nothing, torch.inf)


def gather_backward(dg, a, b, mask, g, lse, dlse, logit_scale, need_a, need_b):
    """dA and dB of some positions from the G and lse of all; None where not needed."""
    weights = weights_from_lse(scaled_logits(b, mask, logit_scale), lse)
    da = (dg @ weights).to(a.dtype) if need_a else None
    if not need_b:
        return da, None
    delta = (dg * g).sum(-2)
    if dlse is not None:
        delta = delta - dlse.to(delta.dtype)
    db = weights * (dg.mT @ masked_features(a, mask).to(dg.dtype) - delta[..., None])
    return da, (logit_scale * db).to(b.dtype)


def scaled_logits(b, mask, logit_scale):
    """The gather's logits in the dtype of sums, −inf where a position is masked."""
    logits = logits_in(b, logit_scale, accumulator(b.dtype))
    return logits if mask is None else logits.masked_fill(~mask[:, None, None, :], -torch.inf)


def weights_from_lse(logits, lse):
    """``P = exp(logits − lse)``: lse is subtracted in two parts, as ``kernels.primitives`` does."""
    pivot = lse.to(logits.dtype)
    rest = (pivot - lse).nan_to_num(0).to(logits.dtype)  # inf − inf, where all are masked
    return (logits - pivot[..., None]).exp() * rest.exp()[..., None]


def masked_features(a, mask):
    """``a`` with zeros at masked positions, which may hold anything."""
    return a if mask is None else a.masked_fill(~mask[:, None, None, :], 0)


def product_dtype(x: Tensor) -> torch.dtype:
    """The input dtype, or that of sums if x has more positions than weights in it can represent.

    A graph for any number of positions takes the dtype that is right for all of them.
    """
    policy = POLICIES[x.dtype]
    if policy.positions is not None and (_any_length(x) or x.shape[-1] > policy.positions):
        return policy.accumulator
    return x.dtype


def _any_length(x: Tensor) -> bool:
    """Whether a graph is traced that must not depend on the number of positions."""
    if torch.compiler.is_dynamo_compiling():
        return exporting()
    return torch.jit.is_tracing() or isinstance(x.shape[-1], torch.SymInt)


def logits_in(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """``scale · x`` in ``dtype``, or where it is scaled, in the dtype of sums."""
    if scale == 1:
        return converted(x, dtype)
    wide = x.to(accumulator(x.dtype))
    if wide is x or transformed():  # transforms forbid changing what they have captured in place
        return scale * wide
    return wide.mul_(scale)


def sum_over_positions(a: Tensor, weights: Tensor) -> Tensor:
    """``a @ weightsᵀ`` in the dtype of ``weights``."""
    positions = positions_per_product(weights)
    if positions is None:
        return converted(a, weights.dtype) @ weights.transpose(-1, -2)
    pairs = zip(a.split(positions, -1), weights.split(positions, -1), strict=True)
    return torch.stack([converted(x, y.dtype) @ y.mT for x, y in pairs]).sum(0)


def positions_per_product(x: Tensor) -> int | None:
    """How many positions of ``x`` one product sums; None if one product sums all of them."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or _any_length(x):
        return None
    most = POSITIONS_PER_HALF_PRODUCT if x.dtype in HALF else POSITIONS_PER_PRODUCT
    return most if x.shape[-1] > most else None


def _cat(slices: list[Tensor], dim: int) -> Tensor:
    return slices[0] if len(slices) == 1 else torch.cat(slices, dim)
