r"""Gather: ``G = A softmax_L(s B)ᵀ``, forward and backward.

Forward, online over positions. A chunk of positions holds, for every map, its largest logit ``mx``,
``sum = Σ exp(x − mx)`` and ``acc = Σ a·exp(x − mx)``; two chunks merge by rescaling to the larger
``mx``. Chunks are worked by separate programs and merged in a fixed order, so the result is
bitwise repeatable. ``lse = mx + log(sum)``. A map whose positions are all masked has ``lse = +inf``
and G = 0; without a mask, logits of ``-inf`` alone give NaN, as ``torch.softmax`` does.

Backward, with ``P = exp(s B − lse)`` recomputed and ``δ = Σ_m dG∘G`` (which equals ``Σ_L P∘dP``, so
the softmax's correction needs no pass over positions):

    dA = dG P            dB = s · P∘(dGᵀ A − δ)

Neither has a sum over positions. Where dG fits one tile a program owns positions with all maps and
features, and reads and writes each element of A, B, dA and dB once; elsewhere see ``tiled``.

Tensors are ``(N, heads, channels, positions)`` in any strides.
"""

import torch
import triton
import triton.language as tl

from . import configs, launch, tiled
from .tiles import (
    dot,
    exp,
    exp_minus,
    load_keep,
    load_map,
    load_matrix,
    log_sum,
    online_softmax,
    scalar,
    store_map,
)  # fmt: skip


