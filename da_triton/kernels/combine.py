r"""The small products between the passes over positions, which also merge a pass's partials.

    forward     M or G from partials   G = Wa M + ba·1ᵀ      H = scale · Wo G
    backward    dH from partials       dG = scale · Woᵀ dH   dM = Waᵀ dG      δ = Σ_C dM∘M

One launch each, on the matrix unit, with descriptors in two halves where the weights have half
precision (``dot_2xhalf``). A program owns a tile of n of one head of one sample, with all
features. The number of positions does not enter.

M, H, dH and dM are ``(N, C, total_n)``, G and dG are ``(N, heads, C_M, C_N)``, with
``total_n = heads·C_N``. H and dM have the dtype of the weights, because that is how the passes over
positions multiply with them; δ is made from dM so rounded (see ``delta_kernel``). All others
are float32 (float64 for float64).
"""

import torch
import triton
import triton.language as tl

from ..precision import POLICIES, accumulator, lse_dtype
from ..runtime import guard, launch, tiles
from .primitives import GRADIENT_RANGE, dot_2xhalf, exp, into_float16, load_matrix, log_sum, scalar


@triton.jit
def _merged(
    acc_base, max_base, rows, cols, R, C_N, NUM_PARTIALS, pivot, inverse,
    stride_partial, stride_n, stride_f, stride_max, MERGE: tl.constexpr,
):  # fmt: skip
    """``Σ_i acc·exp(mx − pivot) / total``, ``[rows, cols]``, in order; or the only partial."""
    inside = (rows < R)[:, None] & (cols < C_N)[None, :]
    ptrs = acc_base + cols[None, :] * stride_n + rows[:, None] * stride_f
    if not MERGE:
        return tl.load(ptrs, mask=inside, other=0.0)
    merged = tl.zeros((rows.shape[0], cols.shape[0]), acc_base.dtype.element_ty)
    for partial in range(0, NUM_PARTIALS):
        mx = tl.load(max_base + partial * stride_max + cols, mask=cols < C_N, other=-float("inf"))
        weight = exp(mx - pivot) * inverse
        merged += tl.load(ptrs + partial * stride_partial, mask=inside, other=0.0) * weight[None, :]
    return merged


