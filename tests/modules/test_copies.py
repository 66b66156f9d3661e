"""Copies, pickles and wrappers of the layer behave like those of ``nn.Conv2d``."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from da_triton import DoubleAttention
from da_triton.integrations import ResidualDoubleAttention, accelerate
from support.copies import WAYS


class Copied(nn.Module):
    """Double attention of another author, which ``accelerate`` replaces."""

    def __init__(self):
        super().__init__()
        self.convA, self.convB, self.convV = (nn.Conv2d(6, 4, 1) for _ in range(3))

    def forward(self, x):
        a, b, v = (conv(x).flatten(2) for conv in (self.convA, self.convB, self.convV))
        return (a @ b.softmax(2).mT @ v.softmax(1)).unflatten(2, x.shape[2:])


def accelerated():
    module = Copied()
    accelerate(module)
    return module


LAYERS = {
    "conv": lambda: nn.Conv2d(6, 6, 1),
    "layer": lambda: DoubleAttention(6),
    "residual": lambda: ResidualDoubleAttention(6, zero_init=False),
    "accelerated": accelerated,
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
X = torch.randn(2, 6, 3, 4, generator=torch.Generator().manual_seed(0))


@each_layer
@pytest.mark.parametrize("duplicate", WAYS)
def test_a_copy_of_a_layer_compiled_in_place_runs_its_own_weights(make, duplicate):
    torch._dynamo.reset()
    layer = make()
    layer.compile(backend="eager")
    expected = layer(X)
    twin = duplicate(layer)
    assert twin._compiled_call_impl is None
    torch.testing.assert_close(twin(X), expected)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert not twin(X).equal(expected)
    torch.testing.assert_close(layer(X), expected)


def test_attributes_of_a_shallow_copy_of_a_compiled_layer_count():
    torch._dynamo.reset()
    layer = DoubleAttention(6)
    layer.compile(backend="eager")
    layer(X)
    twin = copy.copy(layer)
    twin.scale = 0.0
    assert twin.convA is layer.convA
    torch.testing.assert_close(twin(X), layer.conv_reconstruct(torch.zeros(2, 3, 3, 4)))


@each_layer
def test_an_average_of_compiled_weights_is_not_the_live_model(make):
    torch._dynamo.reset()
    net = nn.Sequential(make())
    net[0].compile(backend="eager")
    before = net(X)
    average = AveragedModel(net)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
    torch.testing.assert_close(average(X), before)


class Forwarding(nn.Module):
    """A wrapper that answers with the attributes of what it wraps, as PEFT's do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, x):
        return self.inner(x)


WRAPPERS = {
    "compile": lambda module: torch.compile(module, backend="eager"),
    "checkpoint": checkpoint_wrapper,
    "forwarding": Forwarding,
}


@each_layer
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_deepcopy_copies_the_wrapper_too(make, wrap):
    torch._dynamo.reset()
    net = nn.Sequential(wrap(make()))
    expected = net(X)
    twin = copy.deepcopy(net)
    assert type(twin[0]) is type(net[0])
    assert twin.state_dict().keys() == net.state_dict().keys()
    twin.load_state_dict(net.state_dict())
    torch.testing.assert_close(twin(X), expected)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in net.parameters()}


def test_a_layer_moves_to_the_memory_format_of_videos():
    net = nn.Sequential(nn.Conv3d(3, 6, 3, padding=1), DoubleAttention(6), nn.Conv3d(6, 2, 1))
    x = torch.randn(2, 3, 2, 4, 5)
    expected = net(x)
    net.to(memory_format=torch.channels_last_3d)
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert {conv.weight.dim() for conv in net[1].children()} == {4}
    out = net(x.to(memory_format=torch.channels_last_3d))
    torch.testing.assert_close(out, expected)
    net.to(torch.float64, memory_format=torch.channels_last_3d)
    torch.testing.assert_close(net(x.double()).float(), expected)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_other_memory_formats_are_those_of_a_convolution(memory_format):
    layer = DoubleAttention(6).to(memory_format=memory_format)
    assert layer.convA.weight.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(layer(X), copy.deepcopy(layer).to(torch.float64)(X.double()).float())


def test_an_error_of_a_conversion_is_not_hidden():
    def fails(t):
        raise RuntimeError("no memory left")

    with pytest.raises(RuntimeError, match="no memory left"):
        DoubleAttention(6)._apply(fails)
