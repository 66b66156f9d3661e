r"""Products with softmax weights for which a program holds the full n of its positions.

With ``E[n, l] = softmax_n(s·(x + bias))`` (distribution: W is G, x is V) or ``exp(s·x − lse)`` with
lse per n (gather's backward: W is dG, x is B), one pass over positions makes

    out = scale · W E                                                            Z, dA
    dx  = s · E∘(scale · Wᵀ y − c)      c = Σ_n E∘(scale · Wᵀ y), or δ           dV, dB

feature block by feature block, and writes E itself where a later product needs it. Each block of W
serves both products; y is read once and x twice (again at the end: E for the full n would not fit
the registers beside its gradient; the largest tiles read E there, if it was written, rounded). Half
precision, up to n = 512; see ``core_tiled`` for more.

W is ``(N, heads, C_M, C_N)``, activations are ``(N, heads, channels, positions)``, both in any
strides.
"""

import triton
import triton.language as tl

from ..precision import POLICIES
from ..runtime import launch, tiles
from .primitives import dot, exp, exp_minus, load_mask, load_matrix, load_tile, scalar, store_tile

# Values per thread, in the accumulator's dtype, from which E does not fit beside its gradient and
# is read back; beyond them it is made in parts.
MOST_VALUES = 128


@triton.jit
def _logits(
    x_base, bias_ptr, rows, cols, C_N, L, stride_c, stride_l, scale, HAS_BIAS: tl.constexpr
):
    """``s·(x + bias)`` of a tile, ``[BLOCK_N, BLOCK_L]``; 0 outside the tensor."""
    x = load_tile(x_base, rows, cols, C_N, L, stride_c, stride_l).to(scale.dtype)
    if HAS_BIAS:
        x += tl.load(bias_ptr + rows, mask=rows < C_N, other=0.0).to(scale.dtype)[:, None]
    return x * scale


