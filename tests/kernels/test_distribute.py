"""Distribute's kernels, by their autograd function, against the definition in float64."""

import math

import pytest
import torch

from da_triton import reference
from da_triton.kernels import distribute
from da_triton.ops.triton import core
from da_triton.runtime import guard
from support.cases import CASES, LARGEST, each_case
from support.cases import LARGEST_G_TILE as CASE
from support.compare import check_against_reference, step
from support.numerics import DEVICE, DTYPES, TOLERANCE, peaky, relative_rms


def compare(g, v, upstream, **options):
    return check_against_reference(
        core.distribute, reference.distribute, (g, v), upstream, **options
    )


def inputs(case, dtype, channels_last=False):
    layout = {"dtype": dtype, "channels_last": channels_last}
    v = peaky(case.batch, case.heads, case.n, case.length, **layout)
    upstream = peaky(case.batch, case.heads, case.m, case.length, **layout)
    return peaky(case.batch, case.heads, case.m, case.n, dtype=dtype), v, upstream


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_case
def test_matches_the_definition(case, dtype, channels_last, poisoned):
    compare(*inputs(case, dtype, channels_last), logit_scale=0.7, scale=1.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@each_case
def test_without_softmax(case, dtype, poisoned):
    compare(*inputs(case, dtype), softmax=False, logit_scale=0.7, scale=-1.3)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", ["start", "bias_out", "both"])
@each_case
def test_what_is_added_to_z(case, given, dtype, channels_last, poisoned):
    g, v, start = inputs(case, dtype, channels_last)
    bias = peaky(1, 1, case.heads * case.n, 1, dtype=dtype).flatten()
    added = {"start": start, "bias_out": peaky(1, 1, case.m, 1, dtype=dtype).flatten()}
    if given != "both":
        added = {given: added[given]}
    z = distribute.distribute_forward(g, v, 1.3, True, 0.7, bias, **added)
    wide = v.double() + bias.double().view(case.heads, case.n, 1)
    expected = reference.distribute(g.double(), wide, logit_scale=0.7, scale=1.3)
    for name, tensor in added.items():
        expected += 1.3 * tensor.double() if name == "start" else tensor.double()[:, None]
    assert z.dtype == dtype
    assert case.n == 1 or z.stride() == start.stride()  # of one map, both are the same memory
    assert relative_rms(z, expected) < TOLERANCE[dtype]


def test_proofs_of_what_is_added_to_z():
    g, v, start = inputs(CASE, torch.bfloat16)
    bias = peaky(1, 1, CASE.m, 1, dtype=torch.bfloat16).flatten()
    with guard.examine(2) as verdicts:
        for added in ({"start": start}, {"bias_out": bias}, {"start": start, "bias_out": bias}):
            distribute.distribute_forward(g, v, 1.0, True, 0.7, None, **added)
    assert len(verdicts) == 3
    assert all(verdict.right for verdict in verdicts), verdicts


def test_largest_m_and_n():
    compare(*inputs(LARGEST, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_case
def test_descriptors_in_float32_beside_lower_precision(case, dtype):
    g, v, upstream = inputs(case, dtype)
    found = compare(g.float() + 1e-4, v, upstream)
    assert found["g"].dtype == torch.float32


def test_scales_are_not_rounded_to_float32():
    compare(*inputs(CASE, torch.float64), logit_scale=1 / 3, scale=1 / 7)


@pytest.mark.parametrize("case", [c for c in CASES if c.n > 1], ids=lambda case: case.name)
def test_output_has_the_memory_format_of_v(case):
    """Except for one channel, where both formats are the same memory."""
    for channels_last in (False, True):
        g, v, upstream = inputs(case, torch.float32, channels_last)
        result = step(core.distribute, (g, v), upstream)
        for x in (result["out"], result["v"]):
            memory = x.permute(0, 3, 1, 2) if channels_last else x
            assert memory.is_contiguous()


def test_slices_need_no_copy():
    """A slice of one projection, over channels, samples and every second position."""
    stacked = peaky(4, 1, 100, 2 * CASE.length, dtype=torch.float32)
    g = peaky(2, 1, 30, 24, dtype=torch.float32)[:, :, 2:-1].mT.contiguous().mT
    compare(g, stacked[1:3, :, 3:27, ::2], peaky(2, 1, 27, CASE.length, dtype=torch.float32))


def upstream_layouts(shape):
    """Channels last, from ``.sum()``, from a mean over positions, a slice of a larger gradient."""
    yield peaky(*shape, dtype=torch.float32, channels_last=True)
    yield torch.ones((), device=DEVICE).expand(shape)
    yield peaky(*shape[:3], 1, dtype=torch.float32).expand(shape)
    larger = peaky(shape[0], shape[1], shape[2] + 3, shape[3] + 5, dtype=torch.float32)
    yield larger[:, :, 2:-1, 3:-2]


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@each_case
def test_upstream_strides(case, channels_last):
    g, v, _ = inputs(case, torch.float32, channels_last)
    for upstream in upstream_layouts((case.batch, case.heads, case.m, case.length)):
        compare(g, v, upstream)


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("needs", [(True, False), (False, True)])
@each_case
def test_partial_gradients(case, needs, softmax, poisoned):
    g, v, upstream = inputs(case, torch.float32)
    whole = step(core.distribute, (g, v), upstream, softmax=softmax)
    g, v = g.requires_grad_(needs[0]), v.requires_grad_(needs[1])
    core.distribute(g, v, softmax=softmax).backward(upstream)
    for name, x, need in zip(("g", "v"), (g, v), needs, strict=True):
        assert (x.grad is not None) == need
        if need:
            assert torch.equal(x.grad, whole[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_case
def test_bitwise_repeatable(case, dtype):
    g, v, upstream = inputs(case, dtype)
    first, second = (step(core.distribute, (g, v), upstream) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("offset", [-300.0, 300.0, 1e4, 1e8])
@each_case
def test_huge_logits(case, offset):
    g, v, upstream = inputs(case, torch.float32)
    v = v + offset
    expected = step(reference.distribute, (g.double(), v.double()), upstream)
    actual = step(core.distribute, (g, v), upstream)
    for name in expected:
        if case.n > 1 or name != "v":  # with n = 1, dV is zero
            assert relative_rms(actual[name], expected[name]) < TOLERANCE[torch.float32], name


@pytest.mark.parametrize("offset", [1e30, 3e38, -3e38])
def test_the_largest_logits(offset):
    g, v, upstream = inputs(CASE, torch.float32)
    v = (v + offset).clamp(-torch.finfo(v.dtype).max, torch.finfo(v.dtype).max)
    compare(g, v, upstream)


def test_infinite_logits_and_nan_stay_at_their_position():
    """−inf is weight 0; +inf, NaN and −inf alone are NaN at that position, as in torch.softmax."""
    g, v, _ = inputs(CASE, torch.float32)
    clean = core.distribute(g, v)
    v[0, 0, 2, 5] = -math.inf
    v[0, 1, 3, 7] = math.inf
    v[1, 0, 4, 9] = math.nan
    v[1, 1, :, 11] = -math.inf
    expected = reference.distribute(g.double(), v.double())
    actual = core.distribute(g, v)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert expected.isnan().sum() == 3 * CASE.m
    untouched = torch.ones_like(actual, dtype=torch.bool)
    for sample, head, position in ((0, 0, 5), (0, 1, 7), (1, 0, 9), (1, 1, 11)):
        untouched[sample, head, :, position] = False
    assert torch.equal(actual[untouched], clean[untouched])


def test_nan_stays_in_its_sample_in_backward():
    g, v, upstream = inputs(CASE, torch.float32)
    clean = step(core.distribute, (g, v), upstream)
    v[1, 0, 4, 9] = math.nan
    spoiled = step(core.distribute, (g, v), upstream)
    for name in clean:
        assert torch.equal(spoiled[name][0], clean[name][0]), name
        assert torch.equal(spoiled[name][1, 1], clean[name][1, 1]), name
        assert spoiled[name][1, 0].isnan().any(), name


@pytest.mark.parametrize(
    "wrong",
    [
        lambda g, v: reference.distribute(g, v, logit_scale=0.5),
        lambda g, v: g @ v.softmax(-1),
        lambda g, v: g @ v.softmax(0),
        lambda g, v: 1.05 * (g @ v.softmax(-2)),
        lambda g, v: g @ v.softmax(-2).detach() + 0 * v.sum(),
    ],
    ids=["half the logit scale", "over positions", "over the batch", "5 % off", "no gradient of Q"],
)
def test_a_wrong_reference_is_rejected(wrong):
    g, v, upstream = inputs(CASE, torch.bfloat16)
    right = step(core.distribute, (g, v), upstream)
    other = step(wrong, (g.double(), v.double()), upstream)
    assert relative_rms(right["v"], other["v"]) > TOLERANCE[torch.bfloat16]


def test_gradients_of_the_kernels_by_finite_differences():
    g = peaky(1, 1, 2, 3, dtype=torch.float64).requires_grad_()
    v = peaky(1, 1, 3, 5, dtype=torch.float64, deviation=1).requires_grad_()
    for softmax in (True, False):

        def function(g, v, softmax=softmax):
            return core.distribute(g, v, softmax=softmax, scale=1.3, logit_scale=0.6)

        assert torch.autograd.gradcheck(function, (g, v))
        assert torch.autograd.gradgradcheck(function, (g, v), fast_mode=True)


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize(
    ("shape", "strides"),
    [((3, 2, 3, 36), (2**30, 192, 64, 1)), ((2, 2, 3, 36), (8, 4, 1, 2**26))],
    ids=["batch", "positions"],
)
def test_offsets_beyond_int32(shape, strides):
    """Strides that put elements past 2^31: offsets are int64 from the program's number on."""
    storage = torch.empty(2**31 + 2**29, dtype=torch.float16, device=DEVICE)
    v = storage.as_strided(shape, strides)
    v.copy_(torch.randn(shape))
    compare(peaky(*shape[:2], 3, 3, dtype=torch.float16), v, v.detach().clone())
