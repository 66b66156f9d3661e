"""The core of the ``torch`` backend against the definition: values, both derivatives."""

import pytest
import torch

from da_triton import reference
from da_triton.ops.aten import core as aten
from support.cases import LARGEST_G_TILE, each_case
from support.compare import check_against_reference
from support.numerics import DEVICE, DTYPES, check, peaky, relative_rms


def operands(case, dtype, channels_last=False):
    layout = {"dtype": dtype, "channels_last": channels_last}
    return [
        peaky(case.batch, case.heads, c, case.length, **layout).requires_grad_()
        for c in (case.m, case.n, case.n)
    ]


def core_of(backend, gather_options, distribute_options):
    def function(a, b, v):
        g = backend.gather(a, b, **gather_options)
        return backend.distribute(g, v, **distribute_options)

    return function


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_case
def test_matches_the_definition(case, dtype, masked, softmax, channels_last):
    activations = operands(case, dtype, channels_last)
    mask = None
    if masked:
        mask = torch.rand(case.batch, case.length, device=DEVICE) > 0.4
        mask[1:] = False
        mask[0, :2] = True
    options = (
        {"mask": mask, "logit_scale": 0.7},
        {"softmax": softmax, "logit_scale": 0.9, "scale": 2},
    )
    ours, definition = (core_of(backend, *options) for backend in (aten, reference))
    check_against_reference(ours, definition, activations, slack=2)


@pytest.mark.parametrize("masked", [False, True])
def test_extra_tokens(masked):
    case = LARGEST_G_TILE
    a, b, _ = operands(case, torch.float32)
    mask = torch.rand(case.batch, case.length, device=DEVICE) > 0.4 if masked else None
    extra = (peaky(2, 2, c, 4, dtype=torch.float32) for c in (24, 19))

    def gather_of(backend):
        def function(a, b, extra_a, extra_b):
            return backend.gather(a, b, mask=mask, extra=(extra_a, extra_b))

        return function

    check_against_reference(gather_of(aten), gather_of(reference), (a, b, *extra))


def test_twice_differentiable():
    a = peaky(1, 1, 2, 5, dtype=torch.float64).requires_grad_()
    b = peaky(1, 1, 2, 5, dtype=torch.float64, deviation=1).requires_grad_()
    mask = torch.tensor([[True] * 4 + [False]], device=DEVICE)

    def function(a, b):
        return aten.distribute(aten.gather(a, b, mask=mask), b, scale=1.3)

    assert torch.autograd.gradcheck(function, (a, b))
    assert torch.autograd.gradgradcheck(function, (a, b))


def test_fully_masked_attention_maps_have_zero_gradients():
    a, b, _ = operands(LARGEST_G_TILE, torch.float32)
    mask = torch.zeros(LARGEST_G_TILE.batch, LARGEST_G_TILE.length, dtype=torch.bool, device=DEVICE)
    g = aten.gather(a, b, mask=mask)
    g.sum().backward()
    assert not g.any()
    assert not a.grad.any()
    assert not b.grad.any()


def test_a_wrong_reference_is_rejected():
    a, b, v = operands(LARGEST_G_TILE, torch.float32)
    right = aten.distribute(aten.gather(a, b), v)
    wrong = a @ b.softmax(-1).mT @ v.softmax(-1)
    with pytest.raises(AssertionError):
        check(right, wrong, torch.float32)
    assert relative_rms(right, wrong) > 0.1
