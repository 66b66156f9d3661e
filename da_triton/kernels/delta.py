r"""Between backward's two passes over positions: sums and rounds dG, and ``δ = Σ_m dG∘(G − ba)``.

δ is the correction of the gather's softmax; it equals ``Σ_L P∘dP``, so it needs no pass over
positions. ba, where A was used without its bias, is in G but not in dP.
"""

import torch
import triton
import triton.language as tl

from ..precision import POLICIES
from ..runtime import launch
from .primitives import into_float16

GROUP = 32  # partials that a program loads at once, at most


@triton.jit
def _round(
    dg_base, g_base, bias_base, lowp_base, rows_n, lse, factor, NUM_PARTIALS, C_M, C_N,
    stride_s, stride_m, stride_k, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Writes a block of dG, in float16 times ``factor``; returns δ of it, and its largest ``|dG|``
    of every descriptor, which is known in float16 only."""
    acc: tl.constexpr = g_base.dtype.element_ty
    dtype: tl.constexpr = lowp_base.dtype.element_ty
    delta = tl.zeros(rows_n.shape, acc)
    largest = tl.zeros(rows_n.shape, acc)
    for m0 in range(0, C_M, BLOCK_M):
        rows_m = (m0 + tl.arange(0, BLOCK_M)).to(tl.int64)
        dg = tl.zeros((rows_m.shape[0], rows_n.shape[0]), acc)
        inside = (rows_m < C_M)[:, None] & (rows_n < C_N)[None, :]
        ptrs = dg_base + rows_m[:, None] * stride_m + rows_n[None, :] * stride_k
        for first in range(0, NUM_PARTIALS, GROUP):
            partials = (first + tl.arange(0, GROUP)).to(tl.int64)[:, None, None]
            there = (partials < NUM_PARTIALS) & inside[None, :, :]
            parts = tl.load(ptrs[None, :, :] + partials * stride_s, mask=there, other=0.0)
            dg += tl.sum(parts.to(acc), 0)
        if HAS_MASK:
            dg = tl.where((lse == float("inf"))[None, :], 0.0, dg)
        if dtype == tl.float16:
            largest = tl.maximum(largest, tl.max(tl.abs(dg), 0))
            dg *= factor[None, :]
        dg = dg.to(dtype)
        offs = rows_m[:, None] * C_N + rows_n[None, :]
        tl.store(lowp_base + offs, dg, mask=inside)
        g = tl.load(g_base + offs, mask=inside, other=0.0)
        if HAS_BIAS:
            bias = tl.load(bias_base + rows_m, mask=rows_m < C_M, other=0.0)
            g -= bias.to(acc)[:, None]
        delta += tl.sum(dg.to(acc) * g, 0)
    return delta, largest


@triton.jit(do_not_specialize=["HEADS", "NUM_PARTIALS"])
def delta_kernel(
    dg_ptr,  # (N, heads, NUM_PARTIALS, C_M, C_N), any strides: partials of dG
    g_ptr,  # (N·heads, C_M, C_N)
    bias_ptr,  # (heads·C_M,): ba; read if HAS_BIAS
    lse_ptr,  # (N·heads, C_N): +inf where n has no position; read if HAS_MASK, and in float16
    dlse_ptr,  # (N·heads, C_N), taken from δ; read if HAS_DLSE
    lowp_ptr,  # (N·heads, C_M, C_N): dG in the input dtype
    delta_ptr,  # (N·heads, C_N)
    shifted_ptr,  # (N·heads, C_N): lse of the weights that go with ``lowp``; float16 only
    HEADS,
    NUM_PARTIALS,
    C_M,
    C_N,
    stride_dg_n,
    stride_dg_h,
    stride_dg_s,
    stride_dg_m,
    stride_dg_k,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,  # partials that are loaded at once
):
    """One program: a tile of n of one head of one sample.

    dG is rounded as the products of the backward pass round it. The difference dP − δ then has no
    bias that is common to all positions, which would add up in the gradient of B's weights.
    """
    blocks = tl.cdiv(C_N, BLOCK_N)
    pid = tl.program_id(0)
    h = pid // blocks % HEADS
    n = (pid // blocks // HEADS).to(tl.int64)
    nh = n * HEADS + h
    rows_n = ((pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    inside_n = rows_n < C_N
    dg_base = dg_ptr + n * stride_dg_n + h.to(tl.int64) * stride_dg_h
    base = nh * C_M * C_N
    offs_n = nh * C_N + rows_n
    acc: tl.constexpr = g_ptr.dtype.element_ty
    half: tl.constexpr = lowp_ptr.dtype.element_ty == tl.float16
    factor = tl.full((BLOCK_N,), 1.0, acc)
    lse = factor  # not read
    if HAS_MASK or half:
        lse = tl.load(lse_ptr + offs_n, mask=inside_n, other=0.0)
    delta, largest = _round(
        dg_base, g_ptr + base, bias_ptr + h * C_M, lowp_ptr + base, rows_n, lse, factor,
        NUM_PARTIALS, C_M, C_N, stride_dg_s, stride_dg_m, stride_dg_k, HAS_BIAS, HAS_MASK or half,
        BLOCK_M, GROUP,
    )  # fmt: skip
    if half:
        shifted, factor = into_float16(largest, lse)
        tl.store(shifted_ptr + offs_n, shifted, mask=inside_n)
        if tl.min(factor) < 1.0:  # few calls read dG twice
            tl.debug_barrier()  # between stores to the same addresses
            delta, largest = _round(
                dg_base, g_ptr + base, bias_ptr + h * C_M, lowp_ptr + base, rows_n, lse, factor,
                NUM_PARTIALS, C_M, C_N, stride_dg_s, stride_dg_m, stride_dg_k, HAS_BIAS, True,
                BLOCK_M, GROUP,
            )  # fmt: skip
    if HAS_DLSE:
        dlse = tl.load(dlse_ptr + offs_n, mask=inside_n, other=0.0).to(acc)
        delta -= dlse * factor if half else dlse
    tl.store(delta_ptr + offs_n, delta, mask=inside_n)


def lowp_and_delta(partials, g, dtype, lse, *, bias=None, mask=False, dlse=None):
    """dG in ``dtype``, ``(N, heads, m, n)``, δ, ``(N, heads, n)`` in the dtype of G, and lse.

    ``partials``: ``(N, heads, num_partials, m, n)`` in any strides, added in order. ``g``,
    ``(N, heads, m, n)``, and ``lse``, for the full n, are contiguous. P is the gradient of lse:
    ``dlse`` is subtracted from δ. In float16, the weights that go with dG and δ are those of the
    lse that is returned (see ``into_float16``).
    """
    shifted = torch.empty_like(lse) if POLICIES[dtype].extended else lse
    dlse_ = lse if dlse is None else dlse.contiguous()
    ready = launch.prepared(_delta, (partials, g, bias, lse, dlse), dtype, mask)
    delta, lowp = ready.empty()
    ready((partials, g, g if bias is None else bias, lse, dlse_, lowp, delta, shifted))
    return lowp, delta, shifted


def _delta(partials, g, bias, lse, dlse, dtype, mask):
    batch, heads, num_partials, c_m, c_n = partials.shape
    # Few samples have many partials: their programs share n in narrow tiles.
    size, block_n, warps = (1024, 16, 4) if num_partials == 1 else (8192, 8, 8)
    if num_partials > 8:
        block_n = 4
    elif 16 < c_n < 32:  # rows that are not aligned are read once
        size, block_n, warps = 4096, 32, 8
    group = min(GROUP, 1 << (num_partials - 1).bit_length())
    block_m = min(size // (block_n * group), 1 << (c_m - 1).bit_length())
    ready = launch.Launch(
        delta_kernel, g, None, batch * heads * -(-c_n // block_n), strided={"dg": partials},
        HEADS=heads, NUM_PARTIALS=num_partials, C_M=c_m, C_N=c_n, HAS_BIAS=bias is not None,
        HAS_MASK=mask, HAS_DLSE=dlse is not None, BLOCK_M=block_m, BLOCK_N=block_n, GROUP=group,
        num_warps=warps,
    )  # fmt: skip
    ready.allocating(g.dtype, (batch, heads, c_n))
    return ready.allocating(dtype, (batch, heads, c_m, c_n))
