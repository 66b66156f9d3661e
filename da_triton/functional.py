"""The public functions: checks, autocast, choice of backend and order, shapes in and out."""

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from . import checks, cores, distributed, eager, packed
from .cores.operators import transformed
from .projection import split_heads
from .tracing import constant, exporting, sizes, unrecorded


def gather(
    a: Tensor,
    b: Tensor,
    *,
    heads: int = 1,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    process_group: Any = None,
) -> Tensor:
    r"""Global descriptors ``G = A softmax_positions(logit_scale · B)ᵀ`` (A²-Nets, equation 3).

    Args:
        a: features, ``(N, heads·m, *positions)`` with one to three position axes, any strides;
            float16, bfloat16, float32 or float64.
        b: attention maps, ``(N, heads·n, *positions)``, of a's dtype and device. Head-major along
            the channels, like a.
        heads: divides the channels of a and b.
        logit_scale: factor on b before the softmax.
        mask: bool, ``(N, *positions)`` or ``(N, 1, *positions)``; True where a position takes
            part. A map with no position left gives zeros.
        cu_seqlens: int32 or int64, ``(S + 1,)``, rising from 0 to total: a and b are the positions
            of S concatenated sequences, ``(1, channels, total)``, and sequence s is those from
            ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``; one without any gives zeros. On the Triton
            backend, sequences of similar length share a launch. The host reads it, and waits for it
            if it is on a GPU: keep it on the CPU. See :mod:`da_triton.packed`. Not with
            ``process_group``.
        backend: ``"auto"`` (Triton on a supported GPU, else ``"torch"``), ``"triton"``,
            ``"torch"`` or ``"eager"`` (the definition).
        process_group: a ``torch.distributed.ProcessGroup``: a, b and mask are this rank's slice of
            the positions, perhaps empty, and G is that of all ranks, the same bits on each. See
            :mod:`da_triton.distributed`. Not with ``backend="eager"``.

    Returns:
        ``(N, heads, m, n)`` in the dtype of the maps (under autocast, the autocast dtype); with
        ``cu_seqlens``, ``(S, heads, m, n)``.

    Raises:
        ValueError: shapes, heads, offsets, backend name.
        TypeError: dtypes, or arguments that are no tensors.
        RuntimeError: several devices, or ``backend="triton"`` where it cannot run.
    """
    checks.backend(backend)
    unrecorded(_check_gather, a, b, heads, logit_scale, mask, process_group, backend, cu_seqlens)
    _check_offsets(cu_seqlens, process_group, a=a, b=b)
    a, b = _autocast(a, b)
    checks.one_kind(a=a, b=b)
    core = _select(backend, b, process_group, cu_seqlens)
    with _autocast_off(a):
        g = core.gather(
            _by_head(a, heads), _by_head(b, heads), keep=_keep(mask), logit_scale=logit_scale
        )
    return g.to(a.dtype)


