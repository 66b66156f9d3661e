"""Host cost of a layer's warm call: exact counts of operations and Python functions."""

import sys
from pathlib import Path

import torch

from da_triton import DoubleAttention, kernels
from da_triton.ops.triton import block as triton_block
from da_triton.planning.costs import XH
from da_triton.planning.planner import Route
from support import repeatable
from support.numerics import DEVICE

KERNELS = str(Path(kernels.__file__).parent)  # which may be interpreted, in Python


def make(backend):
    return DoubleAttention(16, 8, residual=True, backend=backend)


def activations(*shape):
    return torch.randn(shape)


def python_calls(function):
    """The number of Python functions of the package that run in a call."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        name, path = frame.f_globals["__name__"], frame.f_code.co_filename
        ours = name.startswith("da_triton") and not path.startswith(KERNELS)
        count += event == "call" and ours

    function()
    function()
    sys.setprofile(trace)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def operations(function):
    """The number of operations that the dispatcher sees, except views and nested ones."""
    function()
    with torch.profiler.profile() as profile:
        function()
    names = ("mm", "addmm", "bmm", "softmax", "sum", "add_", "_softmax_backward_data", "zeros_like")
    return sum(event.name.removeprefix("aten::") in names for event in profile.events())


def test_a_small_forward_pass_on_a_cpu_takes_eight_operations():
    """Six products and two softmaxes: the sum with x is part of the last product."""
    layer, x = make("torch"), activations(1, 16, 8, 8)
    with torch.no_grad():
        assert operations(lambda: layer(x)) == 8
        assert python_calls(lambda: layer(x)) <= 37


def test_a_small_step_on_a_cpu():
    layer, x = make("torch"), activations(1, 16, 8, 8).requires_grad_()
    given = [x, *layer.parameters()]
    upstream = torch.ones_like(x)
    assert operations(lambda: torch.autograd.grad(layer(x), given, upstream)) == 26
    assert python_calls(lambda: torch.autograd.grad(layer(x), given, upstream)) <= 64


def test_a_call_of_kernels_takes_few_python_functions(monkeypatch):
    """From the module to launches: three without gradients, ten in a step."""
    fused = Route(XH, "fused", "fused", "fused", XH, 64)
    monkeypatch.setattr(triton_block, "_route", lambda *_: fused)
    layer, x = make("triton").to(DEVICE), activations(1, 16, 8, 8).to(DEVICE).requires_grad_()
    given = [x, *layer.parameters()]
    upstream = torch.ones_like(x)

    def step():
        torch.autograd.grad(layer(x), given, upstream)

    with repeatable.kernels():
        with torch.no_grad():
            assert python_calls(lambda: layer(x)) <= 44
        assert python_calls(step) <= 91
