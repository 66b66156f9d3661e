"""Gather's kernels, by their autograd function, against the definition in float64."""

import math

import pytest
import torch

from da_triton import reference
from da_triton.kernels import gather
from da_triton.ops.triton import core
from da_triton.runtime import launch
from support.cases import CASES, LARGEST, each_case
from support.cases import LARGEST_G_TILE as CASE
from support.compare import check_against_reference, step
from support.numerics import DEVICE, DTYPES, TOLERANCE, check, peaky, relative_rms


def compare(a, b, upstream, **options):
    check_against_reference(core.gather, reference.gather, (a, b), upstream, **options)


def inputs(case, dtype, channels_last=False):
    layout = {"dtype": dtype, "channels_last": channels_last}
    a = peaky(case.batch, case.heads, case.m, case.length, **layout)
    b = peaky(case.batch, case.heads, case.n, case.length, **layout)
    return a, b, peaky(case.batch, case.heads, case.m, case.n, dtype=dtype)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_case
def test_matches_the_definition(case, dtype, channels_last, poisoned):
    compare(*inputs(case, dtype, channels_last), logit_scale=0.7)


def test_largest_m_and_n():
    compare(*inputs(LARGEST, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_position(dtype):
    """G is A itself and no logit matters: dB is zero up to the rounding of dP."""
    a, b, upstream = (peaky(2, 1, c, k, dtype=dtype) for c, k in ((5, 1), (3, 1), (5, 3)))
    result = step(core.gather, (a, b), upstream)
    check(result["out"], a.double().expand(-1, -1, -1, 3), dtype)
    check(result["a"], upstream.double().sum(-1, keepdim=True), dtype)
    dp = (upstream.double().mT @ a.double()).norm()
    assert result["b"].double().norm() <= TOLERANCE[dtype] * dp


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@each_case
def test_features_with_a_mean(case, dtype):
    """dB sums to zero over positions; a bias common to them would add up in B's weights."""
    a, b, upstream = inputs(case, dtype)
    a = a + 5
    x = peaky(case.batch, 1, 16, case.length, dtype=torch.float64) + 5
    wide = step(reference.gather, (a.double(), b.double()), upstream)
    own, actual = (step(f, (a, b), upstream) for f in (reference.gather, core.gather))
    error, allowed = ((r["b"].double() @ x.mT - wide["b"] @ x.mT).norm() for r in (actual, own))
    assert error <= max(2 * allowed, 1e-5 * wide["b"].norm() * x.norm())
    compare(a, b, upstream)


def test_backward_inside_autocast():
    a, b, upstream = inputs(CASE, torch.float32)
    expected = step(core.gather, (a, b), upstream)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        actual = step(core.gather, (a, b), upstream)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_tf32_is_pytorchs_own_switch(precision):
    x = torch.empty(1, 1, 4, 4)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = precision
        for activations, expected in ((x, precision), (x.double(), "ieee")):
            made = gather._gathering(activations, activations, *[None] * 8, False, 1, 1, 0, 1, True)
            assert made.constants["PRECISION"] == expected
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("logit_scale", [-0.5, 2.0, 0.0])
def test_logit_scale(logit_scale):
    a, b, upstream = inputs(CASE, torch.float32)
    if logit_scale == 0:  # dB is exactly zero: no relative error to speak of
        result = step(core.gather, (a, b), upstream, logit_scale=0.0)
        assert result["b"].count_nonzero() == 0
        check(result["out"], a.double().mean(-1, keepdim=True).expand(-1, -1, -1, CASE.n), a.dtype)
    else:
        compare(a, b, upstream, logit_scale=logit_scale)


def test_scale_is_not_rounded_to_float32():
    a, b, upstream = inputs(CASE, torch.float64)
    compare(a, b, upstream, logit_scale=1 / 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_case
def test_mask(case, dtype, poisoned):
    a, b, upstream = inputs(case, dtype)
    mask = torch.rand(case.batch, case.length, device=DEVICE) > 0.4
    mask[:, 0] = True
    compare(a, b, upstream, mask=mask)


def test_mask_with_every_position_gone_gives_zeros():
    a, b, upstream = inputs(CASE, torch.float32)
    mask = torch.ones(CASE.batch, CASE.length, dtype=torch.bool, device=DEVICE)
    mask[0] = False
    result = step(core.gather, (a, b), upstream, mask=mask)
    for name, value in result.items():
        assert value[0].count_nonzero() == 0, name
        assert value[1].isfinite().all(), name
    compare(a, b, upstream, mask=mask)


def test_masked_values_reach_neither_result_nor_gradients():
    a, b, upstream = inputs(CASE, torch.float32)
    mask = torch.rand(CASE.batch, CASE.length, device=DEVICE) > 0.3
    expected = step(core.gather, (a, b), upstream, mask=mask)
    hidden = ~mask[:, None, None, :]
    spoiled = a.masked_fill(hidden, math.nan), b.masked_fill(hidden, math.inf)
    found = step(core.gather, spoiled, upstream, mask=mask)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("tokens_per_sample", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@each_case
def test_extra_tokens(case, masked, tokens_per_sample):
    a, b, upstream = inputs(case, torch.float32)
    extra_a = peaky(1, case.heads, case.m, 4, dtype=a.dtype)
    extra_b = peaky(1, case.heads, case.n, 4, dtype=a.dtype)
    if tokens_per_sample:
        extra_a = extra_a + peaky(case.batch, case.heads, case.m, 4, dtype=a.dtype)
        extra_b = extra_b + peaky(case.batch, case.heads, case.n, 4, dtype=a.dtype)
    mask = torch.rand(case.batch, case.length, device=DEVICE) > 0.5 if masked else None
    batch = case.batch
    extra = tuple(e.expand(batch, -1, -1, -1) for e in (extra_a, extra_b))
    compare(a, b, upstream, extra=extra, mask=mask)

    leaves = [x.clone().requires_grad_() for x in (extra_a, extra_b)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    for function, (x, y), (f, g) in (
        (core.gather, leaves, (a, b)),
        (reference.gather, wide, (a.double(), b.double())),
    ):
        pair = (x.expand(batch, -1, -1, -1), y.expand(batch, -1, -1, -1))
        out = function(f, g, extra=pair, mask=mask)
        out.backward(upstream.to(out.dtype))
    for ours, theirs in zip(leaves, wide, strict=True):
        check(ours.grad, theirs.grad, a.dtype)


def test_a_shared_by_all_heads():
    """A with stride 0 over the heads, as the orders that gather from X need it."""
    _, b, _ = inputs(CASE, torch.float32)
    x = peaky(CASE.batch, 1, 40, CASE.length, dtype=torch.float32)
    upstream = peaky(CASE.batch, CASE.heads, 40, CASE.n, dtype=torch.float32)
    compare(x.expand(-1, CASE.heads, -1, -1), b, upstream)


def test_slices_need_no_copy():
    """Slices of one projection, over channels, samples and every second position."""
    stacked = peaky(4, 1, 100, 2 * CASE.length, dtype=torch.float32)
    a = stacked[1:3, :, 3:27, ::2]
    b = stacked[1:3, :, 40:59, ::2]
    compare(a, b, peaky(2, 1, 24, 19, dtype=torch.float32))


def upstream_layouts(shape):
    """Transposed, from ``.sum()``, broadcast over n, and a slice."""
    yield peaky(*shape[:2], shape[3], shape[2], dtype=torch.float32).mT
    yield torch.ones((), device=DEVICE).expand(shape)
    yield peaky(*shape[:3], 1, dtype=torch.float32).expand(shape)
    larger = peaky(shape[0], shape[1], shape[2] + 3, shape[3] + 5, dtype=torch.float32)
    yield larger[:, :, 2:-1, 3:-2]


@each_case
def test_upstream_strides(case):
    a, b, _ = inputs(case, torch.float32)
    shape = (case.batch, case.heads, case.m, case.n)
    for upstream in upstream_layouts(shape):
        compare(a, b, upstream)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
@each_case
def test_partial_gradients(case, needs, poisoned):
    a, b, upstream = inputs(case, torch.float32)
    whole = step(core.gather, (a, b), upstream)
    a, b = a.requires_grad_(needs[0]), b.requires_grad_(needs[1])
    core.gather(a, b).backward(upstream)
    for name, x, need in zip(("a", "b"), (a, b), needs, strict=True):
        assert (x.grad is not None) == need
        if need:
            assert torch.equal(x.grad, whole[name])


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_in_a_launch_of_their_own(dtype, masked, poisoned, monkeypatch):
    """In channels-last memory, where several blocks of m share rows of P."""
    monkeypatch.setattr(launch, "num_sms", lambda device: 4)
    length, found = 147, []
    original = gather._statistics
    monkeypatch.setattr(gather, "_statistics", lambda *args: found.append(1) or original(*args))
    layout = {"dtype": dtype, "channels_last": True}
    a, b = peaky(2, 2, 150, length, **layout), peaky(2, 2, 43, length, **layout)
    mask, extra = None, None
    if masked:
        mask = torch.rand(2, length, device=DEVICE) > 0.4
        mask[:, 0] = True
        extra = peaky(2, 2, 150, 5, dtype=dtype), peaky(2, 2, 43, 5, dtype=dtype)
    options = {"mask": mask, "extra": extra, "logit_scale": 0.7}
    compare(a, b, peaky(2, 2, 150, 43, dtype=dtype), **options)
    assert found
    first, second = (core.gather(a, b, **options) for _ in range(2))
    assert torch.equal(first, second)
    gone = torch.ones(2, length, dtype=torch.bool, device=DEVICE)
    gone[0] = False
    result = core.gather(a, b, mask=gone)
    assert result[0].count_nonzero() == 0
    assert result[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_case
def test_bitwise_repeatable(case, dtype):
    a, b, upstream = inputs(case, dtype)
    first, second = (step(core.gather, (a, b), upstream) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("offset", [-300.0, 1e4, 1e8, 1e30, 3e38])
def test_huge_logits(offset):
    """A softmax is invariant to a constant added to all its logits, up to the largest float32."""
    a, b, upstream = inputs(CASE, torch.float32)
    shifted = (b + offset).clamp(max=torch.finfo(torch.float32).max)
    expected = step(reference.gather, (a.double(), shifted.double()), upstream)
    actual = step(core.gather, (a, shifted), upstream)
    assert relative_rms(actual["out"], expected["out"]) < TOLERANCE[torch.float32]
    if offset < 1e9:  # beyond, no float64 holds the log of the sum beside the maximum
        assert relative_rms(actual["a"], expected["a"]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("case", [CASE, CASES[4], CASES[5]], ids=lambda case: case.name)
@pytest.mark.parametrize("offset", [1e6, 1e9])
def test_weights_sum_to_one_however_large_the_logits(case, offset):
    """Backward must round ``0.7·b`` as forward did: ``exp`` of the difference would overflow."""
    a, b, upstream = inputs(case, torch.float32)
    found = step(core.gather, (a, b + offset), upstream, logit_scale=0.7)["a"]
    sums = upstream.double().sum(-1)  # Σ_L dA = Σ_n dG: rows of P sum to 1
    assert relative_rms(found.double().sum(-1), sums) < TOLERANCE[torch.float32]


def test_infinite_logits():
    """−inf is weight 0; +inf, or all −inf, gives NaN in that attention map, as in torch.softmax."""
    a, b, _ = inputs(CASE, torch.float32)
    b[0, 0, 2, ::3] = -math.inf
    b[0, 1, 5, :100] = -math.inf  # a whole split of the positions and more
    b[1, 0, 3, 7] = math.inf
    b[1, 1, 4] = -math.inf
    expected = reference.gather(a.double(), b.double())
    actual = core.gather(a, b)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert expected.isnan().sum() == 2 * CASE.m
    finite = ~expected.isnan()
    assert relative_rms(actual[finite], expected[finite]) < TOLERANCE[torch.float32]


def test_nan_stays_in_its_attention_map_and_sample():
    a, b, upstream = inputs(CASE, torch.float32)
    clean = step(core.gather, (a, b), upstream)
    b[1, 0, 3, 17] = math.nan
    spoiled = step(core.gather, (a, b), upstream)
    assert spoiled["out"][1, 0, :, 3].isnan().all()
    spoiled["out"][1, 0, :, 3] = clean["out"][1, 0, :, 3]
    assert torch.equal(spoiled["out"], clean["out"])
    for name in ("a", "b"):
        assert torch.equal(spoiled[name][0], clean[name][0])
        assert torch.equal(spoiled[name][1, 1], clean[name][1, 1])


def test_weights_below_float16_still_count():
    """Beside a position that takes nearly all, the others' P are float16 subnormals."""
    a, b = (peaky(1, 1, 16, 200, dtype=torch.float16, deviation=1) for _ in range(2))
    b[..., 0] = 14
    upstream = peaky(1, 1, 16, 16, dtype=torch.float16, deviation=300)
    expected = step(reference.gather, (a.double(), b.double()), upstream)
    actual = step(core.gather, (a, b), upstream)
    p = b.double().softmax(-1)[..., 1:]
    assert p.mean() < 2e-6
    error = relative_rms(actual["a"][..., 1:], expected["a"][..., 1:])
    assert error < 2 * TOLERANCE[torch.float16], error


@pytest.mark.parametrize(
    "wrong",
    [
        lambda a, b: reference.gather(a, b, logit_scale=0.5),
        lambda a, b: a @ b.softmax(-2).mT,
        lambda a, b: a @ b.softmax(0).mT,
        lambda a, b: a @ b.softmax(-1).detach().mT + 0 * b.sum(),
    ],
    ids=["half the logit scale", "softmax over n", "softmax over the batch", "no gradient of P"],
)
def test_a_wrong_reference_is_rejected(wrong):
    a, b, upstream = inputs(CASE, torch.bfloat16)
    right = step(core.gather, (a, b), upstream)
    other = step(wrong, (a.double(), b.double()), upstream)
    assert relative_rms(right["b"], other["b"]) > TOLERANCE[torch.bfloat16]


def test_gradients_of_the_kernels_by_finite_differences():
    a = peaky(1, 1, 2, 6, dtype=torch.float64).requires_grad_()
    b = peaky(1, 1, 2, 6, dtype=torch.float64, deviation=1).requires_grad_()
    mask = torch.tensor([[True] * 5 + [False]], device=DEVICE)
    extra = tuple(peaky(1, 1, 2, 1, dtype=torch.float64).requires_grad_() for _ in range(2))

    def function(a, b, *extra):
        return core.gather(a, b, mask=mask, extra=extra, logit_scale=0.6)

    assert torch.autograd.gradcheck(function, (a, b, *extra))
    assert torch.autograd.gradgradcheck(function, (a, b, *extra), fast_mode=True)


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((3, 2, 3, 36), (2**30, 192, 64, 1)),
        ((2, 2, 3, 36), (8, 4, 1, 2**26)),
        ((1, 1, 2, 36), (0, 0, 2**31, 1)),
    ],
    ids=["batch", "positions", "channels"],
)
def test_offsets_beyond_int32(shape, strides):
    """Strides that put elements past 2^31: offsets are int64 from the program's number on."""
    storage = torch.empty(2**31 + 2**29, dtype=torch.float16, device=DEVICE)
    x = storage.as_strided(shape, strides)
    x.copy_(torch.randn(shape))
    packed = x.clone(memory_format=torch.contiguous_format)  # cuBLAS has strides below 2^31
    compare(x, x, peaky(*shape[:3], shape[2], dtype=torch.float16), own=(packed, packed))


def test_a_map_of_minus_infinity_under_a_mask_is_zero_whatever_a_holds():
    a = torch.full((1, 1, 20, 40), float("inf"), dtype=torch.bfloat16, device=DEVICE)
    b = torch.full((1, 1, 16, 40), -float("inf"), dtype=torch.bfloat16, device=DEVICE)
    mask = torch.ones(1, 40, dtype=torch.uint8, device=DEVICE)
    mask[:, 5:9] = 0
    g, lse = gather.gather_forward([(a, b, mask)], 1.0)
    assert (g == 0).all()
    assert (lse == float("inf")).all()
