r"""Gather: ``G = A softmax_L(s B)ᵀ`` on ``(N, heads, channels, L)``; backward: ``gather_backward``.

Online over positions. A split of the positions holds, per row n of B, its largest logit
``mx``, ``sum = Σ exp(x − mx)`` and ``acc = Σ a·exp(x − mx)``; two splits merge by rescaling to the
larger ``mx``, in a fixed order: results repeat bit for bit. ``lse = mx + log(sum)``. A row whose
positions are all masked has ``lse = +inf`` and G = 0; without a mask, logits of ``-inf``
alone give NaN, as ``torch.softmax`` does.

Where several programs weight blocks of A with the same rows of P, in channels-last memory, a launch
of its own finds ``mx`` and ``sum`` first: they then reduce nothing over positions, which warps
would share there, and rescale nothing.
"""

import triton
import triton.language as tl

from ..planning.costs import STATISTICS
from ..precision import accumulator, lse_dtype
from ..runtime import guard, launch, tiles
from .merge import few_or_many, merge, store_descriptors
from .primitives import dot, exp, load_mask, load_tile, online_softmax, scalar

SOURCE = ("N--L", "N--L", "NL")
GIVEN = "given"  # the variant of a tile for given statistics


@triton.jit(do_not_specialize=["HEADS"])
def statistics_kernel(
    b_ptr,  # (N, heads, C_N, L)
    mask_ptr,  # (N, L) uint8, 0 at masked positions; read if HAS_MASK
    max_ptr,  # (N, heads·C_N)
    sum_ptr,  # (N, heads·C_N): of exp(x − max)
    logit_scale: "fp64",
    HEADS,
    C_N,
    L_UNITS,
    stride_b_n,
    stride_b_h,
    stride_b_c,
    stride_b_l,
    stride_mask_n,
    stride_mask_l,
    HAS_MASK: tl.constexpr,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """One program: a block of n of a head of a sample, all positions."""
    L = L_UNITS * ALIGN
    blocks_n = tl.cdiv(C_N, BLOCK_N)
    pid = tl.program_id(0)
    nh = (pid // blocks_n).to(tl.int64)
    n, h = nh // HEADS, nh % HEADS
    rows_n = ((pid % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    b_base = b_ptr + (n * stride_b_n + h * stride_b_h) * ALIGN
    scale = scalar(logit_scale, ACC)

    mx = tl.full((BLOCK_N,), -float("inf"), ACC)
    total = tl.zeros((BLOCK_N,), ACC)
    for l0 in range(0, L, BLOCK_L):
        cols = (l0 + tl.arange(0, BLOCK_L)).to(tl.int64)
        taking_part = cols < L
        b = load_tile(b_base, rows_n, cols, C_N, L, stride_b_c * ALIGN, stride_b_l)
        if HAS_MASK:
            taking_part = load_mask(mask_ptr + n * stride_mask_n, cols, L, stride_mask_l)
        x = tl.where(taking_part[None, :], b.to(ACC) * scale, -float("inf"))
        _, _, mx, total = online_softmax(x, mx, total)
    offs = nh * C_N + rows_n
    tl.store(max_ptr + offs, mx, mask=rows_n < C_N)
    tl.store(sum_ptr + offs, total, mask=rows_n < C_N)


@triton.jit(do_not_specialize=[*launch.COUNTS, "PARTIAL", "NUM_PARTIALS"])
def gather_kernel(
    a_ptr,  # (N, heads, C_M, L)
    b_ptr,  # (N, heads, C_N, L)
    mask_ptr,  # (N, L) uint8, 0 at masked positions; read if HAS_MASK
    acc_ptr,  # (N, NUM_PARTIALS, heads·C_N, C_M): partial sums; (N·heads, C_M, C_N): G if FINAL
    max_ptr,  # (N, NUM_PARTIALS, heads·C_N): partial maxima; not touched if FINAL
    sum_ptr,  # (N, NUM_PARTIALS, heads·C_N): partial sums, or lse if FINAL
    bias_ptr,  # (heads·C_M,): of A, added to G; read if FINAL and HAS_BIAS
    lowp_ptr,  # (N·heads, C_M, C_N): G in the input dtype; written if FINAL and LOWP
    given_max_ptr,  # (N, heads·C_N): of all positions; read if GIVEN
    given_sum_ptr,  # (N, heads·C_N); read if GIVEN
    logit_scale: "fp64",
    HEADS,
    C_M,
    C_N,
    L_UNITS,
    BLOCKS_PER_SPLIT,
    NUM_SPLITS,
    PARTIAL,
    NUM_PARTIALS,
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
    HAS_MASK: tl.constexpr,
    FINAL: tl.constexpr,
    GIVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LOWP: tl.constexpr,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """One program: tiles of n and m, a split of the positions, a head of a sample."""
    L = L_UNITS * ALIGN
    blocks_m = tl.cdiv(C_M, BLOCK_M)
    tiles = blocks_m * tl.cdiv(C_N, BLOCK_N)
    pid = tl.program_id(0)
    tile = pid % tiles
    split = (pid // tiles) % NUM_SPLITS
    nh = (pid // (tiles * NUM_SPLITS)).to(tl.int64)
    n, h = nh // HEADS, nh % HEADS

    rows_m = ((tile % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    rows_n = ((tile // blocks_m) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    a_base = a_ptr + (n * stride_a_n + h * stride_a_h) * ALIGN
    b_base = b_ptr + (n * stride_b_n + h * stride_b_h) * ALIGN
    scale = scalar(logit_scale, ACC)

    if GIVEN:  # then acc is [BLOCK_M, BLOCK_N]
        mx = tl.load(given_max_ptr + nh * C_N + rows_n, mask=rows_n < C_N, other=0.0)
        total = tl.load(given_sum_ptr + nh * C_N + rows_n, mask=rows_n < C_N, other=1.0)
        pivot = tl.where(mx == -float("inf"), 0.0, mx)
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    else:
        mx = tl.full((BLOCK_N,), -float("inf"), ACC)
        total = tl.zeros((BLOCK_N,), ACC)
        acc = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    start = split * BLOCKS_PER_SPLIT * BLOCK_L
    for l0 in range(start, tl.minimum(start + BLOCKS_PER_SPLIT * BLOCK_L, L), BLOCK_L):
        cols = (l0 + tl.arange(0, BLOCK_L)).to(tl.int64)
        taking_part = cols < L
        b = load_tile(b_base, rows_n, cols, C_N, L, stride_b_c * ALIGN, stride_b_l)
        a = load_tile(a_base, rows_m, cols, C_M, L, stride_a_c * ALIGN, stride_a_l)
        if HAS_MASK:
            taking_part = load_mask(mask_ptr + n * stride_mask_n, cols, L, stride_mask_l)
            a = tl.where(taking_part[None, :], a, 0.0)  # a masked position may hold NaN
        x = tl.where(taking_part[None, :], b.to(ACC) * scale, -float("inf"))
        if GIVEN:
            p = exp(x - pivot[:, None])
            acc = dot(a, tl.trans(p.to(a.dtype)), acc, PRECISION)
        else:
            p, rescale, mx, total = online_softmax(x, mx, total)
            acc = dot(p.to(a.dtype), tl.trans(a), acc * rescale[:, None], PRECISION)

    if not GIVEN:
        acc = tl.trans(acc)
    if FINAL:
        store_descriptors(
            acc, mx, total, nh, h, rows_m, rows_n, C_M, C_N,
            acc_ptr, lowp_ptr, sum_ptr, bias_ptr, HAS_MASK, HAS_BIAS, LOWP,
        )  # fmt: skip
    else:
        offs_n = ((n * NUM_PARTIALS + PARTIAL + split) * HEADS + h) * C_N + rows_n
        inside_n = rows_n < C_N
        if GIVEN:  # those of all positions: one split has the sum
            total = tl.where(split == 0, total, 0.0)
        tl.store(max_ptr + offs_n, mx, mask=inside_n)
        tl.store(sum_ptr + offs_n, total, mask=inside_n)
        ptrs = acc_ptr + offs_n[None, :] * C_M + rows_m[:, None]
        tl.store(ptrs, acc, mask=inside_n[None, :] & (rows_m < C_M)[:, None])


@guard.proved(
    {"sources": SOURCE, "lowp": "N---", "g": "N---", "lse": "N"},
    writes=("lowp", "g", "lse"),
    num_splits=lambda sources, **_: few_or_many(_num_partials(sources)),
    choice=lambda sources, **_: apart(*sources[0][:2]),
)
def gather_forward(sources, logit_scale, bias=None, lowp=None, g=None, lse=None):
    """G and lse of positions that come from one or more sources (the input itself, extra tokens).

    ``sources``: list of ``(a, b, mask)``: ``(N, heads, m, L)``, ``(N, heads, n, L)``, ``(N, L)``
    uint8 or None. ``bias``: of A, ``(heads·m,)``, where a has none. Returns ``G (N, heads, m, n)``
    in float32 (float64 for float64 inputs) and ``lse (N, heads, n)`` in float32 (float64 for
    float32 and float64 inputs), contiguous, in ``g`` and ``lse`` if they are given. ``lowp``: G in
    the input dtype is written there.
    """
    a, b, mask = sources[0]
    batch, heads, c_m, _ = a.shape
    c_n = b.shape[2]
    if g is None:
        g = a.new_empty((batch, heads, c_m, c_n), dtype=accumulator(a.dtype))
    if lse is None:
        lse = a.new_empty((batch, heads, c_n), dtype=lse_dtype(a.dtype))
    if batch == 0:
        return g, lse
    if _num_partials(sources) == 1:
        _gather(sources, logit_scale, (g, lse, lse), bias, lowp, final=True)
        return g, lse
    partials = _partials(sources, logit_scale)
    merge(partials, g, lse, bias, lowp, mask=mask is not None)
    return g, lse


@guard.proved({"sources": SOURCE}, choice=lambda sources, **_: apart(*sources[0][:2]))
def gather_partials(sources, logit_scale):
    """Partial ``(acc, max, sum)``: acc ``(N, num_partials, heads·n, m)``, others without m."""
    return _partials(sources, logit_scale)


def _partials(sources, logit_scale):
    a, b, _ = sources[0]
    batch, heads, c_m, _ = a.shape
    statistics, dtype = (batch, _num_partials(sources), heads * b.shape[2]), accumulator(a.dtype)
    shapes = (*statistics, c_m), statistics, statistics
    partials = tuple(a.new_empty(shape, dtype=dtype) for shape in shapes)
    _gather(sources, logit_scale, partials, None, None, final=False)
    return partials


def _num_partials(sources):
    """The number of partials: programs over the positions of all sources."""
    return sum(num_splits for _, num_splits in _splits(sources))


def _splits(sources):
    """``(blocks_per_split, num_splits)`` of each source."""
    return launch.prepared(_split, [t for a, b, _ in sources for t in (a, b)])


def _split(*inputs):
    own, found = launch.chosen(apart(*inputs[:2])), []
    for a, b in zip(inputs[::2], inputs[1::2], strict=True):
        tile = _tile(a, b, own)
        found.append(launch.split_positions(_programs(a, b, tile), a.shape[-1], tile, a.device))
    return found


def _programs(a, b, tile):
    """How many programs there are without splitting positions."""
    blocks = -(-a.shape[2] // tile.block_m) * -(-b.shape[2] // tile.block_n)
    return a.shape[0] * a.shape[1] * blocks


def apart(a, b):
    """Whether the first source has a tile of its own, GIVEN in channels-last memory or ALIGNED.

    In channels-last memory, where several programs share rows of P, and a launch for their
    statistics fills the GPU. On aligned rows, where G has several tiles: for two programs per SM,
    except where single programs fill more than half of the GPU as they are.
    """
    (batch, heads, c_n, _), c_m, num_sms = b.shape, a.shape[2], launch.num_sms(a.device)
    tile = tiles.tile("gather", a, c_m, c_n)
    if _variant(b) == GIVEN:
        found = batch * heads * -(-c_n // STATISTICS)
        return c_m > tile.block_m and c_n > 32 and found >= num_sms
    if launch.rows(a) != tiles.ALIGNED or tiles.g_fits_one_tile(a, c_m, c_n):
        return False
    return not num_sms // 2 < _programs(a, b, tile) <= num_sms


def _variant(b):
    return GIVEN if launch.is_channels_last(b) else tiles.ALIGNED


def _tile(a, b, own):
    return tiles.tile("gather", a, a.shape[2], b.shape[2], _variant(b) if own else tiles.PLAIN)


def _gather(sources, logit_scale, results, bias, lowp, final):
    splits = _splits(sources)
    own = launch.chosen(apart(*sources[0][:2]))
    partial, num_partials = 0, sum(num_splits for _, num_splits in splits)
    for (a, b, mask), split in zip(sources, splits, strict=True):
        given = _statistics(b, mask, logit_scale) if own and _variant(b) == GIVEN else (None, None)
        tensors = a, b, mask, *results, bias, lowp, *given
        ready = launch.prepared(_gathering, tensors, own, *split, partial, num_partials, final)
        ready([a if t is None else t for t in tensors], (logit_scale,))
        partial += split[1]


def _statistics(b, mask, logit_scale):
    """The largest logit of each row and the sum of its exponentials, ``(N, heads, n)``."""
    ready = launch.prepared(_finding, (b, mask))
    found = ready.empty()
    ready((b, b if mask is None else mask, *found), (logit_scale,))
    return found


def _finding(b, mask):
    batch, heads, c_n, _ = b.shape
    return launch.Launch(
        statistics_kernel, b, None, batch * heads * -(-c_n // STATISTICS),
        activations={"b": b}, strided={"mask": mask}, HEADS=heads, C_N=c_n,
        HAS_MASK=mask is not None, BLOCK_N=STATISTICS, BLOCK_L=256 // b.element_size(),
        num_warps=4,
    ).allocating(accumulator(b.dtype), *[b.shape[:3]] * 2)  # fmt: skip


def _gathering(
    a, b, mask, acc, mx, total, bias, lowp, given_max, given_sum,
    own, blocks_per_split, num_splits, partial, num_partials, final,
):  # fmt: skip
    _, heads, c_m, _ = a.shape
    c_n = b.shape[2]
    tile = _tile(a, b, own)
    return launch.Launch(
        gather_kernel, a, tile, _programs(a, b, tile) * num_splits, bounded=True,
        activations={"a": a, "b": b}, strided={"mask": mask},
        HEADS=heads, C_M=c_m, C_N=c_n, BLOCKS_PER_SPLIT=blocks_per_split, NUM_SPLITS=num_splits,
        PARTIAL=partial, NUM_PARTIALS=num_partials,
        HAS_MASK=mask is not None, FINAL=final, GIVEN=given_max is not None,
        HAS_BIAS=bias is not None, LOWP=lowp is not None,
    )  # fmt: skip
