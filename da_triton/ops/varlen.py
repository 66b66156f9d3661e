"""Packed sequences as operators that read the offsets inside.

``torch.ops.da_triton.gather_packed``, ``gather_packed_backward``, ``distribute_packed`` and
``distribute_packed_backward`` run either backend on activations ``(1, heads, channels, total)``:
the kernels on batches of sequences (see ``ops.triton.varlen``), ATen operations on one sequence at
a time (see ``ops.aten.varlen``). They are opaque to the compiler, so a compiled model is not
compiled again for other lengths, nor for another number of sequences.

Second derivatives are taken through the ``torch`` backend, one run of equal lengths after another.
"""

import itertools

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import checks, varlen
from ..precision import accumulator, lse_dtype
from . import TORCH, Backend
from .aten import varlen as aten_varlen
from .custom_op import (
    READS_ON_HOST,
    apply,
    differentiable,
    of_tensors,
    or_empty,
    run,
    scalars,
    vectorise,
    wants_graph,
)


def packed_ops(backend: Backend, cu_seqlens: Tensor) -> Backend:
    """``varlen.per_sequence`` with these operators."""
    kernels = backend is not TORCH

    def gather(a, b, *, mask=None, extra=None, logit_scale=1.0):
        extra_a, extra_b = (None, None) if extra is None else extra
        options = (cu_seqlens, *scalars(logit_scale), kernels)
        return apply(Gather, a, b, mask, extra_a, extra_b, *options)[0]

    def distribute(g, v, *, scale=1.0, softmax=True, logit_scale=1.0):
        scale, logit_scale = scalars(scale, logit_scale)
        return apply(Distribute, g, v, cu_seqlens, scale, softmax, logit_scale, kernels)

    return backend._replace(gather=gather, distribute=distribute)


def _implementation(kernels):
    """The same functions of packed activations and lengths for either backend."""
    if not kernels:
        return aten_varlen
    from .triton import varlen as triton_varlen

    return triton_varlen


def _lengths(cu_seqlens, **activations):
    ends = checks.ends(cu_seqlens, **activations)
    return tuple(end - start for start, end in itertools.pairwise(ends))


# --- gather ---------------------------------------------------------------------------------------


@torch.library.custom_op("da_triton::gather_packed", mutates_args=(), tags=READS_ON_HOST)
def gather_op(
    a: Tensor,
    b: Tensor,
    mask: Tensor | None,
    extra_a: Tensor | None,
    extra_b: Tensor | None,
    cu_seqlens: Tensor,
    logit_scale: float,
    kernels: bool,
) -> tuple[Tensor, Tensor]:
    """G, zeros for an empty sequence, and lse, which is empty without ``kernels``."""
    gather = _implementation(kernels).gather
    return gather(a, b, mask, extra_a, extra_b, _lengths(cu_seqlens, a=a), logit_scale)


@gather_op.register_fake
def _(a, b, mask, extra_a, extra_b, cu_seqlens, logit_scale, kernels):
    sequences, heads, c_n = cu_seqlens.shape[0] - 1, a.shape[1], b.shape[2]
    g = a.new_empty((sequences, heads, a.shape[2], c_n), dtype=accumulator(a.dtype))
    lse = (sequences, heads, c_n) if kernels else (0,)
    return g, a.new_empty(lse, dtype=lse_dtype(a.dtype))


