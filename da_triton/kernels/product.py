r"""Products of weights with descriptors, ``scale · W x``, spread over blocks of the weights' rows.

On the matrix unit, with descriptors in two halves where the weights have half precision. They have
no positions, so a launch is small: what counts is how many programs share it.
"""

import triton
import triton.language as tl

from ..runtime import launch
from .primitives import GRADIENT_RANGE, dot_2xhalf, load_matrix, scalar

BLOCK_R = 32
LONG = 128  # k, beyond which a product takes fewer, longer steps


@triton.jit(do_not_specialize=["HEADS"])
def product_kernel(
    w_ptr,  # (HEADS, ROWS, K), any strides
    x_ptr,  # (N, HEADS, K, C_N), any strides
    bias_ptr,  # (HEADS·ROWS,); read if HAS_BIAS
    lse_ptr,  # (N, HEADS·C_N): +inf where out is zero; read if HAS_MASK
    out_ptr,  # (N, HEADS, ROWS, C_N), any strides
    scale_h: "fp64",
    HEADS,
    ROWS,
    K,
    C_N,
    stride_w_h,
    stride_w_r,
    stride_w_k,
    stride_x_s,
    stride_x_h,
    stride_x_k,
    stride_x_n,
    stride_out_s,
    stride_out_h,
    stride_out_r,
    stride_out_n,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    GRADIENT: tl.constexpr,  # x may be larger than float16 holds
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: a tile of rows and n of one head of one sample.

    Zeros of x come from a select behind the load. An operand that is only loaded and converted,
    Triton copies to shared memory before the conversion, and each warp then converts all of it.
    """
    blocks_r = tl.cdiv(ROWS, BLOCK_R)
    blocks = blocks_r * tl.cdiv(C_N, BLOCK_N)
    pid = tl.program_id(0)
    tile = pid % blocks
    head = (pid // blocks % HEADS).to(tl.int64)
    n = (pid // (blocks * HEADS)).to(tl.int64)
    rows = ((tile % blocks_r) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    cols = ((tile // blocks_r) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    inside_n = cols < C_N
    half: tl.constexpr = GRADIENT and w_ptr.dtype.element_ty == tl.float16
    w_base = w_ptr + head * stride_w_h
    x_base = x_ptr + n * stride_x_s + head * stride_x_h
    out = tl.zeros((BLOCK_R, BLOCK_N), ACC)
    for k0 in tl.range(0, K, BLOCK_K, num_stages=1):
        ks = (k0 + tl.arange(0, BLOCK_K)).to(tl.int64)
        w = load_matrix(w_base, rows, ks, ROWS, K, stride_w_r, stride_w_k, w_ptr.dtype.element_ty)
        inside = (ks < K)[:, None] & inside_n[None, :]
        x_ptrs = x_base + ks[:, None] * stride_x_k + cols[None, :] * stride_x_n
        x = tl.where(inside, tl.load(x_ptrs, mask=inside), 0.0)
        if half:
            x *= 1.0 / GRADIENT_RANGE
        out = dot_2xhalf(w, x, out, PRECISION)
    if half:
        out *= GRADIENT_RANGE
    out *= scalar(scale_h, ACC)
    if HAS_BIAS:
        out += tl.load(bias_ptr + head * ROWS + rows, mask=rows < ROWS, other=0.0).to(ACC)[:, None]
    if HAS_MASK:  # of an attention map whose positions are all masked
        lse = tl.load(lse_ptr + (n * HEADS + head) * C_N + cols, mask=inside_n, other=0.0)
        out = tl.where((lse == float("inf"))[None, :], 0.0, out)
    ptrs = out_ptr + n * stride_out_s + head * stride_out_h
    ptrs += rows[:, None] * stride_out_r + cols[None, :] * stride_out_n
    inside = (rows < ROWS)[:, None] & inside_n[None, :]
    tl.store(ptrs, out.to(out_ptr.dtype.element_ty), mask=inside)


def product(w, x, out, scale=1.0, bias=None, lse=None, gradient=False):
    """``out = scale · w @ x + bias`` by head; zero where ``lse``, unless None, is +inf.

    ``w``: ``(heads, rows, k)``; ``x``: ``(N, heads, k, n)`` in the accumulator's dtype; ``out``:
    ``(N, heads, rows, n)``, each in any strides; ``bias``: ``(heads·rows,)``. ``gradient``: x may
    be larger than float16 holds.
    """
    ready = launch.prepared(_product, (x, w, out, bias, lse), gradient)
    ready((w, x, x if bias is None else bias, x if lse is None else lse, out), (scale,))


def _product(x, w, out, bias, lse, gradient):
    batch, heads, rows, c_n = out.shape
    k = w.shape[2]
    block_k = 256 if k > LONG else 64
    block_n = 32 if 16 < c_n < 32 else 16  # rows of x that are not aligned are read once
    blocks = -(-rows // BLOCK_R) * -(-c_n // block_n)
    return launch.Launch(
        product_kernel, w, None, batch * heads * blocks, HEADS=heads, ROWS=rows, K=k,
        C_N=c_n, HAS_BIAS=bias is not None, HAS_MASK=lse is not None,
        GRADIENT=gradient,
        strided={"w": w, "x": x, "out": out},
        BLOCK_R=BLOCK_R, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4,
    )  # fmt: skip
