"""Backends' gather of some positions: G and the sum of exponentials, and gradients of both."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from da_triton import ops, reference
from support.numerics import DEVICE, check, peaky

OPTIONS = {
    "plain": {},
    "masked": {"masked": True, "logit_scale": 0.7},
    "tokens": {"masked": True, "tokens": True, "logit_scale": 0.7},
}
each_backend = pytest.mark.parametrize("backend", ["torch", "triton", "eager"])
each_kind = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
HEADS, M, N, LENGTH = 2, 5, 3, 40


def problem(dtype=torch.float64, *, masked=False, tokens=False, logit_scale=1.0):
    """Leaves, and the gather's other arguments; in sample 1 all positions are masked."""
    leaves = [peaky(3, HEADS, c, LENGTH, dtype=dtype) for c in (M, N)]
    if tokens:
        leaves += [peaky(3, HEADS, c, 4, dtype=dtype) for c in (M, N)]
    mask = None
    if masked:
        mask = torch.rand(3, LENGTH, device=DEVICE) > 0.4
        mask[1] = False
    return [x.requires_grad_() for x in leaves], {"mask": mask, "logit_scale": logit_scale}


def definition(a, b, *extra, mask, logit_scale):
    """In float64; lse is +inf where an attention map has no position."""
    a, b, *extra = (x.double() for x in (a, b, *extra))
    g = reference.gather(a, b, mask=mask, extra=extra or None, logit_scale=logit_scale)
    if extra:
        a, b, mask = reference.join_extra(a, b, mask, extra)
    logits = logit_scale * b
    if mask is None:
        return g, logits.logsumexp(-1)
    left = mask.any(-1)[:, None, None]
    unmasked = mask[:, None, None] | ~left[..., None]  # all-masked logsumexp: NaN gradient
    lse = logits.masked_fill(~unmasked, -torch.inf).logsumexp(-1)
    return g, lse.masked_fill(~left, torch.inf)


def part(backend):
    """G, and lse from the pivot and the sum."""
    backend = ops.select(backend, torch.empty(0, device=DEVICE))

    def gather_partial(a, b, *extra, **options):
        g, pivot, total = backend.gather_partial(a, b, extra=extra or None, **options)
        assert {g.dtype, pivot.dtype, total.dtype} == {torch.promote_types(a.dtype, torch.float32)}
        nothing = total == 0
        assert torch.equal(pivot == -torch.inf, nothing)
        lse = pivot.double() + total.double().masked_fill(nothing, 1).log()
        return g, lse.masked_fill(nothing, torch.inf)

    return gather_partial


class Operations(TorchDispatchMode):
    """Names of all operations, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.name() != "aten::detach":
            self.names.append(op.name())
        return op(*args, **(kwargs or {}))


def loss(g, lse):
    weights = torch.linspace(-1, 2, lse.numel(), dtype=lse.dtype, device=DEVICE).view(lse.shape)
    return g.double().sin().sum() + (weights * lse.masked_fill(lse == torch.inf, 0)).sum()


@each_kind
@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_g_and_lse_and_their_gradients(backend, options, dtype):
    leaves, given = problem(dtype, **options)
    found, expected = part(backend)(*leaves, **given), definition(*leaves, **given)
    slack = 2 if backend == "eager" else 1  # the definition rounds P to the input dtype
    check(found[0], expected[0], dtype, slack=slack)
    assert torch.equal(found[1] == torch.inf, expected[1] == torch.inf)
    finite = expected[1] != torch.inf
    check(found[1][finite], expected[1][finite], dtype)
    grads = torch.autograd.grad(loss(*found), leaves)
    for x, y in zip(grads, torch.autograd.grad(loss(*expected), leaves), strict=True):
        check(x, y, dtype, slack=slack)


@each_kind
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_lse(backend, options):
    leaves, given = problem(**options)
    a, b, *extra = (x.detach() for x in leaves)
    with Operations() as seen:
        g, lse = ops.select(backend, a).gather_lse(a, b, extra=extra or None, **given)
    if backend == "triton":  # as from the kernels
        assert seen.names == ["da_triton::gather"]
    expected = definition(*leaves, **given)
    check(g, expected[0], torch.float64)
    finite = expected[1] != torch.inf
    assert torch.equal(lse != torch.inf, finite)
    check(lse[finite], expected[1][finite], torch.float64)


@each_backend
def test_each_of_the_two_alone_has_a_gradient(backend):
    leaves, given = problem(masked=True)
    pairs = part(backend)(*leaves, **given), definition(*leaves, **given)
    for only in (lambda g, lse: loss(g, lse.detach()), lambda g, lse: loss(g.detach(), lse)):
        found, expected = (
            torch.autograd.grad(only(*pair), leaves[1], retain_graph=True)[0] for pair in pairs
        )
        check(found, expected, torch.float64)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradients_of_some_positions_from_the_g_and_lse_of_all(backend):
    """A slice needs no other slice."""
    leaves, given = problem(masked=True, logit_scale=0.7)
    g, lse = definition(*leaves, **given)
    dg, dlse = torch.randn_like(g), torch.randn_like(lse)
    expected = torch.autograd.grad((g, lse), leaves, (dg, dlse.masked_fill(lse == torch.inf, 0)))
    backend = ops.select(backend, g)
    for cut in (slice(0, 11), slice(11, LENGTH)):
        a, b = (x.detach()[..., cut] for x in leaves)
        mask, scale = given["mask"][:, cut], given["logit_scale"]
        found = backend.gather_backward(
            dg, a, b, mask, g.detach(), lse.detach(), dlse, scale, True, True
        )
        for ours, truth in zip(found, expected, strict=True):
            check(ours, truth[..., cut], torch.float64)


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