@torch.library.custom_op("da_triton::gather_packed_backward", mutates_args=(), tags=READS_ON_HOST)
def gather_backward_op(
    dg: Tensor,
    a: Tensor,
    b: Tensor,
    mask: Tensor | None,
    extra_a: Tensor | None,
    extra_b: Tensor | None,
    g: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    logit_scale: float,
    kernels: bool,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of a, b and the tokens; empty where not needed."""
    found = _implementation(kernels).gather_backward(
        dg, a, b, mask, extra_a, extra_b, g, lse, _lengths(cu_seqlens, a=a), logit_scale, needs
    )
    return [or_empty(x, a) for x in found]


@gather_backward_op.register_fake
def _(dg, a, b, mask, extra_a, extra_b, g, lse, cu_seqlens, logit_scale, kernels, needs):
    grads = [aten_varlen.empty_like(x, x.shape[2]) for x in (a, b)]
    tokens = [x if x is None else torch.empty_like(x) for x in (extra_a, extra_b)]
    given = zip((*grads, *tokens), needs, strict=True)
    return [or_empty(x if need else None, a) for x, need in given]


def _gather_setup(ctx, inputs, output):
    *tensors, ctx.logit_scale, ctx.kernels = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _gather_gradients(ctx, dg, _):
    *inputs, cu_seqlens, g, lse = ctx.saved_tensors
    needs = ctx.needs_input_grad[:5]
    if dg is None:
        return (None,) * 8
    if wants_graph(dg):
        backend = varlen.per_sequence(TORCH, cu_seqlens)

        def forward(a, b, mask, extra_a, extra_b):
            extra = None if extra_a is None else (extra_a, extra_b)
            options = {"mask": mask, "extra": extra, "logit_scale": ctx.logit_scale}
            return backend.gather(a, b, **options).to(dg.dtype)

        return *differentiable(forward, inputs, needs, dg), None, None, None
    wanted = [*needs[:2], *needs[3:]]
    options = ctx.logit_scale, ctx.kernels, wanted
    found = run(gather_backward_op, dg, *inputs, g, lse, cu_seqlens, *options)
    da, db, *tokens = (x if need else None for x, need in zip(found, wanted, strict=True))
    return da, db, None, *tokens, None, None, None


gather_op.register_autograd(_gather_gradients, setup_context=_gather_setup)
gather_of_tensors, gather_backward_of_tensors = map(of_tensors, (gather_op, gather_backward_op))


class Gather(torch.autograd.Function):
    """``gather_op`` with its gradient. Saves the inputs, G and lse."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a, b, mask, extra_a, extra_b, cu_seqlens, logit_scale, kernels):
        return run(gather_op, a, b, mask, extra_a, extra_b, cu_seqlens, logit_scale, kernels)

    setup_context = staticmethod(_gather_setup)
    backward = staticmethod(_gather_gradients)


# --- distribute -----------------------------------------------------------------------------------


@torch.library.custom_op("da_triton::distribute_packed", mutates_args=(), tags=READS_ON_HOST)
def distribute_op(
    g: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    softmax: bool,
    logit_scale: float,
    kernels: bool,
) -> Tensor:
    """Z in v's dtype and memory format."""
    distribute = _implementation(kernels).distribute
    return distribute(g, v, _lengths(cu_seqlens, v=v), scale, softmax, logit_scale)


@distribute_op.register_fake
def _(g, v, cu_seqlens, scale, softmax, logit_scale, kernels):
    return aten_varlen.empty_like(v, g.shape[2])


@torch.library.custom_op(
    "da_triton::distribute_packed_backward", mutates_args=(), tags=READS_ON_HOST
)
def distribute_backward_op(
    dz: Tensor,
    g: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    softmax: bool,
    logit_scale: float,
    kernels: bool,
    need_g: bool,
    need_v: bool,
) -> tuple[Tensor, Tensor]:
    """dG in the dtype of sums and dV; empty where not needed."""
    dg, dv = _implementation(kernels).distribute_backward(
        dz, g, v, _lengths(cu_seqlens, v=v), scale, softmax, logit_scale, need_g, need_v
    )
    return or_empty(dg, g), or_empty(dv, v)


@distribute_backward_op.register_fake
def _(dz, g, v, cu_seqlens, scale, softmax, logit_scale, kernels, need_g, need_v):
    dg = g.new_empty(g.shape, dtype=accumulator(v.dtype)) if need_g else None
    dv = aten_varlen.empty_like(v, v.shape[2]) if need_v else None
    return or_empty(dg, g), or_empty(dv, v)


def _distribute_setup(ctx, inputs, output):
    g, v, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(g, v, cu_seqlens)


def _distribute_gradients(ctx, dz):
    g, v, cu_seqlens = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    if wants_graph(dz):
        backend = varlen.per_sequence(TORCH, cu_seqlens)
        scale, softmax, logit_scale, _ = ctx.options

        def forward(g, v):
            return backend.distribute(g, v, scale=scale, softmax=softmax, logit_scale=logit_scale)

        return *differentiable(forward, (g, v), needs, dz), *[None] * 5
    dg, dv = run(distribute_backward_op, dz, g, v, cu_seqlens, *ctx.options, *needs)
    return dg.to(g.dtype) if needs[0] else None, dv if needs[1] else None, *[None] * 5


distribute_op.register_autograd(_distribute_gradients, setup_context=_distribute_setup)
distribute_of_tensors = of_tensors(distribute_op)
distribute_backward_of_tensors = of_tensors(distribute_backward_op)


class Distribute(torch.autograd.Function):
    """``distribute_op`` with its gradient. Saves G and v."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g, v, cu_seqlens, scale, softmax, logit_scale, kernels):
        return run(distribute_op, g, v, cu_seqlens, scale, softmax, logit_scale, kernels)

    setup_context = staticmethod(_distribute_setup)
    backward = staticmethod(_distribute_gradients)


for _op in (gather_op, gather_backward_op, distribute_op, distribute_backward_op):
    vectorise(_op, joined=False)


@register_flop_formula(
    [torch.ops.da_triton.gather_packed, torch.ops.da_triton.gather_packed_of_tensors]
)
def gather_flops(a, b, mask, extra_a, extra_b, cu_seqlens, logit_scale, kernels, **_):
    """MACs of ``A Pᵀ`` counted twice; those of padding are not counted."""
    tokens = 0 if extra_a is None else extra_a[0] * extra_a[3]
    return 2 * a[1] * a[2] * b[2] * (a[3] + tokens)


@register_flop_formula(
    [
        torch.ops.da_triton.gather_packed_backward,
        torch.ops.da_triton.gather_packed_backward_of_tensors,
    ]
)
def gather_backward_flops(
    dg, a, b, mask, extra_a, extra_b, g, lse, cu_seqlens, logit_scale, kernels, needs, **_
):
    tokens = 0 if extra_a is None else extra_a[0] * extra_a[3]
    pairs = sum(needs[:2]) * a[3] + sum(needs[2:]) * tokens
    return 2 * a[1] * a[2] * b[2] * pairs


@register_flop_formula(
    [torch.ops.da_triton.distribute_packed, torch.ops.da_triton.distribute_packed_of_tensors]
)
def distribute_flops(g, v, *_, **__):
    return 2 * v[1] * v[2] * v[3] * g[2]


@register_flop_formula(
    [
        torch.ops.da_triton.distribute_packed_backward,
        torch.ops.da_triton.distribute_packed_backward_of_tensors,
    ]
)
def distribute_backward_flops(
    dz, g, v, cu_seqlens, scale, softmax, logit_scale, kernels, need_g, need_v, **_
):
    return 2 * v[1] * v[2] * v[3] * g[2] * (need_g + need_v)
