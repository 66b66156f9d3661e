"""The core's operators at PyTorch's boundary: opcheck, fakes, FLOP, saved tensors, errors."""

import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from da_triton import ops, reference
from da_triton.ops.triton import core
from da_triton.runtime import launch
from support.cases import CASES, LARGEST_G_TILE, each_case
from support.compare import check_against_reference
from support.numerics import DEVICE, check, peaky

LAYOUTS = [False, True]


def operands(case, dtype=torch.float32, channels_last=False):
    layout = {"dtype": dtype, "channels_last": channels_last}
    a = peaky(case.batch, case.heads, case.m, case.length, **layout)
    b = peaky(case.batch, case.heads, case.n, case.length, **layout)
    v = peaky(case.batch, case.heads, case.n, case.length, **layout)
    return a, b, v


@pytest.mark.parametrize("channels_last", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck_gather(masked, channels_last):
    a, b, _ = operands(LARGEST_G_TILE, channels_last=channels_last)
    mask = (
        torch.rand(LARGEST_G_TILE.batch, LARGEST_G_TILE.length, device=DEVICE) > 0.5
        if masked
        else None
    )
    extra = [peaky(2, 2, c, 4, dtype=a.dtype) for c in (24, 19)] if masked else [None, None]
    for need in (False, True):
        args = (a.requires_grad_(need), b.requires_grad_(need), mask, *extra, 0.7)
        torch.library.opcheck(core.gather_op, args)
    g, lse = (x.detach() for x in core.gather_op(*args))
    dg = peaky(*g.shape[:2], g.shape[3], g.shape[2], dtype=g.dtype).mT
    for needs in ((True, True), (True, False), (False, True)):
        for dlse in (None, torch.ones_like(lse)):
            args = (dg, a.detach(), b.detach(), mask, g, lse, dlse, 0.7, *needs)
            torch.library.opcheck(core.gather_backward_op, args)


@pytest.mark.parametrize("channels_last", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("softmax", [False, True])
def test_opcheck_distribute(softmax, channels_last):
    _, _, v = operands(LARGEST_G_TILE, channels_last=channels_last)
    g = peaky(
        LARGEST_G_TILE.batch,
        LARGEST_G_TILE.heads,
        LARGEST_G_TILE.m,
        LARGEST_G_TILE.n,
        dtype=v.dtype,
    )
    for need in (False, True):
        args = (g.requires_grad_(need), v.requires_grad_(need), 1.3, softmax, 0.7)
        torch.library.opcheck(core.distribute_op, args)
    dz = torch.ones((), device=DEVICE).expand(
        2, LARGEST_G_TILE.heads, LARGEST_G_TILE.m, LARGEST_G_TILE.length
    )
    for needs in ((True, True), (True, False), (False, True)):
        args = (dz, g.detach(), v.detach(), 1.3, softmax, 0.7, *needs)
        torch.library.opcheck(core.distribute_backward_op, args)


@pytest.mark.parametrize("channels_last", LAYOUTS, ids=["nchw", "nhwc"])
@each_case
def test_fakes_have_the_true_strides(case, channels_last):
    """Checked here, because opcheck of torch 2.11 does not look at strides."""
    a, b, v = operands(case, torch.bfloat16, channels_last)
    g, lse = core.gather_op(a, b, None, None, None, 1.0)
    z = core.distribute_op(g, v, 1.0, True, 1.0)
    dg, dv = core.distribute_backward_op(z, g, v, 1.0, True, 1.0, True, True)
    da, db = core.gather_backward_op(dg, a, b, None, g, lse, None, 1.0, True, True)
    real = (g, lse, z, dg, dv, da, db)

    mode = torch._subclasses.FakeTensorMode()
    with mode:
        a, b, v = (mode.from_tensor(x) for x in (a, b, v))
        g, lse = core.gather_op(a, b, None, None, None, 1.0)
        z = core.distribute_op(g, v, 1.0, True, 1.0)
        dg, dv = core.distribute_backward_op(z, g, v, 1.0, True, 1.0, True, True)
        da, db = core.gather_backward_op(dg, a, b, None, g, lse, None, 1.0, True, True)
    for x, fake in zip(real, (g, lse, z, dg, dv, da, db), strict=True):
        assert (x.shape, x.stride(), x.dtype) == (fake.shape, fake.stride(), fake.dtype)


def test_empty_batch():
    a, b, v = (x[:0].requires_grad_() for x in operands(LARGEST_G_TILE))
    g = core.gather(a, b)
    z = core.distribute(g, v)
    z.sum().backward()
    assert z.shape == (0, LARGEST_G_TILE.heads, LARGEST_G_TILE.m, LARGEST_G_TILE.length)
    assert all(x.grad.shape == x.shape for x in (a, b, v))


def test_the_gradient_of_a_sum_over_an_empty_batch_is_zero():
    g = peaky(1, 1, 3, 2, dtype=torch.float32)[:0].requires_grad_()
    v = peaky(1, 1, 2, 5, dtype=torch.float32)[:0]
    core.distribute(g, v).sum().backward()
    assert g.grad.shape == g.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_autograd_saves(dtype):
    """a, b, v and the descriptors; nothing of the size of an attention map."""
    a, b, v = (x.requires_grad_() for x in operands(LARGEST_G_TILE, dtype))
    saved = []

    def pack(x):
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        core.distribute(core.gather(a, b), v)
    inputs = {x.data_ptr() for x in (a, b, v)}
    small = {x.data_ptr(): x for x in saved if x.data_ptr() not in inputs}
    case = LARGEST_G_TILE
    descriptors = case.batch * case.heads * case.m * case.n
    assert sorted(x.numel() for x in small.values()) == [descriptors // case.m, descriptors]
    assert next(x.dtype for x in small.values() if x.numel() == descriptors) == torch.float32


def test_flop_formulas():
    case = LARGEST_G_TILE
    a, b, v = (x.requires_grad_() for x in operands(case))
    product = 2 * case.batch * case.heads * case.m * case.n * case.length
    with FlopCounterMode(display=False) as forward:
        z = core.distribute(core.gather(a, b), v)
    with FlopCounterMode(display=False) as backward:
        z.sum().backward()
    assert forward.get_total_flops() == 2 * product
    assert backward.get_total_flops() == 4 * product
    extra = [peaky(2, 2, c, 10, dtype=a.dtype) for c in (case.m, case.n)]
    with FlopCounterMode(display=False) as with_extra:
        core.gather(a, b, extra=tuple(extra))
    assert with_extra.get_total_flops() == product // case.length * (case.length + 10)


def test_torch_func_gradients():
    """Second derivatives of single functions and through the whole core."""
    a, b, v = operands(LARGEST_G_TILE)

    def loss(core, a, b, v):
        return core.distribute(core.gather(a, b), v).square().mean()

    ours = torch.func.grad(loss, argnums=(1, 2, 3))(core, a, b, v)
    wide = (x.double() for x in (a, b, v))
    theirs = torch.func.grad(loss, argnums=(1, 2, 3))(reference, *wide)
    for x, y in zip(ours, theirs, strict=True):
        check(x, y, torch.float32)


@pytest.mark.parametrize("masked", [False, True])
def test_second_derivatives(masked):
    """A gradient penalty through the ``torch`` backend, against the definition."""
    case = LARGEST_G_TILE
    mask = torch.rand(case.batch, case.length, device=DEVICE) > 0.3 if masked else None

    def penalty(implementation, a, b, v):
        z = implementation.distribute(implementation.gather(a, b, mask=mask), v)
        first = torch.autograd.grad(z.square().sum(), (a, b, v), create_graph=True)
        return sum(x.square().sum() for x in first)

    ours, theirs = (functools.partial(penalty, module) for module in (core, reference))
    check_against_reference(ours, theirs, operands(case))


def test_gradients_of_inputs_that_depend_on_each_other():
    """With and without a graph of the gradient: each path counts once."""
    x = peaky(1, 1, 4, 9, dtype=torch.float64)

    def both(implementation, x):
        return implementation.gather(x, x).square().sum()

    def chain(implementation, x):
        g = implementation.gather(x, x)
        return implementation.distribute(g, 2 * g.mT.contiguous()).square().sum()

    for function in (both, chain):
        leaf = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(function(reference, leaf), leaf)
        for graph in (False, True):
            (actual,) = torch.autograd.grad(function(core, leaf), leaf, create_graph=graph)
            check(actual, expected, x.dtype)
        check(torch.func.grad(lambda x, f=function: f(core, x))(x), expected, x.dtype)


def test_the_backward_operators_cannot_be_differentiated():
    _, _, v = operands(LARGEST_G_TILE)
    g = peaky(
        LARGEST_G_TILE.batch,
        LARGEST_G_TILE.heads,
        LARGEST_G_TILE.m,
        LARGEST_G_TILE.n,
        dtype=v.dtype,
    )
    dz = core.distribute_op(g, v, 1.0, True, 1.0).requires_grad_()
    dg, _ = core.distribute_backward_op(dz, g, v, 1.0, True, 1.0, True, True)
    with pytest.raises(RuntimeError, match="autograd"):
        dg.sum().backward()


def test_lse_is_not_differentiable():
    a, b, _ = (x.requires_grad_() for x in operands(LARGEST_G_TILE))
    _, lse = core.gather_op(a, b, None, None, None, 1.0)
    assert not lse.requires_grad


def test_inputs_changed_in_place_are_caught():
    a, b, _ = operands(LARGEST_G_TILE)
    b = b.requires_grad_() + 1
    g = core.gather(a, b)
    with torch.no_grad():
        b.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        g.sum().backward()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one():
    a, b, v = (x.to("cuda:1") for x in operands(LARGEST_G_TILE))
    z = core.distribute(core.gather(a, b), v)
    assert z.device == a.device
    check(z, reference.distribute(reference.gather(a.double(), b.double()), v.double()), a.dtype)


def test_obstacles_to_the_kernels(monkeypatch):
    x = torch.zeros(1, 1, 2, 3)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match=r"'cpu'.*need a GPU.*TRITON_INTERPRET=1"):
        ops.select("triton", x)
    assert ops.select("auto", x) is ops.TORCH
    monkeypatch.setattr(launch, "INTERPRETED", True)
    assert ops.select("triton", x).gather is core.gather
    assert ops.select("auto", x) is ops.TORCH, "auto takes kernels on a GPU only"
    monkeypatch.setattr(core, "interpreter_has_bfloat16", False)
    with pytest.raises(RuntimeError, match="not compute bfloat16 correctly"):
        ops.select("triton", x.bfloat16())
    with pytest.raises(RuntimeError, match=r"no torch\.int32"):
        ops.select("triton", x.int())
    monkeypatch.setattr(ops, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="not installed"):
        ops.select("triton", x)
    assert ops.select("auto", x) is ops.TORCH


@pytest.mark.parametrize(
    ("capability", "obstacle"),
    [((7, 5), "8.0"), ((8, 0), None)],
)
def test_which_gpus_can_run_the_kernels(monkeypatch, capability, obstacle):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = core._gpu_obstacle(torch.device("cuda", 0))
    assert found is None if obstacle is None else obstacle in found


def test_cases_reach_both_kinds_of_kernel():
    from da_triton.runtime import tiles

    x = torch.empty(1, dtype=torch.bfloat16)
    assert {tiles.g_fits_one_tile(x, c.m, c.n) for c in CASES} == {True, False}
