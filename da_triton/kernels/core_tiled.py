r"""Products with softmax weights for any m and n, tile by tile.

With ``E[n, l] = exp(s·x[n, l] − lse)``, lse per n or per position (or ``E = s·x`` without a
softmax), these four kernels compute gather's backward and distribute when G does not
fit one tile, nor n ``core_full_n`` (dG, ``grad_g``, also where they do):

    apply_weights   out[m, l] = scale · Σ_n W[m, n] E[n, l]                Z, dA
    row_dot         rowsum_v[l] = Σ_m y[m, l] · out[m, l]                  Σ_m dZ∘Z = Σ_n Q∘dQ
    grad_logits     dx[n, l] = s · E∘(scale · Σ_m W[m, n] y[m, l] − c)     dV, dB (c = rowsum_v, δ)
    grad_g          dW[m, n] = scale · Σ_l y[m, l] E[n, l]                 dG

E is made in registers from x, tile by tile, and never written. W is ``(N, heads, C_M, C_N)``,
activations are ``(N, heads, channels, positions)``, both in any strides. Each product has its sum
in the innermost loop, where loads are pipelined.
"""

import triton
import triton.language as tl

from ..precision import POLICIES, accumulator, lse_dtype
from ..runtime import launch, tiles
from .primitives import (
    dot,
    exp,
    exp_minus,
    load_mask,
    load_matrix,
    load_tile,
    log_sum,
    scalar,
    store_tile,
)


