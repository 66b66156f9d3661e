"""The core in Triton kernels: custom operators and their gradients.

``torch.ops.da_triton.gather``, ``gather_backward``, ``distribute`` and ``distribute_backward`` are
opaque to the compiler: the tile and the split over positions are chosen inside, so a compiled model
is not compiled again for another size. Each has a fake implementation with true strides and a FLOP
formula; the forward operators have gradients. ``gather``, ``gather_lse`` and ``distribute`` below
wrap them in ``torch.autograd.Function``, which ``torch.func`` can differentiate too.

``gather_of_tensors`` and so on are the same for scales that change between the calls of a compiled
program: see ``custom_op.scalars``.

Second derivatives are taken through the ``torch`` backend.
"""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ...checks import DTYPES
from ...kernels import distribute as distribute_kernels
from ...kernels import gather as gather_kernels
from ...kernels import gather_backward as gather_backward_kernels
from ...precision import accumulator, lse_dtype
from ...runtime import launch, tiles
from ...tracing import constant
from ..aten import core as aten
from ..custom_op import (
    apply,
    as_owned_tensor,
    differentiable,
    of_tensors,
    or_empty,
    run,
    scalars,
    vectorise,
    wants_graph,
)

# Triton's interpreter computes bfloat16 on its bit patterns and gives wrong results. A test suite
# that corrects the interpreter sets this.
interpreter_has_bfloat16 = False


def obstacle(x: Tensor) -> str | None:
    """Why the kernels cannot run on tensors like ``x``, or None."""
    if x.dtype not in DTYPES:
        return f"the kernels have no {x.dtype}; use one of {', '.join(map(str, DTYPES))}."
    if launch.INTERPRETED:
        if x.dtype == torch.bfloat16 and not interpreter_has_bfloat16:
            return (
                "Triton's interpreter (TRITON_INTERPRET=1) does not compute bfloat16 correctly. "
                "Use float32 or float16 there."
            )
        return None
    if not x.is_cuda:
        return (
            f"the tensors are on {x.device.type!r} and the kernels need a GPU. Move them to one, "
            "use backend='torch', or set TRITON_INTERPRET=1 before importing da_triton to run "
            "the kernels in Triton's interpreter."
        )
    return _gpu_obstacle(x.device)


@constant
def _gpu_obstacle(device: torch.device) -> str | None:
    if torch.version.hip:
        return tiles.obstacle(device)
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the kernels need compute capability 8.0 or newer; {device} has {major}.{minor}."
    return None


def gather(a, b, *, mask=None, extra=None, logit_scale=1.0):
    """``G (N, heads, m, n)`` in float32 (float64 for float64 inputs)."""
    extra_a, extra_b = (None, None) if extra is None else extra
    return apply(Gather, a, b, mask, extra_a, extra_b, *scalars(logit_scale))[0]


def gather_partial(a, b, *, mask=None, extra=None, logit_scale=1.0):
    """Like ``reference.gather_partial``. The pivot is lse rounded to the dtype of sums, and the sum
    holds the remainder: together they have all digits of lse."""
    g, lse = gather_lse(a, b, mask=mask, extra=extra, logit_scale=logit_scale)
    if mask is None:
        pivot = lse.detach().to(g.dtype)
        return g, pivot, (lse - pivot).exp().to(g.dtype)
    nothing = lse == torch.inf
    lse = lse.masked_fill(nothing, 0)
    pivot = lse.detach().to(g.dtype)
    total = (lse - pivot).exp().masked_fill(nothing, 0).to(g.dtype)
    return g, pivot.masked_fill(nothing, -torch.inf), total


def gather_lse(a, b, *, mask=None, extra=None, logit_scale=1.0):
    """Like ``aten.gather_lse``."""
    extra_a, extra_b = (None, None) if extra is None else extra
    return apply(GatherLse, a, b, mask, extra_a, extra_b, *scalars(logit_scale))


def distribute(g, v, *, scale=1.0, softmax=True, logit_scale=1.0):
    """``Z (N, heads, m, L)`` in v's dtype and memory format."""
    scale, logit_scale = scalars(scale, logit_scale)
    return apply(Distribute, g, v, scale, softmax, logit_scale)


def gather_backward(dg, a, b, mask, g, lse, dlse, logit_scale, need_a, need_b):
    """Like ``aten.gather_backward``; empty where not needed."""
    (logit_scale,) = scalars(logit_scale)
    args = dg, a, b, mask, g, lse, dlse, logit_scale, need_a, need_b
    return run(gather_backward_op, *args)


