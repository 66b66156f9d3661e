"""The core of the ``torch`` backend against the definition: values, both derivatives."""

import pytest
import torch

from da_triton import reference
from da_triton.ops.aten import core as aten
from support.cases import ONE_TILE, each_case
from support.numerics import DEVICE, DTYPES, check, peaky, relative_rms


def operands(case, dtype, channels_last=False):
    layout = {"dtype": dtype, "channels_last": channels_last}
    return [
        peaky(case.batch, case.heads, c, case.length, **layout).requires_grad_()
        for c in (case.m, case.n, case.n)
    ]


def run(core, maps, gather_options, distribute_options):
    z = core.distribute(core.gather(*maps[:2], **gather_options), maps[2], **distribute_options)
    torch.manual_seed(2)
    grads = torch.autograd.grad(z, maps, torch.randn(z.shape, dtype=torch.float64).to(z))
    return [z.detach(), *grads]


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_case
def test_matches_the_definition(case, dtype, masked, softmax, channels_last):
    maps = operands(case, dtype, channels_last)
    keep = None
    if masked:
        keep = torch.rand(case.batch, case.length, device=DEVICE) > 0.4
        keep[1:] = False
        keep[0, :2] = True
    options = (
        {"keep": keep, "logit_scale": 0.7},
        {"softmax": softmax, "logit_scale": 0.9, "scale": 2},
    )
    wide = [x.detach().double().requires_grad_() for x in maps]
    ours, own = run(aten, maps, *options), run(reference, maps, *options)
    expected = run(reference, wide, *options)
    for name, x, y, z in zip(("Z", "dA", "dB", "dV"), ours, expected, own, strict=True):
        check(x, y, dtype, z, name, slack=2)


@pytest.mark.parametrize("masked", [False, True])
def test_extra_tokens(masked):
    case = ONE_TILE
    a, b, v = operands(case, torch.float32)
    keep = torch.rand(case.batch, case.length, device=DEVICE) > 0.4 if masked else None
    extra = tuple(peaky(2, 2, c, 4, dtype=torch.float32).requires_grad_() for c in (24, 19))
    wide = tuple(x.detach().double().requires_grad_() for x in (a, b, *extra))
    ours = aten.gather(a, b, keep=keep, extra=extra)
    expected = reference.gather(*wide[:2], keep=keep, extra=wide[2:])
    check(ours, expected, torch.float32)
    upstream = torch.randn_like(ours)  # the same for both: errors of the result are not in it
    ours.backward(upstream)
    expected.backward(upstream.double())
    for x, y in zip((a, b, *extra), wide, strict=True):
        check(x.grad, y.grad, torch.float32)
    assert v.grad is None


def test_twice_differentiable():
    a = peaky(1, 1, 2, 5, dtype=torch.float64).requires_grad_()
    b = peaky(1, 1, 2, 5, dtype=torch.float64, deviation=1).requires_grad_()
    keep = torch.tensor([[True] * 4 + [False]], device=DEVICE)

    def function(a, b):
        return aten.distribute(aten.gather(a, b, keep=keep), b, scale=1.3)

    assert torch.autograd.gradcheck(function, (a, b))
    assert torch.autograd.gradgradcheck(function, (a, b))


def test_all_masked_maps_have_zero_gradients():
    a, b, _ = operands(ONE_TILE, torch.float32)
    keep = torch.zeros(ONE_TILE.batch, ONE_TILE.length, dtype=torch.bool, device=DEVICE)
    g = aten.gather(a, b, keep=keep)
    g.sum().backward()
    assert not g.any()
    assert not a.grad.any()
    assert not b.grad.any()


def test_a_wrong_reference_is_rejected():
    a, b, v = operands(ONE_TILE, torch.float32)
    right = aten.distribute(aten.gather(a, b), v)
    wrong = a @ b.softmax(-1).mT @ v.softmax(-1)
    with pytest.raises(AssertionError):
        check(right, wrong, torch.float32)
    assert relative_rms(right, wrong) > 0.1
