r"""Between backward's two passes over positions: dG whole and rounded, and ``δ = Σ_m dG∘(G − ba)``.

δ is the correction of the gather's softmax; it equals ``Σ_L P∘dP`` and so costs no pass over
positions. ba, where A was used without its bias, is in G but not in dP.
"""

import triton
import triton.language as tl

from . import configs, launch
from .tiles import load_matrix


@triton.jit(do_not_specialize=["HEADS", "SLOTS"])
def delta_kernel(
    dg_ptr,  # (N, heads, SLOTS, C_M, C_N), any strides: parts of dG
    g_ptr,  # (N·heads, C_M, C_N)
    bias_ptr,  # (heads·C_M,): ba; read if HAS_BIAS
    lse_ptr,  # (N·heads, C_N): +inf where a map has no position; read if HAS_MASK
    rounded_ptr,  # (N·heads, C_M, C_N): dG in the dtype of the maps
    delta_ptr,  # (N·heads, C_N)
    HEADS,
    SLOTS,
    C_M,
    C_N,
    stride_dg_n,
    stride_dg_h,
    stride_dg_s,
    stride_dg_m,
    stride_dg_k,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: a block of maps of one head of one sample.

    dG is rounded as the products of the backward pass round it. The difference dP − δ then has no
    bias that is common to all positions, which would add up in the gradient of B's weights.
    """
    blocks = tl.cdiv(C_N, BLOCK_N)
    pid = tl.program_id(0)
    h = pid // blocks % HEADS
    n = (pid // blocks // HEADS).to(tl.int64)
    nh = n * HEADS + h
    rows_n = ((pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    dg_base = dg_ptr + n * stride_dg_n + h.to(tl.int64) * stride_dg_h
    base = nh * C_M * C_N
    acc: tl.constexpr = g_ptr.dtype.element_ty
    if HAS_MASK:
        lse = tl.load(lse_ptr + nh * C_N + rows_n, mask=rows_n < C_N, other=0.0)
    delta = tl.zeros((BLOCK_N,), acc)
    for m0 in range(0, C_M, BLOCK_M):
        rows_m = (m0 + tl.arange(0, BLOCK_M)).to(tl.int64)
        dg = tl.zeros((BLOCK_M, BLOCK_N), acc)
        part = dg_base
        for _ in range(0, SLOTS):
            dg += load_matrix(part, rows_m, rows_n, C_M, C_N, stride_dg_m, stride_dg_k, acc)
            part += stride_dg_s
        if HAS_MASK:
            dg = tl.where((lse == float("inf"))[None, :], 0.0, dg)
        dg = dg.to(rounded_ptr.dtype.element_ty)
        inside = (rows_m < C_M)[:, None] & (rows_n < C_N)[None, :]
        offs = base + rows_m[:, None] * C_N + rows_n[None, :]
        tl.store(rounded_ptr + offs, dg, mask=inside)
        g = tl.load(g_ptr + offs, mask=inside, other=0.0)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + h * C_M + rows_m, mask=rows_m < C_M, other=0.0)
            g -= bias.to(acc)[:, None]
        delta += tl.sum(dg.to(acc) * g, 0)
    tl.store(delta_ptr + nh * C_N + rows_n, delta, mask=rows_n < C_N)


def rounded_and_delta(parts, g, dtype, *, bias=None, lse=None):
    """dG in ``dtype``, ``(N, heads, m, n)``, and δ, ``(N, heads, n)`` in the dtype of G.

    ``parts``: ``(N, heads, slots, m, n)`` in any strides, added in order. ``g``, ``(N, heads, m,
    n)``, and ``lse``, ``(N, heads·n)``, of maps that may be masked, are contiguous.
    """
    batch, heads, slots, c_m, c_n = parts.shape
    delta = g.new_empty((batch, heads, c_n))
    rounded = g.new_empty((batch, heads, c_m, c_n), dtype=dtype)
    tile = configs.tile("delta", delta, c_m, c_n)
    with launch.device_of(g):
        delta_kernel[(batch * heads * triton.cdiv(c_n, tile.block_n),)](
            parts, g, g if bias is None else bias, g if lse is None else lse, rounded, delta,
            heads, slots, c_m, c_n, *parts.stride(),
            HAS_BIAS=bias is not None, HAS_MASK=lse is not None,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            num_warps=tile.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return rounded, delta
