r"""Backward of the gather: dA and dB from dG, on ``(N, heads, channels, L)``.

``P = exp(s B − lse)`` is recomputed. ``δ = Σ_m dG∘G`` equals ``Σ_L P∘dP``, so the correction of the
softmax needs no pass over positions, and nothing is summed over them:

    dA = dG P            dB = s · P∘(dGᵀ A − δ)

Where dG does not fit one tile of m and n, see ``core_full_n`` and ``core_tiled``.
"""

import triton
import triton.language as tl

from ..precision import POLICIES
from ..runtime import guard, launch, tiles
from . import core_full_n, core_tiled, delta
from .primitives import dot, exp_minus, load_mask, load_matrix, load_tile, scalar, store_tile


@triton.jit(do_not_specialize=launch.COUNTS)
def gather_backward_kernel(
    dg_ptr,  # (N, heads, C_M, C_N), any strides
    a_ptr,  # (N, heads, C_M, L)
    b_ptr,  # (N, heads, C_N, L)
    mask_ptr,  # (N, L) uint8; read if HAS_MASK
    lse_ptr,  # (N·heads, C_N)
    delta_ptr,  # (N·heads, C_N): Σ_m dG∘G
    da_ptr,  # (N, heads, C_M, L); written if NEED_A
    db_ptr,  # (N, heads, C_N, L); written if NEED_B
    logit_scale: "fp64",
    HEADS,
    C_M,
    C_N,
    L_UNITS,
    BLOCKS_PER_SPLIT,
    NUM_SPLITS,
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
    stride_mask_n,
    stride_mask_l,
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
    """One program: a split of the positions of one head of one sample, all m and n.

    BLOCK_M ≥ C_M and BLOCK_N ≥ C_N: dG is read once, A and B once, dA and dB written once.
    """
    L = L_UNITS * ALIGN
    pid = tl.program_id(0)
    split = pid % NUM_SPLITS
    nh = (pid // NUM_SPLITS).to(tl.int64)
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
    start = split * BLOCKS_PER_SPLIT * BLOCK_L
    for l0 in range(start, tl.minimum(start + BLOCKS_PER_SPLIT * BLOCK_L, L), BLOCK_L):
        cols = (l0 + tl.arange(0, BLOCK_L)).to(tl.int64)
        b = load_tile(b_base, rows_n, cols, C_N, L, stride_b_c * ALIGN, stride_b_l)
        p = exp_minus(b.to(ACC) * scale, lse[:, None])
        if HAS_MASK:
            mask = load_mask(mask_ptr + n * stride_mask_n, cols, L, stride_mask_l)
            p = tl.where(mask[None, :], p, 0.0)
        if NEED_A:
            p_operand = (p * P_SCALE).to(dtype)
            da = dot(tl.trans(dg), p_operand, tl.zeros((BLOCK_M, BLOCK_L), ACC), PRECISION)
            da = da / P_SCALE
            store_tile(da_base, rows_m, cols, C_M, L, stride_da_c * ALIGN, stride_da_l, da)
        if NEED_B:
            a = load_tile(a_base, rows_m, cols, C_M, L, stride_a_c * ALIGN, stride_a_l)
            dp = dot(dg, a, tl.zeros((BLOCK_N, BLOCK_L), ACC), PRECISION)
            db = scale * p * (dp - delta[:, None])
            if HAS_MASK:
                db = tl.where(mask[None, :], db, 0.0)  # 0 · NaN, where A may hold anything
            store_tile(db_base, rows_n, cols, C_N, L, stride_db_c * ALIGN, stride_db_l, db)


def gradients(dg, a, b, mask, g, lse, dlse, logit_scale, need_a, need_b):
    """dA and dB (None where not needed) from dG and dlse (or None), the inputs, G and lse."""
    da = launch.empty_activations_like(a) if need_a else None
    db = launch.empty_activations_like(b) if need_b else None
    if a.shape[0] and (need_a or need_b):
        dg, correction, lse = delta.lowp_and_delta(dg[:, :, None], g, a.dtype, lse, dlse=dlse)
        gather_backward(dg, correction, a, b, mask, lse, da, db, logit_scale)
    return da, db


@guard.proved(
    {
        "dg": "N---",
        "correction": "N",
        "a": "N--L",
        "b": "N--L",
        "mask": "NL",
        "lse": "N",
        "da": "N--L",
        "db": "N--L",
    },
    writes=("da", "db"),
    choice=lambda a, b, **_: core_full_n.few(b, a.shape[2], "gradient"),
)
def gather_backward(dg, correction, a, b, mask, lse, da, db, logit_scale):
    """Writes dA and dB, unless None, from dG in the input dtype, δ and lse (``delta``)."""
    c_m, c_n = a.shape[2], b.shape[2]
    if not tiles.g_fits_one_tile(a, c_m, c_n):
        options = {"logit_scale": logit_scale, "lse": lse, "mask": mask}
        if core_full_n.fits(b, c_n):
            # The same bits whether or not dB is needed.
            db = launch.empty_activations_like(b) if db is None else db
            core_full_n.gather_backward(dg, a, b, correction, da, db, **options)
            return
        if da is not None:
            core_tiled.apply_weights(dg, b, da, lse_per_n=True, **options)
        if db is not None:
            core_tiled.grad_logits(dg, b, a, db, correction=correction, lse_per_n=True, **options)
        return
    ready = launch.prepared(_launch, (a, b, dg, da, db, mask, lse, correction))
    tensors = dg, a, b, mask, lse, correction, da, db
    ready([a if t is None else t for t in tensors], (logit_scale,))


def _launch(a, b, dg, da, db, mask, lse, correction):
    batch, heads, c_m, _ = a.shape
    c_n = b.shape[2]
    tile = tiles.tile("gather_backward", a, c_m, c_n, launch.rows(a))
    return launch.Launch(
        gather_backward_kernel, a, tile, batch * heads, again=True,
        activations={"a": a, "b": b, "da": a if da is None else da, "db": b if db is None else db},
        strided={"dg": dg, "mask": mask}, HEADS=heads, C_M=c_m, C_N=c_n,
        HAS_MASK=mask is not None, NEED_A=da is not None, NEED_B=db is not None,
        P_SCALE=POLICIES[a.dtype].p_scale,
    )  # fmt: skip