def gather_part(
    a: Tensor,
    b: Tensor,
    *,
    heads: int = 1,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """What :mod:`da_triton.streaming` keeps of a frame: see ``eager.gather_part``.

    Arguments and errors as :func:`gather`.
    """
    checks.backend(backend)
    unrecorded(_check_gather, a, b, heads, logit_scale, mask)
    a, b = _autocast(a, b)
    checks.one_kind(a=a, b=b)
    core = cores.select(backend, b)
    with _autocast_off(a):
        return core.gather_part(
            _by_head(a, heads), _by_head(b, heads), keep=_keep(mask), logit_scale=logit_scale
        )


def distribute(
    g: Tensor,
    v: Tensor,
    *,
    scale: float = 1.0,
    softmax: bool = True,
    logit_scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Each position's mixture ``Z = scale · G softmax_maps(logit_scale · V)`` (A²-Nets, eq. 4).

    Args:
        g: descriptors, ``(N, heads, m, n)``, of v's dtype, or float32 beside lower precision.
        v: attention vectors, ``(N, heads·n, *positions)``, any strides, positions of its own.
        scale: factor on the result.
        softmax: False distributes with ``logit_scale · V`` itself.
        logit_scale: factor on v before the softmax.
        cu_seqlens: as in :func:`gather`: g is ``(S, heads, m, n)``, v ``(1, heads·n, total)``.
        backend: as in :func:`gather`.

    Returns:
        ``(N, heads·m, *positions of v)`` in v's dtype and memory format.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`gather`.
    """
    checks.backend(backend)
    some = cu_seqlens is not None
    unrecorded(checks.feature_map, "v", v, may_have_no_positions=some)
    checks.number(scale=scale, logit_scale=logit_scale)
    checks.flag(softmax=softmax)
    sequences = _check_offsets(cu_seqlens, None, v=v)
    (v,) = _autocast(v)
    unrecorded(checks.descriptors, g, v, sequences)
    core = _select(backend, v, None, cu_seqlens)
    with _autocast_off(v):
        z = core.distribute(
            g, _by_head(v, sizes(g)[1]), scale=scale, softmax=softmax, logit_scale=logit_scale
        )
    return _positions_of(z, v, v.shape[0])


def double_attention(
    a: Tensor,
    b: Tensor,
    v: Tensor,
    *,
    heads: int = 1,
    logit_scale: float = 1.0,
    logit_scale_v: float = 1.0,
    scale: float = 1.0,
    softmax_v: bool = True,
    mask: Tensor | None = None,
    extra: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    process_group: Any = None,
) -> Tensor:
    r"""Double attention ``Z = scale · [A softmax_L(B)ᵀ] softmax_n(V)`` (A²-Nets, equation 5).

    Args:
        a: features, ``(N, heads·m, *positions)``.
        b: attention maps, ``(N, heads·n, *positions)``, softmax over positions.
        v: attention vectors, ``(N, heads·n, *positions of its own)``, softmax over maps.
        heads: divides all channels; head-major along the channel axis.
        logit_scale, logit_scale_v: factors on b and v before their softmax.
        scale: factor on the result.
        softmax_v: False distributes with ``logit_scale_v · V`` itself.
        mask: bool, ``(N, *positions)`` or ``(N, 1, *positions)`` of a and b, True where a position
            takes part in the gather. It does not touch the distribution.
        extra: ``(extra_a, extra_b)``, tokens ``(1 or N, channels, K)`` that join the gather and
            are not distributed to.
        cu_seqlens: as in :func:`gather`: v is packed as a and b are, and tokens may be
            ``(S, channels, K)``.
        backend: as in :func:`gather`.
        process_group: as in :func:`gather`; v, and so the result, is a slice of this rank's too.
            ``extra`` is the same on every rank and counts once; all of its gradient is on rank 0.

    Returns:
        ``(N, heads·m, *positions of v)`` in the maps' dtype and v's memory format. Between the two
        steps the descriptors stay in float32 on the Triton backend.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`gather`.
    """
    checks.backend(backend)
    unrecorded(_check_gather, a, b, heads, logit_scale, mask, process_group, backend, cu_seqlens)
    some = process_group is not None or cu_seqlens is not None
    unrecorded(_check_distribute, b, v, heads, logit_scale_v, scale, softmax_v, some)
    sequences = _check_offsets(cu_seqlens, process_group, a=a, b=b, v=v)
    batch = a.shape[0] if sequences is None else sequences
    if extra is not None:
        unrecorded(checks.extra, extra, a, b, sequences)
    a, b, v, *tokens = _autocast(a, b, v, *(extra or ()))
    checks.one_kind(a=a, b=b, v=v, **dict(zip(("extra_a", "extra_b"), tokens, strict=False)))
    core = _select(backend, b, process_group, cu_seqlens)
    n = a.shape[0]
    with _autocast_off(a):
        tokens = [_by_head(token.expand(batch, -1, -1), heads) for token in tokens]
        g = core.gather(
            _by_head(a, heads, n),
            _by_head(b, heads, n),
            keep=_keep(mask),
            extra=tokens or None,
            logit_scale=logit_scale,
        )
        z = core.distribute(
            g, _by_head(v, heads, n), scale=scale, softmax=softmax_v, logit_scale=logit_scale_v
        )
    return _positions_of(z, v, n)


def double_attention_block(
    x: Tensor,
    weight_a: Tensor,
    bias_a: Tensor | None,
    weight_b: Tensor,
    bias_b: Tensor | None,
    weight_v: Tensor,
    bias_v: Tensor | None,
    weight_out: Tensor | None = None,
    bias_out: Tensor | None = None,
    *,
    heads: int = 1,
    logit_scale: float = 1.0,
    logit_scale_v: float = 1.0,
    scale: float = 1.0,
    softmax_v: bool = True,
    residual: bool = False,
    mask: Tensor | None = None,
    order: str = "auto",
    recompute: bool | str = "auto",
    backend: str = "auto",
    process_group: Any = None,
) -> Tensor:
    r"""The whole A²-Nets block: three pointwise convolutions, double attention, one convolution.

    ``A, B, V = Wa X + ba, Wb X + bb, Wv X + bv``, then :func:`double_attention`, then
    ``Y = Wo Z + bo``, then ``X + Y`` with ``residual`` (Chen et al., NeurIPS 2018, figure 2).

    Args:
        x: ``(N, C, *positions)`` with one to three position axes, any strides.
        weight_a, weight_b, weight_v: ``(c_m, C)``, ``(c_n, C)``, ``(c_n, C)``, perhaps with
            trailing 1-axes.
        bias_a, bias_b, bias_v: ``(c_m,)``, ``(c_n,)``, ``(c_n,)`` or None. ``bias_b`` cannot
            change the result (a softmax over positions removes it): its gradient is zero.
        weight_out, bias_out: ``(C', c_m)`` and ``(C',)``, or None: no last convolution.
        heads, logit_scale, logit_scale_v, scale, softmax_v, mask: as :func:`double_attention`.
        residual: adds x; the block must then give x's channels.
        order: association order ``"AZ"`` (the paper's), ``"XZ"``, ``"AH"``, ``"XH"``, or
            ``"auto"``: the cheapest for the shape. All give the same result up to rounding.
        recompute: what backward finds beyond x and the weights. True: lse and G in float32 (with
            the ``torch`` backend nothing), and the maps are projected again. False: V too (with
            ``torch``, what makes backward fast). ``"auto"``: V is projected again where a model
            says that it costs under a tenth of a training step; with ``torch`` as False. Through
            ``torch`` on anything but a CPU's float32 or float64, a graph made with True can be
            differentiated once, not twice; inside ``torch.func`` all is kept.
        backend: as :func:`gather`.
        process_group: as :func:`gather`: x and mask are this rank's slice of the positions. The
            order is the paper's, and the weights' gradients are this rank's share: see
            :class:`da_triton.DoubleAttention`. ``recompute=True`` gathers again in backward.

    Returns:
        ``(N, C' or c_m, *positions)`` in the input's dtype and memory format; under autocast the
        autocast dtype (float32 with ``residual`` and a float32 x).

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`gather`.
    """
    checks.backend(backend)
    checks.recompute(recompute, backend)
    unrecorded(checks.feature_map, "x", x, may_have_no_positions=process_group is not None)
    checks.number(logit_scale=logit_scale, logit_scale_v=logit_scale_v, scale=scale)
    checks.flag(softmax_v=softmax_v, residual=residual)
    weights: dict[str, Any] = {
        "weight_a": weight_a, "bias_a": bias_a, "weight_b": weight_b, "bias_b": bias_b,
        "weight_v": weight_v, "bias_v": bias_v, "weight_out": weight_out, "bias_out": bias_out,
    }  # fmt: skip
    unrecorded(checks.block_weights, x, **weights, residual=residual)
    reconstruct = weight_out is not None
    checks.order(order, reconstruct, backend)
    if process_group is not None:
        checks.process_group(process_group, backend, order)
    checks.heads(heads, weight_a=sizes(weight_a)[0], weight_b=sizes(weight_b)[0])
    if mask is not None:
        unrecorded(checks.mask, mask, x, "x")
    matrices = (
        w.flatten(1) if name.startswith("weight") and w is not None else w
        for name, w in weights.items()
    )
    cast, *values = _autocast(x, *matrices)
    weights = dict(zip(weights, values, strict=True))
    checks.one_kind(x=cast, **weights)

    core = _select(backend, cast, process_group)
    inputs = cast.flatten(2)
    options = {
        "heads": heads,
        "logit_scale": logit_scale,
        "logit_scale_v": logit_scale_v,
        "scale": scale,
        "softmax_v": softmax_v,
        "residual": None if not residual else inputs if cast is x else x.flatten(2),
        "keep": _keep(mask),
    }
    with _autocast_off(x):
        if core is cores.EAGER:
            out = eager.block(inputs, **weights, **options)
        else:
            unused = weights.pop("bias_b")
            # An exported program has no gradients, and a trace of it is checked without them.
            wanted = torch.is_grad_enabled() and not exporting()
            if unused is not None and wanted:
                weights["weight_b"] = _zero_gradient(weights["weight_b"], unused)
            out = core.block(inputs, weights, order=order, recompute=recompute, **options)
    return _positions_of(out, x, x.shape[0])


def _check_gather(
    a, b, heads, logit_scale, mask, process_group=None, backend="auto", cu_seqlens=None
):
    if process_group is not None:
        checks.process_group(process_group, backend)
    some = process_group is not None or cu_seqlens is not None
    checks.feature_map("a", a, may_have_no_positions=some)
    checks.feature_map("b", b, may_have_no_positions=some)
    checks.same_positions(a=a, b=b)
    checks.heads(heads, a=a.shape[1], b=b.shape[1])
    checks.number(logit_scale=logit_scale)
    if mask is not None:
        checks.mask(mask, a, "a")


def _check_distribute(b, v, heads, logit_scale_v, scale, softmax_v, may_have_no_positions):
    checks.feature_map("v", v, may_have_no_positions=may_have_no_positions)
    checks.heads(heads, v=v.shape[1])
    checks.same_batch("b", b, "v", v)
    if v.shape[1] != b.shape[1]:
        raise ValueError(
            f"b and v must have the same number of maps, got {b.shape[1]} and {v.shape[1]}."
        )
    checks.number(logit_scale_v=logit_scale_v, scale=scale)
    checks.flag(softmax_v=softmax_v)


def _check_offsets(cu_seqlens: Tensor | None, process_group: Any, **maps: Tensor) -> int | None:
    """The number of packed sequences."""
    if cu_seqlens is None:
        return None
    if process_group is not None:
        raise ValueError(
            "cu_seqlens and process_group cannot be combined. Give each rank sequences of its own."
        )
    unrecorded(checks.cu_seqlens, cu_seqlens, **maps)
    return sizes(cu_seqlens)[0] - 1


def _select(
    backend: str, x: Tensor, process_group: Any, cu_seqlens: Tensor | None = None
) -> cores.Backend:
    core = cores.select(backend, x)
    if cu_seqlens is not None:
        return packed.backend(core, cu_seqlens, x)
    return core if process_group is None else distributed.split(core, process_group)


def _by_head(x: Tensor, heads: int, batch: int | None = None) -> Tensor:
    """``(N, heads·c, *positions)`` as ``(N, heads, c, L)``.

    A view, unless the positions are not evenly spaced in memory (a crop of inner axes). ``batch``:
    N, which an exported program then reads once for several maps.
    """
    if exporting():  # where the batch is never empty, one operation does it
        batch = x.shape[0] if batch is None else batch
        return x.reshape(batch, heads, sizes(x)[1] // heads, -1)
    return split_heads(x.flatten(2), heads)


def _keep(mask: Tensor | None) -> Tensor | None:
    """The mask as ``(N, L)``."""
    return None if mask is None else mask.flatten(1)


def _positions_of(z: Tensor, like: Tensor, batch: int) -> Tensor:
    """``(N, [heads,] channels, L)`` with the position axes and the memory format of ``like``."""
    channels = math.prod(sizes(z)[1:-1])
    z = z.reshape(batch, channels, *like.shape[2:])
    if like.stride(1) == 1 and like.stride(-1) != 1:
        return z.movedim(1, -1).contiguous().movedim(-1, 1)
    return z.contiguous()


def _autocast(first: Tensor, *others: Tensor | None) -> list:
    """The tensors in the autocast dtype where autocast is on, as PyTorch's own layers take them."""
    tensors = [first, *others]
    kind = first.device.type
    if not (_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors]


def _autocast_off(x: Tensor):
    """What follows has the dtypes it is meant to have."""
    kind = x.device.type
    if not (_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


@constant  # torch 2.11 cannot trace the question
def _autocast_available(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


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
