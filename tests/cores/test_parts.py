"""The gather of some of the positions: G and log-sum-exp, and the gradients of both."""

import pytest
import torch

from da_triton import cores, eager
from support.numerics import DEVICE, check, peaky

OPTIONS = {
    "plain": {},
    "masked": {"mask": True, "logit_scale": 0.7},
    "tokens": {"mask": True, "tokens": True, "logit_scale": 0.7},
}
each_backend = pytest.mark.parametrize("backend", ["torch", "triton"])
each_kind = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
HEADS, M, N, LENGTH = 2, 5, 3, 40


def problem(dtype=torch.float64, *, mask=False, tokens=False, logit_scale=1.0):
    """Leaves, and what else the gather takes; in sample 1 no position is left without tokens."""
    leaves = [peaky(3, HEADS, c, LENGTH, dtype=dtype) for c in (M, N)]
    if tokens:
        leaves += [peaky(3, HEADS, c, 4, dtype=dtype) for c in (M, N)]
    keep = None
    if mask:
        keep = torch.rand(3, LENGTH, device=DEVICE) > 0.4
        keep[1] = False
    return [x.requires_grad_() for x in leaves], {"keep": keep, "logit_scale": logit_scale}


def definition(a, b, *extra, keep, logit_scale):
    """In float64; lse is +inf where a map has no position."""
    a, b, *extra = (x.double() for x in (a, b, *extra))
    g = eager.gather(a, b, keep=keep, extra=extra or None, logit_scale=logit_scale)
    if extra:
        a, b, keep = eager.join_extra(a, b, keep, extra)
    logits = logit_scale * b
    if keep is None:
        return g, logits.logsumexp(-1)
    left = keep.any(-1)[:, None, None]
    kept = keep[:, None, None] | ~left[..., None]  # no logsumexp of nothing: its gradient is NaN
    lse = logits.masked_fill(~kept, -torch.inf).logsumexp(-1)
    return g, lse.masked_fill(~left, torch.inf)


def part(backend):
    core = cores.select(backend, torch.empty(0, device=DEVICE))

    def gather_part(a, b, *extra, **options):
        return core.gather_part(a, b, extra=extra or None, **options)

    return gather_part


def loss(g, lse):
    weights = torch.linspace(-1, 2, lse.numel(), dtype=lse.dtype, device=DEVICE).view(lse.shape)
    return g.double().sin().sum() + (weights * lse.masked_fill(lse == torch.inf, 0)).sum()


@each_kind
@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_g_and_lse_and_their_gradients(backend, options, dtype):
    leaves, given = problem(dtype, **options)
    found, expected = part(backend)(*leaves, **given), definition(*leaves, **given)
    assert found[0].dtype == torch.promote_types(dtype, torch.float32)
    check(found[0], expected[0], dtype)
    assert torch.equal(found[1] == torch.inf, expected[1] == torch.inf)
    finite = expected[1] != torch.inf
    check(found[1][finite], expected[1][finite], dtype)
    grads = torch.autograd.grad(loss(*found), leaves)
    for x, y in zip(grads, torch.autograd.grad(loss(*expected), leaves), strict=True):
        check(x, y, dtype)


@each_backend
def test_each_of_the_two_alone_has_a_gradient(backend):
    leaves, given = problem(mask=True)
    pairs = part(backend)(*leaves, **given), definition(*leaves, **given)
    for only in (lambda g, lse: loss(g, lse.detach()), lambda g, lse: loss(g.detach(), lse)):
        found, expected = (
            torch.autograd.grad(only(*pair), leaves[1], retain_graph=True)[0] for pair in pairs
        )
        check(found, expected, torch.float64)


@each_kind
@each_backend
def test_second_derivatives(backend, options):
    leaves, given = problem(**options)

    def penalty(gather):
        first = torch.autograd.grad(loss(*gather(*leaves, **given)), leaves, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), leaves)

    for x, y in zip(penalty(part(backend)), penalty(definition), strict=True):
        check(x, y, torch.float64)


def test_a_gradient_without_that_of_lse_is_rejected():
    leaves, given = problem()
    g, lse = definition(*leaves, **given)
    _, right = torch.autograd.grad(loss(g, lse), leaves, retain_graph=True)
    _, wrong = torch.autograd.grad(loss(g, lse.detach()), leaves)
    with pytest.raises(AssertionError):
        check(wrong, right, torch.float64)
