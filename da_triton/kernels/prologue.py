r"""Packs the operands of the unfused route's vendor GEMMs in one launch.

stacked    the weights of several projections, concatenated: one GEMM for A, B and V
start      X + bo, to which the last product adds: its result is written once
lowp       G in the input dtype

``formatted`` copies activations to another memory format with the same kernel, and adds to them.
"""

import triton
import triton.language as tl

from ..projection import channels_last
from ..runtime import launch
from .primitives import load_tile, store_tile

BLOCK = 4096
SUM, COPY = (32, 128), (64, 64)  # channels and positions per tile; longer copies spill on sm_100


@triton.jit
def _copy(source_ptr, target_ptr, block, SIZE, BLOCK: tl.constexpr):
    offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source_ptr + offs, mask=offs < SIZE, other=0.0)
    tl.store(target_ptr + offs, values.to(target_ptr.dtype.element_ty), mask=offs < SIZE)


@triton.jit
def operands_kernel(
    w0_ptr,  # SIZE_0 elements
    w1_ptr,  # SIZE_1
    w2_ptr,  # SIZE_2
    stacked_ptr,  # SIZE_0 + SIZE_1 + SIZE_2: concatenated
    g_ptr,  # SIZE_G
    lowp_ptr,  # SIZE_G, another dtype
    x_ptr,  # (N, C, L); read if START
    added_ptr,  # (N, C, L); read if START and HAS_ADDED
    bias_ptr,  # (C,); read if START and HAS_BIAS
    start_ptr,  # (N, C, L): x + added + bias
    SIZE_0,
    SIZE_1,
    SIZE_2,
    SIZE_G,
    C,
    L_UNITS,
    stride_x_n,
    stride_x_c,
    stride_x_l,
    stride_added_n,
    stride_added_c,
    stride_added_l,
    stride_start_n,
    stride_start_c,
    stride_start_l,
    START: tl.constexpr,
    HAS_X: tl.constexpr,
    HAS_ADDED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Programs in the order of the arguments: blocks of the copies, then tiles of ``start``."""
    pid = tl.program_id(0)
    end_0 = tl.cdiv(SIZE_0, BLOCK)
    end_1 = end_0 + tl.cdiv(SIZE_1, BLOCK)
    end_2 = end_1 + tl.cdiv(SIZE_2, BLOCK)
    end_g = end_2 + tl.cdiv(SIZE_G, BLOCK)
    if pid < end_0:
        _copy(w0_ptr, stacked_ptr, pid, SIZE_0, BLOCK)
    elif pid < end_1:
        _copy(w1_ptr, stacked_ptr + SIZE_0, pid - end_0, SIZE_1, BLOCK)
    elif pid < end_2:
        _copy(w2_ptr, stacked_ptr + SIZE_0 + SIZE_1, pid - end_1, SIZE_2, BLOCK)
    elif pid < end_g:
        _copy(g_ptr, lowp_ptr, pid - end_2, SIZE_G, BLOCK)
    elif START:
        L = L_UNITS * ALIGN
        pid -= end_g
        tiles_l, tiles_c = tl.cdiv(L, BLOCK_L), tl.cdiv(C, BLOCK_C)
        n = (pid // (tiles_l * tiles_c)).to(tl.int64)
        rows = (pid // tiles_l % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
        cols = (pid % tiles_l * BLOCK_L + tl.arange(0, BLOCK_L)).to(tl.int64)
        y = tl.zeros((BLOCK_C, BLOCK_L), ACC)
        if HAS_X:
            x_base = x_ptr + n * stride_x_n * ALIGN
            y += load_tile(x_base, rows, cols, C, L, stride_x_c * ALIGN, stride_x_l).to(ACC)
        if HAS_ADDED:
            added_base = added_ptr + n * stride_added_n * ALIGN
            step_c = stride_added_c * ALIGN
            y += load_tile(added_base, rows, cols, C, L, step_c, stride_added_l).to(ACC)
        if HAS_BIAS:
            y += tl.load(bias_ptr + rows, mask=rows < C, other=0.0).to(ACC)[:, None]
        start_base = start_ptr + n * stride_start_n * ALIGN
        store_tile(start_base, rows, cols, C, L, stride_start_c * ALIGN, stride_start_l, y)


def prepare(like, weights, *, g=None, x=None, bias=None, start=None):
    """``(matrices, lowp)``, and x + bias in ``start`` where that is given.

    ``like``: X, ``(N, C, L)``. ``weights``: up to three contiguous ``(rows, C)``. The matrices are
    all of them stacked, or, where A, B, V in one tensor would be misaligned, the weights
    themselves. ``g``: contiguous or None; it is not copied if it has the weights' dtype. ``x``,
    ``bias``: None adds nothing.
    """
    w = weights[0]
    together = len(weights) > 1 and _aligned_together(like, [len(weight) for weight in weights])
    stacked = w.new_empty((sum(map(len, weights)), w.shape[1])) if together else w
    lowp = g if g is None or g.dtype == w.dtype else g.new_empty(g.shape, dtype=w.dtype)
    x_ = (like if start is None else start) if x is None else x
    copied = weights if together else []
    ready = launch.prepared(
        _operands, (w, like if start is None else start, x_, None, None if lowp is g else g, bias),
        tuple(map(len, copied)), start is not None, x is not None,
    )  # fmt: skip
    if ready is not None:
        first, second, third = (*weights, w, w)[:3]
        ready((
            first, second, third, stacked, *((w, w) if lowp is g else (g, lowp)), x_, x_,
            w if bias is None else bias, like if start is None else start,
        ))  # fmt: skip
    return [stacked] if together else weights, lowp


def formatted(x, last, added=None, bias=None):
    """``(N, C, L)`` in channels-last memory, or in contiguous memory: x itself, or a copy.

    ``added``, like x, and ``bias (C,)`` are added unless None.
    """
    plain = added is None and bias is None
    if x is None or (plain and (x.mT if last else x).is_contiguous()):
        return x
    batch, channels, length = x.shape
    y = x.new_empty((batch, length, channels)).mT if last else x.new_empty(x.shape)
    ready = launch.prepared(_operands, (x, y, x, added, None, bias), (), True, True)
    ready((*[x] * 7, x if added is None else added, x if bias is None else bias, y))
    return y


def _operands(w, activation, x, added, g, bias, rows, start, has_x):
    """The launch, or None where nothing has to be packed."""
    batch, channels, length = activation.shape
    sizes = [r * w.shape[1] for r in rows]
    sizes += [0] * (3 - len(sizes))
    sizes.append(0 if g is None else g.numel())
    programs = sum(-(-size // BLOCK) for size in sizes)
    block_c, block_l = SUM if channels_last(activation) == channels_last(x) else COPY
    if start:
        programs += batch * -(-channels // block_c) * -(-length // block_l)
    if not programs:
        return None
    return launch.Launch(
        operands_kernel, w, None, programs,
        activations={"start": activation, "x": x, "added": x if added is None else added},
        SIZE_0=sizes[0], SIZE_1=sizes[1], SIZE_2=sizes[2], SIZE_G=sizes[3], C=channels,
        START=start, HAS_X=has_x, HAS_ADDED=added is not None, HAS_BIAS=bias is not None,
        BLOCK=BLOCK, BLOCK_C=block_c, BLOCK_L=block_l, num_warps=8,
    )  # fmt: skip


def _aligned_together(x, rows):
    """Whether A, B, V with these rows, stacked in one tensor like x, keep its vector loads.

    An odd number of positions in NCHW is loaded element by element anyway.
    """
    step = 1 if channels_last(x) else x.shape[2]
    return all(r * step * x.element_size() % 16 == 0 for r in rows) or step % 2 == 1 < step
