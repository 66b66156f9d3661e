"""What a warm call costs the host, in numbers that do not vary: operations and Python functions."""

import sys

import torch

from da_triton import DoubleAttention
from da_triton.kernels import block as kernels
from support.numerics import DEVICE


def make(backend):
    return DoubleAttention(16, 8, residual=True, backend=backend)


def maps(*shape):
    return torch.randn(shape)


def python_calls(function):
    """How many Python functions of the package run in a call."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        count += event == "call" and frame.f_globals["__name__"].startswith("da_triton")

    function()
    function()
    sys.setprofile(trace)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def operations(function):
    """How many operations the dispatcher sees, views and those that others call left out."""
    function()
    with torch.profiler.profile() as profile:
        function()
    names = ("mm", "addmm", "bmm", "softmax", "sum", "add_", "_softmax_backward_data", "zeros_like")
    return sum(event.name.removeprefix("aten::") in names for event in profile.events())


def test_a_small_forward_pass_on_a_cpu_takes_eight_operations():
    """Six products and two softmaxes: the sum with x is part of the last product."""
    layer, x = make("torch"), maps(1, 16, 8, 8)
    with torch.no_grad():
        assert operations(lambda: layer(x)) == 8
        assert python_calls(lambda: layer(x)) <= 37


def test_a_small_step_on_a_cpu():
    layer, x = make("torch"), maps(1, 16, 8, 8).requires_grad_()
    given = [x, *layer.parameters()]
    upstream = torch.ones_like(x)
    assert operations(lambda: torch.autograd.grad(layer(x), given, upstream)) == 26
    assert python_calls(lambda: torch.autograd.grad(layer(x), given, upstream)) <= 64


def test_a_call_of_kernels_takes_few_python_functions(monkeypatch):
    """From the module to the launchers, whose own are counted in ``kernels/test_prepared``."""
    layer, x = make("triton").to(DEVICE), maps(1, 16, 8, 8).to(DEVICE)
    with torch.no_grad():
        layer(x)
        out = torch.empty(1, 16, 64, device=DEVICE)
        monkeypatch.setattr(kernels, "forward", lambda *_: (out, out, out, None))
        assert python_calls(lambda: layer(x)) <= 27
