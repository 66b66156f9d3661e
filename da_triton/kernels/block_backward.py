r"""The fused block's backward pass over positions, in order XH, where H fits one program.

    distribution   Q, dQ = Hᵀ dO   rowsum_v = Σ_n Q∘dQ   dV = s_v · Q∘(dQ − rowsum_v)   dH = dO Qᵀ
    gather         P                dB = s · P∘(dMᵀ X − δ)
                   dX = dO (residual) + Wvᵀ dV + Wbᵀ dB + dM P

A program of either kernel handles a split of the positions with the full n: each reads X and dO
once, and dX is written once. dV and dB are the only temporaries with positions, adjacent in one
``(N, 2·total_n, L)``, from which ``weight_gradients`` makes the rest. dH is summed in registers,
written as partials and merged by ``combine``.
"""

import triton
import triton.language as tl

from ..precision import POLICIES, accumulator
from ..runtime import guard, launch, tiles
from .primitives import (
    LOG2E,
    dot,
    exp_minus,
    load_mask,
    load_matrix,
    load_tile,
    scalar,
    store_tile,
)
from .project_distribute import rows_of_packed_cols, softmax_heads


@triton.jit
def softmax_base_2(z, C_N, HEADS: tl.constexpr, BLOCK_N: tl.constexpr):
    """``softmax_heads`` of logits times log2(e), which spares a product.

    The select, needed or not, keeps the scale and the subtraction apart: contracted into one FMA,
    huge logits would not have the maximum's rounding.
    """
    z = tl.reshape(z, (z.shape[0], HEADS, BLOCK_N))
    z = tl.where((tl.arange(0, BLOCK_N) < C_N)[None, None, :], z, -float("inf"))
    e = tl.exp2(z - tl.max(z, 2)[:, :, None])
    return tl.reshape(e * (1.0 / tl.sum(e, 2))[:, :, None], (z.shape[0], HEADS * BLOCK_N))


