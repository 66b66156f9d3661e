"""Kernels in float16, where gradients of G may overflow it while those of A, B, V do not.

Sums over positions make dG many times larger than the gradients computed from it.
"""

import pytest
import torch

from da_triton.ops.aten import core as aten
from da_triton.ops.triton import core
from support.block import NAMES, ROUTES, definition, run
from support.block import Case as Sizes
from support.block import inputs as block_inputs
from support.cases import CASES, ORDERS, Case
from support.cases import LARGEST_G_TILE as CASE
from support.numerics import DEVICE, check, peaky

DTYPE = torch.float16
LARGEST = torch.finfo(DTYPE).max
RANGE = 32  # by which dG may exceed it
# One for each of the kernels that read dG.
TILED = Case("tiled", heads=1, m=40, n=520, length=120, batch=1)
each_case = pytest.mark.parametrize("case", [CASE, *CASES[4:], TILED], ids=lambda case: case.name)
UNFUSED = [f"unfused_{order}" for order in ORDERS]


def inputs(case):
    """A, B and an upstream gradient; weights of all positions are alike."""
    a = peaky(case.batch, case.heads, case.m, case.length, dtype=DTYPE, deviation=0.3)
    b = peaky(case.batch, case.heads, case.n, case.length, dtype=DTYPE, deviation=0.5)
    upstream = torch.randn(case.batch, case.heads, case.m, case.n, device=DEVICE)
    return a, b, upstream


def gradients(backend, a, b, upstream, **options):
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    g = backend.gather(a, b, **options)
    return torch.autograd.grad(g, (a, b), upstream.to(g.dtype))


def compare(a, b, upstream, **options):
    """Against float64, where no gradient is too large for float16."""
    expected = gradients(aten, a.double(), b.double(), upstream, **options)
    found = gradients(core, a, b, upstream, **options)
    for name, ours, truth in zip(("dA", "dB"), found, expected, strict=True):
        assert truth.abs().max() < LARGEST
        check(ours, truth, DTYPE, None, name)
    return found


def to(largest, x):
    """``x``, its largest element as large as that."""
    return x * (largest / x.abs().max())


@pytest.mark.parametrize("excess", [1.1, 3.0])
@each_case
def test_gradients_of_descriptors_beyond_float16(case, excess):
    a, b, upstream = inputs(case)
    compare(a, b, to(excess * LARGEST, upstream))


@pytest.mark.parametrize("excess", [0.4, 0.6, 0.99, 0.45 * RANGE, 0.99 * RANGE])
def test_the_whole_range_of_gradients_of_descriptors(excess):
    """Few descriptors of many positions, of weights that are alike."""
    a = peaky(1, 1, 8, 1500, dtype=DTYPE, deviation=0.3)
    b = peaky(1, 1, 4, 1500, dtype=DTYPE, deviation=0.1)
    compare(a, b, to(excess * LARGEST, torch.randn(1, 1, 8, 4, device=DEVICE)))


@each_case
def test_digits_do_not_depend_on_the_size_of_the_gradient(case):
    """Where nothing is too large, a power of two on dG is the same power on dA and dB."""
    a, b, upstream = inputs(case)
    upstream = to(2.0**14, upstream)
    for whole, small in zip(
        gradients(core, a, b, upstream), gradients(core, a, b, upstream / 2**6), strict=True
    ):
        normal = small.abs() >= torch.finfo(DTYPE).smallest_normal
        assert normal.float().mean() > 0.9
        assert torch.equal(whole[normal], small[normal] * 2**6)


@each_case
def test_descriptors_with_small_gradients_beside_one_with_large_ones(case):
    """Each descriptor has its factor: the small ones keep their digits."""
    a, b, upstream = inputs(case)
    upstream[..., :1] = to(3 * LARGEST, upstream[..., :1])
    found = compare(a, b, upstream)
    alone = gradients(core, a, b, upstream.index_fill(3, torch.tensor([0], device=DEVICE), 0.0))
    assert torch.equal(found[1][:, :, 1:], alone[1][:, :, 1:])


