r"""Merges partial results: ``Σ_i acc_i·exp(mx_i − mx) / Σ_i sum_i·exp(mx_i − mx)``.

Several partials are loaded at a time, and all are added in a fixed order. The launch of its own is
spread over tiles of n and m; ``combine`` merges a few partials in the launch of its products.
"""

import triton
import triton.language as tl

from ..planning.costs import FEW
from ..runtime import launch
from .primitives import exp, log_sum

IN_FLIGHT = 128  # rows of 32 or 64 features that a program loads at once
MANY = 16  # partials among them, of more than a few


@triton.jit
def merged_statistics(max_base, sum_base, cols, C_N, NUM_PARTIALS, stride, GROUP: tl.constexpr):
    """``(mx, pivot, total)`` of all partials; ``pivot`` is mx, or 0 instead of −inf."""
    mx = tl.full(cols.shape, -float("inf"), max_base.dtype.element_ty)
    for first in range(0, NUM_PARTIALS, GROUP):
        partials = first + tl.arange(0, GROUP).to(tl.int64)
        inside = (partials < NUM_PARTIALS)[:, None] & (cols < C_N)[None, :]
        offs = partials[:, None] * stride + cols[None, :]
        part = tl.load(max_base + offs, mask=inside, other=-float("inf"))
        mx = tl.maximum(mx, tl.max(part, 0))
    pivot = tl.where(mx == -float("inf"), 0.0, mx)
    total = tl.zeros(cols.shape, max_base.dtype.element_ty)
    for first in range(0, NUM_PARTIALS, GROUP):
        partials = first + tl.arange(0, GROUP).to(tl.int64)
        inside = (partials < NUM_PARTIALS)[:, None] & (cols < C_N)[None, :]
        offs = partials[:, None] * stride + cols[None, :]
        part = tl.load(max_base + offs, mask=inside, other=-float("inf"))
        sums = tl.load(sum_base + offs, mask=inside, other=0.0)
        total += tl.sum(sums * exp(part - pivot[None, :]), 0)
    return mx, pivot, total


@triton.jit
def added(
    acc_base, max_base, rows, cols, R, C_N, NUM_PARTIALS, pivot, stride, GROUP: tl.constexpr,
    WEIGHTED: tl.constexpr,
):  # fmt: skip
    """``Σ_i acc``, ``[cols, rows]``, of acc ``(NUM_PARTIALS, stride, R)``.

    WEIGHTED: each times ``exp(mx − pivot)``.
    """
    found = tl.zeros((cols.shape[0], rows.shape[0]), acc_base.dtype.element_ty)
    inside_n = cols < C_N
    ptrs = acc_base + cols[:, None] * R + rows[None, :]
    inside = inside_n[:, None] & (rows < R)[None, :]
    for first in range(0, NUM_PARTIALS, GROUP):
        partials = first + tl.arange(0, GROUP).to(tl.int64)
        there = partials < NUM_PARTIALS
        acc = tl.load(
            ptrs[None, :, :] + (partials * stride * R)[:, None, None],
            mask=there[:, None, None] & inside[None, :, :], other=0.0,
        )  # fmt: skip
        if WEIGHTED:
            mx = tl.load(
                max_base + partials[:, None] * stride + cols[None, :],
                mask=there[:, None] & inside_n[None, :], other=-float("inf"),
            )  # fmt: skip
            acc *= exp(mx - pivot[None, :])[:, :, None]
        found += tl.sum(acc, 0)
    return found


