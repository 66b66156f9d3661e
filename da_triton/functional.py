"""The public functions: input validation, autocast, choice of backend and order, shapes.

In the terms of linear attention, A are the values, B the keys (softmax over positions), V the
queries (softmax over the n descriptors), and G is the KV state (m × n): ``gather`` builds the
state, ``distribute`` reads it.
"""

from typing import Any

from torch import Tensor

from . import calls, checks, ops
from .arguments import Options
from .calls import autocast, autocast_off, positions_of, select
from .projection import split_heads
from .signatures import Table
from .tracing import autocast_dtype, exporting, sizes, unrecorded

_table = Table()


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
        b: logits of the attention maps, ``(N, heads·n, *positions)``, of a's dtype and device.
            Head-major along the channels, like a.
        heads: divides the channels of a and b.
        logit_scale: factor on b before the softmax.
        mask: bool, ``(N, *positions)`` or ``(N, 1, *positions)``; True where a position is
            included. An attention map with no position left gives zeros.
        cu_seqlens: int32 or int64, ``(S + 1,)``, rising from 0 to total: a and b are the positions
            of S concatenated sequences, ``(1, channels, total)``, and sequence s is those from
            ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``; one without any gives zeros. On the Triton
            backend, sequences of similar length share a launch. The host reads it, and waits for it
            if it is on a GPU: keep it on the CPU. See :mod:`da_triton.varlen`. Not with
            ``process_group``.
        backend: ``"auto"`` (Triton on a supported GPU, else ``"torch"``), ``"triton"``,
            ``"torch"`` or ``"eager"`` (the definition).
        process_group: a ``torch.distributed.ProcessGroup``: a, b and mask are this rank's slice of
            the positions, perhaps empty, and G is that of all ranks, the same bits on each. See
            :mod:`da_triton.parallel.context_parallel`. Not with ``backend="eager"``.

    Returns:
        ``(N, heads, m, n)`` in the input dtype (under autocast, the autocast dtype); with
        ``cu_seqlens``, ``(S, heads, m, n)``.

    Raises:
        ValueError: shapes, heads, offsets, backend name.
        TypeError: dtypes, or arguments that are not tensors.
        RuntimeError: several devices, or ``backend="triton"`` where it cannot run.
    """
    key, found = None, None
    if cu_seqlens is None and process_group is None:
        key, found = _table.find((a, b, mask), ("gather", heads, logit_scale, backend))
    if found is None:
        checks.backend(backend)
        given = a, b, heads, logit_scale, mask, process_group, backend, cu_seqlens
        unrecorded(_check_gather, *given)
        _check_offsets(cu_seqlens, process_group, a=a, b=b)
        dtype = autocast_dtype(a.device.type)
        checks.one_kind(dtype, a=a, b=b)
        found = select(backend, b, process_group, cu_seqlens, dtype), dtype
        _table.add(key, found)
    chosen, dtype = found
    a, b = autocast(dtype, a, b)
    with autocast_off(a.device.type, dtype):
        g = chosen.gather(
            _by_head(a, heads), _by_head(b, heads), mask=_flat(mask), logit_scale=logit_scale
        )
    return g.to(a.dtype)


def gather_partial(
    a: Tensor,
    b: Tensor,
    *,
    heads: int = 1,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Partial gather of one frame (:mod:`da_triton.streaming`); see ``reference.gather_partial``.

    Arguments and errors as :func:`gather`.
    """
    checks.backend(backend)
    unrecorded(_check_gather, a, b, heads, logit_scale, mask)
    dtype = autocast_dtype(a.device.type)
    a, b = autocast(dtype, a, b)
    checks.one_kind(a=a, b=b)
    chosen = ops.select(backend, b)
    with autocast_off(a.device.type, dtype):
        return chosen.gather_partial(
            _by_head(a, heads), _by_head(b, heads), mask=_flat(mask), logit_scale=logit_scale
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
    r"""Each position's mixture ``Z = scale · G softmax_n(logit_scale · V)`` (A²-Nets, eq. 4).

    Args:
        g: descriptors, ``(N, heads, m, n)``, same dtype as v, or float32 when v is half precision.
        v: attention vectors, ``(N, heads·n, *positions)``, any strides; positions may differ from
        those of a and b. scale: factor on the result. softmax: False distributes with ``logit_scale
        · V`` itself. logit_scale: factor on v before the softmax. cu_seqlens: as in :func:`gather`:
        g is ``(S, heads, m, n)``, v ``(1, heads·n, total)``. backend: as in :func:`gather`.

    Returns:
        ``(N, heads·m, *positions of v)`` in v's dtype and memory format.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`gather`.
    """
    key, found = None, None
    if cu_seqlens is None:
        key, found = _table.find((v, g), ("distribute", scale, softmax, logit_scale, backend))
    if found is None:
        checks.backend(backend)
        some = cu_seqlens is not None
        unrecorded(checks.feature_map, "v", v, may_have_no_positions=some)
        checks.number(scale=scale, logit_scale=logit_scale)
        checks.flag(softmax=softmax)
        sequences = _check_offsets(cu_seqlens, None, v=v)
        dtype = autocast_dtype(v.device.type)
        unrecorded(checks.descriptors, g, v, sequences, dtype)
        found = select(backend, v, None, cu_seqlens, dtype), dtype
        _table.add(key, found)
    chosen, dtype = found
    (v,) = autocast(dtype, v)
    with autocast_off(v.device.type, dtype):
        z = chosen.distribute(
            g, _by_head(v, sizes(g)[1]), scale=scale, softmax=softmax, logit_scale=logit_scale
        )
    return positions_of(z, v, v.shape[0])


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
        b: logits of the attention maps, ``(N, heads·n, *positions)``, softmax over positions.
        v: logits of the attention vectors, ``(N, heads·n, *positions of its own)``, softmax over n.
        heads: divides all channels; head-major along the channel axis.
        logit_scale, logit_scale_v: factors on b and v before their softmax.
        scale: factor on the result.
        softmax_v: False distributes with ``logit_scale_v · V`` itself.
        mask: bool, ``(N, *positions)`` or ``(N, 1, *positions)`` of a and b, True where a position
            is included in the gather. It does not touch the distribution.
        extra: ``(extra_a, extra_b)``, tokens ``(1 or N, channels, K)`` that join the gather and
            are not distributed to.
        cu_seqlens: as in :func:`gather`: v is packed as a and b are, and tokens may be
            ``(S, channels, K)``.
        backend: as in :func:`gather`.
        process_group: as in :func:`gather`; v, and so the result, is a slice of this rank's too.
            ``extra`` is the same on every rank and counts once; all of its gradient is on rank 0.

    Returns:
        ``(N, heads·m, *positions of v)`` in the input dtype and v's memory format. Between the two
        steps the descriptors stay in float32 on the Triton backend.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`gather`.
    """
    key, found, some = None, None, process_group is not None or cu_seqlens is not None
    tokens: Any = () if extra is None else extra
    if not some and type(tokens) is tuple:
        options = heads, logit_scale, logit_scale_v, scale, softmax_v, backend
        key, found = _table.find((a, b, v, mask, *tokens), ("double_attention", *options))
    if found is None:
        checks.backend(backend)
        given = a, b, heads, logit_scale, mask, process_group, backend, cu_seqlens
        unrecorded(_check_gather, *given)
        unrecorded(_check_distribute, b, v, heads, logit_scale_v, scale, softmax_v, some)
        sequences = _check_offsets(cu_seqlens, process_group, a=a, b=b, v=v)
        if extra is not None:
            unrecorded(checks.extra, extra, a, b, sequences)
        dtype = autocast_dtype(a.device.type)
        named = dict(zip(("extra_a", "extra_b"), tokens, strict=False))
        checks.one_kind(dtype, a=a, b=b, v=v, **named)
        found = select(backend, b, process_group, cu_seqlens, dtype), dtype
        _table.add(key, found)
    chosen, dtype = found
    a, b, v, *tokens = autocast(dtype, a, b, v, *tokens)
    n = a.shape[0]
    batch = n if cu_seqlens is None else sizes(cu_seqlens)[0] - 1
    with autocast_off(a.device.type, dtype):
        tokens = [_by_head(token.expand(batch, -1, -1), heads) for token in tokens]
        g = chosen.gather(
            _by_head(a, heads, n),
            _by_head(b, heads, n),
            mask=_flat(mask),
            extra=tokens or None,
            logit_scale=logit_scale,
        )
        z = chosen.distribute(
            g, _by_head(v, heads, n), scale=scale, softmax=softmax_v, logit_scale=logit_scale_v
        )
    return positions_of(z, v, n)


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
    r"""The complete A²-Nets block: three pointwise convolutions, double attention, one convolution.

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
            the ``torch`` backend nothing), and A, B, V are projected again. False: V too (with
            ``torch``, what makes backward fast). ``"auto"``: V is projected again where a model
            says that it costs under a tenth of a training step; with ``torch`` as False. Through
            ``torch`` on anything but a CPU's float32 or float64, a graph made with True can be
            differentiated once, not twice; inside ``torch.func`` everything is saved.
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
    weights = (
        weight_a, bias_a, weight_b, bias_b, weight_v, bias_v, weight_out, bias_out,
    )  # fmt: skip
    options = Options(
        heads, logit_scale, logit_scale_v, scale, softmax_v, residual, order, recompute, backend
    )
    return calls.block(x, weights, mask, options, process_group)


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
            "b and v must have the same number of channels (heads·n), got "
            f"{b.shape[1]} and {v.shape[1]}."
        )
    checks.number(logit_scale_v=logit_scale_v, scale=scale)
    checks.flag(softmax_v=softmax_v)


def _check_offsets(cu_seqlens: Tensor | None, process_group: Any, **inputs: Tensor) -> int | None:
    """The number of packed sequences."""
    if cu_seqlens is None:
        return None
    if process_group is not None:
        raise ValueError(
            "cu_seqlens and process_group cannot be combined. Give each rank sequences of its own."
        )
    unrecorded(checks.cu_seqlens, cu_seqlens, **inputs)
    return sizes(cu_seqlens)[0] - 1


def _by_head(x: Tensor, heads: int, batch: int | None = None) -> Tensor:
    """``(N, heads·c, *positions)`` as ``(N, heads, c, L)``.

    A view, unless the positions are not evenly spaced in memory (a crop of inner axes). ``batch``:
    N, which an exported program then reads once for several tensors.
    """
    if exporting():  # where the batch is never empty, one operation does it
        batch = x.shape[0] if batch is None else batch
        return x.reshape(batch, heads, sizes(x)[1] // heads, -1)
    return split_heads(x.flatten(2), heads)


def _flat(mask: Tensor | None) -> Tensor | None:
    """The mask as ``(N, L)``."""
    return None if mask is None else mask.flatten(1)
