r"""The small products between the passes over positions, which also merge a pass's partials.

    forward     M or G from partials   G = Wa M + ba·1ᵀ      H = scale · Wo G
    backward    dH from partials       dG = scale · Woᵀ dH   dM = Waᵀ dG      δ = Σ_C dM∘M

On the matrix unit, with descriptors in two halves where the weights have half precision
(``dot_2xhalf``). Up to ``FEW`` partials are merged in the launch of the products, where a program
owns a tile of n of one head of one sample, with all features. More of them are merged in a launch
spread over features (``merge``), and the products follow, spread over rows of the weights.

M, H, dH and dM are ``(N, C, total_n)``, G and dG are ``(N, heads, C_M, C_N)``, with
``total_n = heads·C_N``. H and dM have the dtype of the weights, because that is how the passes over
positions multiply with them; δ is made from dM so rounded (see ``delta_kernel``). All others
are float32 (float64 for float64).
"""

import torch
import triton
import triton.language as tl

from ..planning.costs import FEW, SMALL_M
from ..precision import POLICIES, accumulator, lse_dtype
from ..runtime import guard, launch, tiles
from .delta import lowp_and_delta
from .merge import add, added, merge, merged_statistics
from .primitives import GRADIENT_RANGE, dot_2xhalf, into_float16, load_matrix, log_sum, scalar
from .product import product

IN_FLIGHT = 1024  # elements of them that a warp loads at once