@triton.jit
def store_descriptors(
    acc, mx, total, nh, h, rows_m, rows_n, C_M, C_N, g_ptr, lowp_ptr, lse_ptr, bias_ptr,
    HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, LOWP: tl.constexpr,
):  # fmt: skip
    """Writes lse, and G of a block from ``acc [BLOCK_M, BLOCK_N]`` over ``total`` with A's bias.

    Rows of P sum to 1, so G has the bias of A; an attention map without positions has neither.
    """
    inside_n = rows_n < C_N
    lse = log_sum(mx, total, lse_ptr.dtype.element_ty)
    acc *= (1.0 / total)[None, :]
    if HAS_MASK:
        lse = tl.where(total == 0.0, float("inf"), lse)
        acc = tl.where((total == 0.0)[None, :], 0.0, acc)
    tl.store(lse_ptr + nh * C_N + rows_n, lse, mask=inside_n)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + h * C_M + rows_m, mask=rows_m < C_M, other=0.0).to(acc.dtype)
        if HAS_MASK:
            acc += tl.where((total == 0.0)[None, :], 0.0, bias[:, None])
        else:
            acc += bias[:, None]
    offs = nh * C_M * C_N + rows_m[:, None] * C_N + rows_n[None, :]
    inside = inside_n[None, :] & (rows_m < C_M)[:, None]
    tl.store(g_ptr + offs, acc, mask=inside)
    if LOWP:
        tl.store(lowp_ptr + offs, acc.to(lowp_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["HEADS", "NUM_PARTIALS"])
def gather_combine_kernel(
    acc_ptr,  # (N, NUM_PARTIALS, heads·C_N, C_M): partial sums
    max_ptr,  # (N, NUM_PARTIALS, heads·C_N): partial maxima
    sum_ptr,  # (N, NUM_PARTIALS, heads·C_N): partial sums of exponentials
    bias_ptr,  # (heads·C_M,): of A; read if HAS_BIAS
    g_ptr,  # (N·heads, C_M, C_N): G
    lowp_ptr,  # (N·heads, C_M, C_N): G in the input dtype; written if LOWP
    lse_ptr,  # (N·heads, C_N)
    HEADS,
    C_M,
    C_N,
    NUM_PARTIALS,
    HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LOWP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program: a tile of n and m of one head of one sample, partials in order."""
    blocks_m = tl.cdiv(C_M, BLOCK_M)
    tiles = blocks_m * tl.cdiv(C_N, BLOCK_N)
    pid = tl.program_id(0)
    tile = pid % tiles
    nh = (pid // tiles).to(tl.int64)
    n, h = nh // HEADS, nh % HEADS
    rows_m = (tile % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_n = (tile // blocks_m) * BLOCK_N + tl.arange(0, BLOCK_N)

    base = (n * NUM_PARTIALS * HEADS + h) * C_N
    stride = HEADS * C_N
    max_base = max_ptr + base
    mx, pivot, total = merged_statistics(
        max_base, sum_ptr + base, rows_n, C_N, NUM_PARTIALS, stride, GROUP
    )
    acc = added(
        acc_ptr + base * C_M, max_base, rows_m, rows_n, C_M, C_N, NUM_PARTIALS, pivot,
        stride, GROUP, True,
    )  # fmt: skip
    store_descriptors(
        tl.trans(acc), mx, total, nh, h, rows_m, rows_n, C_M, C_N,
        g_ptr, lowp_ptr, lse_ptr, bias_ptr, HAS_MASK, HAS_BIAS, LOWP,
    )  # fmt: skip


@triton.jit(do_not_specialize=["NUM_PARTIALS"])
def add_kernel(
    partials_ptr,  # (N, NUM_PARTIALS, total_n, C)
    out_ptr,  # (N, C, total_n)
    TOTAL_N,
    C,
    NUM_PARTIALS,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program: a tile of n and channels of one sample."""
    blocks_c = tl.cdiv(C, BLOCK_M)
    tiles = blocks_c * tl.cdiv(TOTAL_N, BLOCK_N)
    pid = tl.program_id(0)
    tile = pid % tiles
    n = (pid // tiles).to(tl.int64)
    rows_c = (tile % blocks_c) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (tile // blocks_c) * BLOCK_N + tl.arange(0, BLOCK_N)
    base = partials_ptr + n * NUM_PARTIALS * TOTAL_N * C
    out = added(base, base, rows_c, cols, C, TOTAL_N, NUM_PARTIALS, 0, TOTAL_N, GROUP, False)
    ptrs = out_ptr + (n * C + rows_c)[:, None] * TOTAL_N + cols[None, :]
    tl.store(ptrs, tl.trans(out), mask=(rows_c < C)[:, None] & (cols < TOTAL_N)[None, :])


def few_or_many(num_partials):
    """The number of partials with which the code that merges ``num_partials`` is proved."""
    return 1 if num_partials == 1 else 2 if num_partials <= FEW else FEW + 1


def merge(partials, g, lse, bias=None, lowp=None, *, mask):
    """Writes G, ``(N, heads, m, n)``, plus ``bias``, in ``lowp`` too unless None, and lse."""
    ready = launch.prepared(_merge, (g, *partials, lse, bias, lowp), mask)
    ready((*partials, g if bias is None else bias, g, g if lowp is None else lowp, lse))


def _merge(g, acc, mx, total, lse, bias, lowp, mask):
    batch, heads, c_m, c_n = g.shape
    num_partials = acc.shape[1]
    blocks, sizes = _tiles(num_partials, c_m, c_n)
    return launch.Launch(
        gather_combine_kernel, g, None, batch * heads * blocks, HEADS=heads, C_M=c_m, C_N=c_n,
        NUM_PARTIALS=num_partials, HAS_MASK=mask, HAS_BIAS=bias is not None,
        LOWP=lowp is not None, **sizes, num_warps=4,
    )  # fmt: skip


def add(partials):
    """The sum ``(N, C, total_n)`` of partials ``(N, num_partials, total_n, C)``."""
    ready = launch.prepared(_add, (partials,))
    (out,) = ready.empty()
    ready((partials, out))
    return out


def _add(partials):
    batch, num_partials, total_n, channels = partials.shape
    blocks, sizes = _tiles(num_partials, channels, total_n)
    return launch.Launch(
        add_kernel, partials, None, batch * blocks, TOTAL_N=total_n, C=channels,
        NUM_PARTIALS=num_partials, **sizes, num_warps=4,
    ).allocating(partials.dtype, (batch, channels, total_n))  # fmt: skip


def _tiles(num_partials, features, c_n):
    """How many tiles there are, and their sizes, with the partials that are loaded at once."""
    group = FEW if num_partials <= FEW else MANY  # proofs cover these two
    block_m, block_n = 32 if features <= 32 else 64, min(IN_FLIGHT // group, 64)
    sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "GROUP": group}
    return -(-features // block_m) * -(-c_n // block_n), sizes