@triton.jit(do_not_specialize=launch.COUNTS)
def block_bwd_distribute_kernel(
    x_ptr,  # (N, C, L)
    do_ptr,  # (N, C_OUT, L)
    w_ptr,  # (total_n, C), contiguous: Wv; read if PROJECT
    bias_ptr,  # (total_n,); read if HAS_BIAS
    v_ptr,  # (N, total_n, L): V as forward saved it; read if not PROJECT
    h_ptr,  # (N, C_OUT, total_n), contiguous
    dv_ptr,  # (N, total_n, L)
    dh_ptr,  # (N, NUM_SPLITS, total_n, C_OUT) float32/64: partials of dH
    logit_scale: "fp64",
    HEADS,
    C,
    C_N,
    C_OUT,
    L_UNITS,
    BLOCKS_PER_SPLIT,
    NUM_SPLITS,
    stride_x_n,
    stride_x_c,
    stride_x_l,
    stride_do_n,
    stride_do_c,
    stride_do_l,
    stride_v_n,
    stride_v_c,
    stride_v_l,
    stride_dv_n,
    stride_dv_c,
    stride_dv_l,
    HEAD_BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    PROJECT: tl.constexpr,
    SOFTMAX: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAME_STEPS: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr,
    WGMMA: tl.constexpr,
    X_AHEAD: tl.constexpr,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """One program: a split of the positions of a sample. BLOCK_C ≥ C and C_OUT, BLOCK_N ≥ C_N.

    SAME_STEPS: dO has X's strides of channels and positions, so that one set of offsets is held.

    CHANNELS_FIRST: dH has channels as rows, so that no accumulator is transposed, which Triton
    before 3.7.1 miscompiles for Hopper.
    X_AHEAD: registers hold X of the next positions while this tile is used.

    With X_AHEAD the bias is loaded for each tile of positions: held, it would take an eighth of
    the registers where n is 128.
    """
    L = L_UNITS * ALIGN
    pid = tl.program_id(0)
    split = pid % NUM_SPLITS
    n = (pid // NUM_SPLITS).to(tl.int64)
    total_n = HEADS * C_N
    packed_cols = tl.arange(0, HEAD_BLOCK * BLOCK_N).to(tl.int64)
    rows_n = rows_of_packed_cols(packed_cols, HEADS, C_N, PACKED, BLOCK_N)
    rows_c = tl.arange(0, BLOCK_C).to(tl.int64)
    x_base = x_ptr + n * stride_x_n * ALIGN
    do_base = do_ptr + n * stride_do_n * ALIGN
    v_base = v_ptr + n * stride_v_n * ALIGN
    dv_base = dv_ptr + n * stride_dv_n * ALIGN
    scale = scalar(logit_scale, ACC)
    dtype: tl.constexpr = x_ptr.dtype.element_ty

    start = split * BLOCKS_PER_SPLIT * BLOCK_L
    end = tl.minimum(start + BLOCKS_PER_SPLIT * BLOCK_L, L)
    h_base = h_ptr + n * C_OUT * total_n
    if SAME_STEPS:
        stride_do_c, stride_do_l = stride_x_c, stride_x_l
    if PROJECT:
        w = load_matrix(w_ptr, rows_c, rows_n, C, total_n, 1, C, dtype)
    if HAS_BIAS and not X_AHEAD:
        bias = tl.load(bias_ptr + rows_n, mask=rows_n < total_n, other=0.0).to(ACC)
    h = load_matrix(h_base, rows_c, rows_n, C_OUT, total_n, total_n, 1, dtype)
    if CHANNELS_FIRST:
        dh = tl.zeros((BLOCK_C, HEAD_BLOCK * BLOCK_N), ACC)
    else:
        dh = tl.zeros((HEAD_BLOCK * BLOCK_N, BLOCK_C), ACC)
    if X_AHEAD:
        cols = (start + tl.arange(0, BLOCK_L)).to(tl.int64)
        x_next = load_tile(x_base, cols, rows_c, end, C, stride_x_l, stride_x_c * ALIGN)
    for l0 in range(start, end, BLOCK_L):
        cols = (l0 + tl.arange(0, BLOCK_L)).to(tl.int64)
        if WGMMA:  # both loads under way before the first product
            do = load_tile(do_base, cols, rows_c, L, C_OUT, stride_do_l, stride_do_c * ALIGN)
        if PROJECT:
            if X_AHEAD:
                x, after = x_next, cols + BLOCK_L
                x_next = load_tile(x_base, after, rows_c, end, C, stride_x_l, stride_x_c * ALIGN)
            else:
                x = load_tile(x_base, cols, rows_c, L, C, stride_x_l, stride_x_c * ALIGN)
            z = dot(x, w, tl.zeros((BLOCK_L, HEAD_BLOCK * BLOCK_N), ACC), PRECISION)
            if HAS_BIAS:
                if X_AHEAD:
                    bias = tl.load(bias_ptr + rows_n, mask=rows_n < total_n, other=0.0).to(ACC)
                z += bias[None, :]
        else:
            z = load_tile(v_base, cols, rows_n, L, total_n, stride_v_l, stride_v_c * ALIGN).to(ACC)
        if SOFTMAX and WGMMA:
            q = softmax_base_2(z * (scale * LOG2E), C_N, HEAD_BLOCK, BLOCK_N)
        elif SOFTMAX:
            q = softmax_heads(z * scale, C_N, HEAD_BLOCK, BLOCK_N)
        else:
            q = z * scale
        if not WGMMA:
            do = load_tile(do_base, cols, rows_c, L, C_OUT, stride_do_l, stride_do_c * ALIGN)
        dq = dot(do, h, tl.zeros((BLOCK_L, HEAD_BLOCK * BLOCK_N), ACC), PRECISION)
        dv = dq * scale
        if SOFTMAX:
            weighted = q * dq if WGMMA else q * dv
            if HEAD_BLOCK == 1:
                rowsum_v = tl.sum(weighted, 1)[:, None]
            else:
                rowsum_v = tl.sum(tl.reshape(weighted, (BLOCK_L, HEAD_BLOCK, BLOCK_N)), 2)
                rowsum_v = tl.broadcast_to(rowsum_v[:, :, None], (BLOCK_L, HEAD_BLOCK, BLOCK_N))
                rowsum_v = tl.reshape(rowsum_v, (BLOCK_L, HEAD_BLOCK * BLOCK_N))
            if WGMMA:  # one product for scale and subtraction
                rowsum_v *= scale
            dv = q * (dv - rowsum_v)
        ptrs = dv_base + cols[:, None] * stride_dv_l + rows_n[None, :] * stride_dv_c * ALIGN
        tl.store(ptrs, dv.to(dtype), mask=(cols < L)[:, None] & (rows_n < total_n)[None, :])
        if CHANNELS_FIRST:
            dh = dot(tl.trans(do), q.to(dtype), dh, PRECISION)
        else:
            dh = dot(tl.trans(q.to(dtype)), do, dh, PRECISION)

    partials = dh_ptr + ((n * NUM_SPLITS + split) * total_n + rows_n) * C_OUT
    inside_n, inside_c = rows_n < total_n, rows_c < C_OUT
    if CHANNELS_FIRST:
        ptrs = partials[None, :] + rows_c[:, None]
        tl.store(ptrs, dh, mask=inside_n[None, :] & inside_c[:, None])
    else:
        ptrs = partials[:, None] + rows_c[None, :]
        tl.store(ptrs, dh, mask=inside_n[:, None] & inside_c[None, :])


@triton.jit
def product_of_x(
    p, db, dv, dm, wb, wv, start, inside,
    CHAINED: tl.constexpr, P_SCALE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``dV Wv + P dM / P_SCALE + dB Wb``; the matrices are ``[BLOCK_N, BLOCK_C]``.

    ``start``: dO if it is to be added, else None.
    """
    zero = tl.zeros((p.shape[0], dm.shape[1]), ACC)
    if CHAINED:
        first = zero if start is None else start.to(ACC) * P_SCALE
        dx = dot(p, dm, first, PRECISION) / P_SCALE
        dx = dot(dv, wv, dot(db, wb, dx, PRECISION), PRECISION)
    else:  # the selects keep Triton from chaining the products again
        dx = dot(p, dm, zero, PRECISION) / P_SCALE
        if start is not None:
            dx += start.to(ACC)
        dx += tl.where(inside, dot(db, wb, zero, PRECISION), 0.0)
        dx += tl.where(inside, dot(dv, wv, zero, PRECISION), 0.0)
    return dx


@triton.jit(do_not_specialize=launch.COUNTS)
def block_bwd_gather_kernel(
    x_ptr,  # (N, C, L)
    do_ptr,  # (N, C, L); read if RESIDUAL
    wb_ptr,  # (TOTAL_N, C), contiguous
    wv_ptr,  # (TOTAL_N, C), contiguous
    dm_ptr,  # (N, C, TOTAL_N), contiguous
    lse_ptr,  # (N, TOTAL_N)
    delta_ptr,  # (N, TOTAL_N)
    mask_ptr,  # (N, L) uint8; read if HAS_MASK
    dv_ptr,  # (N, TOTAL_N, L)
    db_ptr,  # (N, TOTAL_N, L), strides of dV
    dx_ptr,  # (N, C, L); written if WRITE_X
    logit_scale: "fp64",
    C,
    TOTAL_N,
    L_UNITS,
    BLOCKS_PER_SPLIT,
    NUM_SPLITS,
    stride_x_n,
    stride_x_c,
    stride_x_l,
    stride_do_n,
    stride_do_c,
    stride_do_l,
    stride_dv_n,
    stride_dv_c,
    stride_dv_l,
    stride_dx_n,
    stride_dx_c,
    stride_dx_l,
    stride_mask_n,
    stride_mask_l,
    HAS_MASK: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WRITE_X: tl.constexpr,
    CHAINED: tl.constexpr,
    CHANNELS_FIT: tl.constexpr,
    SAME_STEPS: tl.constexpr,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    P_SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """One program: a split of the positions of a sample, full n. BLOCK_N ≥ TOTAL_N.

    CHANNELS_FIT: BLOCK_C ≥ C. The matrices stay in shared memory, and tiles of positions are loaded
    while others are in use. Otherwise channels come in blocks, with their part of the matrices.
    SAME_STEPS: dO and dX have X's strides of channels and positions.

    lse and δ are loaded for each tile of positions: held, they would take a quarter of the
    registers where n is 128.
    """
    L = L_UNITS * ALIGN
    pid = tl.program_id(0)
    split = pid % NUM_SPLITS
    n = (pid // NUM_SPLITS).to(tl.int64)
    rows_n = tl.arange(0, BLOCK_N).to(tl.int64)
    inside_n = rows_n < TOTAL_N
    x_base = x_ptr + n * stride_x_n * ALIGN
    do_base = do_ptr + n * stride_do_n * ALIGN
    dv_base = dv_ptr + n * stride_dv_n * ALIGN
    db_base = db_ptr + n * stride_dv_n * ALIGN
    dx_base = dx_ptr + n * stride_dx_n * ALIGN
    dm_base = dm_ptr + n * C * TOTAL_N
    scale = scalar(logit_scale, ACC)
    dtype: tl.constexpr = x_ptr.dtype.element_ty

    if SAME_STEPS:
        stride_do_c, stride_do_l = stride_x_c, stride_x_l
        stride_dx_c, stride_dx_l = stride_x_c, stride_x_l
    lse_base, delta_base = lse_ptr + n * TOTAL_N, delta_ptr + n * TOTAL_N

    if CHANNELS_FIT:
        rows_c = tl.arange(0, BLOCK_C).to(tl.int64)
        wb = load_matrix(wb_ptr, rows_c, rows_n, C, TOTAL_N, 1, C, dtype)
        wv = load_matrix(wv_ptr, rows_c, rows_n, C, TOTAL_N, 1, C, dtype)
        dm = load_matrix(dm_base, rows_c, rows_n, C, TOTAL_N, TOTAL_N, 1, dtype)
    start = split * BLOCKS_PER_SPLIT * BLOCK_L
    for l0 in range(start, tl.minimum(start + BLOCKS_PER_SPLIT * BLOCK_L, L), BLOCK_L):
        cols = (l0 + tl.arange(0, BLOCK_L)).to(tl.int64)
        z = tl.zeros((BLOCK_L, BLOCK_N), ACC)
        if CHANNELS_FIT:
            x = load_tile(x_base, cols, rows_c, L, C, stride_x_l, stride_x_c * ALIGN)
            z = dot(x, wb, z, PRECISION)
            if WRITE_X:
                offs = cols[:, None] * stride_dv_l + rows_n[None, :] * stride_dv_c * ALIGN
                inside = (cols < L)[:, None] & inside_n[None, :]
                dv = tl.load(dv_base + offs, mask=inside, other=0.0)
        else:
            delta = tl.load(delta_base + rows_n, mask=inside_n, other=0.0)
            dp = tl.broadcast_to(-delta[None, :], (BLOCK_L, BLOCK_N))
            for c0 in range(0, C, BLOCK_C):
                rows_c = (c0 + tl.arange(0, BLOCK_C)).to(tl.int64)
                x = load_tile(x_base, cols, rows_c, L, C, stride_x_l, stride_x_c * ALIGN)
                wb = load_matrix(wb_ptr, rows_c, rows_n, C, TOTAL_N, 1, C, dtype)
                dm = load_matrix(dm_base, rows_c, rows_n, C, TOTAL_N, TOTAL_N, 1, dtype)
                z = dot(x, wb, z, PRECISION)
                dp = dot(x, dm, dp, PRECISION)
        lse = tl.load(lse_base + rows_n, mask=inside_n, other=float("inf"))
        p = exp_minus(z * scale, lse[None, :])
        if CHANNELS_FIT:  # only now, so that z is gone
            delta = tl.load(delta_base + rows_n, mask=inside_n, other=0.0)
            dp = tl.broadcast_to(-delta[None, :], (BLOCK_L, BLOCK_N))
            start_x = None
            if WRITE_X and RESIDUAL:  # before the product, which hides the latency
                start_x = load_tile(do_base, cols, rows_c, L, C, stride_do_l, stride_do_c * ALIGN)
            dp = dot(x, dm, dp, PRECISION)
        db = scale * p * dp
        if HAS_MASK:
            mask = load_mask(mask_ptr + n * stride_mask_n, cols, L, stride_mask_l)
            p = tl.where(mask[:, None], p, 0.0)
            db = tl.where(mask[:, None], db, 0.0)
        db = db.to(dtype)
        offs = cols[:, None] * stride_dv_l + rows_n[None, :] * stride_dv_c * ALIGN
        inside = (cols < L)[:, None] & inside_n[None, :]
        tl.store(db_base + offs, db, mask=inside)
        if WRITE_X:
            p = (p * P_SCALE).to(dtype)
            if CHANNELS_FIT:
                inside_x = (cols < L)[:, None] & (rows_c < C)[None, :]
                dx = product_of_x(
                    p, db, dv, tl.trans(dm), tl.trans(wb), tl.trans(wv), start_x, inside_x,
                    CHAINED, P_SCALE, PRECISION, ACC,
                )  # fmt: skip
                store_tile(dx_base, cols, rows_c, L, C, stride_dx_l, stride_dx_c * ALIGN, dx)
            else:
                dv = tl.load(dv_base + offs, mask=inside, other=0.0)
                for c0 in range(0, C, BLOCK_C):
                    rows_c = (c0 + tl.arange(0, BLOCK_C)).to(tl.int64)
                    dm = load_matrix(dm_base, rows_n, rows_c, TOTAL_N, C, 1, TOTAL_N, dtype)
                    wb = load_matrix(wb_ptr, rows_n, rows_c, TOTAL_N, C, C, 1, dtype)
                    wv = load_matrix(wv_ptr, rows_n, rows_c, TOTAL_N, C, C, 1, dtype)
                    inside_x = (cols < L)[:, None] & (rows_c < C)[None, :]
                    dx = product_of_x(
                        p, db, dv, dm, wb, wv, None, inside_x, CHAINED, P_SCALE, PRECISION, ACC
                    )
                    if RESIDUAL:
                        do = load_tile(
                            do_base, cols, rows_c, L, C, stride_do_l, stride_do_c * ALIGN
                        )
                        dx += do.to(ACC)
                    store_tile(dx_base, cols, rows_c, L, C, stride_dx_l, stride_dx_c * ALIGN, dx)


@guard.proved(
    {"x": "N-L", "dout": "N-L", "v": "N-L", "h": "N--", "dv": "N-L"}, writes=("dv",),
    apart=lambda x, dout, **_: not launch.same_steps(x, dout),
)  # fmt: skip
def block_bwd_distribute(x, dout, weight_v, bias_v, v, h, dv, *, heads, logit_scale, softmax):
    """Writes dV and returns the partials of dH, ``(N, num_splits, total_n, C')``."""
    ready = launch.prepared(
        _block_bwd_distribute, (x, dout, v, h, dv, weight_v, bias_v), heads, softmax
    )
    (partials,) = ready.empty()
    ready(
        (
            x, dout, weight_v, weight_v if bias_v is None else bias_v, x if v is None else v,
            h, dv, partials,
        ),
        (logit_scale,),
    )  # fmt: skip
    return partials


def _block_bwd_distribute(x, dout, v, h, dv, weight_v, bias_v, heads, softmax):
    batch, channels, _ = x.shape
    c_out, total_n = h.shape[1:]
    head_block, block_n = tiles.packed_cols(heads, total_n // heads)
    sizes = max(channels, c_out), head_block * block_n
    odd, wgmma = launch.rows(x) == tiles.ODD, tiles.wants_64_rows(x.device)
    variant = "v" if v is not None else tiles.ODD if odd else tiles.PLAIN
    tile = tiles.tile("block_bwd_distribute", x, *sizes, variant)
    ready = launch.Launch(
        block_bwd_distribute_kernel, x, tile, batch,
        activations={"x": x, "do": dout, "v": x if v is None else v, "dv": dv},
        HEADS=heads, C=channels, C_N=total_n // heads, C_OUT=c_out, HEAD_BLOCK=head_block,
        PACKED=tiles.packed(heads, total_n // heads, block_n), PROJECT=v is None, SOFTMAX=softmax,
        HAS_BIAS=v is None and bias_v is not None,
        SAME_STEPS=launch.same_steps(x, dout),
        CHANNELS_FIRST=tiles.reads_shared_operands(x.device),
        WGMMA=wgmma, X_AHEAD=wgmma and v is None and tile.num_stages == 1 and not odd,
        BLOCK_N=block_n,
    )  # fmt: skip
    return ready.allocating(accumulator(x.dtype), (batch, ready.num_splits, total_n, c_out))


@guard.proved(
    {
        "x": "N-L", "dout": "N-L", "dm": "N--", "lse": "N", "delta": "N-", "mask": "NL",
        "dv": "N-L", "db": "N-L",
    },
    writes=("db",),
    apart=lambda x, dout, residual, need_x, **_: (
        not launch.same_steps(
            x, dout if residual else x, launch.empty_rows_like(x, x.shape[1]) if need_x else x
        )
    ),
)  # fmt: skip
def block_bwd_gather(
    x, dout, weight_b, weight_v, dm, lse, delta, mask, dv, db, *, logit_scale, residual, need_x
):
    """Writes dB and returns dX (None if not needed) in the memory format of X."""
    dx = launch.empty_rows_like(x, x.shape[1]) if need_x else x
    dout_ = dout if residual else x
    ready = launch.prepared(
        _block_bwd_gather, (x, dout_, dv, db, dx, mask, weight_b, weight_v, dm, lse, delta),
        residual, need_x,
    )  # fmt: skip
    ready(
        (
            x, dout_, weight_b, weight_v, dm, lse, delta, x if mask is None else mask, dv, db, dx,
        ),
        (logit_scale,),
    )  # fmt: skip
    return dx if need_x else None


def _block_bwd_gather(
    x, dout, dv, db, dx, mask, weight_b, weight_v, dm, lse, delta, residual, need_x
):
    batch, channels, _ = x.shape
    total_n = weight_b.shape[0]
    channels_fit = tiles.fits("block_bwd_gather_full_c", x, channels, total_n)
    kernel = "block_bwd_gather_full_c" if channels_fit else "block_bwd_gather"
    variant = tiles.PLAIN if mask is None else "mask"
    if channels_fit and launch.rows(x) == tiles.ODD:  # with or without a mask
        variant = tiles.ODD
    tile = tiles.tile(kernel, x, channels, total_n, variant)
    return launch.Launch(
        block_bwd_gather_kernel, x, tile, batch,
        activations={"x": x, "do": dout, "dv": dv, "dx": dx}, strided={"mask": mask}, again=True,
        C=channels, TOTAL_N=total_n, HAS_MASK=mask is not None, RESIDUAL=residual, WRITE_X=need_x,
        CHAINED=tiles.chains_products(x.device), P_SCALE=POLICIES[x.dtype].p_scale,
        CHANNELS_FIT=channels_fit, SAME_STEPS=launch.same_steps(x, dout, dx),
    )  # fmt: skip