@triton.jit(do_not_specialize=[*launch.COUNTS, "NUM_PARTIALS"])
def combine_kernel(
    acc_ptr,  # (N, NUM_PARTIALS, total_n, features): partials of M (FROM_X) or of G − ba
    max_ptr,  # (N, NUM_PARTIALS, total_n)
    sum_ptr,  # (N, NUM_PARTIALS, total_n)
    wa_ptr,  # (HEADS·C_M, C), contiguous; read if FROM_X
    ba_ptr,  # (HEADS·C_M,); read if HAS_BIAS
    wo_ptr,  # (C_OUT, HEADS·C_M), contiguous; read if WRITE_H
    lse_ptr,  # (N, total_n)
    m_ptr,  # (N, C, total_n); written if WRITE_M
    g_ptr,  # (N, HEADS, C_M, C_N)
    h_ptr,  # (N, C_OUT, total_n); written if WRITE_H
    scale_h: "fp64",
    HEADS,
    C,
    C_M,
    C_N,
    C_OUT,
    NUM_PARTIALS,
    BLOCKS_PER_SPLIT,
    NUM_SPLITS,
    FROM_X: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    WRITE_M: tl.constexpr,
    WRITE_H: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,  # partials that are loaded at once
):
    """One program: a tile of n of a head of a sample, all features, a split of H's channels.

    BLOCK_M ≥ C_M. The first split writes everything but H.
    """
    blocks = tl.cdiv(C_N, BLOCK_N)
    pid = tl.program_id(0)
    split = pid % NUM_SPLITS
    pid = pid // NUM_SPLITS
    head = (pid // blocks % HEADS).to(tl.int64)
    n = (pid // (blocks * HEADS)).to(tl.int64)
    cols = ((pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    rows_m = tl.arange(0, BLOCK_M).to(tl.int64)
    inside_n = cols < C_N
    writes = cols < tl.where(split == 0, C_N, 0)
    total_n = HEADS * C_N
    first = head * C_N  # of this head's n
    base = n * NUM_PARTIALS * total_n + first
    dtype: tl.constexpr = h_ptr.dtype.element_ty

    max_base = max_ptr + base
    mx, pivot, total = merged_statistics(
        max_base, sum_ptr + base, cols, C_N, NUM_PARTIALS, total_n, GROUP
    )
    lse = log_sum(mx, total, lse_ptr.dtype.element_ty)
    if HAS_MASK:
        lse = tl.where(total == 0.0, float("inf"), lse)
        total = tl.where(total == 0.0, 1.0, total)
    tl.store(lse_ptr + n * total_n + first + cols, lse, mask=writes)
    inverse = (1.0 / total)[None, :]

    if FROM_X:
        g = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        for c0 in range(0, C, BLOCK_C):
            rows_c = (c0 + tl.arange(0, BLOCK_C)).to(tl.int64)
            m = added(
                acc_ptr + base * C, max_base, rows_c, cols, C, C_N, NUM_PARTIALS, pivot, total_n,
                GROUP, True,
            )  # fmt: skip
            m = tl.trans(m) * inverse
            if WRITE_M:
                m_ptrs = m_ptr + (n * C + rows_c)[:, None] * total_n + (first + cols)[None, :]
                tl.store(m_ptrs, m, mask=(rows_c < C)[:, None] & writes[None, :])
            wa = load_matrix(wa_ptr + head * C_M * C, rows_m, rows_c, C_M, C, C, 1, dtype)
            g = dot_2xhalf(wa, m, g, PRECISION)
    else:
        g = added(
            acc_ptr + base * C_M, max_base, rows_m, cols, C_M, C_N, NUM_PARTIALS, pivot, total_n,
            GROUP, True,
        )  # fmt: skip
        g = tl.trans(g) * inverse
    if HAS_BIAS:
        ba = tl.load(ba_ptr + head * C_M + rows_m, mask=rows_m < C_M, other=0.0).to(ACC)[:, None]
        if HAS_MASK:  # rows of P sum to 1, but for attention maps whose positions are all masked
            ba = tl.where((lse == float("inf"))[None, :], 0.0, ba)
        g += ba
    g_ptrs = g_ptr + ((n * HEADS + head) * C_M + rows_m)[:, None] * C_N + cols[None, :]
    tl.store(g_ptrs, g, mask=(rows_m < C_M)[:, None] & writes[None, :])
    if WRITE_H:
        scale = scalar(scale_h, ACC)
        start = split * BLOCKS_PER_SPLIT * BLOCK_C
        for c0 in range(start, tl.minimum(start + BLOCKS_PER_SPLIT * BLOCK_C, C_OUT), BLOCK_C):
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
    ADDED: tl.constexpr,  # dH is there; else its partials are added
    GROUP: tl.constexpr,  # partials that are loaded at once
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

    base = partials_ptr + (n * NUM_PARTIALS * total_n + first) * C_OUT
    if ADDED:
        base = dh_ptr + n * C_OUT * total_n + first
    dg = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for c0 in range(0, C_OUT, BLOCK_C):
        rows_c = (c0 + tl.arange(0, BLOCK_C)).to(tl.int64)
        inside = (rows_c < C_OUT)[:, None] & inside_n[None, :]
        if ADDED:
            dh = load_matrix(base, rows_c, cols, C_OUT, C_N, total_n, 1, ACC)
        else:
            dh = added(base, base, rows_c, cols, C_OUT, C_N, NUM_PARTIALS, 0, total_n, GROUP, False)
            dh = tl.trans(dh)
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
    num_splits=lambda partials, **_: 3 if partials[0].shape[1] > FEW else 2,
)
def merge_partials(
    partials, weights, lse, g, *, heads, scale, mask, from_x, want_m=False, want_h=True
):
    """Writes lse and G from the partials of pass 1; returns ``(M or None, H or None)``.

    ``weights``: weight_a, bias_a (or None) and weight_out, in the dtype of X.
    """
    acc = partials[0]
    batch, num_partials, total_n, features = acc.shape
    a, bias, out = weights.a, weights.bias_a, weights.out
    few = num_partials <= FEW
    # Of many features, M would be written and read once more than a forward pass may cost.
    whole = from_x and want_h and not want_m and g.shape[2] > SMALL_M
    if whole or (few and (from_x or want_h)):
        with_h = want_h and few
        ready = launch.prepared(
            _combine, (a, bias, out, *partials, g), heads, mask, from_x, want_m, with_h
        )
        made = ready.empty()
        m, h = made[0] if want_m else None, made[-1] if with_h else None
        others = a if bias is None else bias, out if with_h else a
        results = lse, acc if m is None else m, g, a if h is None else h
        ready((*partials, a, *others, *results), (scale,))
        return m, _h(g, weights, scale) if want_h and not few else h
    if from_x:
        m = acc.new_empty((batch, features, total_n))
        merge(partials, m[:, None], lse, mask=mask)
        by_head = a.unflatten(0, (heads, -1))
        product(by_head, _by_head(m, heads), g, bias=bias, lse=lse if mask else None)
    else:
        m = None
        merge(partials, g, lse, bias, mask=mask)
    return m if want_m else None, _h(g, weights, scale) if want_h else None


@guard.proved({"g": "N---"})
def reconstructing(g, weights, *, heads, scale):
    """``H = scale · Wo G`` alone, ``(N, C', total_n)`` in the dtype of the weights."""
    return _h(g, weights, scale)


def _h(g, weights, scale):
    out = weights.out
    batch, heads, _, c_n = g.shape
    h = out.new_empty((batch, len(out), heads * c_n))
    per_head = out.unflatten(1, (heads, -1)).transpose(0, 1)
    product(per_head, g, _by_head(h, heads), scale)
    return h


def _combine(a, bias, out, acc, mx, total, g, heads, mask, from_x, want_m, want_h):
    batch, _, c_m, c_n = g.shape
    channels, num_partials, total_n = a.shape[1], acc.shape[1], heads * c_n
    c_out = out.shape[0] if want_h else 1
    tile = tiles.tile("combine", a, c_m, c_n)
    programs = batch * heads * -(-c_n // tile.block_n)
    per_split, num_splits = launch.split_positions(programs, c_out, tile, a.device)
    if 4 * programs > launch.num_sms(a.device):  # each reads the partials again
        per_split, num_splits = per_split * num_splits, 1
    ready = launch.Launch(
        combine_kernel, a, tile, programs * num_splits,
        HEADS=heads, C=channels, C_M=c_m, C_N=c_n, C_OUT=c_out, NUM_PARTIALS=num_partials,
        BLOCKS_PER_SPLIT=per_split, NUM_SPLITS=num_splits, BLOCK_C=tile.block_l,
        FROM_X=from_x, HAS_BIAS=bias is not None, HAS_MASK=mask, WRITE_M=want_m, WRITE_H=want_h,
        GROUP=_group(tile, tile.block_l if from_x else tile.block_m),
    )  # fmt: skip
    if want_m:
        ready.allocating(acc.dtype, (batch, channels, total_n))
    return ready.allocating(a.dtype, (batch, c_out, total_n)) if want_h else ready


@guard.proved(
    {"partials": "NS--", "lse": "N", "m": "N--"},
    num_splits=lambda partials, **_: 3 if partials.shape[1] > FEW else 2,
)
def combine_backward(partials, lse, m, weights, *, heads, scale):
    """``(dH, dG, dM, δ, lse)`` from the partials of dH, ``(N, NUM_PARTIALS, total_n, C')``.

    In float16, the weights that go with dM and δ are those of the lse that is returned.
    """
    many = partials.shape[1] > FEW
    if many and weights.a.shape[0] > SMALL_M * heads:
        return _backward_products(add(partials), lse, m, weights, heads, scale)
    shifted = torch.empty_like(lse) if POLICIES[weights.a.dtype].extended else lse
    ready = launch.prepared(_combine_backward, (weights.a, weights.out, partials, lse, m), heads)
    dg, delta, dm, *dh = ready.empty()
    dh = add(partials) if many else dh[0]
    ready((partials, lse, m, weights.a, weights.out, dh, dg, dm, delta, shifted), (scale,))
    return dh, dg, dm, delta, shifted


def _backward_products(dh, lse, m, weights, heads, scale):
    """The same from dH, a product a launch."""
    by_head = weights.a.unflatten(0, (heads, -1))
    dg = dh.new_empty((len(dh), *by_head.shape[:2], dh.shape[2] // heads))
    per_head = weights.out.unflatten(1, (heads, -1)).permute(1, 2, 0)
    product(per_head, _by_head(dh, heads), dg, scale, lse=lse, gradient=True)
    dm = torch.empty_like(m)
    product(by_head.mT, dg, _by_head(dm, heads), gradient=True)
    dm, delta, shifted = lowp_and_delta(
        dm[:, None, None], m[:, None], weights.a.dtype, lse[:, None]
    )  # fmt: skip
    return dh, dg, dm.squeeze(1), delta.squeeze(1), shifted.squeeze(1)


def _by_head(y, heads):
    """``(N, features, total_n)`` as ``(N, heads, features, n)``."""
    return y.unflatten(2, (heads, -1)).transpose(1, 2)


def _combine_backward(a, out, partials, lse, m, heads):
    batch, num_partials, total_n, c_out = partials.shape
    c_m, c_n, channels = a.shape[0] // heads, total_n // heads, a.shape[1]
    tile = tiles.tile("combine_backward", a, c_m, c_n)
    ready = launch.Launch(
        combine_backward_kernel, a, tile, batch * heads * -(-c_n // tile.block_n),
        HEADS=heads, C=channels, C_M=c_m, C_N=c_n, C_OUT=c_out, NUM_PARTIALS=num_partials,
        BLOCK_C=tile.block_l, ADDED=num_partials > FEW, GROUP=_group(tile, tile.block_l),
    )  # fmt: skip
    ready.allocating(partials.dtype, (batch, heads, c_m, c_n), (batch, total_n))
    ready.allocating(a.dtype, (batch, channels, total_n))
    if num_partials <= FEW:
        ready.allocating(partials.dtype, (batch, c_out, total_n))
    return ready


def _group(tile, rows):
    """How many of a few partials a program loads at once: tiles of rows and n."""
    return max(1, min(FEW, IN_FLIGHT * tile.num_warps // (rows * tile.block_n)))
