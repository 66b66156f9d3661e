r"""The gradients of the fused block's weights, from the results of the passes over positions.

    over positions and samples    dWv = Σ dV Xᵀ             dWb = Σ dB Xᵀ       dbv = Σ dV
    over samples and n            dWo = scale · Σ dH Gᵀ     dWa = Σ dG Mᵀ       dba = Σ dG
                                  dbo = Σ dO = Σ dH of one head, since columns of Q sum to 1

The first are sums over all positions of the batch, split over programs, whose partials the second
launch adds in a fixed order, besides its own products of descriptors: two launches for all six. On
the unfused route every gradient is such a sum: two launches for the projections of X, two for Wo.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..precision import accumulator
from ..runtime import guard, launch, tiles
from .primitives import GRADIENT_RANGE, LOW_SCALE, dot, load_tile, scalar, split

LEAST_BLOCKS, LEAST_POSITIONS = 4, 256  # per split
FEW = 12  # partials, up to which each is read on its own
WAVES = 4  # at most: with many blocks of t and x, a single one would leave SMs idle


@triton.jit(do_not_specialize=["N", "BLOCKS_PER_SPLIT"])
def outer_product_kernel(
    t_ptr,  # (N, ROWS, L): dV and dB
    x_ptr,  # (N, C, L)
    partials_ptr,  # (splits, ROWS, C) float32/64: partials of Σ_N Σ_L t xᵀ
    sums_ptr,  # (splits, ROWS): partials of Σ_N Σ_L t
    N,
    ROWS,
    C,
    L_UNITS,
    BLOCKS_PER_SPLIT,
    stride_t_n,
    stride_t_c,
    stride_t_l,
    stride_x_n,
    stride_x_c,
    stride_x_l,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """One program: tiles of rows and channels, a split of the positions of all samples."""
    L = L_UNITS * ALIGN
    tiles_c = tl.cdiv(C, BLOCK_C)
    tiles = tiles_c * tl.cdiv(ROWS, BLOCK_N)
    pid = tl.program_id(0)
    tile, split = pid % tiles, pid // tiles
    rows_n = ((tile // tiles_c) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    rows_c = ((tile % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    blocks = tl.cdiv(L, BLOCK_L)
    acc = tl.zeros((BLOCK_N, BLOCK_C), ACC)
    # In half precision the matrix unit sums t, too: 16 equal columns, the fewest of a product.
    half: tl.constexpr = t_ptr.dtype.element_ty != ACC
    total = tl.zeros((BLOCK_N, 16) if half else (BLOCK_N,), ACC)
    ones = tl.full((BLOCK_L, 16), 1.0, tl.float32).to(t_ptr.dtype.element_ty)
    start = split * BLOCKS_PER_SPLIT
    for block in range(start, tl.minimum(start + BLOCKS_PER_SPLIT, N * blocks)):
        n = (block // blocks).to(tl.int64)
        cols = (block % blocks).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
        t_base, x_base = t_ptr + n * stride_t_n * ALIGN, x_ptr + n * stride_x_n * ALIGN
        t = load_tile(t_base, rows_n, cols, ROWS, L, stride_t_c * ALIGN, stride_t_l)
        x = load_tile(x_base, cols, rows_c, L, C, stride_x_l, stride_x_c * ALIGN)
        acc = dot(t, x, acc, PRECISION)
        if half:
            total = dot(t, ones, total, PRECISION)
        else:
            total += tl.sum(t, 1)
    if half:
        total = tl.max(total, 1)
    split = split.to(tl.int64)
    offs = (split * ROWS + rows_n)[:, None] * C + rows_c[None, :]
    tl.store(partials_ptr + offs, acc, mask=(rows_n < ROWS)[:, None] & (rows_c < C)[None, :])
    if tile % tiles_c == 0:
        tl.store(sums_ptr + split * ROWS + rows_n, total, mask=rows_n < ROWS)


@triton.jit
def _sum_partials(
    partials_ptr, out_ptr, tile, SIZE, STRIDE, NUM_PARTIALS, ACC: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``Σ_i partials[i, :SIZE]``, a block of it, in a fixed order, ``GROUP`` partials at a time."""
    offs = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < SIZE
    total = tl.zeros((GROUP, BLOCK), ACC)
    for first in range(0, NUM_PARTIALS, GROUP):
        partials = (first + tl.arange(0, GROUP)).to(tl.int64)
        mask = inside[None, :]
        if GROUP > 1:
            mask &= (partials < NUM_PARTIALS)[:, None]
        ptrs = partials_ptr + partials[:, None] * STRIDE + offs[None, :]
        total += tl.load(ptrs, mask=mask, other=0.0)
    tl.store(out_ptr + offs, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _product_of_descriptors(
    a_base, b_base, out_base, sum_base, tile, R, K, COLS, N, scale,
    stride_a_n, stride_a_r, stride_b_n, stride_b_r, stride_out_r, write_sum,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out[r, c] = scale · Σ_N Σ_k a[n, r, k] b[n, c, k]`` of one tile, and ``Σ a`` by rows.

    a is a gradient. Both are in the accumulator's dtype; in half precision each goes to the matrix
    unit in two parts, and only the product of the two low parts is left out. Samples and k are one
    axis, whose blocks are full where n is a number like 19.

    Zeros come from selects behind the loads. An operand that is only loaded and converted, Triton
    copies to shared memory before the conversion, and each warp then converts all that it reads.
    """
    acc_dtype: tl.constexpr = a_base.dtype.element_ty
    half: tl.constexpr = tl.float16 == DTYPE
    tiles_c = tl.cdiv(COLS, BLOCK_R)
    rows = ((tile // tiles_c) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    cols = ((tile % tiles_c) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    acc = tl.zeros((BLOCK_R, BLOCK_R), acc_dtype)
    low_a = tl.zeros((BLOCK_R, BLOCK_R), acc_dtype)
    low_b = tl.zeros((BLOCK_R, BLOCK_R), acc_dtype)
    total = tl.zeros((BLOCK_R, BLOCK_K), acc_dtype)
    for first in range(0, N * K, BLOCK_K):
        nk = first + tl.arange(0, BLOCK_K)
        n, k, inside = (nk // K).to(tl.int64), nk % K, nk < N * K
        inside_a = (rows < R)[:, None] & inside[None, :]
        inside_b = (cols < COLS)[:, None] & inside[None, :]
        a_ptrs = a_base + rows[:, None] * stride_a_r + (n * stride_a_n + k)[None, :]
        b_ptrs = b_base + cols[:, None] * stride_b_r + (n * stride_b_n + k)[None, :]
        a = tl.where(inside_a, tl.load(a_ptrs, mask=inside_a), 0.0)
        b = tl.trans(tl.where(inside_b, tl.load(b_ptrs, mask=inside_b), 0.0))
        total += a
        if acc_dtype == DTYPE:
            acc = dot(a, b, acc, PRECISION)
        else:
            if half:
                a = a * (1.0 / GRADIENT_RANGE)
            a_high, a_low = split(a, DTYPE)
            b_high, b_low = split(b, DTYPE)
            acc = dot(a_high, b_high, acc, PRECISION)
            low_a = dot(a_low, b_high, low_a, PRECISION)
            low_b = dot(a_high, b_low, low_b, PRECISION)
    acc += (low_a + low_b) * (1.0 / LOW_SCALE)
    if half:
        acc = acc * GRADIENT_RANGE
    ptrs = out_base + rows[:, None] * stride_out_r + cols[None, :]
    out_dtype: tl.constexpr = out_base.dtype.element_ty
    tl.store(ptrs, (acc * scale).to(out_dtype), mask=(rows < R)[:, None] & (cols < COLS)[None, :])
    if write_sum and tile % tiles_c == 0:
        tl.store(sum_base + rows, tl.sum(total, 1).to(out_dtype), mask=rows < R)


@triton.jit(do_not_specialize=["NUM_PARTIALS", "N", "HEADS"])
def weight_gradients_kernel(
    partials_ptr,  # (NUM_PARTIALS, ROWS, C): dWv in the first half of the rows, dWb in the second
    sums_ptr,  # (NUM_PARTIALS, ROWS)
    dh_ptr,  # (N, C_OUT, total_n)
    g_ptr,  # (N, HEADS, C_M, C_N)
    dg_ptr,  # (N, HEADS, C_M, C_N)
    m_ptr,  # (N, C, total_n)
    dwv_ptr,  # (total_n, C)
    dwb_ptr,  # (total_n, C)
    dbv_ptr,  # (total_n,)
    dwo_ptr,  # (C_OUT, HEADS·C_M)
    dbo_ptr,  # (C_OUT,)
    dwa_ptr,  # (HEADS·C_M, C)
    dba_ptr,  # (HEADS·C_M,)
    scale_h: "fp64",
    NUM_PARTIALS,
    ROWS,
    N,
    HEADS,
    C,
    C_M,
    C_N,
    C_OUT,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,  # partials that are loaded at once
):
    """Programs in this order: sums of dWv, of dWb, of dbv, tiles of dWo, tiles of dWa."""
    pid = tl.program_id(0)
    total_n = HEADS * C_N
    size = total_n * C
    for_matrix, for_vector = tl.cdiv(size, BLOCK), tl.cdiv(total_n, BLOCK)
    sums = 2 * for_matrix + for_vector
    tiles_o = tl.cdiv(C_OUT, BLOCK_R) * tl.cdiv(C_M, BLOCK_R)
    tiles_a = tl.cdiv(C_M, BLOCK_R) * tl.cdiv(C, BLOCK_R)
    dtype: tl.constexpr = dwo_ptr.dtype.element_ty
    scale = scalar(scale_h, ACC)
    if pid < for_matrix:
        _sum_partials(partials_ptr, dwv_ptr, pid, size, ROWS * C, NUM_PARTIALS, ACC, BLOCK, GROUP)
    elif pid < 2 * for_matrix:
        pid -= for_matrix
        second_half = partials_ptr + ROWS // 2 * C
        _sum_partials(second_half, dwb_ptr, pid, size, ROWS * C, NUM_PARTIALS, ACC, BLOCK, GROUP)
    elif pid < sums:
        pid -= 2 * for_matrix
        _sum_partials(sums_ptr, dbv_ptr, pid, total_n, ROWS, NUM_PARTIALS, ACC, BLOCK, GROUP)
    elif pid < sums + HEADS * tiles_o:
        pid -= sums
        head = (pid // tiles_o).to(tl.int64)
        _product_of_descriptors(
            dh_ptr + head * C_N, g_ptr + head * C_M * C_N, dwo_ptr + head * C_M, dbo_ptr,
            pid % tiles_o, C_OUT, C_N, C_M, N, scale,
            C_OUT * total_n, total_n, HEADS * C_M * C_N, C_N, HEADS * C_M, head == 0,
            dtype, PRECISION, BLOCK_R, BLOCK_K,
        )  # fmt: skip
    else:
        pid -= sums + HEADS * tiles_o
        head = (pid // tiles_a).to(tl.int64)
        _product_of_descriptors(
            dg_ptr + head * C_M * C_N, m_ptr + head * C_N, dwa_ptr + head * C_M * C,
            dba_ptr + head * C_M, pid % tiles_a, C_M, C_N, C, N, tl.full((), 1.0, ACC),
            HEADS * C_M * C_N, C_N, C * total_n, total_n, C, True,
            dtype, PRECISION, BLOCK_R, BLOCK_K,
        )  # fmt: skip


@triton.jit(do_not_specialize=["NUM_PARTIALS"])
def sums_kernel(
    partials_ptr,  # (NUM_PARTIALS, ROWS, C)
    sums_ptr,  # (NUM_PARTIALS, ROWS)
    w0_ptr,  # (ROWS_0, C): the first rows of Σ partials
    w1_ptr,  # (ROWS_1, C): the next
    w2_ptr,  # (ROWS_2, C): the last
    b0_ptr,  # (ROWS_0,): in the same way, of Σ sums
    b1_ptr,  # (ROWS_1,)
    b2_ptr,  # (ROWS_2,)
    NUM_PARTIALS,
    ROWS_0,
    ROWS_1,
    ROWS_2,
    C,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,  # partials that are loaded at once
):
    """Programs in this order: blocks of the three matrices, of the three vectors."""
    pid = tl.program_id(0)
    rows = ROWS_0 + ROWS_1 + ROWS_2
    end_0 = tl.cdiv(ROWS_0 * C, BLOCK)
    end_1 = end_0 + tl.cdiv(ROWS_1 * C, BLOCK)
    end_2 = end_1 + tl.cdiv(ROWS_2 * C, BLOCK)
    end_3 = end_2 + tl.cdiv(ROWS_0, BLOCK)
    end_4 = end_3 + tl.cdiv(ROWS_1, BLOCK)
    stride = rows * C
    second, third = ROWS_0, ROWS_0 + ROWS_1
    if pid < end_0:
        _sum_partials(
            partials_ptr, w0_ptr, pid, ROWS_0 * C, stride, NUM_PARTIALS, ACC, BLOCK, GROUP
        )
    elif pid < end_1:
        pid -= end_0
        base = partials_ptr + second * C
        _sum_partials(base, w1_ptr, pid, ROWS_1 * C, stride, NUM_PARTIALS, ACC, BLOCK, GROUP)
    elif pid < end_2:
        pid -= end_1
        base = partials_ptr + third * C
        _sum_partials(base, w2_ptr, pid, ROWS_2 * C, stride, NUM_PARTIALS, ACC, BLOCK, GROUP)
    elif pid < end_3:
        _sum_partials(sums_ptr, b0_ptr, pid - end_2, ROWS_0, rows, NUM_PARTIALS, ACC, BLOCK, GROUP)
    elif pid < end_4:
        _sum_partials(
            sums_ptr + second, b1_ptr, pid - end_3, ROWS_1, rows, NUM_PARTIALS, ACC, BLOCK, GROUP
        )
    else:
        _sum_partials(
            sums_ptr + third, b2_ptr, pid - end_4, ROWS_2, rows, NUM_PARTIALS, ACC, BLOCK, GROUP
        )


class Gradient(NamedTuple):
    """Gradients of a weight ``(rows, C)`` and of its bias ``(rows,)``."""

    weight: torch.Tensor
    bias: torch.Tensor


@guard.proved({"t": "N-L", "x": "N-L"})
def outer_product(t, x):
    """Partials ``(splits, rows, C)`` of ``Σ_N Σ_L t xᵀ``, and ``(splits, rows)`` of ``Σ_N Σ_L t``.

    ``t``: ``(N, rows, L)``; ``x``: ``(N, C, L)``, in any strides.
    """
    ready = launch.prepared(_outer, (t, x))
    partials, sums = ready.empty()
    ready((t, x, partials, sums))
    return partials, sums


def _outer(t, x):
    batch, channels, length = x.shape
    rows = t.shape[1]
    # A single large tile would have a partial for every SM: twice the bytes of two.
    features = channels if channels * rows > 256 * 128 else min(channels, 128)
    tile = tiles.tile("outer_product", x, features, rows, launch.rows(x))
    blocks = -(-rows // tile.block_n) * -(-channels // tile.block_m)
    padded = -(-length // tile.block_l) * tile.block_l
    # A partial has as many bytes as its tiles of t and x at a few blocks of positions.
    least = max(LEAST_BLOCKS, LEAST_POSITIONS // tile.block_l)
    blocks_per_split, num_splits = launch.split_positions(
        blocks, padded * batch, tile, x.device, WAVES, least
    )
    ready = launch.Launch(
        outer_product_kernel, x, tile, blocks * num_splits, activations={"x": x, "t": t},
        N=batch, ROWS=rows, C=channels, BLOCKS_PER_SPLIT=blocks_per_split,
    )  # fmt: skip
    return ready.allocating(accumulator(x.dtype), (num_splits, rows, channels), (num_splits, rows))


def _few_tiles(g, x, dh):
    """Whether the tiles of dWo and dWa leave SMs idle: smaller ones then share the samples."""
    heads, c_m = g.shape[1:3]
    square, _ = tiles.blocks("weight_gradients", "half", c_m, g.shape[3])
    count = sum(-(-wide // square) for wide in (dh.shape[1], x.shape[1]))
    return heads * -(-c_m // square) * count < launch.num_sms(x.device)


@guard.proved(
    {"t": "N-L", "x": "N-L", "dh": "N--", "g": "N---", "dg": "N---", "m": "N--"},
    choice=lambda x, dh, g, **_: _few_tiles(g, x, dh),
)
def weight_gradients(t, x, dh, g, dg, m, like, *, scale):
    """dWa, dba, dWb, dWv, dbv, dWo, dbo, in the dtype of ``like``, a weight.

    ``t``: dV at the start of the first half of its rows, dB of the second. dbo is right only where
    V has a softmax.
    """
    partials, sums = outer_product(t, x)
    ready = launch.prepared(_weight_gradients, (x, partials, sums, dh, g, dg, m, like))
    dwv, dwb, dbv, dwo, dbo, dwa, dba = results = ready.empty()
    ready((partials, sums, dh, g, dg, m, *results), (scale,))
    return dwa, dba, dwb, dwv, dbv, dwo, dbo


def _weight_gradients(x, partials, sums, dh, g, dg, m, like):
    batch, channels, _ = x.shape
    heads, c_m, c_n = g.shape[1:]
    c_out, total_n = dh.shape[1], heads * c_n
    num_partials, rows, _ = partials.shape
    tile = tiles.tile("weight_gradients", x, c_m, c_n)
    square, depth = tile.block_m, tile.block_l
    if launch.chosen(_few_tiles(g, x, dh)):
        square, depth = square // 2, 4 * depth
    group, block = 32, 128
    programs = 2 * -(-total_n * channels // block) + -(-total_n // block)
    for wide in (c_out, channels):
        programs += heads * -(-c_m // square) * -(-wide // square)
    ready = launch.Launch(
        weight_gradients_kernel, x, tile, programs, NUM_PARTIALS=num_partials, ROWS=rows, N=batch,
        HEADS=heads, C=channels, C_M=c_m, C_N=c_n, C_OUT=c_out, BLOCK_R=square,
        BLOCK_K=depth, BLOCK=block, GROUP=group,
    )  # fmt: skip
    return ready.allocating(
        like.dtype, *[(total_n, channels)] * 2, (total_n,), (c_out, heads * c_m), (c_out,),
        (heads * c_m, channels), (heads * c_m,),
    )  # fmt: skip


def products(t, x, *rows):
    """A ``Gradient`` for each run of ``rows`` (up to three) of t, in its dtype: ``Σ_N Σ_L t xᵀ``.

    ``t``: ``(N, rows, L)``, ``x``: ``(N, C, L)``, in any strides. No result shares memory.
    """
    if not tiles.fits("outer_product", t, x.shape[1], t.shape[1]):
        return [_vendor_gemm(t_, x) for t_ in t.split(rows, 1)]
    partials, sums = outer_product(t, x)
    ready = launch.prepared(_sums, (t, partials, sums), rows)
    made = ready.empty()
    results = [Gradient(*pair) for pair in zip(made[::2], made[1::2], strict=True)]
    first, second, third = (*results, results[0], results[0])[:3]
    ready((
        partials, sums, first.weight, second.weight, third.weight, first.bias, second.bias,
        third.bias,
    ))  # fmt: skip
    return results


def _sums(t, partials, sums, rows):
    num_partials, _, channels = partials.shape
    group, block = (16, 256) if num_partials > FEW else (1, 1024)
    programs = sum(-(-r * channels // block) + -(-r // block) for r in rows)
    first, second, third = (*rows, 0, 0)[:3]
    ready = launch.Launch(
        sums_kernel, t, None, programs, NUM_PARTIALS=num_partials,
        ROWS_0=first, ROWS_1=second, ROWS_2=third,
        C=channels, BLOCK=block, GROUP=group, num_warps=4,
    )  # fmt: skip
    return ready.allocating(t.dtype, *[s for r in rows for s in ((r, channels), (r,))])


def _vendor_gemm(t, x):
    """``outer_product`` without a kernel: in channels-last memory one GEMM over all positions."""
    acc = accumulator(x.dtype)
    if x.stride(1) == t.stride(1) == 1 and x.shape[1] > 1 < t.shape[1]:
        rows, columns = (y.transpose(1, 2).flatten(0, 1) for y in (t, x))
        weight = rows.t() @ columns
    else:
        weight = torch.bmm(t, x.transpose(1, 2)).sum(0, dtype=acc).to(x.dtype)
    return Gradient(weight, t.sum((0, 2), dtype=acc).to(x.dtype))