@triton.jit(do_not_specialize=["HEADS", "NUM_PARTIALS"])
def combine_kernel(
    acc_ptr,  # partials of M (FROM_X) or of G − ba; any strides
    max_ptr,  # (N, NUM_PARTIALS, total_n); read if MERGE
    sum_ptr,  # (N, NUM_PARTIALS, total_n); read if MERGE
    lse_ptr,  # (N, total_n); written if MERGE, else read if HAS_BIAS
    wa_ptr,  # (HEADS·C_M, C), contiguous; read if FROM_X
    ba_ptr,  # (HEADS·C_M,); read if HAS_BIAS
    wo_ptr,  # (C_OUT, HEADS·C_M), contiguous; read if WRITE_H
    m_ptr,  # (N, C, total_n); written if WRITE_M
    g_ptr,  # (N, HEADS, C_M, C_N); written if WRITE_G
    h_ptr,  # (N, C_OUT, total_n); written if WRITE_H
    scale_h: "fp64",
    HEADS,
    C,
    C_M,
    C_N,
    C_OUT,
    NUM_PARTIALS,
    stride_acc_s,
    stride_acc_partial,
    stride_acc_h,
    stride_acc_n,
    stride_acc_f,
    FROM_X: tl.constexpr,
    MERGE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    WRITE_M: tl.constexpr,
    WRITE_G: tl.constexpr,
    WRITE_H: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: a tile of n of a head of a sample, all features. BLOCK_M ≥ C_M."""
    blocks = tl.cdiv(C_N, BLOCK_N)
    pid = tl.program_id(0)
    head = (pid // blocks % HEADS).to(tl.int64)
    n = (pid // (blocks * HEADS)).to(tl.int64)
    cols = ((pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    rows_m = tl.arange(0, BLOCK_M).to(tl.int64)
    inside_n = cols < C_N
    total_n = HEADS * C_N
    first = head * C_N  # of this head's n
    acc_base = acc_ptr + n * stride_acc_s + head * stride_acc_h
    max_base = max_ptr + n * NUM_PARTIALS * total_n + first
    dtype: tl.constexpr = h_ptr.dtype.element_ty

    pivot = tl.zeros((BLOCK_N,), ACC)
    total = tl.full((BLOCK_N,), 1.0, ACC)
    if MERGE:
        mx = tl.full((BLOCK_N,), -float("inf"), ACC)
        for partial in range(0, NUM_PARTIALS):
            part = tl.load(max_base + partial * total_n + cols, mask=inside_n, other=-float("inf"))
            mx = tl.maximum(mx, part)
        pivot = tl.where(mx == -float("inf"), 0.0, mx)
        total = tl.zeros((BLOCK_N,), ACC)
        for partial in range(0, NUM_PARTIALS):
            offs = partial * total_n + cols
            part = tl.load(max_base + offs, mask=inside_n, other=-float("inf"))
            sums = tl.load(
                sum_ptr + n * NUM_PARTIALS * total_n + first + offs, mask=inside_n, other=0.0
            )
            total += sums * exp(part - pivot)
        lse = log_sum(mx, total, lse_ptr.dtype.element_ty)
        if HAS_MASK:
            lse = tl.where(total == 0.0, float("inf"), lse)
            total = tl.where(total == 0.0, 1.0, total)
        tl.store(lse_ptr + n * total_n + first + cols, lse, mask=inside_n)
    inverse = 1.0 / total

    if FROM_X:
        g = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        for c0 in range(0, C, BLOCK_C):
            rows_c = (c0 + tl.arange(0, BLOCK_C)).to(tl.int64)
            m = _merged(
                acc_base, max_base, rows_c, cols, C, C_N, NUM_PARTIALS, pivot, inverse,
                stride_acc_partial, stride_acc_n, stride_acc_f, total_n, MERGE,
            )  # fmt: skip
            if WRITE_M:
                m_ptrs = m_ptr + (n * C + rows_c)[:, None] * total_n + (first + cols)[None, :]
                tl.store(m_ptrs, m, mask=(rows_c < C)[:, None] & inside_n[None, :])
            wa = load_matrix(wa_ptr + head * C_M * C, rows_m, rows_c, C_M, C, C, 1, dtype)
            g = dot_2xhalf(wa, m, g, PRECISION)
    else:
        g = _merged(
            acc_base, max_base, rows_m, cols, C_M, C_N, NUM_PARTIALS, pivot, inverse,
            stride_acc_partial, stride_acc_n, stride_acc_f, total_n, MERGE,
        )  # fmt: skip
    if HAS_BIAS:
        ba = tl.load(ba_ptr + head * C_M + rows_m, mask=rows_m < C_M, other=0.0).to(ACC)[:, None]
        if HAS_MASK:  # rows of P sum to 1, but for attention maps whose positions are all masked
            if not MERGE:
                lse = tl.load(lse_ptr + n * total_n + first + cols, mask=inside_n, other=0.0)
            ba = tl.where((lse == float("inf"))[None, :], 0.0, ba)
        g += ba
    if WRITE_G:
        g_ptrs = g_ptr + ((n * HEADS + head) * C_M + rows_m)[:, None] * C_N + cols[None, :]
        tl.store(g_ptrs, g, mask=(rows_m < C_M)[:, None] & inside_n[None, :])
    if WRITE_H:
        scale = scalar(scale_h, ACC)
        for c0 in range(0, C_OUT, BLOCK_C):
            rows_c = (c0 + tl.arange(0, BLOCK_C)).to(tl.int64)
            wo_base = wo_ptr + head * C_M
            wo = load_matrix(wo_base, rows_c, rows_m, C_OUT, C_M, HEADS * C_M, 1, dtype)
            h = dot_2xhalf(wo, g, tl.zeros((BLOCK_C, BLOCK_N), ACC), PRECISION) * scale
            h_ptrs = h_ptr + (n * C_OUT + rows_c)[:, None] * total_n + (first + cols)[None, :]
            tl.store(h_ptrs, h.to(dtype), mask=(rows_c < C_OUT)[:, None] & inside_n[None, :])


@triton.jit(do_not_specialize=["HEADS", "NUM_PARTIALS"])
def combine_backward_kernel(
    partials_ptr,  # (N, NUM_PARTIALS, total_n, C_OUT): partials of dH
    lse_ptr,  # (N, total_n): +inf where an attention map has no position
    m_ptr,  # (N, C, total_n)
    wa_ptr,  # (HEADS·C_M, C), contiguous
    wo_ptr,  # (C_OUT, HEADS·C_M), contiguous
    dh_ptr,  # (N, C_OUT, total_n)
    dg_ptr,  # (N, HEADS, C_M, C_N)
    dm_ptr,  # (N, C, total_n)
    delta_ptr,  # (N, total_n)
    shifted_ptr,  # (N, total_n): lse of the weights that go with dM; written in float16
    scale_h: "fp64",
    HEADS,
    C,
    C_M,
    C_N,
    C_OUT,
    NUM_PARTIALS,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: a tile of n of a head of a sample, all features. BLOCK_M ≥ C_M."""
    blocks = tl.cdiv(C_N, BLOCK_N)
    pid = tl.program_id(0)
    head = (pid // blocks % HEADS).to(tl.int64)
    n = (pid // (blocks * HEADS)).to(tl.int64)
    cols = ((pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    rows_m = tl.arange(0, BLOCK_M).to(tl.int64)
    inside_n = cols < C_N
    total_n = HEADS * C_N
    first = head * C_N
    dtype: tl.constexpr = dm_ptr.dtype.element_ty
    half: tl.constexpr = dtype == tl.float16

    dg = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for c0 in range(0, C_OUT, BLOCK_C):
        rows_c = (c0 + tl.arange(0, BLOCK_C)).to(tl.int64)
        inside = (rows_c < C_OUT)[:, None] & inside_n[None, :]
        dh = tl.zeros((BLOCK_C, BLOCK_N), ACC)
        for partial in range(0, NUM_PARTIALS):
            part = ((n * NUM_PARTIALS + partial) * total_n + first + cols)[
                None, :
            ] * C_OUT + rows_c[:, None]
            dh += tl.load(partials_ptr + part, mask=inside, other=0.0)
        ptrs = dh_ptr + (n * C_OUT + rows_c)[:, None] * total_n + (first + cols)[None, :]
        tl.store(ptrs, dh, mask=inside)
        wo_base = wo_ptr + head * C_M
        wo = load_matrix(wo_base, rows_m, rows_c, C_M, C_OUT, 1, HEADS * C_M, dtype)
        if half:
            dh = dh * (1.0 / GRADIENT_RANGE)
        dg = dot_2xhalf(wo, dh, dg, PRECISION)
    if half:
        dg = dg * GRADIENT_RANGE
    lse = tl.load(lse_ptr + n * total_n + first + cols, mask=inside_n, other=0.0)
    dg = tl.where((lse == float("inf"))[None, :], 0.0, dg * scalar(scale_h, ACC))
    ptrs = dg_ptr + ((n * HEADS + head) * C_M + rows_m)[:, None] * C_N + cols[None, :]
    tl.store(ptrs, dg, mask=(rows_m < C_M)[:, None] & inside_n[None, :])
    if half:  # no element of dM is larger than the sum, where no weight is larger than 1
        shifted, factor = into_float16(tl.sum(tl.abs(dg), 0), lse)
        tl.store(shifted_ptr + n * total_n + first + cols, shifted, mask=inside_n)
        dg = dg * factor[None, :]

    delta = tl.zeros((BLOCK_N,), ACC)
    for c0 in range(0, C, BLOCK_C):
        rows_c = (c0 + tl.arange(0, BLOCK_C)).to(tl.int64)
        inside = (rows_c < C)[:, None] & inside_n[None, :]
        offs = (n * C + rows_c)[:, None] * total_n + (first + cols)[None, :]
        wa = load_matrix(wa_ptr + head * C_M * C, rows_c, rows_m, C, C_M, 1, C, dtype)
        dm = dot_2xhalf(wa, dg, tl.zeros((BLOCK_C, BLOCK_N), ACC), PRECISION).to(dtype)
        tl.store(dm_ptr + offs, dm, mask=inside)
        delta += tl.sum(dm.to(ACC) * tl.load(m_ptr + offs, mask=inside, other=0.0), 0)
    tl.store(delta_ptr + n * total_n + first + cols, delta, mask=inside_n)


def empty(x, weights, heads):
    """Uninitialised lse and G of a batch like x."""
    batch, c_m, total_n = x.shape[0], weights.a.shape[0], weights.b.shape[0]
    lse = x.new_empty((batch, total_n), dtype=lse_dtype(x.dtype))
    g = x.new_empty((batch, heads, c_m // heads, total_n // heads), dtype=accumulator(x.dtype))
    return lse, g


@guard.proved(
    {"partials": ("NS--", "NS-", "NS-"), "lse": "N", "g": "N---"},
    writes=("lse", "g"),
    roles={"partials": ("", "", "positive")},
)
def merge_partials(
    partials, weights, lse, g, *, heads, scale, mask, from_x, want_m=False, want_h=True
):
    """Writes lse and G from the partials of pass 1; returns ``(M or None, H or None)``.

    ``weights``: weight_a, bias_a (or None) and weight_out, in the dtype of X.
    """
    acc, mx, total = partials
    _, num_partials, total_n, features = acc.shape
    strides = (acc.stride(0), acc.stride(1), total_n // heads * features, features, 1)
    return _descriptors(
        acc, mx, total, lse, weights, num_partials, strides, heads=heads, scale=scale, mask=mask,
        from_x=from_x, merge=True, bias=weights.bias_a, want_m=want_m, g=g, want_h=want_h,
    )  # fmt: skip


@guard.proved({"g": "N---"})
def reconstructing(g, weights, *, heads, scale):
    """``H = scale · Wo G`` alone, ``(N, C', total_n)`` in the dtype of the weights."""
    return _descriptors(
        g, g, g, g, weights, 1, (g.stride(0), 0, g.stride(1), g.stride(3), g.stride(2)),
        heads=heads, scale=scale, mask=False, from_x=False, merge=False, bias=None,
        want_m=False, g=None, want_h=True,
    )[-1]  # fmt: skip


def _descriptors(
    acc, mx, total, lse, weights, num_partials, strides, *, heads, scale, mask, from_x, merge, bias,
    want_m, g, want_h,
):  # fmt: skip
    a, out = weights.a, weights.out
    ready = launch.prepared(
        _forward, (a, weights.b, bias, out, acc, mx, total, lse, g), num_partials, strides, heads,
        mask, from_x, merge, want_m, want_h,
    )  # fmt: skip
    results = ready.empty()
    m = results[0] if want_m else None
    h = results[-1] if want_h else None
    ready(
        (
            acc, mx, total, lse, a, a if bias is None else bias, out if want_h else a,
            acc if m is None else m, acc if g is None else g, a if h is None else h,
        ),
        (scale,),
    )  # fmt: skip
    return m, h


def _forward(
    a, b, bias, out, acc, mx, total, lse, g, num_partials, strides, heads, mask, from_x, merge,
    want_m, want_h,
):  # fmt: skip
    batch, channels, total_n = acc.shape[0], a.shape[1], b.shape[0]
    c_m, c_n = a.shape[0] // heads, total_n // heads
    c_out = out.shape[0] if want_h else 1
    tile = tiles.tile("combine", a, c_m, c_n)
    steps = zip(("s", "partial", "h", "n", "f"), strides, strict=True)
    ready = launch.Launch(
        combine_kernel, a, tile, batch * heads * -(-c_n // tile.block_n),
        HEADS=heads, C=channels, C_M=c_m, C_N=c_n, C_OUT=c_out, NUM_PARTIALS=num_partials,
        FROM_X=from_x, MERGE=merge, HAS_BIAS=bias is not None, HAS_MASK=mask, WRITE_M=want_m,
        WRITE_G=g is not None, WRITE_H=want_h, BLOCK_C=tile.block_l,
        **{f"stride_acc_{axis}": step for axis, step in steps},
    )  # fmt: skip
    if want_m:
        ready.allocating(acc.dtype, (batch, channels, total_n))
    return ready.allocating(a.dtype, (batch, c_out, total_n)) if want_h else ready


@guard.proved({"partials": "NS--", "lse": "N", "m": "N--"})
def combine_backward(partials, lse, m, weights, *, heads, scale):
    """``(dH, dG, dM, δ, lse)`` from the partials of dH, ``(N, NUM_PARTIALS, total_n, C')``.

    In float16, the weights that go with dM and δ are those of the lse that is returned.
    """
    shifted = torch.empty_like(lse) if POLICIES[weights.a.dtype].extended else lse
    ready = launch.prepared(_combine_backward, (weights.a, weights.out, partials, lse, m), heads)
    dh, dg, delta, dm = ready.empty()
    ready((partials, lse, m, weights.a, weights.out, dh, dg, dm, delta, shifted), (scale,))
    return dh, dg, dm, delta, shifted


def _combine_backward(a, out, partials, lse, m, heads):
    batch, num_partials, total_n, c_out = partials.shape
    c_m, c_n, channels = a.shape[0] // heads, total_n // heads, a.shape[1]
    tile = tiles.tile("combine_backward", a, c_m, c_n)
    ready = launch.Launch(
        combine_backward_kernel, a, tile, batch * heads * -(-c_n // tile.block_n),
        HEADS=heads, C=channels, C_M=c_m, C_N=c_n, C_OUT=c_out, NUM_PARTIALS=num_partials,
        BLOCK_C=tile.block_l,
    )  # fmt: skip
    ready.allocating(
        partials.dtype, (batch, c_out, total_n), (batch, heads, c_m, c_n), (batch, total_n)
    )
    return ready.allocating(a.dtype, (batch, channels, total_n))
