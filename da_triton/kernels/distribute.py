r"""Distribute: ``Z = scale · G Q``, ``Q = softmax_n(s V)`` or ``Q = s V``, forward and backward.

    dQ = scale · Gᵀ dZ    rowsum_v = Σ_n Q∘dQ    dV = s · Q∘(dQ − rowsum_v)    dG = scale · dZ Qᵀ

Q is recomputed from V. Where G fits one tile, a program owns positions with all m and n:
each element of V, Z, dZ and dV is read or written once, and the program's part of dG is summed in
registers, then added to the others' in a fixed order. A larger G takes ``core_full_n`` (backward
then writes Q once, for dG), or where that does not fit, ``core_tiled``.

Tensors are ``(N, heads, channels, positions)`` in any strides.
"""

import triton
import triton.language as tl

from ..precision import accumulator
from ..runtime import guard, launch, tiles
from . import core_full_n, core_tiled
from .primitives import dot, load_matrix, load_tile, scalar, softmax_n, store_tile


@triton.jit(do_not_specialize=launch.COUNTS)
def distribute_kernel(
    g_ptr,  # (N, heads, C_M, C_N), any strides
    v_ptr,  # (N, heads, C_N, L)
    z_ptr,  # (N, heads, C_M, L)
    scale_z: "fp64",
    logit_scale: "fp64",
    HEADS,
    C_M,
    C_N,
    L_UNITS,
    BLOCKS_PER_SPLIT,
    NUM_SPLITS,
    stride_g_n,
    stride_g_h,
    stride_g_m,
    stride_g_k,
    stride_v_n,
    stride_v_h,
    stride_v_c,
    stride_v_l,
    stride_z_n,
    stride_z_h,
    stride_z_c,
    stride_z_l,
    SOFTMAX: tl.constexpr,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """One program: a split of the positions of one head of one sample, all m and n."""
    L = L_UNITS * ALIGN
    pid = tl.program_id(0)
    split = pid % NUM_SPLITS
    nh = (pid // NUM_SPLITS).to(tl.int64)
    n, h = nh // HEADS, nh % HEADS
    rows_m = tl.arange(0, BLOCK_M).to(tl.int64)
    rows_n = tl.arange(0, BLOCK_N).to(tl.int64)
    g_base = g_ptr + n * stride_g_n + h * stride_g_h
    v_base = v_ptr + (n * stride_v_n + h * stride_v_h) * ALIGN
    z_base = z_ptr + (n * stride_z_n + h * stride_z_h) * ALIGN
    scale = scalar(scale_z, ACC)
    scale_v = scalar(logit_scale, ACC)
    dtype: tl.constexpr = v_ptr.dtype.element_ty

    g = load_matrix(g_base, rows_m, rows_n, C_M, C_N, stride_g_m, stride_g_k, dtype)
    start = split * BLOCKS_PER_SPLIT * BLOCK_L
    for l0 in range(start, tl.minimum(start + BLOCKS_PER_SPLIT * BLOCK_L, L), BLOCK_L):
        cols = (l0 + tl.arange(0, BLOCK_L)).to(tl.int64)
        v = load_tile(v_base, rows_n, cols, C_N, L, stride_v_c * ALIGN, stride_v_l)
        q = v.to(ACC) * scale_v
        if SOFTMAX:
            q = softmax_n(q, rows_n, C_N)
        z = dot(g, q.to(dtype), tl.zeros((BLOCK_M, BLOCK_L), ACC), PRECISION) * scale
        store_tile(z_base, rows_m, cols, C_M, L, stride_z_c * ALIGN, stride_z_l, z)


@triton.jit(do_not_specialize=launch.COUNTS)
def distribute_backward_kernel(
    dz_ptr,  # (N, heads, C_M, L)
    g_ptr,  # (N, heads, C_M, C_N), any strides
    v_ptr,  # (N, heads, C_N, L)
    dv_ptr,  # (N, heads, C_N, L); written if NEED_V
    dg_ptr,  # (N·heads, NUM_SPLITS, C_M, C_N) float32/64: partial sums of dG; written if NEED_G
    scale_z: "fp64",
    logit_scale: "fp64",
    HEADS,
    C_M,
    C_N,
    L_UNITS,
    BLOCKS_PER_SPLIT,
    NUM_SPLITS,
    stride_dz_n,
    stride_dz_h,
    stride_dz_c,
    stride_dz_l,
    stride_g_n,
    stride_g_h,
    stride_g_m,
    stride_g_k,
    stride_v_n,
    stride_v_h,
    stride_v_c,
    stride_v_l,
    stride_dv_n,
    stride_dv_h,
    stride_dv_c,
    stride_dv_l,
    SOFTMAX: tl.constexpr,
    NEED_G: tl.constexpr,
    NEED_V: tl.constexpr,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """One program: a split of the positions of one head of one sample, all m and n."""
    L = L_UNITS * ALIGN
    pid = tl.program_id(0)
    split = pid % NUM_SPLITS
    nh = (pid // NUM_SPLITS).to(tl.int64)
    n, h = nh // HEADS, nh % HEADS
    rows_m = tl.arange(0, BLOCK_M).to(tl.int64)
    rows_n = tl.arange(0, BLOCK_N).to(tl.int64)
    dz_base = dz_ptr + (n * stride_dz_n + h * stride_dz_h) * ALIGN
    g_base = g_ptr + n * stride_g_n + h * stride_g_h
    v_base = v_ptr + (n * stride_v_n + h * stride_v_h) * ALIGN
    dv_base = dv_ptr + (n * stride_dv_n + h * stride_dv_h) * ALIGN
    scale = scalar(scale_z, ACC)
    scale_v = scalar(logit_scale, ACC)
    dtype: tl.constexpr = v_ptr.dtype.element_ty

    if NEED_V:
        g = load_matrix(g_base, rows_n, rows_m, C_N, C_M, stride_g_k, stride_g_m, dtype)
    dg = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    start = split * BLOCKS_PER_SPLIT * BLOCK_L
    for l0 in range(start, tl.minimum(start + BLOCKS_PER_SPLIT * BLOCK_L, L), BLOCK_L):
        cols = (l0 + tl.arange(0, BLOCK_L)).to(tl.int64)
        v = load_tile(v_base, rows_n, cols, C_N, L, stride_v_c * ALIGN, stride_v_l)
        dz = load_tile(dz_base, rows_m, cols, C_M, L, stride_dz_c * ALIGN, stride_dz_l)
        q = v.to(ACC) * scale_v
        if SOFTMAX:
            q = softmax_n(q, rows_n, C_N)
        if NEED_G:
            dg = dot(q.to(dtype), tl.trans(dz), dg, PRECISION)
        if NEED_V:
            dv = dot(g, dz, tl.zeros((BLOCK_N, BLOCK_L), ACC), PRECISION) * (scale * scale_v)
            if SOFTMAX:
                dv = q * (dv - tl.sum(q * dv, 0)[None, :])
            store_tile(dv_base, rows_n, cols, C_N, L, stride_dv_c * ALIGN, stride_dv_l, dv)
    if NEED_G:
        offs = rows_m[None, :] * C_N + rows_n[:, None]
        inside = (rows_n < C_N)[:, None] & (rows_m < C_M)[None, :]
        partial = (nh * NUM_SPLITS + split) * C_M * C_N
        tl.store(dg_ptr + partial + offs, dg * scale, mask=inside)


@guard.proved(
    {"g": "N---", "v": "N--L", "start": "N--L"},
    choice=lambda g, v, **_: core_full_n.few(v, g.shape[2]),
)
def distribute_forward(g, v, scale, softmax, logit_scale, bias=None, start=None, bias_out=None):
    """``Z (N, heads, m, L)`` in v's dtype and memory format, from ``G (N, heads, m, n)`` and v.

    ``bias``: ``(heads·n,)``, to be added to v, or None. With ``start``, like Z, or ``bias_out
    (m,)``, the result is ``scale · (start + G Q) + bias_out``.
    """
    c_m, c_n = g.shape[2], v.shape[2]
    z = launch.empty_activations_like(v, c_m)
    if v.shape[0] == 0:
        return z
    scalars = {"scale": scale, "logit_scale": logit_scale}
    g_fits_one_tile = tiles.g_fits_one_tile(v, c_m, c_n)
    added = {"start": start, "bias_out": bias_out}
    wanted = not g_fits_one_tile or any(t is not None for t in (bias, start, bias_out))
    if wanted and core_full_n.fits(v, c_n):
        core_full_n.distribute(g.to(v.dtype), v, bias, z, softmax=softmax, **scalars, **added)
        return z
    if start is not None or bias_out is not None:
        z = distribute_forward(g, v, scale, softmax, logit_scale, bias)
        z = z if start is None else z.add_(start, alpha=scale)
        return z if bias_out is None else z.add_(bias_out[:, None])
    v = with_bias(v, bias)
    if not g_fits_one_tile:
        lse = core_tiled.position_lse(v, logit_scale) if softmax else None
        core_tiled.apply_weights(g, v, z, lse=lse, **scalars)
        return z
    ready = launch.prepared(_forward, (v, g, z), softmax)
    ready((g, v, z), (scale, logit_scale))
    return z


def _forward(v, g, z, softmax):
    batch, heads, c_n, _ = v.shape
    c_m = g.shape[2]
    tile = tiles.tile("distribute", v, c_m, c_n)
    return launch.Launch(
        distribute_kernel, v, tile, batch * heads, activations={"v": v, "z": z}, strided={"g": g},
        HEADS=heads, C_M=c_m, C_N=c_n, SOFTMAX=softmax,
    )  # fmt: skip


@guard.proved(
    {"dz": "N--L", "g": "N---", "v": "N--L"},
    choice=lambda g, v, **_: core_full_n.few(v, g.shape[2], "gradient"),
)
def distribute_backward(dz, g, v, scale, softmax, logit_scale, need_g, need_v):
    """dG (float32, float64 for float64 inputs) and dV (None where not needed)."""
    batch, heads, c_n, _ = v.shape
    dv = launch.empty_activations_like(v) if need_v else None
    if batch == 0 or not (need_g or need_v):
        shape = batch, heads, g.shape[2], c_n
        return g.new_zeros(shape, dtype=accumulator(v.dtype)) if need_g else None, dv
    scalars = {"scale": scale, "softmax": softmax, "logit_scale": logit_scale}
    if tiles.g_fits_one_tile(v, g.shape[2], c_n):
        partials = _backward_in_one_tile(dz, g, v, dv, need_g, **scalars)
    elif core_full_n.fits(v, c_n):
        # Q and dV are made even if one is not needed: bits must not depend on what is.
        q = launch.empty_activations_like(v)
        made = launch.empty_activations_like(v) if dv is None else dv
        core_full_n.distribute_backward(dz, g.to(v.dtype), v, None, made, None, q, **scalars)
        partials = core_tiled.grad_g(dz, q, scale, 1.0, None) if need_g else None
    else:
        partials = _backward_in_tiles(dz, g, v, dv, need_g, **scalars)
    return (launch.add_partials(partials, g.shape) if need_g else None), dv


@guard.proved(
    {"dz": "N--L", "g": "N---", "v": "N--L", "dv": "N--L", "z": "N--L", "q": "N--L"},
    writes=("dv", "z"), choice=lambda g, v, **_: core_full_n.few(v, g.shape[2], "gradient"),
)  # fmt: skip
def backward_partials(dz, g, v, bias, dv, z, q, *, scale, softmax, logit_scale):
    """Writes dV, and Z unless None; returns partials of dG, ``(N, heads, num_partials, m, n)``.

    ``g``: perhaps rounded to the dtype of v. ``bias``: to be added to v, or None. ``q``: memory for
    Q, with the layout of v; its contents are undefined afterwards.
    """
    scalars = {"scale": scale, "softmax": softmax, "logit_scale": logit_scale}
    if core_full_n.fits(v, v.shape[2]):
        core_full_n.distribute_backward(dz, g.to(v.dtype), v, bias, dv, z, q, **scalars)
        partials = core_tiled.grad_g(dz, q, scale, 1.0, None)
    else:
        v = with_bias(v, bias)
        if z is not None:
            z.copy_(distribute_forward(g, v, scale, softmax, logit_scale))
        g_fits_one_tile = tiles.g_fits_one_tile(v, *g.shape[2:])
        backward = _backward_in_one_tile if g_fits_one_tile else _backward_in_tiles
        partials = backward(dz, g, v, dv, True, **scalars)
    return partials.unflatten(0, v.shape[:2])


def with_bias(v, bias):
    """v with a bias ``(heads·n,)``, which may be None."""
    return v if bias is None else v + bias.view(v.shape[1], v.shape[2], 1)


def _backward_in_one_tile(dz, g, v, dv, need_g, *, scale, softmax, logit_scale):
    """Writes dV unless None; returns partials of dG, if needed. One program holds all of G."""
    ready = launch.prepared(_backward, (v, dz, g, dv), softmax, need_g)
    partial = ready.empty()[0] if need_g else v
    ready((dz, g, v, v if dv is None else dv, partial), (scale, logit_scale))
    return partial


def _backward(v, dz, g, dv, softmax, need_g):
    batch, heads, c_n, _ = v.shape
    c_m = g.shape[2]
    tile = tiles.tile("distribute_backward", v, c_m, c_n)
    ready = launch.Launch(
        distribute_backward_kernel, v, tile, batch * heads,
        activations={"dz": dz, "v": v, "dv": v if dv is None else dv}, strided={"g": g},
        HEADS=heads, C_M=c_m, C_N=c_n, SOFTMAX=softmax, NEED_G=need_g, NEED_V=dv is not None,
    )  # fmt: skip
    return ready.allocating(accumulator(v.dtype), (batch * heads, ready.num_splits, c_m, c_n))


def _backward_in_tiles(dz, g, v, dv, need_g, *, scale, softmax, logit_scale):
    """The same where neither G nor the full n of its positions fits one program."""
    scalars = {"scale": scale, "logit_scale": logit_scale}
    lse = core_tiled.position_lse(v, logit_scale) if softmax else None
    if dv is not None:
        rowsum_v = core_tiled.row_dot(g, v, dz, lse=lse, **scalars) if softmax else None
        core_tiled.grad_logits(g, v, dz, dv, lse=lse, correction=rowsum_v, **scalars)
    return core_tiled.grad_g(dz, v, scale, logit_scale, lse) if need_g else None