@triton.jit
def _softmax_in_parts(
    x_base, bias_base, cols, C_N, L, stride_c, stride_l, scale, DTYPE: tl.constexpr,
    SOFTMAX: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, PART_N: tl.constexpr,
):  # fmt: skip
    """``E`` in parts of n, rounded one by one: x is read twice, and few registers are needed."""
    mx = tl.full(cols.shape, -float("inf"), scale.dtype)
    total = tl.zeros(cols.shape, scale.dtype)
    if SOFTMAX:
        for n0 in tl.range(0, C_N, PART_N, num_stages=1):
            rows = (n0 + tl.arange(0, PART_N)).to(tl.int64)
            x = _logits(x_base, bias_base, rows, cols, C_N, L, stride_c, stride_l, scale, HAS_BIAS)
            x = tl.where((rows < C_N)[:, None], x, -float("inf"))
            new_mx = tl.maximum(mx, tl.max(x, 0))
            pivot = tl.where(new_mx == -float("inf"), 0.0, new_mx)  # −inf − (−inf) would be NaN
            total = total * exp(mx - pivot) + tl.sum(exp(x - pivot[None, :]), 0)
            mx = new_mx
        total = 1.0 / total
    e = ()
    for k in tl.static_range(BLOCK_N // PART_N):
        rows = (k * PART_N + tl.arange(0, PART_N)).to(tl.int64)
        x = _logits(x_base, bias_base, rows, cols, C_N, L, stride_c, stride_l, scale, HAS_BIAS)
        if SOFTMAX:
            x = tl.where((rows < C_N)[:, None], x, -float("inf"))
            x = exp(x - mx[None, :]) * total[None, :]
        e = e + (x.to(DTYPE),)  # noqa: RUF005, which Triton cannot read
    return e


@triton.jit(do_not_specialize=["HEADS"])
def full_n_kernel(
    w_ptr,  # (N, heads, C_M, C_N)
    x_ptr,  # (N, heads, C_N, L)
    bias_ptr,  # (heads·C_N,), contiguous; read if HAS_BIAS
    lse_ptr,  # (N·heads, C_N); read if LSE_PER_N
    delta_ptr,  # (N·heads, C_N): c; read if LSE_PER_N and GRADIENT
    mask_ptr,  # (N, L) uint8, 0 where E is 0; read if HAS_MASK
    y_ptr,  # (N, heads, C_M, L); read if GRADIENT
    start_ptr,  # (N, heads, C_M, L): added to W E; read if HAS_START
    bias_out_ptr,  # (C_M,): added to out; read if HAS_BIAS_OUT
    out_ptr,  # (N, heads, C_M, L); written if WRITE_OUT
    e_ptr,  # (N, heads, C_N, L); written if WRITE_E
    dx_ptr,  # (N, heads, C_N, L); written if GRADIENT
    scale_out: "fp64",
    logit_scale: "fp64",
    HEADS,
    C_M,
    C_N,
    L_UNITS,
    stride_w_n,
    stride_w_h,
    stride_w_m,
    stride_w_k,
    stride_x_n,
    stride_x_h,
    stride_x_c,
    stride_x_l,
    stride_mask_n,
    stride_mask_l,
    stride_y_n,
    stride_y_h,
    stride_y_c,
    stride_y_l,
    stride_start_n,
    stride_start_h,
    stride_start_c,
    stride_start_l,
    stride_out_n,
    stride_out_h,
    stride_out_c,
    stride_out_l,
    stride_e_n,
    stride_e_h,
    stride_e_c,
    stride_e_l,
    stride_dx_n,
    stride_dx_h,
    stride_dx_c,
    stride_dx_l,
    SOFTMAX: tl.constexpr,
    LSE_PER_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_BIAS_OUT: tl.constexpr,
    WRITE_OUT: tl.constexpr,
    WRITE_E: tl.constexpr,
    GRADIENT: tl.constexpr,
    READ_E: tl.constexpr,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    E_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    PART_N: tl.constexpr,
):
    """One program: a block of positions of a head of a sample. BLOCK_N ≥ C_N.

    PART_N: n of a product, which may be less than BLOCK_N where ``out`` alone is written.
    """
    L = L_UNITS * ALIGN
    blocks = tl.cdiv(L, BLOCK_L)
    pid = tl.program_id(0)
    nh = (pid // blocks).to(tl.int64)
    n, h = nh // HEADS, nh % HEADS
    cols = (pid % blocks * BLOCK_L + tl.arange(0, BLOCK_L)).to(tl.int64)
    rows_n = tl.arange(0, BLOCK_N).to(tl.int64)
    inside_n = rows_n < C_N
    w_base = w_ptr + n * stride_w_n + h * stride_w_h
    x_base = x_ptr + (n * stride_x_n + h * stride_x_h) * ALIGN
    y_base = y_ptr + (n * stride_y_n + h * stride_y_h) * ALIGN
    start_base = start_ptr + (n * stride_start_n + h * stride_start_h) * ALIGN
    out_base = out_ptr + (n * stride_out_n + h * stride_out_h) * ALIGN
    scale_x = scalar(logit_scale, ACC)
    scale = scalar(scale_out, ACC)
    dtype: tl.constexpr = x_ptr.dtype.element_ty

    e_base = e_ptr + (n * stride_e_n + h * stride_e_h) * ALIGN
    PARTS: tl.constexpr = BLOCK_N // PART_N
    if PARTS > 1:
        operand = _softmax_in_parts(
            x_base, bias_ptr + h * C_N, cols, C_N, L, stride_x_c * ALIGN, stride_x_l, scale_x,
            dtype, SOFTMAX, HAS_BIAS, BLOCK_N, PART_N,
        )  # fmt: skip
    else:
        e = _logits(
            x_base, bias_ptr + h * C_N, rows_n, cols, C_N, L, stride_x_c * ALIGN, stride_x_l,
            scale_x, HAS_BIAS,
        )  # fmt: skip
        if HAS_MASK:
            mask = load_mask(mask_ptr + n * stride_mask_n, cols, L, stride_mask_l)
        if LSE_PER_N:
            lse = tl.load(lse_ptr + nh * C_N + rows_n, mask=inside_n, other=float("inf"))
            e = exp_minus(e, lse[:, None])
        elif SOFTMAX:
            e = tl.where(inside_n[:, None], e, -float("inf"))
            mx = tl.max(e, 0)
            e = exp(e - mx[None, :])
            inverse = 1.0 / tl.sum(e, 0)
            e = e * inverse[None, :]
        if HAS_MASK:
            e = tl.where(mask[None, :], e, 0.0)
        rounded = (e * E_SCALE).to(dtype)
        if WRITE_E:
            store_tile(e_base, rows_n, cols, C_N, L, stride_e_c * ALIGN, stride_e_l, rounded)
        operand = (rounded,)

    grad = tl.zeros((BLOCK_N, BLOCK_L), ACC)
    if HAS_START:
        rows_m = tl.arange(0, BLOCK_M).to(tl.int64)
        step_c = stride_start_c * ALIGN
        start = load_tile(start_base, rows_m, cols, C_M, L, step_c, stride_start_l)
    for m0 in range(0, C_M, BLOCK_M):
        rows_m = (m0 + tl.arange(0, BLOCK_M)).to(tl.int64)
        out = tl.zeros((BLOCK_M, BLOCK_L), ACC)
        if HAS_START:
            out += start.to(ACC)
            start = load_tile(start_base, rows_m + BLOCK_M, cols, C_M, L, step_c, stride_start_l)
        for k in tl.static_range(PARTS):
            rows = (k * PART_N + tl.arange(0, PART_N)).to(tl.int64)
            w = load_matrix(w_base, rows_m, rows, C_M, C_N, stride_w_m, stride_w_k, dtype)
            if WRITE_OUT:
                out = dot(w, operand[k], out, PRECISION)
        if WRITE_OUT:
            out = out * (scale / E_SCALE)
            if HAS_BIAS_OUT:
                bias_out = tl.load(bias_out_ptr + rows_m, mask=rows_m < C_M, other=0.0)
                out += bias_out.to(ACC)[:, None]
            store_tile(out_base, rows_m, cols, C_M, L, stride_out_c * ALIGN, stride_out_l, out)
        if GRADIENT:
            y = load_tile(y_base, rows_m, cols, C_M, L, stride_y_c * ALIGN, stride_y_l)
            grad = dot(tl.trans(w), y, grad, PRECISION)

    if GRADIENT:
        grad = grad * scale
        if READ_E:
            tl.debug_barrier()  # between stores and loads of the same addresses
            e = load_tile(e_base, rows_n, cols, C_N, L, stride_e_c * ALIGN, stride_e_l).to(ACC)
            grad = e * (grad - tl.sum(e * grad, 0)[None, :])
        elif LSE_PER_N or SOFTMAX:
            e = _logits(
                x_base, bias_ptr + h * C_N, rows_n, cols, C_N, L, stride_x_c * ALIGN, stride_x_l,
                scale_x, HAS_BIAS,
            )  # fmt: skip
            if LSE_PER_N:
                delta = tl.load(delta_ptr + nh * C_N + rows_n, mask=inside_n, other=0.0)
                grad = exp_minus(e, lse[:, None]) * (grad - delta[:, None])
            else:
                e = tl.where(inside_n[:, None], e, -float("inf"))
                e = exp(e - mx[None, :]) * inverse[None, :]
                grad = e * (grad - tl.sum(e * grad, 0)[None, :])
        if HAS_MASK:
            grad = tl.where(mask[None, :], grad, 0.0)  # 0 · NaN, where y may hold anything
        dx_base = dx_ptr + (n * stride_dx_n + h * stride_dx_h) * ALIGN
        grad = grad * scale_x
        store_tile(dx_base, rows_n, cols, C_N, L, stride_dx_c * ALIGN, stride_dx_l, grad)


def fits(x, c_n):
    """Whether a program can hold the full n of a head, in the dtype of x."""
    return tiles.fits("full_n", x, 1, c_n)


def distribute(g, v, bias, z, *, scale, logit_scale, softmax, start=None, bias_out=None):
    """Writes ``Z = scale · (start + G Q) + bias_out``. ``g``: in the dtype of v.

    ``bias``: of V; ``start``: in the layout of z; ``bias_out``: ``(m,)``; each may be None.
    """
    added = {"start": start, "bias_out": bias_out}
    _launch(g, v, bias, scale, logit_scale, softmax=softmax, out=z, **added)


def distribute_backward(dz, g, v, bias, dv, z, q, *, scale, logit_scale, softmax):
    """Writes dV, and Z and Q where they are given."""
    _launch(g, v, bias, scale, logit_scale, softmax=softmax, y=dz, out=z, e=q, dx=dv)


def gather_backward(dg, a, b, delta, da, db, *, mask, lse, logit_scale):
    """Writes dB, and dA where it is given. ``dg``: in the input dtype."""
    lse_per_n = {"lse": lse, "delta": delta, "mask": mask}
    _launch(dg, b, None, 1.0, logit_scale, y=a, out=da, dx=db, **lse_per_n)


def _launch(
    w, x, bias, scale, logit_scale, *, softmax=True, y=None, out=None, e=None, dx=None,
    lse=None, delta=None, mask=None, start=None, bias_out=None,
):  # fmt: skip
    gradient = dx is not None
    y, dx = (y, dx) if gradient else (x, x)
    ready = launch.prepared(
        _full_n, (x, w, y, out, e, dx, bias, lse, delta, mask, start, bias_out), gradient, softmax
    )
    optional = [x if t is None else t for t in (bias, lse, delta, mask)]
    others = [x if t is None else t for t in (start, bias_out, out, e)]
    ready((w, x, *optional, y, *others, dx), (scale, logit_scale))


def _full_n(
    x, w, y, out, e, dx, bias, lse, delta, mask, start, bias_out, gradient, softmax
):  # fmt: skip
    batch, heads, c_n, length = x.shape
    tile = _tile(x, w.shape[2], "gradient" if gradient else tiles.PLAIN)
    values = tile.block_n * tile.block_l // tiles.threads(tile, x.device)
    parts = 1
    plain = out is not None and not gradient and e is None and lse is None
    if plain and tiles.chains_products(x.device):
        parts = max(1, values // MOST_VALUES)
    out_, e_, start_ = (x if t is None else t for t in (out, e, start))
    return launch.Launch(
        full_n_kernel, x, tile, batch * heads * -(-length // tile.block_l),
        activations={"x": x, "y": y, "start": start_, "out": out_, "e": e_, "dx": dx},
        strided={"w": w, "mask": mask}, again=True,
        HEADS=heads, C_M=w.shape[2], C_N=c_n, SOFTMAX=softmax, LSE_PER_N=lse is not None,
        HAS_BIAS=bias is not None, HAS_MASK=mask is not None, HAS_START=start is not None,
        HAS_BIAS_OUT=bias_out is not None, WRITE_OUT=out is not None,
        WRITE_E=e is not None, GRADIENT=gradient,
        READ_E=gradient and softmax and e is not None and values >= MOST_VALUES,
        E_SCALE=1.0 if lse is None else POLICIES[x.dtype].p_scale, PART_N=tile.block_n // parts,
    )  # fmt: skip


def few(x, c_m, variant=tiles.PLAIN):
    """Whether programs, if they can hold the full n, fill at most two thirds of the GPU."""
    batch, heads, c_n, length = x.shape
    if not fits(x, c_n):
        return False
    tile = tiles.tile("full_n", x, c_m, c_n, variant)
    programs = batch * heads * -(-length // tile.block_l)
    return 3 * programs <= 2 * launch.num_sms(x.device) * tile.ctas_per_sm


def _tile(x, c_m, variant):
    """The tile; one for few programs, where there is one."""
    of_few = launch.chosen(few(x, c_m, variant))
    return tiles.tile("full_n", x, c_m, x.shape[2], variant + tiles.FEW * of_few)
