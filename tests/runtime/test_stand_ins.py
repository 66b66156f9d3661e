"""The operations that take the place of wrong kernels: all at once, and each among kernels."""

import inspect

import pytest
import torch

from da_triton.ops.aten import core as aten
from da_triton.ops.triton import core
from da_triton.runtime import guard, stand_ins
from support.block import CASES, NAMES, ROUTES, definition, inputs, run
from support.launches import count
from support.numerics import DEVICE, TOLERANCE, check, relative_rms

DTYPE = torch.float16


def test_every_stand_in_has_its_launcher():
    functions = inspect.getmembers(stand_ins, inspect.isfunction)
    own = {n for n, f in functions if f.__module__ == stand_ins.__name__ and n[0] != "_"}
    assert own - {"merged"} == set(guard.LAUNCHERS)
    for name, spec in guard.LAUNCHERS.items():
        ours = list(inspect.signature(getattr(stand_ins, name)).parameters)
        assert ours == list(spec.signature.parameters), name


@pytest.mark.parametrize(("case", "channels_last"), [("odd", True), ("wide", False)])
@pytest.mark.parametrize("route", [r for r in ROUTES if "batch_chunks" not in r])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_block_of_stand_ins(dtype, route, case, channels_last, monkeypatch):
    """Where every kernel is wrong: correct results, and no kernel that multiplies runs."""
    monkeypatch.setattr(guard, "watched", lambda: True)
    monkeypatch.setattr(guard, "_use", lambda spec, args, kwargs: False)
    given = inputs(CASES[case], dtype, channels_last)
    expected = definition(CASES[case], *given, torch.float64)
    own = definition(CASES[case], *given, dtype)
    with count() as names:
        run(ROUTES[route], CASES[case], *given)
    kernels = {name for name in names if name.endswith("_kernel")}
    assert kernels <= {"operands_kernel", "delta_kernel", "sums_kernel"}
    found = run(ROUTES[route], CASES[case], *given)
    for name, ours, truth, theirs in zip(NAMES, found, expected, own, strict=True):
        assert ours.isfinite().all(), name
        if name in ("v", "bias_v"):  # terms cancel: eager's own error may exceed the tolerance
            slack = max(2, relative_rms(theirs, truth) / TOLERANCE[dtype])
        else:
            slack = 2
        check(ours, truth, dtype, None, name, slack)


@pytest.mark.parametrize("name", sorted(guard.LAUNCHERS))
def test_one_stand_in_among_kernels(name, monkeypatch):
    """Each takes the outputs of kernels before it, and kernels after it take its outputs."""
    monkeypatch.setattr(guard, "watched", lambda: True)
    monkeypatch.setattr(guard, "_use", lambda spec, args, kwargs: spec.name != name)
    given = inputs(CASES["odd"], torch.float32, True)
    expected = definition(CASES["odd"], *given, torch.float64)
    for route in ("fused_xh", "fused_gather_a_h", "unfused_XZ"):
        found = run(ROUTES[route], CASES["odd"], *given)
        for what, ours, truth in zip(NAMES, found, expected, strict=True):
            check(ours, truth, torch.float32, None, f"{route} {what}", 2)


def test_stand_ins_sum_in_float32():
    """Sums that overflow float16: many positions, large gradients."""
    a, b = torch.full((1, 1, 4, 2**17), 1.2), torch.zeros(1, 1, 3, 2**17)
    g, lse = stand_ins.gather_forward([(a.half(), b.half(), None)], 1.0)
    assert relative_rms(g, torch.full_like(g, 1.2)) < TOLERANCE[DTYPE]
    few = a[..., :8].half(), b[..., :8].half()
    dg, da = torch.full((1, 1, 4, 3), 500.0).half(), torch.empty(1, 1, 4, 8).half()
    lse = torch.full_like(lse, 8.0).log()
    stand_ins.gather_backward(dg, torch.zeros(1, 1, 3), *few, None, lse, da, None, 1.0)
    assert relative_rms(da, torch.full_like(da, 3 * 500 / 8)) < TOLERANCE[DTYPE]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", [(20, 150), (130, 130)])
def test_a_core_of_stand_ins(sizes, masked, monkeypatch):
    """Tokens, masks, and more of both than one program holds."""
    generator = torch.Generator().manual_seed(5)
    m, n = sizes
    a, b, v = (torch.randn(2, 1, c, 50, generator=generator).double() for c in (m, n, n))
    extra = tuple(torch.randn(2, 1, c, 3, generator=generator).double() for c in (m, n))
    mask = torch.rand(2, 50, generator=generator) > 0.5 if masked else None

    def results(backend):
        leaves = [t.detach().to(DEVICE).requires_grad_() for t in (a, b, *extra, v)]
        here = None if mask is None else mask.to(DEVICE)
        g = backend.gather(*leaves[:2], mask=here, extra=leaves[2:4], logit_scale=0.7)
        z = backend.distribute(g, leaves[4], scale=1.1, logit_scale=0.9)
        return [z, *torch.autograd.grad(z.square().sum(), leaves)]

    monkeypatch.setattr(guard, "watched", lambda: True)
    monkeypatch.setattr(guard, "_use", lambda spec, args, kwargs: False)
    for ours, truth in zip(results(core), results(aten), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)