@triton.jit(do_not_specialize=["HEADS"])
def position_lse_kernel(
    x_ptr,  # (N, heads, C_N, L)
    lse_ptr,  # (N·heads, L): log Σ_n exp(s·x)
    logit_scale: "fp64",
    HEADS,
    C_N,
    L_UNITS,
    stride_x_n,
    stride_x_h,
    stride_x_c,
    stride_x_l,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """One program: a block of positions of one head of one sample; n in tiles, online."""
    L = L_UNITS * ALIGN
    blocks = tl.cdiv(L, BLOCK_L)
    pid = tl.program_id(0)
    nh = (pid // blocks).to(tl.int64)
    n, h = nh // HEADS, nh % HEADS
    cols = ((pid % blocks) * BLOCK_L + tl.arange(0, BLOCK_L)).to(tl.int64)
    x_base = x_ptr + (n * stride_x_n + h * stride_x_h) * ALIGN
    scale = scalar(logit_scale, ACC)
    mx = tl.full((BLOCK_L,), -float("inf"), ACC)
    total = tl.zeros((BLOCK_L,), ACC)
    for n0 in range(0, C_N, BLOCK_N):
        rows = (n0 + tl.arange(0, BLOCK_N)).to(tl.int64)
        x = load_tile(x_base, rows, cols, C_N, L, stride_x_c * ALIGN, stride_x_l).to(ACC) * scale
        x = tl.where((rows < C_N)[:, None], x, -float("inf"))
        new_mx = tl.maximum(mx, tl.max(x, 0))
        pivot = tl.where(new_mx == -float("inf"), 0.0, new_mx)  # −inf − (−inf) would be NaN
        total = total * exp(mx - pivot) + tl.sum(exp(x - pivot[None, :]), 0)
        mx = new_mx
    lse = log_sum(mx, total, lse_ptr.dtype.element_ty)
    tl.store(lse_ptr + nh * L + cols, lse, mask=cols < L)


@triton.jit
def _weights(
    x_base, rows, cols, C_N, L, stride_c, stride_l, lse_base, scale,
    SOFTMAX: tl.constexpr, LSE_PER_N: tl.constexpr,
):  # fmt: skip
    """``E`` of a tile, ``[BLOCK_N, BLOCK_L]`` in the dtype of ``scale``; 0 outside the tensor."""
    e = load_tile(x_base, rows, cols, C_N, L, stride_c, stride_l).to(scale.dtype) * scale
    if SOFTMAX:
        if LSE_PER_N:
            lse = tl.load(lse_base + rows, mask=rows < C_N, other=float("inf"))[:, None]
        else:
            lse = tl.load(lse_base + cols, mask=cols < L, other=float("inf"))[None, :]
        e = exp_minus(e, lse)
        if not LSE_PER_N:  # beyond n, exp(0 − lse) overflows where all logits are far below
            e = tl.where((rows < C_N)[:, None], e, 0.0)
    return e


@triton.jit(do_not_specialize=["HEADS"])
def apply_weights_kernel(
    w_ptr,  # (N, heads, C_M, C_N)
    x_ptr,  # (N, heads, C_N, L)
    lse_ptr,  # (N·heads, C_N) if LSE_PER_N, else (N·heads, L); read if SOFTMAX
    mask_ptr,  # (N, L) uint8, 0 where E is 0; read if HAS_MASK
    y_ptr,  # (N, heads, C_M, L): read if PRODUCT, else written: out
    rowsum_v_ptr,  # (N·heads, blocks of features, L): partials of rowsum_v, written if PRODUCT
    scale_out: "fp64",
    logit_scale: "fp64",
    HEADS,
    C_M,
    C_N,
    L_UNITS,
    stride_w_n,
    stride_w_h,
    stride_w_m,
    stride_w_k,
    stride_x_n,
    stride_x_h,
    stride_x_c,
    stride_x_l,
    stride_mask_n,
    stride_mask_l,
    stride_y_n,
    stride_y_h,
    stride_y_c,
    stride_y_l,
    SOFTMAX: tl.constexpr,
    LSE_PER_N: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRODUCT: tl.constexpr,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    E_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """One program: blocks of features and positions, a head of a sample; sums over n."""
    L = L_UNITS * ALIGN
    blocks_m = tl.cdiv(C_M, BLOCK_M)
    blocks_l = tl.cdiv(L, BLOCK_L)
    pid = tl.program_id(0)
    block_m = pid % blocks_m
    nh = (pid // (blocks_m * blocks_l)).to(tl.int64)
    n, h = nh // HEADS, nh % HEADS
    rows_m = (block_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = ((pid // blocks_m) % blocks_l * BLOCK_L + tl.arange(0, BLOCK_L)).to(tl.int64)
    w_base = w_ptr + n * stride_w_n + h * stride_w_h
    x_base = x_ptr + (n * stride_x_n + h * stride_x_h) * ALIGN
    y_base = y_ptr + (n * stride_y_n + h * stride_y_h) * ALIGN
    lse_base = lse_ptr + nh * (C_N if LSE_PER_N else L)
    scale_x = scalar(logit_scale, ACC)
    dtype: tl.constexpr = x_ptr.dtype.element_ty

    acc = tl.zeros((BLOCK_M, BLOCK_L), ACC)
    for n0 in range(0, C_N, BLOCK_N):
        rows_n = (n0 + tl.arange(0, BLOCK_N)).to(tl.int64)
        w = load_matrix(w_base, rows_m, rows_n, C_M, C_N, stride_w_m, stride_w_k, dtype)
        e = _weights(
            x_base, rows_n, cols, C_N, L, stride_x_c * ALIGN, stride_x_l, lse_base, scale_x,
            SOFTMAX, LSE_PER_N,
        )  # fmt: skip
        acc = dot(w, (e * E_SCALE).to(dtype), acc, PRECISION)
    if HAS_MASK:
        mask = load_mask(mask_ptr + n * stride_mask_n, cols, L, stride_mask_l)
        acc = tl.where(mask[None, :], acc, 0.0)
    acc = acc * (scalar(scale_out, ACC) / E_SCALE)
    if PRODUCT:
        y = load_tile(y_base, rows_m, cols, C_M, L, stride_y_c * ALIGN, stride_y_l)
        rowsum_v = tl.sum(acc * y.to(ACC), 0)
        tl.store(rowsum_v_ptr + (nh * blocks_m + block_m) * L + cols, rowsum_v, mask=cols < L)
    else:
        store_tile(y_base, rows_m, cols, C_M, L, stride_y_c * ALIGN, stride_y_l, acc)


@triton.jit(do_not_specialize=["HEADS", "NUM_PARTIALS"])
def grad_logits_kernel(
    w_ptr,  # (N, heads, C_M, C_N)
    x_ptr,  # (N, heads, C_N, L)
    y_ptr,  # (N, heads, C_M, L)
    lse_ptr,  # (N·heads, C_N) if LSE_PER_N, else (N·heads, L); read if SOFTMAX
    c_ptr,  # (N·heads, C_N) if LSE_PER_N, else partials (N·heads, NUM_PARTIALS, L); read if SOFTMAX
    mask_ptr,  # (N, L) uint8, 0 where E is 0; read if HAS_MASK
    dx_ptr,  # (N, heads, C_N, L)
    scale_out: "fp64",
    logit_scale: "fp64",
    HEADS,
    C_M,
    C_N,
    L_UNITS,
    NUM_PARTIALS,
    stride_w_n,
    stride_w_h,
    stride_w_m,
    stride_w_k,
    stride_x_n,
    stride_x_h,
    stride_x_c,
    stride_x_l,
    stride_y_n,
    stride_y_h,
    stride_y_c,
    stride_y_l,
    stride_mask_n,
    stride_mask_l,
    stride_dx_n,
    stride_dx_h,
    stride_dx_c,
    stride_dx_l,
    SOFTMAX: tl.constexpr,
    LSE_PER_N: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """One program: tiles of n and positions, a head of a sample; sums over features."""
    L = L_UNITS * ALIGN
    blocks_n = tl.cdiv(C_N, BLOCK_N)
    blocks_l = tl.cdiv(L, BLOCK_L)
    pid = tl.program_id(0)
    nh = (pid // (blocks_n * blocks_l)).to(tl.int64)
    n, h = nh // HEADS, nh % HEADS
    rows_n = (pid % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    cols = ((pid // blocks_n) % blocks_l * BLOCK_L + tl.arange(0, BLOCK_L)).to(tl.int64)
    w_base = w_ptr + n * stride_w_n + h * stride_w_h
    x_base = x_ptr + (n * stride_x_n + h * stride_x_h) * ALIGN
    y_base = y_ptr + (n * stride_y_n + h * stride_y_h) * ALIGN
    dx_base = dx_ptr + (n * stride_dx_n + h * stride_dx_h) * ALIGN
    lse_base = lse_ptr + nh * (C_N if LSE_PER_N else L)
    scale_x = scalar(logit_scale, ACC)
    dtype: tl.constexpr = x_ptr.dtype.element_ty

    acc = tl.zeros((BLOCK_N, BLOCK_L), ACC)
    for m0 in range(0, C_M, BLOCK_M):
        rows_m = (m0 + tl.arange(0, BLOCK_M)).to(tl.int64)
        w = load_matrix(w_base, rows_n, rows_m, C_N, C_M, stride_w_k, stride_w_m, dtype)
        y = load_tile(y_base, rows_m, cols, C_M, L, stride_y_c * ALIGN, stride_y_l)
        acc = dot(w, y, acc, PRECISION)
    acc = acc * scalar(scale_out, ACC)
    if SOFTMAX:
        e = _weights(
            x_base, rows_n, cols, C_N, L, stride_x_c * ALIGN, stride_x_l, lse_base, scale_x,
            SOFTMAX, LSE_PER_N,
        )  # fmt: skip
        if LSE_PER_N:
            c = tl.load(c_ptr + nh * C_N + rows_n, mask=rows_n < C_N, other=0.0)[:, None]
        else:
            c = tl.zeros((BLOCK_L,), ACC)
            for partial in range(0, NUM_PARTIALS):
                c += tl.load(
                    c_ptr + (nh * NUM_PARTIALS + partial) * L + cols, mask=cols < L, other=0.0
                )
            c = c[None, :]
        acc = e * (acc - c)
    if HAS_MASK:
        mask = load_mask(mask_ptr + n * stride_mask_n, cols, L, stride_mask_l)
        acc = tl.where(mask[None, :], acc, 0.0)
    store_tile(dx_base, rows_n, cols, C_N, L, stride_dx_c * ALIGN, stride_dx_l, acc * scale_x)


@triton.jit(do_not_specialize=launch.COUNTS)
def grad_g_kernel(
    y_ptr,  # (N, heads, C_M, L)
    x_ptr,  # (N, heads, C_N, L)
    lse_ptr,  # (N·heads, L); read if SOFTMAX
    dw_ptr,  # (N·heads, NUM_SPLITS, C_M, C_N) float32/64: partial sums
    scale_out: "fp64",
    logit_scale: "fp64",
    HEADS,
    C_M,
    C_N,
    L_UNITS,
    BLOCKS_PER_SPLIT,
    NUM_SPLITS,
    stride_y_n,
    stride_y_h,
    stride_y_c,
    stride_y_l,
    stride_x_n,
    stride_x_h,
    stride_x_c,
    stride_x_l,
    SOFTMAX: tl.constexpr,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """One program: tiles of n and m, a split of the positions, a head of a sample."""
    L = L_UNITS * ALIGN
    blocks_m = tl.cdiv(C_M, BLOCK_M)
    tiles = blocks_m * tl.cdiv(C_N, BLOCK_N)
    pid = tl.program_id(0)
    tile = pid % tiles
    split = (pid // tiles) % NUM_SPLITS
    nh = (pid // (tiles * NUM_SPLITS)).to(tl.int64)
    n, h = nh // HEADS, nh % HEADS
    rows_m = ((tile % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    rows_n = ((tile // blocks_m) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    y_base = y_ptr + (n * stride_y_n + h * stride_y_h) * ALIGN
    x_base = x_ptr + (n * stride_x_n + h * stride_x_h) * ALIGN
    lse_base = lse_ptr + nh * L
    scale_x = scalar(logit_scale, ACC)

    acc = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    start = split * BLOCKS_PER_SPLIT * BLOCK_L
    for l0 in range(start, tl.minimum(start + BLOCKS_PER_SPLIT * BLOCK_L, L), BLOCK_L):
        cols = (l0 + tl.arange(0, BLOCK_L)).to(tl.int64)
        y = load_tile(y_base, rows_m, cols, C_M, L, stride_y_c * ALIGN, stride_y_l)
        e = _weights(
            x_base, rows_n, cols, C_N, L, stride_x_c * ALIGN, stride_x_l, lse_base, scale_x,
            SOFTMAX, False,
        )  # fmt: skip
        acc = dot(e.to(y.dtype), tl.trans(y), acc, PRECISION)

    offs = rows_m[None, :] * C_N + rows_n[:, None]
    inside = (rows_n < C_N)[:, None] & (rows_m < C_M)[None, :]
    partial = (nh * NUM_SPLITS + split) * C_M * C_N
    tl.store(dw_ptr + partial + offs, acc * scalar(scale_out, ACC), mask=inside)


def position_lse(x, logit_scale):
    """Log-sum-exp over n of each position, ``(N·heads, L)``."""
    ready = launch.prepared(_position_lse, (x,))
    (lse,) = ready.empty()
    ready((x, lse), (logit_scale,))
    return lse


def _position_lse(x):
    batch, heads, c_n, length = x.shape
    tile = tiles.tile("position_lse", x, 1, c_n)
    programs = batch * heads * -(-length // tile.block_l)
    ready = launch.Launch(
        position_lse_kernel, x, tile, programs, activations={"x": x}, HEADS=heads, C_N=c_n
    )
    return ready.allocating(lse_dtype(x.dtype), (batch * heads, length))


def apply_weights(w, x, out, *, scale=1.0, logit_scale=1.0, lse=None, lse_per_n=False, mask=None):
    """Writes ``out = scale · W E``; lse per n (``lse_per_n``) or per position, or no softmax."""
    _apply_weights(w, x, out, None, scale, logit_scale, lse, lse_per_n, mask)


def row_dot(w, x, y, *, scale, logit_scale, lse):
    """Partials of ``rowsum_v = Σ_m y ∘ (scale · W E)``, ``(N·heads, blocks of features, L)``."""
    batch, heads, c_n, length = x.shape
    tile = tiles.tile("apply_weights", x, w.shape[2], c_n)
    blocks = -(-w.shape[2] // tile.block_m)
    rowsum_v = x.new_empty((batch * heads, blocks, length), dtype=accumulator(x.dtype))
    _apply_weights(w, x, y, rowsum_v, scale, logit_scale, lse, False, None)
    return rowsum_v


def _apply_weights(w, x, y, rowsum_v, scale, logit_scale, lse, lse_per_n, mask):
    ready = launch.prepared(_applying, (x, w, y, rowsum_v, lse, mask), lse_per_n)
    lse, mask, rowsum_v = (x if t is None else t for t in (lse, mask, rowsum_v))
    ready((w, x, lse, mask, y, rowsum_v), (scale, logit_scale))


def _applying(x, w, y, rowsum_v, lse, mask, lse_per_n):
    batch, heads, c_n, length = x.shape
    c_m = w.shape[2]
    tile = tiles.tile("apply_weights", x, c_m, c_n)
    blocks = -(-c_m // tile.block_m) * -(-length // tile.block_l)
    return launch.Launch(
        apply_weights_kernel, x, tile, batch * heads * blocks, again=True,
        activations={"x": x, "y": y}, strided={"w": w, "mask": mask},
        HEADS=heads, C_M=c_m, C_N=c_n, SOFTMAX=lse is not None, LSE_PER_N=lse_per_n,
        HAS_MASK=mask is not None, PRODUCT=rowsum_v is not None,
        E_SCALE=POLICIES[x.dtype].p_scale if lse_per_n else 1.0,
    )  # fmt: skip


def grad_logits(
    w,
    x,
    y,
    dx,
    *,
    scale=1.0,
    logit_scale=1.0,
    lse=None,
    correction=None,
    lse_per_n=False,
    mask=None,
):
    """Writes ``dx = s · E∘(scale · Wᵀ y − c)``, or ``dx = s · scale · Wᵀ y`` without a softmax.

    ``correction``: δ, or the partials of rowsum_v that ``row_dot`` computed.
    """
    correction = None if lse is None else correction
    ready = launch.prepared(_grad_logits, (x, w, y, dx, lse, correction, mask), lse_per_n)
    lse, correction, mask = (x if t is None else t for t in (lse, correction, mask))
    ready((w, x, y, lse, correction, mask, dx), (scale, logit_scale))


def _grad_logits(x, w, y, dx, lse, correction, mask, lse_per_n):
    batch, heads, c_n, length = x.shape
    c_m = w.shape[2]
    tile = tiles.tile("grad_logits", x, c_m, c_n)
    blocks = -(-c_n // tile.block_n) * -(-length // tile.block_l)
    softmax = lse is not None
    return launch.Launch(
        grad_logits_kernel, x, tile, batch * heads * blocks, again=True,
        activations={"x": x, "y": y, "dx": dx}, strided={"w": w, "mask": mask},
        HEADS=heads, C_M=c_m, C_N=c_n, SOFTMAX=softmax, LSE_PER_N=lse_per_n,
        NUM_PARTIALS=correction.shape[1] if softmax and not lse_per_n else 1,
        HAS_MASK=mask is not None,
    )  # fmt: skip


def grad_g(y, x, scale, logit_scale, lse):
    """Partials of ``dW = scale · y Eᵀ``, ``(N·heads, num_splits, C_M, C_N)`` in float32/64."""
    ready = launch.prepared(_grad_g, (x, y, lse))
    (partial,) = ready.empty()
    ready((y, x, x if lse is None else lse, partial), (scale, logit_scale))
    return partial


def _grad_g(x, y, lse):
    batch, heads, c_n, _ = x.shape
    c_m = y.shape[2]
    tile = tiles.tile("grad_g", x, c_m, c_n, launch.rows(x))
    blocks = -(-c_m // tile.block_m) * -(-c_n // tile.block_n)
    ready = launch.Launch(
        grad_g_kernel, x, tile, batch * heads * blocks, again=True,
        activations={"y": y, "x": x}, HEADS=heads, C_M=c_m, C_N=c_n, SOFTMAX=lse is not None,
    )  # fmt: skip
    shape = batch * heads, ready.num_splits, c_m, c_n
    return ready.allocating(accumulator(x.dtype), shape)
