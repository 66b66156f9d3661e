r"""Pass 2 of the fused block: ``out = H softmax_n(s (Wv X + bv)) + bo (+ X)``, X read once more.

A program holds positions with the full n of all heads: it projects V, takes the softmax over n in
each head, multiplies with H, adds bias and X, and writes each element of the result once.
V and Q are never written, unless V is requested. Where all channels fit, the tile of
X stays resident between the two products, and the weights between tiles of positions.

X, V and the result are ``(N, channels, L)`` in any strides.
"""

import triton
import triton.language as tl

from ..runtime import guard, launch, tiles
from .primitives import dot, exp, load_matrix, load_tile, scalar


@triton.jit
def rows_of_packed_cols(packed_cols, HEADS, C_N, PACKED: tl.constexpr, BLOCK_N: tl.constexpr):
    """The descriptor of each packed column, head-major; beyond the last one in padding columns.

    PACKED: columns are descriptors in order, which the compiler must see to vectorise loads.
    """
    if PACKED:
        rows = packed_cols
    else:
        head, within = packed_cols // BLOCK_N, packed_cols % BLOCK_N
        rows = tl.where((head < HEADS) & (within < C_N), head * C_N + within, HEADS * C_N)
    return rows


@triton.jit
def softmax_heads(z, C_N, HEADS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Softmax of ``[BLOCK_L, HEADS·BLOCK_N]`` over n in each head; 0 beyond C_N."""
    if HEADS == 1:
        z = tl.where((tl.arange(0, BLOCK_N) < C_N)[None, :], z, -float("inf"))
        e = exp(z - tl.max(z, 1)[:, None])
        q = e * (1.0 / tl.sum(e, 1))[:, None]
    else:
        z = tl.reshape(z, (z.shape[0], HEADS, BLOCK_N))
        z = tl.where((tl.arange(0, BLOCK_N) < C_N)[None, None, :], z, -float("inf"))
        e = exp(z - tl.max(z, 2)[:, :, None])
        q = tl.reshape(e * (1.0 / tl.sum(e, 2))[:, :, None], (z.shape[0], HEADS * BLOCK_N))
    return q


@triton.jit(do_not_specialize=launch.COUNTS)
def project_distribute_kernel(
    x_ptr,  # (N, C, L)
    v_ptr,  # (N, total_n, L): V with bias; written if SAVE_V
    w_ptr,  # (total_n, C), contiguous: Wv
    bias_ptr,  # (total_n,); read if HAS_BIAS
    h_ptr,  # (N, C_OUT, total_n), contiguous
    bias_out_ptr,  # (C_OUT,); read if HAS_BIAS_OUT
    out_ptr,  # (N, C_OUT, L)
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
    stride_v_n,
    stride_v_c,
    stride_v_l,
    stride_out_n,
    stride_out_c,
    stride_out_l,
    HEAD_BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    SAVE_V: tl.constexpr,
    SOFTMAX: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_BIAS_OUT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    X_FIRST: tl.constexpr,
    CHANNELS_FIT: tl.constexpr,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """One program: a split of the positions of a sample, all n and channels.

    BLOCK_N ≥ C_N, HEAD_BLOCK ≥ HEADS (powers of two); CHANNELS_FIT: BLOCK_C ≥ C and C_OUT.
    X_FIRST: the residual is in the accumulator before the product: fewer registers, and X is
    loaded ahead of its use. Where V is written, tiles spill with it.
    """
    L = L_UNITS * ALIGN
    pid = tl.program_id(0)
    split = pid % NUM_SPLITS
    n = (pid // NUM_SPLITS).to(tl.int64)
    total_n = HEADS * C_N
    packed_cols = tl.arange(0, HEAD_BLOCK * BLOCK_N).to(tl.int64)
    rows_n = rows_of_packed_cols(packed_cols, HEADS, C_N, PACKED, BLOCK_N)
    x_base = x_ptr + n * stride_x_n * ALIGN
    v_base = v_ptr + n * stride_v_n * ALIGN
    out_base = out_ptr + n * stride_out_n * ALIGN
    h_base = h_ptr + n * C_OUT * total_n
    scale = scalar(logit_scale, ACC)
    dtype: tl.constexpr = out_ptr.dtype.element_ty

    rows_c = tl.arange(0, BLOCK_C).to(tl.int64)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + rows_n, mask=rows_n < total_n, other=0.0).to(ACC)
    if CHANNELS_FIT:
        w = load_matrix(w_ptr, rows_c, rows_n, C, total_n, 1, C, dtype)
        h = load_matrix(h_base, rows_n, rows_c, total_n, C_OUT, 1, total_n, dtype)
    start = split * BLOCKS_PER_SPLIT * BLOCK_L
    for l0 in range(start, tl.minimum(start + BLOCKS_PER_SPLIT * BLOCK_L, L), BLOCK_L):
        cols = (l0 + tl.arange(0, BLOCK_L)).to(tl.int64)
        z = tl.zeros((BLOCK_L, HEAD_BLOCK * BLOCK_N), ACC)
        if CHANNELS_FIT:
            x = load_tile(x_base, cols, rows_c, L, C, stride_x_l, stride_x_c * ALIGN)
            z = dot(x, w, z, PRECISION)
        else:
            for c0 in range(0, C, BLOCK_C):
                rows = c0 + rows_c
                xc = load_tile(x_base, cols, rows, L, C, stride_x_l, stride_x_c * ALIGN)
                wc = load_matrix(w_ptr, rows, rows_n, C, total_n, 1, C, dtype)
                z = dot(xc, wc, z, PRECISION)
        if HAS_BIAS:
            z += bias[None, :]
        if SAVE_V:
            v_ptrs = v_base + cols[:, None] * stride_v_l + rows_n[None, :] * stride_v_c * ALIGN
            inside = (cols < L)[:, None] & (rows_n < total_n)[None, :]
            tl.store(v_ptrs, z.to(dtype), mask=inside)
        q = z * scale
        if SOFTMAX:
            q = softmax_heads(q, C_N, HEAD_BLOCK, BLOCK_N)
        q = q.to(dtype)
        if CHANNELS_FIT:
            y = x.to(ACC) if X_FIRST else tl.zeros((BLOCK_L, BLOCK_C), ACC)
            y = dot(q, h, y, PRECISION)
            if HAS_BIAS_OUT:
                bo = tl.load(bias_out_ptr + rows_c, mask=rows_c < C_OUT, other=0.0)
                y += bo.to(ACC)[None, :]
            if RESIDUAL and not X_FIRST:
                y += x.to(ACC)
            ptrs = out_base + cols[:, None] * stride_out_l + rows_c[None, :] * stride_out_c * ALIGN
            tl.store(ptrs, y.to(dtype), mask=(cols < L)[:, None] & (rows_c < C_OUT)[None, :])
        else:
            for c0 in range(0, C_OUT, BLOCK_C):
                rows = c0 + rows_c
                hc = load_matrix(h_base, rows_n, rows, total_n, C_OUT, 1, total_n, dtype)
                y = tl.zeros((BLOCK_L, BLOCK_C), ACC)
                if X_FIRST:
                    y = load_tile(x_base, cols, rows, L, C, stride_x_l, stride_x_c * ALIGN).to(ACC)
                y = dot(q, hc, y, PRECISION)
                if HAS_BIAS_OUT:
                    bo = tl.load(bias_out_ptr + rows, mask=rows < C_OUT, other=0.0)
                    y += bo.to(ACC)[None, :]
                if RESIDUAL and not X_FIRST:
                    xc = load_tile(x_base, cols, rows, L, C, stride_x_l, stride_x_c * ALIGN)
                    y += xc.to(ACC)
                ptrs = out_base + cols[:, None] * stride_out_l
                ptrs += rows[None, :] * stride_out_c * ALIGN
                tl.store(ptrs, y.to(dtype), mask=(cols < L)[:, None] & (rows < C_OUT)[None, :])


@guard.proved({"x": "N-L", "h": "N--", "out": "N-L", "v": "N-L"}, writes=("out", "v"))
def project_distribute(
    x, weight_v, bias_v, h, bias_out, out, v, *, heads, logit_scale, softmax, residual
):
    """Writes ``out (N, C', L)``, and ``v (N, total_n, L)`` if given; ``h (N, C', total_n)``."""
    ready = launch.prepared(
        _project_distribute, (x, h, out, v, weight_v, bias_v, bias_out), heads, softmax, residual
    )
    ready(
        (
            x, x if v is None else v, weight_v, weight_v if bias_v is None else bias_v,
            h, h if bias_out is None else bias_out, out,
        ),
        (logit_scale,),
    )  # fmt: skip


def _project_distribute(x, h, out, v, weight_v, bias_v, bias_out, heads, softmax, residual):
    batch, channels, _ = x.shape
    c_out, total_n = h.shape[1:]
    head_block, block_n = tiles.packed_cols(heads, total_n // heads)
    sizes = max(channels, c_out), head_block * block_n
    channels_fit = tiles.channels_fit(*sizes)
    kernel = "project_distribute" if channels_fit else "project_distribute_blocks"
    tile = tiles.tile(kernel, x, *sizes, launch.rows(x) if v is None else "v")
    return launch.Launch(
        project_distribute_kernel, x, tile, batch,
        activations={"x": x, "v": x if v is None else v, "out": out},
        HEADS=heads, C=channels, C_N=total_n // heads, C_OUT=c_out, HEAD_BLOCK=head_block,
        PACKED=tiles.packed(heads, total_n // heads, block_n), SAVE_V=v is not None,
        SOFTMAX=softmax, HAS_BIAS=bias_v is not None, HAS_BIAS_OUT=bias_out is not None,
        RESIDUAL=residual, X_FIRST=residual and v is None and tiles.wants_64_rows(x.device),
        CHANNELS_FIT=channels_fit, BLOCK_N=block_n,
    )  # fmt: skip