# --- gather ---------------------------------------------------------------------------------------


@torch.library.custom_op("da_triton::gather", mutates_args=())
def gather_op(
    a: Tensor,
    b: Tensor,
    mask: Tensor | None,
    extra_a: Tensor | None,
    extra_b: Tensor | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor]:
    """G and lse; see ``kernels.gather``. ``mask``: ``(N, L)`` bool; tokens are extra positions."""
    sources = [(a, b, None if mask is None else mask.view(torch.uint8))]
    if extra_a is not None and extra_b is not None:
        sources.append((extra_a, extra_b, None))
    return gather_kernels.gather_forward(sources, logit_scale)


@gather_op.register_fake
def _(a, b, mask, extra_a, extra_b, logit_scale):
    batch, heads, c_m, _ = a.shape
    g = a.new_empty((batch, heads, c_m, b.shape[2]), dtype=accumulator(a.dtype))
    return g, a.new_empty((batch, heads, b.shape[2]), dtype=lse_dtype(a.dtype))


@torch.library.custom_op("da_triton::gather_backward", mutates_args=())
def gather_backward_op(
    dg: Tensor,
    a: Tensor,
    b: Tensor,
    mask: Tensor | None,
    g: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    logit_scale: float,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor]:
    """dA and dB; empty where not needed."""
    mask = None if mask is None else mask.view(torch.uint8)
    g, lse = g.contiguous(), lse.contiguous()  # torch.vmap expands them
    da, db = gather_backward_kernels.gradients(
        dg, a, b, mask, g, lse, dlse, logit_scale, need_a, need_b
    )
    return or_empty(da, a), or_empty(db, b)


@gather_backward_op.register_fake
def _(dg, a, b, mask, g, lse, dlse, logit_scale, need_a, need_b):
    da = launch.empty_activations_like(a) if need_a else None
    db = launch.empty_activations_like(b) if need_b else None
    return or_empty(da, a), or_empty(db, b)


def _lse_setup(ctx, inputs, output):
    *tensors, ctx.logit_scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _gather_setup(ctx, inputs, output):
    _lse_setup(ctx, inputs, output)
    ctx.mark_non_differentiable(output[1])


def _gather_gradients(ctx, dg, dlse):
    a, b, mask, extra_a, extra_b, g, lse = ctx.saved_tensors
    needs = ctx.needs_input_grad[:5]
    if dg is None and dlse is None:
        return (None,) * 6
    dg = torch.zeros_like(g) if dg is None else dg
    if wants_graph(dg):
        upstream = dg if dlse is None else (dg, dlse)

        def forward(a, b, mask, extra_a, extra_b):
            extra = None if extra_a is None else (extra_a, extra_b)
            options = {"mask": mask, "extra": extra, "logit_scale": ctx.logit_scale}
            if dlse is not None:
                return aten.gather_lse(a, b, **options)
            return aten.gather(a, b, **options).to(dg.dtype)

        return *differentiable(forward, (a, b, mask, extra_a, extra_b), needs, upstream), None
    da, db, *of_tokens = gather_gradients(
        dg, a, b, mask, extra_a, extra_b, g, lse, dlse, ctx.logit_scale, [*needs[:2], *needs[3:]]
    )
    return da, db, None, *of_tokens, None


def gather_gradients(dg, a, b, mask, extra_a, extra_b, g, lse, dlse, logit_scale, needs):
    """Gradients of a, b, extra_a and extra_b; None where not needed."""
    grads = [None, None, None, None]
    for i, values, keys, masking in ((0, a, b, mask), (2, extra_a, extra_b, None)):
        if any(needs[i : i + 2]):
            args = dg, values, keys, masking, g, lse, dlse, logit_scale, *needs[i : i + 2]
            found = run(gather_backward_op, *args)
            pairs = zip(found, needs[i : i + 2], strict=True)
            grads[i : i + 2] = (x if need else None for x, need in pairs)
    return grads


gather_op.register_autograd(_gather_gradients, setup_context=_gather_setup)
gather_of_tensors = of_tensors(gather_op)
gather_backward_of_tensors = of_tensors(gather_backward_op)


