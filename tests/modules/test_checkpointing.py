"""``torch.utils.checkpoint`` runs a call twice and compares the saved tensors: observers of
only one of the two runs must not change them."""

import contextlib

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from da_triton import DoubleAttention, double_attention_block
from da_triton.integrations import ResidualDoubleAttention
from support.cases import BACKENDS


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def global_hook(block):
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    yield
    handle.remove()


@contextlib.contextmanager
def child_hook(block):
    handles = [child.register_forward_hook(lambda *_: None) for child in block.children()]
    yield
    for handle in handles:
        handle.remove()


WATCHERS = {
    "flop counter": lambda block: FlopCounterMode(display=False),
    "dispatch mode": lambda block: Watching(),
    "global hook": global_hook,
    "child hook": child_hook,
}
each_watcher = pytest.mark.parametrize("watch", WATCHERS.values(), ids=WATCHERS.keys())


def function(backend):
    layer = DoubleAttention(6, 4, 4, backend=backend)

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(layer.children())

        def forward(self, x):
            weights = [p for conv in self.convs for p in (conv.weight, conv.bias)]
            return double_attention_block(x, *weights, backend=backend)

    return Functional()


MAKE = {
    "layer": lambda backend: DoubleAttention(6, 4, 4, backend=backend),
    "function": function,
    "residual": lambda backend: ResidualDoubleAttention(
        6, 4, 4, zero_init=False, backend=backend
    ).eval(),
}


def gradients(block, x, run, forward, backward):
    x = x.clone().requires_grad_()
    block.zero_grad()
    with forward:
        y = run(block, x)
    with backward:
        y.square().sum().backward()
    return [x.grad, *(p.grad for p in block.parameters())]


@each_watcher
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE.keys())
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_watcher_of_one_run_changes_no_gradient(watch, backend, make, reentrant):
    torch.manual_seed(0)
    block, x = make(backend), torch.randn(2, 6, 3, 4)
    nothing = contextlib.nullcontext

    def run(block, x):
        return checkpoint(block, x, use_reentrant=reentrant)

    plain = gradients(block, x, lambda block, x: block(x), nothing(), nothing())
    cases = [(nothing(), nothing()), (watch(block), nothing()), (nothing(), watch(block))]
    for forward, backward in cases:
        found = gradients(block, x, run, forward, backward)
        torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("shape", [(2, 6, 7), (2, 6, 3, 4), (2, 6, 2, 3, 4)])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_bias_b_has_a_gradient_of_zero(backend, shape):
    block, x = DoubleAttention(6, 4, 4, backend=backend), torch.randn(shape)
    checkpoint(block, x, use_reentrant=False).square().sum().backward()
    assert block.convB.bias.grad.equal(torch.zeros(4))


def test_hooks_on_saved_tensors_may_be_methods():
    block, x = DoubleAttention(6, 4, 4, backend="torch"), torch.randn(2, 6, 3, 4)
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.double, torch.Tensor.float):
        y = block(x)
    y.sum().backward()
    assert block.convA.weight.grad.isfinite().all()


@pytest.mark.parametrize(("name", "value"), [("order", "ZA"), ("recompute", "maybe")])
def test_options_are_checked_inside_a_checkpoint(name, value):
    block, x = DoubleAttention(6, 4, 4), torch.randn(2, 6, 3, 4)
    setattr(block, name, value)
    with pytest.raises(ValueError, match=f"{name} must be one of .* got '{value}'"):
        checkpoint(block, x, use_reentrant=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_checkpoint_within_a_checkpoint(backend):
    torch.manual_seed(0)
    block, x = DoubleAttention(6, 4, 4, backend=backend), torch.randn(2, 6, 3, 4)
    nothing = contextlib.nullcontext

    def run(block, x):
        def inner(x):
            return checkpoint(block, x, use_reentrant=False)

        return checkpoint(inner, x, use_reentrant=False)

    plain = gradients(block, x, lambda block, x: block(x), nothing(), nothing())
    with FlopCounterMode(display=False):
        found = gradients(block, x, run, nothing(), nothing())
    torch.testing.assert_close(found, plain)
