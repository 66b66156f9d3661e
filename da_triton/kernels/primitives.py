"""Triton helpers on tiles, shared by all kernels: addresses, loads, one policy for products."""

import math

import triton
import triton.language as tl

from .. import precision

LOG2E = tl.constexpr(1.4426950408889634)
# |x − high| is at most 2^-9 |x| in bfloat16 and 2^-11 |x| in float16, so the product fits.
LOW_SCALE = tl.constexpr(256.0)
GRADIENT_RANGE = tl.constexpr(precision.GRADIENT_RANGE)
LOG_RANGE = tl.constexpr(math.log(precision.GRADIENT_RANGE))


@triton.jit
def scalar(value, DTYPE: tl.constexpr):
    """A float64 launch argument, rounded once to the accumulator's dtype."""
    return tl.full((), value, DTYPE)


@triton.jit
def dot(x, y, acc, PRECISION: tl.constexpr):
    """``acc + x @ y``: operands of one dtype, sums in the accumulator's dtype."""
    return tl.dot(x, y, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def dot_2xhalf(w, x, acc, PRECISION: tl.constexpr):
    """``acc + w @ x`` for x in the accumulator's dtype.

    Where w has half precision, x goes to the matrix unit in two halves, which together hold
    twice the digits.
    """
    if w.dtype == x.dtype:
        return dot(w, x, acc, PRECISION)
    high, low = split(x, w.dtype)
    return dot(w, high, acc, PRECISION) + dot_low(w, low, acc, PRECISION)


@triton.jit
def split(x, DTYPE: tl.constexpr):
    """``x`` as ``high + low / LOW_SCALE`` in half precision, the scale clear of subnormals."""
    high = x.to(DTYPE)
    return high, ((x - high.to(x.dtype)) * LOW_SCALE).to(DTYPE)


@triton.jit
def dot_low(x, y, acc, PRECISION: tl.constexpr):
    """``x @ y / LOW_SCALE``, one of the two a low part of ``split``; shape and dtype of acc.

    In an accumulator of its own: compilers for Blackwell miscompile products that are chained
    through one in a loop. The factor keeps Triton from chaining them again.
    """
    return dot(x, y, tl.zeros_like(acc), PRECISION) * (1.0 / LOW_SCALE)


@triton.jit
def online_softmax(x, mx, total):
    """One step of a softmax over the second axis of logits that come block by block.

    Returns the unnormalised weights, the factor on sums so far, the new maximum and sum.
    """
    new_mx = tl.maximum(mx, tl.max(x, 1))
    pivot = tl.where(new_mx == -float("inf"), 0.0, new_mx)  # −inf − (−inf) would be NaN
    p = exp(x - pivot[:, None])
    rescale = exp(mx - pivot)
    return p, rescale, new_mx, total * rescale + tl.sum(p, 1)


@triton.jit
def exp(x):
    """exp via exp2. Callers subtract a maximum or lse; what still overflows, under a mask or out of
    bounds, they replace."""
    return tl.exp2(x * LOG2E)


@triton.jit
def exp_minus(x, lse):
    """``exp(x − lse)``, lse broadcast against x and perhaps in float64.

    One float32 cannot hold ``max + log(sum)`` to the precision of float32 weights: where logits are
    float32, lse comes in float64 and is subtracted in two parts.
    """
    high = lse.to(x.dtype)
    e = x - high
    if lse.dtype != x.dtype:
        low = (lse - high.to(lse.dtype)).to(x.dtype)
        e -= tl.where(low == low, low, 0.0)  # inf − inf, where all are masked
    return exp(e)


@triton.jit
def into_float16(largest, lse):
    """``(lse', factor)`` where descriptors have gradients of up to ``largest``.

    Those too large for float16 go to the matrix unit times ``factor``, and what recomputes P takes
    lse': ``factor · exp(x − lse') = exp(x − lse)``. The factor comes from lse' as it is rounded.
    """
    above = tl.maximum(largest * (1.0 / 32768.0), 1.0)  # half of what float16 holds, for roundings
    shift = tl.minimum(tl.log(above), LOG_RANGE)
    shifted = tl.where(shift > 0.0, lse - shift, lse)
    return shifted, tl.where(shift > 0.0, exp(shifted - lse), 1.0)


@triton.jit
def log_sum(mx, total, DTYPE: tl.constexpr):
    """``mx + log(total)`` in lse's dtype."""
    return mx.to(DTYPE) + tl.log(total).to(DTYPE)


@triton.jit
def offsets(base, rows, cols, stride_c, stride_l):
    """Addresses of a tile of an activation: rows are channels, columns are positions.

    Rows and columns are int64, because 2,048 channels of 2^21 positions exceed int32.
    """
    return base + rows[:, None] * stride_c + cols[None, :] * stride_l


@triton.jit
def load_tile(base, rows, cols, C, L, stride_c, stride_l):
    """A tile of an activation, zero outside it."""
    inside = (rows < C)[:, None] & (cols < L)[None, :]
    return tl.load(offsets(base, rows, cols, stride_c, stride_l), mask=inside, other=0.0)


@triton.jit
def store_tile(base, rows, cols, C, L, stride_c, stride_l, value):
    """Writes a tile of an activation, rounded once to the tensor's dtype."""
    inside = (rows < C)[:, None] & (cols < L)[None, :]
    ptrs = offsets(base, rows, cols, stride_c, stride_l)
    tl.store(ptrs, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def load_matrix(base, rows, cols, R, C, stride_r, stride_c, DTYPE: tl.constexpr):
    """A tile of G, dG or a transpose of them, zero outside, in the dtype of the products."""
    inside = (rows < R)[:, None] & (cols < C)[None, :]
    ptrs = base + rows[:, None] * stride_r + cols[None, :] * stride_c
    return tl.load(ptrs, mask=inside, other=0.0).to(DTYPE)


@triton.jit
def load_mask(base, cols, L, stride_l):
    """Mask of the positions that are included: those inside the tensor that the mask leaves.

    The maximum over an axis of size 1 ends what Triton sees behind a masked matrix operand.
    Otherwise it takes the operand for one that was widened from int8, because of this load, and
    lays it out for more columns than the tile may have: triton-lang/triton#11632 and #11691.
    """
    mask = tl.load(base + cols * stride_l, mask=cols < L, other=0).to(tl.int32)
    return tl.max(mask[None, :], 0) != 0


@triton.jit
def softmax_n(v, rows_n, C_N):
    """Softmax over n of every position, ``[BLOCK_N, BLOCK_L]``; rows beyond C_N give 0."""
    v = tl.where((rows_n < C_N)[:, None], v, -float("inf"))
    q = exp(v - tl.max(v, 0)[None, :])
    return q * (1.0 / tl.sum(q, 0))[None, :]