class Gather(torch.autograd.Function):
    """``gather_op`` with its gradient. Saves a, b, G and lse, never P."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a, b, mask, extra_a, extra_b, logit_scale):
        return run(gather_op, a, b, mask, extra_a, extra_b, logit_scale)

    setup_context = staticmethod(_gather_setup)
    backward = staticmethod(_gather_gradients)


class GatherLse(Gather):
    """``Gather`` whose lse has a gradient too."""

    setup_context = staticmethod(_lse_setup)


# --- distribute -----------------------------------------------------------------------------------


@torch.library.custom_op("da_triton::distribute", mutates_args=())
def distribute_op(g: Tensor, v: Tensor, scale: float, softmax: bool, logit_scale: float) -> Tensor:
    """Z; see ``kernels.distribute``."""
    return as_owned_tensor(distribute_kernels.distribute_forward(g, v, scale, softmax, logit_scale))


@distribute_op.register_fake
def _(g, v, scale, softmax, logit_scale):
    return launch.empty_activations_like(v, g.shape[2])


@torch.library.custom_op("da_triton::distribute_backward", mutates_args=())
def distribute_backward_op(
    dz: Tensor,
    g: Tensor,
    v: Tensor,
    scale: float,
    softmax: bool,
    logit_scale: float,
    need_g: bool,
    need_v: bool,
) -> tuple[Tensor, Tensor]:
    """dG in float32 (float64 for float64 inputs) and dV; empty where not needed."""
    dg, dv = distribute_kernels.distribute_backward(
        dz, g, v, scale, softmax, logit_scale, need_g, need_v
    )
    return or_empty(dg, g), or_empty(dv, v)


@distribute_backward_op.register_fake
def _(dz, g, v, scale, softmax, logit_scale, need_g, need_v):
    dg = g.new_empty(g.shape, dtype=accumulator(v.dtype)) if need_g else None
    dv = launch.empty_activations_like(v) if need_v else None
    return or_empty(dg, g), or_empty(dv, v)


def _distribute_setup(ctx, inputs, output):
    g, v, *ctx.options = inputs
    ctx.save_for_backward(g, v)


def _distribute_gradients(ctx, dz):
    g, v = ctx.saved_tensors
    scale, softmax, logit_scale = ctx.options
    need_g, need_v = ctx.needs_input_grad[:2]
    if wants_graph(dz):

        def forward(g, v):
            return aten.distribute(g, v, scale=scale, softmax=softmax, logit_scale=logit_scale)

        return *differentiable(forward, (g, v), (need_g, need_v), dz), None, None, None
    args = dz, g, v, scale, softmax, logit_scale, need_g, need_v
    dg, dv = run(distribute_backward_op, *args)
    return dg.to(g.dtype) if need_g else None, dv if need_v else None, None, None, None


distribute_op.register_autograd(_distribute_gradients, setup_context=_distribute_setup)
distribute_of_tensors = of_tensors(distribute_op)
distribute_backward_of_tensors = of_tensors(distribute_backward_op)


class Distribute(torch.autograd.Function):
    """``distribute_op`` with its gradient. Saves G and v."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g, v, scale, softmax, logit_scale):
        return run(distribute_op, g, v, scale, softmax, logit_scale)

    setup_context = staticmethod(_distribute_setup)
    backward = staticmethod(_distribute_gradients)


for _op in (gather_op, gather_backward_op, distribute_op, distribute_backward_op):
    vectorise(_op)


@register_flop_formula([torch.ops.da_triton.gather, torch.ops.da_triton.gather_of_tensors])
def gather_flops(a, b, mask, extra_a, extra_b, logit_scale, **_):
    """MACs of ``A Pᵀ`` counted twice, as PyTorch counts a matrix product."""
    extra = 0 if extra_a is None else extra_a[-1]
    return 2 * math.prod((*a[:3], b[2])) * (a[3] + extra)


@register_flop_formula(
    [torch.ops.da_triton.gather_backward, torch.ops.da_triton.gather_backward_of_tensors]
)
def gather_backward_flops(dg, a, b, mask, g, lse, dlse, logit_scale, need_a, need_b, **_):
    return 2 * math.prod((*a, b[2])) * (need_a + need_b)


@register_flop_formula([torch.ops.da_triton.distribute, torch.ops.da_triton.distribute_of_tensors])
def distribute_flops(g, v, *_, **__):
    return 2 * math.prod((*v, g[2]))


@register_flop_formula(
    [torch.ops.da_triton.distribute_backward, torch.ops.da_triton.distribute_backward_of_tensors]
)
def distribute_backward_flops(dz, g, v, scale, softmax, logit_scale, need_g, need_v, **_):
    return 2 * math.prod((*v, g[2])) * (need_g + need_v)
