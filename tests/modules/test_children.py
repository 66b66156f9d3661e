"""Children that were wrapped, replaced, quantised or pruned: the layer runs them."""

import copy

import pytest
import torch
from torch import nn

from da_triton import DoubleAttention
from da_triton.integrations import ResidualDoubleAttention
from da_triton.streaming import StreamingDoubleAttention
from support.cases import RANKS

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
each_rank = pytest.mark.parametrize("positions", RANKS, ids=["1d", "2d", "3d"])


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return DoubleAttention(8, 6, 4, heads=2, residual=True, backend="torch")


class Adapter(nn.Module):
    """As LoRA wraps a convolution: the base layer, and two more for the difference, initially 0."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.down = nn.Conv2d(base.in_channels, 2, 1, bias=False)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


class Opaque(nn.Module):
    """Contains no convolution, but says how many position axes it takes."""

    def __init__(self, conv):
        super().__init__()
        self.kernel_size = conv.kernel_size
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight, self.bias)


def hooked(conv):
    conv.register_forward_hook(lambda *_: None)
    return conv


def of_rank(axes, observed):
    def replace(conv):
        kernel = conv.weight.reshape(*conv.weight.shape[:2], *[1] * axes)
        new = CONVOLUTIONS[axes - 1](conv.in_channels, conv.out_channels, 1)
        new.weight, new.bias = nn.Parameter(kernel.detach()), conv.bias
        return hooked(new) if observed else new

    return replace


CHANGES = {
    "sequential": nn.Sequential,
    "nested": lambda conv: nn.Sequential(nn.Identity(), nn.Sequential(conv)),
    "compiled": lambda conv: torch.compile(conv, backend="eager"),
    "adapter": Adapter,
    "opaque": Opaque,
    "hooked": hooked,
    "conv1d": of_rank(1, False),
    "conv3d": of_rank(3, False),
    "conv1d hooked": of_rank(1, True),
    "conv3d hooked": of_rank(3, True),
}
each_change = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())


def changed(layer, change):
    twin = copy.deepcopy(layer)
    for name, child in list(twin.named_children()):
        setattr(twin, name, change(child))
    return twin


@each_change
@each_rank
@pytest.mark.parametrize("batch", [2, 8])
def test_any_number_of_position_axes_gives_what_the_plain_layer_gives(
    layer, change, positions, batch
):
    """With a batch as large as the channels, a wrong rank would go unnoticed."""
    torch._dynamo.reset()
    twin, x = changed(layer, change), torch.randn(batch, 8, *positions)
    torch.testing.assert_close(twin(x), layer(x))
    mask = torch.rand(batch, *positions) > 0.3
    torch.testing.assert_close(twin(x, mask), layer(x, mask))
    for found, expected in zip(twin.attention_maps(x), layer.attention_maps(x), strict=True):
        torch.testing.assert_close(found, expected)


@each_change
@each_rank
def test_streams_call_changed_children_in_the_same_way(layer, change, positions):
    torch._dynamo.reset()
    x = torch.randn(8, 8, *positions)
    streams = [StreamingDoubleAttention(m) for m in (changed(layer, change), layer)]
    torch.testing.assert_close(*(stream(x) for stream in streams))


def test_a_convolution_over_several_positions_needs_its_own_rank(layer):
    layer.convV = nn.Sequential(nn.Conv2d(8, 4, 3, padding=1))
    assert layer(torch.randn(8, 8, 5, 6)).shape == (8, 8, 5, 6)
    for positions in ((30,), (2, 3, 5)):
        with pytest.raises(ValueError, match=r"2 position axes, got \d: Conv2d\(8, 4, kernel_size"):
            layer(torch.randn(8, 8, *positions))


@pytest.mark.parametrize("positions", [(30,), (2, 3, 5)])
def test_a_child_without_a_convolution_says_how_many_axes_it_takes(layer, positions):
    """Inputs with joined axes would give different results, and no error."""

    class Shifted(nn.Module):
        """The features of the position before, along the first axis."""

        def __init__(self, conv):
            super().__init__()
            self.weight, self.bias = conv.weight.flatten(1), conv.bias

        def forward(self, x):
            y = torch.einsum("oc,nc...->no...", self.weight, x.roll(1, 2))
            return y + self.bias.view(-1, *[1] * (x.dim() - 2))

    x = torch.randn(2, 8, *positions)
    plain, layer.convA = copy.deepcopy(layer), Shifted(layer.convA)
    with pytest.raises(ValueError, match=r"Shifted replaces a .* got an input with \d\."):
        layer(x)
    layer.convA.kernel_size = (1,) * len(positions)
    a = layer.convA(x)
    expected = plain(x).detach()
    assert not torch.allclose(layer(x), expected)
    layer.convA.register_forward_hook(lambda module, args, out: out.roll(-1, 2))
    assert layer.convA(x).equal(a.roll(-1, 2))
    torch.testing.assert_close(layer(x), expected)


def test_pooling_in_a_child_needs_its_own_rank(layer):
    layer.convA = nn.Sequential(layer.convA, nn.MaxPool2d(3, 1, 1))
    assert layer(torch.randn(2, 8, 5, 6)).shape == (2, 8, 5, 6)
    with pytest.raises(ValueError, match=r"several positions .* got 3: MaxPool2d"):
        layer(torch.randn(2, 8, 2, 3, 5))


class Quantised(torch.Tensor):
    """A weight that only a convolution can use, like those of quantisation libraries."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.conv2d or function is nn.functional.conv2d:
            args = [x.as_subclass(torch.Tensor) if isinstance(x, cls) else x for x in args]
            return function(*args, **(kwargs or {}))
        if getattr(function, "__name__", "") in ("__get__", "detach", "requires_grad_", "size"):
            return super().__torch_function__(function, types, args, kwargs or {})
        raise NotImplementedError(f"no {function} for a quantised weight")