@triton.jit(do_not_specialize=[*launch.COUNTS, "SLOT", "SLOTS"])
def gather_kernel(
    a_ptr,  # (N, heads, C_M, L)
    b_ptr,  # (N, heads, C_N, L)
    keep_ptr,  # (N, L) uint8, 0 where a position takes no part; read if HAS_MASK
    acc_ptr,  # (N·heads, SLOTS, C_M, C_N) float32/64: partial sums, or G if FINAL
    max_ptr,  # (N·heads, SLOTS, C_N): partial maxima; not touched if FINAL
    sum_ptr,  # (N·heads, SLOTS, C_N): partial sums, or lse if FINAL
    logit_scale: "fp64",
    HEADS,
    C_M,
    C_N,
    L_UNITS,
    CHUNK_BLOCKS,
    SPLITS,
    SLOT,
    SLOTS,
    stride_a_n,
    stride_a_h,
    stride_a_c,
    stride_a_l,
    stride_b_n,
    stride_b_h,
    stride_b_c,
    stride_b_l,
    stride_keep_n,
    stride_keep_l,
    HAS_MASK: tl.constexpr,
    FINAL: tl.constexpr,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """One program: blocks of maps and features, a chunk of positions, a head of a sample."""
    L = L_UNITS * ALIGN
    blocks_m = tl.cdiv(C_M, BLOCK_M)
    tiles = blocks_m * tl.cdiv(C_N, BLOCK_N)
    pid = tl.program_id(0)
    tile = pid % tiles
    split = (pid // tiles) % SPLITS
    nh = (pid // (tiles * SPLITS)).to(tl.int64)
    n, h = nh // HEADS, nh % HEADS

    rows_m = ((tile % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    rows_n = ((tile // blocks_m) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    a_base = a_ptr + (n * stride_a_n + h * stride_a_h) * ALIGN
    b_base = b_ptr + (n * stride_b_n + h * stride_b_h) * ALIGN
    scale = scalar(logit_scale, ACC)

    mx = tl.full((BLOCK_N,), -float("inf"), ACC)
    total = tl.zeros((BLOCK_N,), ACC)
    acc = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    start = split * CHUNK_BLOCKS * BLOCK_L
    for l0 in range(start, tl.minimum(start + CHUNK_BLOCKS * BLOCK_L, L), BLOCK_L):
        cols = (l0 + tl.arange(0, BLOCK_L)).to(tl.int64)
        taking_part = cols < L
        b = load_map(b_base, rows_n, cols, C_N, L, stride_b_c * ALIGN, stride_b_l)
        a = load_map(a_base, rows_m, cols, C_M, L, stride_a_c * ALIGN, stride_a_l)
        if HAS_MASK:
            taking_part = load_keep(keep_ptr + n * stride_keep_n, cols, L, stride_keep_l)
            a = tl.where(
                taking_part[None, :], a, 0.0
            )  # a masked position may hold anything, even NaN
        x = tl.where(taking_part[None, :], b.to(ACC) * scale, -float("inf"))
        p, rescale, mx, total = online_softmax(x, mx, total)
        acc = dot(p.to(a.dtype), tl.trans(a), acc * rescale[:, None], PRECISION)

    slot = nh * SLOTS + SLOT + split
    lse_dtype: tl.constexpr = sum_ptr.dtype.element_ty
    inside_n = rows_n < C_N
    if FINAL:
        lse = log_sum(mx, total, lse_dtype)
        if HAS_MASK:
            lse = tl.where(total == 0.0, float("inf"), lse)
            total = tl.where(total == 0.0, 1.0, total)
        acc = acc / total[:, None]
        tl.store(sum_ptr + slot * C_N + rows_n, lse, mask=inside_n)
    else:
        tl.store(max_ptr + slot * C_N + rows_n, mx, mask=inside_n)
        tl.store(sum_ptr + slot * C_N + rows_n, total, mask=inside_n)
    ptrs = acc_ptr + slot * C_M * C_N + rows_m[None, :] * C_N + rows_n[:, None]
    tl.store(ptrs, acc, mask=inside_n[:, None] & (rows_m < C_M)[None, :])


@triton.jit(do_not_specialize=["SLOTS"])
def gather_combine_kernel(
    acc_ptr,  # (N·heads, SLOTS, C_M, C_N): partial sums
    max_ptr,  # (N·heads, SLOTS, C_N): partial maxima
    sum_ptr,  # (N·heads, SLOTS, C_N): partial sums of exponentials
    g_ptr,  # (N·heads, C_M, C_N): G
    lse_ptr,  # (N·heads, C_N)
    C_M,
    C_N,
    SLOTS,
    HAS_MASK: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: a block of maps and features of one head of one sample, chunks in order."""
    blocks_m = tl.cdiv(C_M, BLOCK_M)
    tiles = blocks_m * tl.cdiv(C_N, BLOCK_N)
    pid = tl.program_id(0)
    tile = pid % tiles
    nh = (pid // tiles).to(tl.int64)
    rows_m = (tile % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_n = (tile // blocks_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = rows_n < C_N
    inside = (rows_m < C_M)[:, None] & inside_n[None, :]
    offs = rows_m[:, None] * C_N + rows_n[None, :]

    mx = tl.full((BLOCK_N,), -float("inf"), ACC)
    total = tl.zeros((BLOCK_N,), ACC)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for i in range(0, SLOTS):
        slot = nh * SLOTS + i
        part_mx = tl.load(max_ptr + slot * C_N + rows_n, mask=inside_n, other=-float("inf"))
        part_total = tl.load(sum_ptr + slot * C_N + rows_n, mask=inside_n, other=0.0)
        part = tl.load(acc_ptr + slot * C_M * C_N + offs, mask=inside, other=0.0)
        new_mx = tl.maximum(mx, part_mx)
        pivot = tl.where(new_mx == -float("inf"), 0.0, new_mx)
        old, new = exp(mx - pivot), exp(part_mx - pivot)
        total = total * old + part_total * new
        acc = acc * old[None, :] + part * new[None, :]
        mx = new_mx

    lse = log_sum(mx, total, lse_ptr.dtype.element_ty)
    if HAS_MASK:
        lse = tl.where(total == 0.0, float("inf"), lse)
        total = tl.where(total == 0.0, 1.0, total)
    tl.store(lse_ptr + nh * C_N + rows_n, lse, mask=inside_n)
    tl.store(g_ptr + nh * C_M * C_N + offs, acc / total[None, :], mask=inside)


@triton.jit(do_not_specialize=["HEADS"])
def gather_delta_kernel(
    dg_ptr,  # (N, heads, C_M, C_N), any strides
    g_ptr,  # (N·heads, C_M, C_N)
    delta_ptr,  # (N·heads, C_N): Σ_m dG∘G
    HEADS,
    C_M,
    C_N,
    stride_dg_n,
    stride_dg_h,
    stride_dg_m,
    stride_dg_k,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: a block of maps of one head of one sample.

    dG is rounded as the products of the backward pass round it. The difference dP − δ then has no
    bias that is common to all positions, which would add up in the gradient of B's weights.
    """
    blocks = tl.cdiv(C_N, BLOCK_N)
    pid = tl.program_id(0)
    nh = (pid // blocks).to(tl.int64)
    rows_n = ((pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    dg_base = dg_ptr + nh // HEADS * stride_dg_n + nh % HEADS * stride_dg_h
    g_base = g_ptr + nh * C_M * C_N
    dtype: tl.constexpr = g_ptr.dtype.element_ty
    delta = tl.zeros((BLOCK_N,), dtype)
    for m0 in range(0, C_M, BLOCK_M):
        rows_m = (m0 + tl.arange(0, BLOCK_M)).to(tl.int64)
        dg = load_matrix(dg_base, rows_m, rows_n, C_M, C_N, stride_dg_m, stride_dg_k, DTYPE)
        g = load_matrix(g_base, rows_m, rows_n, C_M, C_N, C_N, 1, dtype)
        delta += tl.sum(dg.to(dtype) * g, 0)
    tl.store(delta_ptr + nh * C_N + rows_n, delta, mask=rows_n < C_N)


@triton.jit(do_not_specialize=launch.COUNTS)
def gather_backward_kernel(
    dg_ptr,  # (N, heads, C_M, C_N), any strides
    a_ptr,  # (N, heads, C_M, L)
    b_ptr,  # (N, heads, C_N, L)
    keep_ptr,  # (N, L) uint8; read if HAS_MASK
    lse_ptr,  # (N·heads, C_N)
    delta_ptr,  # (N·heads, C_N): Σ_m dG∘G
    da_ptr,  # (N, heads, C_M, L); written if NEED_A
    db_ptr,  # (N, heads, C_N, L); written if NEED_B
    logit_scale: "fp64",
    HEADS,
    C_M,
    C_N,
    L_UNITS,
    CHUNK_BLOCKS,
    SPLITS,
    stride_dg_n,
    stride_dg_h,
    stride_dg_m,
    stride_dg_k,
    stride_a_n,
    stride_a_h,
    stride_a_c,
    stride_a_l,
    stride_b_n,
    stride_b_h,
    stride_b_c,
    stride_b_l,
    stride_keep_n,
    stride_keep_l,
    stride_da_n,
    stride_da_h,
    stride_da_c,
    stride_da_l,
    stride_db_n,
    stride_db_h,
    stride_db_c,
    stride_db_l,
    HAS_MASK: tl.constexpr,
    NEED_A: tl.constexpr,
    NEED_B: tl.constexpr,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    P_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """One program: a chunk of positions of one head of one sample, all maps and features.

    BLOCK_M ≥ C_M and BLOCK_N ≥ C_N: dG is read once, A and B once, dA and dB written once.
    """
    L = L_UNITS * ALIGN
    pid = tl.program_id(0)
    split = pid % SPLITS
    nh = (pid // SPLITS).to(tl.int64)
    n, h = nh // HEADS, nh % HEADS
    rows_m = tl.arange(0, BLOCK_M).to(tl.int64)
    rows_n = tl.arange(0, BLOCK_N).to(tl.int64)
    dg_base = dg_ptr + n * stride_dg_n + h * stride_dg_h
    a_base = a_ptr + (n * stride_a_n + h * stride_a_h) * ALIGN
    b_base = b_ptr + (n * stride_b_n + h * stride_b_h) * ALIGN
    da_base = da_ptr + (n * stride_da_n + h * stride_da_h) * ALIGN
    db_base = db_ptr + (n * stride_db_n + h * stride_db_h) * ALIGN
    scale = scalar(logit_scale, ACC)
    dtype: tl.constexpr = a_ptr.dtype.element_ty

    dg = load_matrix(dg_base, rows_n, rows_m, C_N, C_M, stride_dg_k, stride_dg_m, dtype)
    lse = tl.load(lse_ptr + nh * C_N + rows_n, mask=rows_n < C_N, other=float("inf"))
    delta = tl.load(delta_ptr + nh * C_N + rows_n, mask=rows_n < C_N, other=0.0)
    start = split * CHUNK_BLOCKS * BLOCK_L
    for l0 in range(start, tl.minimum(start + CHUNK_BLOCKS * BLOCK_L, L), BLOCK_L):
        cols = (l0 + tl.arange(0, BLOCK_L)).to(tl.int64)
        b = load_map(b_base, rows_n, cols, C_N, L, stride_b_c * ALIGN, stride_b_l)
        p = exp_minus(b.to(ACC) * scale, lse[:, None])
        if HAS_MASK:
            keep = load_keep(keep_ptr + n * stride_keep_n, cols, L, stride_keep_l)
            p = tl.where(keep[None, :], p, 0.0)
        if NEED_A:
            p_operand = (p * P_SCALE).to(dtype)
            da = dot(tl.trans(dg), p_operand, tl.zeros((BLOCK_M, BLOCK_L), ACC), PRECISION)
            da = da / P_SCALE
            store_map(da_base, rows_m, cols, C_M, L, stride_da_c * ALIGN, stride_da_l, da)
        if NEED_B:
            a = load_map(a_base, rows_m, cols, C_M, L, stride_a_c * ALIGN, stride_a_l)
            dp = dot(dg, a, tl.zeros((BLOCK_N, BLOCK_L), ACC), PRECISION)
            db = scale * p * (dp - delta[:, None])
            if HAS_MASK:
                db = tl.where(keep[None, :], db, 0.0)  # 0 · NaN, where A holds anything
            store_map(db_base, rows_n, cols, C_N, L, stride_db_c * ALIGN, stride_db_l, db)


def gather_forward(sources, logit_scale):
    """G and lse of positions that come from one or more sources (the map itself, extra tokens).

    ``sources``: list of ``(a, b, keep)``: ``(N, heads, m, L)``, ``(N, heads, n, L)``, ``(N, L)``
    uint8 or None. Returns ``G (N, heads, m, n)`` in float32 (float64 for float64 maps) and
    ``lse (N, heads, n)`` in float32 (float64 for float32 and float64 maps), contiguous.
    """
    a, b, keep = sources[0]
    has_mask = keep is not None
    batch, heads, c_m, _ = a.shape
    c_n = b.shape[2]
    acc_dtype = launch.accumulator(a.dtype)
    g = a.new_empty((batch, heads, c_m, c_n), dtype=acc_dtype)
    lse = a.new_empty((batch, heads, c_n), dtype=launch.lse_dtype(a.dtype))
    if batch == 0:
        return g, lse
    tile = configs.tile("gather", a, c_m, c_n)
    tiles = triton.cdiv(c_m, tile.block_m) * triton.cdiv(c_n, tile.block_n)
    chunks = [launch.chunks(batch * heads * tiles, s[0].shape[-1], tile, a.device) for s in sources]
    slots = sum(splits for _, splits in chunks)
    if slots == 1:
        acc, mx, total = g, lse, lse
    else:
        acc = a.new_empty((batch * heads, slots, c_m, c_n), dtype=acc_dtype)
        mx = a.new_empty((batch * heads, slots, c_n), dtype=acc_dtype)
        total = torch.empty_like(mx)
    slot = 0
    with launch.device_of(a):
        for (a, b, keep), (chunk, splits) in zip(sources, chunks, strict=True):
            align = launch.alignment(a, b)
            gather_kernel[(batch * heads * splits * tiles,)](
                a, b, b if keep is None else keep, acc, mx, total,
                logit_scale, heads, c_m, c_n, a.shape[-1] // align, chunk, splits, slot, slots,
                *launch.strides(a, align), *launch.strides(b, align),
                *((0, 0) if keep is None else keep.stride()),
                HAS_MASK=keep is not None, FINAL=slots == 1, ALIGN=align,
                BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_L=tile.block_l,
                **launch.options(a, tile),
            )  # fmt: skip
            slot += splits
        if slots > 1:
            tile = configs.tile("gather_combine", a, c_m, c_n)
            tiles = triton.cdiv(c_m, tile.block_m) * triton.cdiv(c_n, tile.block_n)
            gather_combine_kernel[(batch * heads * tiles,)](
                acc, mx, total, g, lse, c_m, c_n, slots,
                HAS_MASK=has_mask, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
                **launch.options(a, tile, products=False),
            )  # fmt: skip
    return g, lse


def gather_backward(dg, a, b, keep, g, lse, logit_scale, need_a, need_b):
    """dA and dB (None where not needed) from ``dG``, the inputs, ``G`` and ``lse``."""
    batch, heads, c_m, length = a.shape
    c_n = b.shape[2]
    da = launch.empty_map_like(a) if need_a else None
    db = launch.empty_map_like(b) if need_b else None
    if batch == 0 or not (need_a or need_b):
        return da, db
    delta = _delta(dg, g, a)
    if not configs.one_tile(a, c_m, c_n):
        if need_a:
            tiled.mix(dg, b, da, logit_scale=logit_scale, lse=lse, per_map=True, keep=keep)
        if need_b:
            tiled.map_gradient(
                dg, b, a, db, logit_scale=logit_scale, lse=lse, correction=delta, per_map=True,
                keep=keep,
            )  # fmt: skip
        return da, db
    tile = configs.tile("gather_backward", a, c_m, c_n)
    chunk, splits = launch.chunks(batch * heads, length, tile, a.device)
    da_, db_ = (a if da is None else da), (b if db is None else db)
    align = launch.alignment(a, b, da_, db_)
    with launch.device_of(a):
        gather_backward_kernel[(batch * heads * splits,)](
            dg, a, b, b if keep is None else keep, lse, delta, da_, db_,
            logit_scale, heads, c_m, c_n, length // align, chunk, splits,
            *dg.stride(), *launch.strides(a, align), *launch.strides(b, align),
            *((0, 0) if keep is None else keep.stride()),
            *launch.strides(da_, align), *launch.strides(db_, align),
            HAS_MASK=keep is not None, NEED_A=need_a, NEED_B=need_b,
            ALIGN=align, P_SCALE=launch.p_scale(a.dtype),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_L=tile.block_l,
            **launch.options(a, tile),
        )  # fmt: skip
    return da, db


def _delta(dg, g, a):
    """``δ = Σ_m dG∘G``, ``(N·heads, n)``, in the dtype of G."""
    batch, heads, c_m, c_n = g.shape
    delta = g.new_empty((batch * heads, c_n))
    tile = configs.tile("gather_delta", a, c_m, c_n)
    with launch.device_of(a):
        gather_delta_kernel[(batch * heads * triton.cdiv(c_n, tile.block_n),)](
            dg, g, delta, heads, c_m, c_n, *dg.stride(), DTYPE=launch.TRITON_DTYPE[a.dtype],
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            num_warps=tile.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return delta
