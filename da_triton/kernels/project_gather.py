r"""Pass 1 of the fused block: B (and A) are projected from X tile by tile and gathered at once.

    from X    M = X Pᵀ           P = softmax_L(s Wb X)
    from A    G = (Wa X) Pᵀ

As in attention, with the n descriptors as queries: a program holds a tile of n and takes positions
tile by tile, with the online softmax of ``gather``. Neither B nor A nor P is written. From X, the
tile of positions holds all channels and serves twice, as keys and as values; heads are simply more
n. From A, a loop over channels projects the tiles of B and of A, so C has no limit and the result
is m × n.

Both write partial results per split, which ``combine`` merges: ``acc = Σ y·exp(z − mx)`` as
``(N, NUM_SPLITS, total_n, features)``, ``mx`` and ``sum`` as
``(N, NUM_SPLITS, total_n)``. X is ``(N, C, L)`` in any strides.
"""

import triton
import triton.language as tl

from ..precision import accumulator
from ..runtime import guard, launch, tiles
from .primitives import dot, load_mask, load_matrix, load_tile, online_softmax, scalar

BLOCK_C = 64  # channels in a step of gather_from_a


@triton.jit(do_not_specialize=launch.COUNTS)
def gather_from_x_kernel(
    x_ptr,  # (N, C, L)
    w_ptr,  # (TOTAL_N, C), contiguous: Wb
    mask_ptr,  # (N, L) uint8, 0 at masked positions; read if HAS_MASK
    acc_ptr,  # (N, NUM_SPLITS, TOTAL_N, C) float32/64
    max_ptr,  # (N, NUM_SPLITS, TOTAL_N)
    sum_ptr,  # (N, NUM_SPLITS, TOTAL_N)
    logit_scale: "fp64",
    C,
    TOTAL_N,
    L_UNITS,
    BLOCKS_PER_SPLIT,
    NUM_SPLITS,
    stride_x_n,
    stride_x_c,
    stride_x_l,
    stride_mask_n,
    stride_mask_l,
    HAS_MASK: tl.constexpr,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """One program: a tile of n, a split of the positions, a sample. BLOCK_C ≥ C."""
    L = L_UNITS * ALIGN
    blocks_n = tl.cdiv(TOTAL_N, BLOCK_N)
    pid = tl.program_id(0)
    split = (pid // blocks_n) % NUM_SPLITS
    n = (pid // (blocks_n * NUM_SPLITS)).to(tl.int64)
    rows_n = ((pid % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    rows_c = tl.arange(0, BLOCK_C).to(tl.int64)
    x_base = x_ptr + n * stride_x_n * ALIGN
    scale = scalar(logit_scale, ACC)

    w = load_matrix(w_ptr, rows_n, rows_c, TOTAL_N, C, C, 1, w_ptr.dtype.element_ty)
    mx = tl.full((BLOCK_N,), -float("inf"), ACC)
    total = tl.zeros((BLOCK_N,), ACC)
    acc = tl.zeros((BLOCK_N, BLOCK_C), ACC)
    start = split * BLOCKS_PER_SPLIT * BLOCK_L
    for l0 in range(start, tl.minimum(start + BLOCKS_PER_SPLIT * BLOCK_L, L), BLOCK_L):
        cols = (l0 + tl.arange(0, BLOCK_L)).to(tl.int64)
        taking_part = cols < L
        x = load_tile(x_base, rows_c, cols, C, L, stride_x_c * ALIGN, stride_x_l)
        if HAS_MASK:
            taking_part = load_mask(mask_ptr + n * stride_mask_n, cols, L, stride_mask_l)
            x = tl.where(taking_part[None, :], x, 0.0)  # may hold NaN
        z = dot(w, x, tl.zeros((BLOCK_N, BLOCK_L), ACC), PRECISION) * scale
        z = tl.where(taking_part[None, :], z, -float("inf"))
        p, rescale, mx, total = online_softmax(z, mx, total)
        acc = dot(p.to(x.dtype), tl.trans(x), acc * rescale[:, None], PRECISION)

    partial = (n * NUM_SPLITS + split) * TOTAL_N
    inside_n = rows_n < TOTAL_N
    tl.store(max_ptr + partial + rows_n, mx, mask=inside_n)
    tl.store(sum_ptr + partial + rows_n, total, mask=inside_n)
    ptrs = acc_ptr + (partial + rows_n)[:, None] * C + rows_c[None, :]
    tl.store(ptrs, acc, mask=inside_n[:, None] & (rows_c < C)[None, :])


@triton.jit
def project(x, wa, wb, z, a, POSITIONS_FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """``z + Wb X`` and ``a + Wa X``, the latter transposed if POSITIONS_FIRST."""
    z = dot(wb, x, z, PRECISION)
    if POSITIONS_FIRST:
        a = dot(tl.trans(x), tl.trans(wa), a, PRECISION)
    else:
        a = dot(wa, x, a, PRECISION)
    return z, a


@triton.jit(do_not_specialize=launch.COUNTS)
def gather_from_a_kernel(
    x_ptr,  # (N, C, L)
    wa_ptr,  # (HEADS·C_M, C), contiguous
    wb_ptr,  # (HEADS·C_N, C), contiguous
    mask_ptr,  # (N, L) uint8, 0 at masked positions; read if HAS_MASK
    acc_ptr,  # (N, NUM_SPLITS, HEADS·C_N, C_M) float32/64
    max_ptr,  # (N, NUM_SPLITS, HEADS·C_N)
    sum_ptr,  # (N, NUM_SPLITS, HEADS·C_N)
    logit_scale: "fp64",
    HEADS,
    C,
    C_M,
    C_N,
    L_UNITS,
    BLOCKS_PER_SPLIT,
    NUM_SPLITS,
    stride_x_n,
    stride_x_c,
    stride_x_l,
    stride_mask_n,
    stride_mask_l,
    HAS_MASK: tl.constexpr,
    POSITIONS_FIRST: tl.constexpr,
    CHANNELS_FIT: tl.constexpr,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """One program: a head, a split of the positions, a sample. BLOCK_M ≥ C_M, BLOCK_N ≥ C_N.

    POSITIONS_FIRST: A is projected with positions as rows, so that no accumulator is transposed,
    which Triton before 3.7.1 miscompiles for Hopper.
    CHANNELS_FIT: BLOCK_C ≥ C. Without a loop over channels, X is loaded while the tile of positions
    before is in use. On Hopper only: it spills on an A100.
    """
    L = L_UNITS * ALIGN
    pid = tl.program_id(0)
    head = pid % HEADS
    split = pid // HEADS % NUM_SPLITS
    n = (pid // (HEADS * NUM_SPLITS)).to(tl.int64)
    rows_m = tl.arange(0, BLOCK_M).to(tl.int64)
    rows_n = tl.arange(0, BLOCK_N).to(tl.int64)
    x_base = x_ptr + n * stride_x_n * ALIGN
    wa_base = wa_ptr + head.to(tl.int64) * C_M * C
    wb_base = wb_ptr + head.to(tl.int64) * C_N * C
    scale = scalar(logit_scale, ACC)
    dtype: tl.constexpr = x_ptr.dtype.element_ty

    mx = tl.full((BLOCK_N,), -float("inf"), ACC)
    total = tl.zeros((BLOCK_N,), ACC)
    acc = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    if CHANNELS_FIT:
        rows_c = tl.arange(0, BLOCK_C).to(tl.int64)
        wb = load_matrix(wb_base, rows_n, rows_c, C_N, C, C, 1, dtype)
        wa = load_matrix(wa_base, rows_m, rows_c, C_M, C, C, 1, dtype)
    start = split * BLOCKS_PER_SPLIT * BLOCK_L
    for l0 in range(start, tl.minimum(start + BLOCKS_PER_SPLIT * BLOCK_L, L), BLOCK_L):
        cols = (l0 + tl.arange(0, BLOCK_L)).to(tl.int64)
        taking_part = cols < L
        if HAS_MASK:
            taking_part = load_mask(mask_ptr + n * stride_mask_n, cols, L, stride_mask_l)
        z = tl.zeros((BLOCK_N, BLOCK_L), ACC)
        if POSITIONS_FIRST:
            a = tl.zeros((BLOCK_L, BLOCK_M), ACC)
        else:
            a = tl.zeros((BLOCK_M, BLOCK_L), ACC)
        if CHANNELS_FIT:
            x = load_tile(x_base, rows_c, cols, C, L, stride_x_c * ALIGN, stride_x_l)
            z, a = project(x, wa, wb, z, a, POSITIONS_FIRST, PRECISION)
        else:
            for c0 in range(0, C, BLOCK_C):
                rows_c = (c0 + tl.arange(0, BLOCK_C)).to(tl.int64)
                x = load_tile(x_base, rows_c, cols, C, L, stride_x_c * ALIGN, stride_x_l)
                wb = load_matrix(wb_base, rows_n, rows_c, C_N, C, C, 1, dtype)
                wa = load_matrix(wa_base, rows_m, rows_c, C_M, C, C, 1, dtype)
                z, a = project(x, wa, wb, z, a, POSITIONS_FIRST, PRECISION)
        if not POSITIONS_FIRST:
            a = tl.trans(a)
        if HAS_MASK:
            a = tl.where(taking_part[:, None], a, 0.0)
        z = z.to(dtype).to(ACC)  # rounded as B in backward, so that its P sums to 1 with this lse
        z = tl.where(taking_part[None, :], z * scale, -float("inf"))
        p, rescale, mx, total = online_softmax(z, mx, total)
        acc = dot(p.to(dtype), a.to(dtype), acc * rescale[:, None], PRECISION)

    partial = (n * NUM_SPLITS + split) * HEADS * C_N + head * C_N
    inside_n = rows_n < C_N
    tl.store(max_ptr + partial + rows_n, mx, mask=inside_n)
    tl.store(sum_ptr + partial + rows_n, total, mask=inside_n)
    ptrs = acc_ptr + (partial + rows_n)[:, None] * C_M + rows_m[None, :]
    tl.store(ptrs, acc, mask=inside_n[:, None] & (rows_m < C_M)[None, :])


@guard.proved({"x": "N-L", "mask": "NL"})
def gather_from_x(x, weight_b, mask, logit_scale):
    """Partial ``(acc, max, sum)`` of ``M = X Pᵀ`` for the full n of all heads."""
    ready = launch.prepared(_gather_from_x, (x, weight_b, mask))
    partials = ready.empty()
    ready((x, weight_b, x if mask is None else mask, *partials), (logit_scale,))
    return partials


def _gather_from_x(x, weight_b, mask):
    batch, channels, _ = x.shape
    total_n = weight_b.shape[0]
    variant = launch.rows(x) if mask is None else "mask"
    tile = tiles.tile("gather_from_x", x, channels, total_n, variant)
    ready = launch.Launch(
        gather_from_x_kernel, x, tile, batch * -(-total_n // tile.block_n),
        activations={"x": x}, strided={"mask": mask},
        C=channels, TOTAL_N=total_n, HAS_MASK=mask is not None,
    )  # fmt: skip
    return _allocating(ready, x, total_n, channels)


@guard.proved({"x": "N-L", "mask": "NL"})
def gather_from_a(x, weight_a, weight_b, mask, heads, logit_scale):
    """Partial ``(acc, max, sum)`` of ``G − ba = (Wa X) Pᵀ``."""
    ready = launch.prepared(_gather_from_a, (x, weight_a, weight_b, mask), heads)
    partials = ready.empty()
    ready((x, weight_a, weight_b, x if mask is None else mask, *partials), (logit_scale,))
    return partials


def _gather_from_a(x, weight_a, weight_b, mask, heads):
    batch, channels, _ = x.shape
    c_m, c_n = weight_a.shape[0] // heads, weight_b.shape[0] // heads
    tile = tiles.tile("gather_from_a", x, c_m, c_n, tiles.PLAIN if mask is None else "mask")
    ready = launch.Launch(
        gather_from_a_kernel, x, tile, batch * heads, activations={"x": x}, strided={"mask": mask},
        HEADS=heads, C=channels, C_M=c_m, C_N=c_n, HAS_MASK=mask is not None,
        POSITIONS_FIRST=tiles.reads_shared_operands(x.device),
        CHANNELS_FIT=channels <= BLOCK_C and tiles.wants_64_rows(x.device), BLOCK_C=BLOCK_C,
    )  # fmt: skip
    return _allocating(ready, x, heads * c_n, c_m)


def _allocating(ready, x, total_n, features):
    statistics = x.shape[0], ready.num_splits, total_n
    return ready.allocating(accumulator(x.dtype), (*statistics, features), statistics, statistics)