def quantised(layer):
    twin = copy.deepcopy(layer)
    for conv in twin.modules():
        if isinstance(conv, nn.Conv2d):
            weight = conv.weight.detach().as_subclass(Quantised)
            conv.weight = nn.Parameter(weight, requires_grad=False)
    return twin


@each_rank
def test_quantised_weights_are_left_to_their_modules(layer, positions):
    x = torch.randn(2, 8, *positions)
    with torch.no_grad():
        twin = quantised(layer)
        torch.testing.assert_close(twin(x), layer(x))
        for found, expected in zip(twin.attention_maps(x), layer.attention_maps(x), strict=True):
            torch.testing.assert_close(found, expected)


def test_quantised_weights_load_as_they_are(layer):
    given, twin = quantised(layer), copy.deepcopy(layer)
    twin.load_state_dict(given.state_dict(), assign=True)
    assert {type(conv.weight.data) for conv in twin.children()} == {Quantised}
    x = torch.randn(2, 8, 5, 6)
    with torch.no_grad():
        torch.testing.assert_close(twin(x), layer(x))


@pytest.mark.parametrize("training", [True, False])
def test_no_norm_is_folded_into_quantised_weights(training):
    block = ResidualDoubleAttention(8, zero_init=False).train(training)
    x = torch.randn(2, 8, 5, 6)
    with torch.no_grad():
        torch.testing.assert_close(quantised(block)(x), block(x))


def narrow(layer, channels, c_m, c_n):
    sizes = {
        "convA": (channels, c_m), "convB": (channels, c_n), "convV": (channels, c_n),
        "conv_reconstruct": (c_m, channels),
    }  # fmt: skip
    return {name: nn.Conv2d(*sizes[name], 1) for name, _ in layer.named_children()}


def test_the_layer_has_the_sizes_of_its_children(layer):
    for name, conv in narrow(layer, 5, 4, 2).items():
        setattr(layer, name, conv)
    assert (layer.in_channels, layer.c_m, layer.c_n) == (5, 4, 2)
    assert layer.extra_repr().startswith("5, c_m=4, c_n=2,")
    x = torch.randn(2, 5, 3, 4)
    assert layer(x).shape == x.shape
    assert StreamingDoubleAttention(layer)(x).shape == x.shape
    assert layer.attention_maps(x)[0].shape == (2, 2, 1, 3, 4)
    with pytest.raises(ValueError, match=r"x must have 5 channels \(axis 1\), got shape \(2, 8"):
        layer(torch.randn(2, 8, 3, 4))


def test_weights_cut_by_hand_count(layer):
    for name, conv in narrow(layer, 5, 4, 2).items():
        child = getattr(layer, name)
        child.weight, child.bias = conv.weight, conv.bias
    assert (layer.in_channels, layer.c_m, layer.c_n) == (5, 4, 2)
    assert layer(torch.randn(2, 5, 3, 4)).shape == (2, 5, 3, 4)


def test_weights_that_arrive_when_a_child_is_called(layer):
    """As libraries that shard or offload leave them: empty until a hook of the child fills them."""
    x = torch.randn(2, 8, 5, 6)
    expected, weight = layer(x), layer.convA.weight.data
    layer.convA.weight.data = torch.empty(0)
    assert (layer.in_channels, layer.c_m) == (8, 6)
    assert "8, c_m=6, c_n=4" in repr(layer)

    def gather(conv, args):
        conv.weight.data = weight

    layer.convA.register_forward_pre_hook(gather)
    torch.testing.assert_close(layer(x), expected)


def test_factors_of_a_convolution_give_what_the_last_one_gives(layer):
    layer.convA = nn.Sequential(nn.Conv2d(8, 2, 1), nn.Conv2d(2, 6, 1))
    assert (layer.in_channels, layer.c_m) == (8, 6)


def test_a_residual_block_takes_the_channels_of_its_children():
    block = ResidualDoubleAttention(8, 6, 4, norm=None).eval()
    for name, conv in narrow(block.attention, 5, 4, 2).items():
        setattr(block.attention, name, conv)
    assert block(torch.randn(2, 5, 3, 4)).shape == (2, 5, 3, 4)


def test_a_child_that_does_not_say_its_sizes(layer):
    layer.convA = Opaque(layer.convA)
    assert (layer.in_channels, layer.c_m, layer.c_n) == (None, None, 4)
    assert layer(torch.randn(2, 8, 3, 4)).shape == (2, 8, 3, 4)