@each_case
def test_an_attention_map_without_positions(case):
    """Its dG is ignored, however large."""
    a, b, upstream = inputs(case)
    mask = torch.rand(case.batch, case.length, device=DEVICE) > 0.3
    mask[0] = False
    upstream = to(2 * LARGEST, upstream)
    upstream[0] *= 1e6
    da, db = compare(a, b, upstream, mask=mask)
    assert not da[0].any()
    assert not db[0].any()


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
@each_case
def test_each_gradient_alone(case, needs):
    a, b, upstream = inputs(case)
    upstream = to(3 * LARGEST, upstream)
    whole = gradients(core, a, b, upstream)
    a, b = a.requires_grad_(needs[0]), b.requires_grad_(needs[1])
    core.gather(a, b).backward(upstream)
    for x, truth, need in zip((a, b), whole, needs, strict=True):
        assert torch.equal(x.grad, truth) if need else x.grad is None


@pytest.mark.parametrize("offset", [0.0, 300.0, 3e4])
def test_gradients_beyond_float16_of_huge_logits(offset):
    """dG is divided by the rounding error of a low-precision log-sum-exp."""
    a, b, upstream = inputs(CASE)
    b, upstream = b / 2 + offset, to(2 * LARGEST, upstream)
    large, small = (gradients(core, a, b, dg, logit_scale=2.0) for dg in (upstream, upstream / 64))
    for ours, truth in zip(large, small, strict=True):
        check(ours, truth.double() * 64, DTYPE)


@pytest.mark.parametrize("excess", [0.01, 3.0])
@each_case
def test_the_gradient_of_the_log_sum_exp(case, excess):
    """The gradient of lse uses the same weights as dG."""
    a, b, upstream = inputs(case)
    dg = to(excess * LARGEST, upstream)
    dlse = to(excess * LARGEST, torch.randn(case.batch, case.heads, case.n, device=DEVICE))

    def found(backend, a, b):
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        g, lse = backend.gather_lse(a, b)
        return torch.autograd.grad((g, lse), (a, b), (dg.to(g.dtype), dlse.to(lse.dtype)))

    for ours, truth in zip(found(core, a, b), found(aten, a.double(), b.double()), strict=True):
        assert truth.abs().max() < LARGEST
        check(ours, truth, DTYPE)


def constant(sizes, upstream, gains=()):
    """X, weights, mask and a constant upstream gradient."""
    x, w, mask, like = block_inputs(sizes, DTYPE, channels_last=False)
    w = w._replace(**{name: gain * getattr(w, name) for name, gain in gains})
    return x, w, mask, torch.full_like(like, upstream)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("route", ["fused_xh", "fused_gather", *UNFUSED])
def test_a_block_of_a_constant_gradient(route, masked):
    """dX is of the size of dO; dG and dH are of the size of its row sums."""
    sizes = Sizes(1, 32, 16, 4, 300, masked=masked)
    given = constant(sizes, 1024.0, [("b", 0.2), ("v", 0.2)])
    found = run(ROUTES[route], sizes, *given)
    expected = definition(sizes, *given, torch.float64)
    for name, ours, truth in zip(NAMES, found, expected, strict=True):
        if name in ("out", "x"):
            assert truth.abs().max() < LARGEST
            check(ours, truth, DTYPE, None, name)


@pytest.mark.parametrize("route", ["fused_xh", *UNFUSED])
def test_weights_of_a_block_of_a_constant_gradient(route):
    """Products of descriptors: of large gradients and small features."""
    sizes = Sizes(1, 32, 16, 4, 600)
    gains = [("a", 0.01), ("bias_a", 0.01), ("b", 0.02), ("v", 0.2), ("out", 0.35)]
    given = constant(sizes, 512.0, gains)
    expected = dict(zip(NAMES, definition(sizes, *given, torch.float64), strict=True))
    found = dict(zip(NAMES, run(ROUTES[route], sizes, *given), strict=True))
    for name in ("x", "a", "b", "out_weight"):
        assert expected[name].abs().max() < LARGEST
        check(found[name], expected[name], DTYPE, None, name)
