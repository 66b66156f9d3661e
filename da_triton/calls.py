"""A call of the block: checked and planned once per signature, then run.

block         looks the signature up; prepares the call if it is new, or observed
_prepare      the checks, and choices by metadata: autocast, backend, the direct way or not
_dispatched   in operations that every observer can follow: compiler, transforms, modes, exports
_direct       one autograd node from the tensors as given to the result: ``ops.direct``
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import checks, ops, reference, signatures, tracing, varlen
from .arguments import Options, Weights
from .parallel import context_parallel
from .projection import channels_last, in_format
from .tracing import exporting, sizes, transformed, unrecorded

WEIGHTS = (
    "weight_a", "bias_a", "weight_b", "bias_b", "weight_v", "bias_v", "weight_out", "bias_out",
)  # fmt: skip
_table = signatures.Table()


def block(
    x: Tensor,
    weights: tuple[Tensor | None, ...],
    mask: Tensor | None,
    options: Options,
    process_group: Any = None,
    check: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """``double_attention_block`` of ``weights`` in the order of ``WEIGHTS``.

    ``check``: of x, before everything else.
    """
    key, call = None, None
    if process_group is None:
        key, call = _table.find((x, mask, *weights), options)
    if call is None:
        if check is not None:
            check(x)
        call = _prepare(x, weights, mask, options, process_group, key is not None)
        _table.add(key, call)
    return call(x, weights, mask)


def _prepare(x, weights, mask, options, process_group, known) -> Callable[..., Tensor]:
    """A function of the three that depends on their metadata alone."""
    heads, _, _, _, softmax_v, residual, order, recompute, backend = options
    named = dict(zip(WEIGHTS, weights, strict=True))
    checks.backend(backend)
    checks.recompute(recompute, backend)
    unrecorded(checks.feature_map, "x", x, may_have_no_positions=process_group is not None)
    checks.number(
        logit_scale=options.logit_scale, logit_scale_v=options.logit_scale_v, scale=options.scale
    )
    checks.flag(softmax_v=softmax_v, residual=residual)
    unrecorded(checks.block_weights, x, **named, residual=residual)
    checks.order(order, named["weight_out"] is not None, backend)
    if process_group is not None:
        checks.process_group(process_group, backend, order)
    checks.heads(heads, weight_a=sizes(named["weight_a"])[0], weight_b=sizes(named["weight_b"])[0])
    if mask is not None:
        unrecorded(checks.mask, mask, x, "x")
    dtype = tracing.autocast_dtype(x.device.type)
    checks.one_kind(dtype, x=x, **named)
    chosen = select(backend, x, process_group, dtype=dtype)
    if known and chosen.direct is not None:
        call = _direct(chosen.direct, x, weights, mask, options, dtype)
        if call is not None:
            return call

    def dispatched(x, weights, mask):
        return _dispatched(chosen, x, weights, mask, options, dtype)

    return dispatched


def _direct(prepare, x, weights, mask, options, dtype) -> Callable[..., Tensor] | None:
    cast, *given = autocast(dtype, x, *weights)
    added = options.residual and cast is x
    plain = options._replace(  # NumPy's numbers are accepted, too
        heads=int(options.heads),
        logit_scale=float(options.logit_scale),
        logit_scale_v=float(options.logit_scale_v),
        scale=float(options.scale),
        softmax_v=bool(options.softmax_v),
    )
    call = prepare(cast, given, mask, plain, bool(added))
    if call is None or dtype is None:
        return call

    def of_cast(x, weights, mask):
        cast, *given = autocast(dtype, x, *weights)
        with autocast_off(x.device.type, dtype):
            out = call(cast, given, mask)
        return x + out if options.residual and not added else out

    return of_cast


def _dispatched(backend, x, weights, mask, options, dtype) -> Tensor:
    matrices = (w if w is None or i % 2 else w.flatten(1) for i, w in enumerate(weights))
    cast, *matrices = autocast(dtype, x, *matrices)
    inputs = cast.flatten(2)
    residual = None
    if options.residual:
        residual = inputs if cast is x else x.flatten(2)
    mask = None if mask is None else mask.flatten(1)
    with autocast_off(x.device.type, dtype):
        if backend is ops.EAGER:
            heads, logit_scale, logit_scale_v, scale, softmax_v, *_ = options
            out = reference.block(
                inputs, *matrices, heads=heads, logit_scale=logit_scale,
                logit_scale_v=logit_scale_v, scale=scale, softmax_v=softmax_v,
                residual=residual, mask=mask,
            )  # fmt: skip
        else:
            a, bias_a, b, bias_b, *rest = matrices
            # An exported program has no gradients, and a trace of it is checked without them.
            if bias_b is not None and torch.is_grad_enabled() and not exporting():
                b = _zero_gradient(b, bias_b)
            w = Weights(a, bias_a, b, *rest)
            out = backend.block(inputs, w, mask, residual, options)
    return positions_of(out, x, x.shape[0])


def select(
    backend: str,
    x: Tensor,
    process_group: Any,
    cu_seqlens: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> ops.Backend:
    """The backend for tensors like x, in autocast's ``dtype``."""
    if dtype not in (None, x.dtype) and x.dtype != torch.float64:
        x = x.new_empty(0, dtype=dtype)
    chosen = ops.select(backend, x)
    if cu_seqlens is not None:
        return varlen.packed_backend(chosen, cu_seqlens, x)
    return chosen if process_group is None else context_parallel.split(chosen, process_group)


def autocast(dtype: torch.dtype | None, *tensors: Tensor | None) -> Any:
    """The tensors in autocast's dtype, like the inputs of PyTorch's built-in layers."""
    if dtype is None:
        return tensors
    return [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors]


def autocast_off(kind: str, dtype: torch.dtype | None) -> Any:
    """Autocast off: the operations inside choose their own dtypes."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(kind, enabled=False)


def positions_of(z: Tensor, like: Tensor, batch: int) -> Tensor:
    """``(N, [heads,] channels, L)`` with the position axes and the memory format of ``like``."""
    channels = math.prod(sizes(z)[1:-1])
    z = z.reshape(batch, channels, *like.shape[2:])
    return in_format(z, channels_last(like))


def _zero_gradient(weight: Tensor, bias: Tensor) -> Tensor:
    """``weight`` itself; ``bias`` gets the zero gradient that it has, instead of none.

    A parameter without a gradient would stop distributed training. What transforms and the compiler
    can follow makes a copy of the weight: a sum of nothing, so that NaN in the bias stays there.
    """
    if torch.compiler.is_compiling() or transformed():
        return weight + bias[:0].sum()
    return _ZeroGradient.apply(weight, bias)


class _ZeroGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, bias):
        ctx.save_for_backward(bias)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        (bias,) = ctx.saved_tensors
        return grad, torch.zeros_like(bias)
