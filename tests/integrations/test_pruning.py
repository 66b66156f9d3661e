"""Pruning libraries on networks with the block: the same effect as on the plain block."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from da_triton import DoubleAttention
from da_triton.integrations import ResidualDoubleAttention
from da_triton.streaming import StreamingDoubleAttention
from support.cases import RANKS
from support.plain import PlainBlock, PlainResidual, randomize

KINDS = {
    "layer": (DoubleAttention, PlainBlock),
    "residual": (ResidualDoubleAttention, PlainResidual),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


class Net(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.block = block
        self.last = nn.Conv2d(16, 12, 3, padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.last(self.block(self.stem(x))).flatten(2).mean(-1))


def nets(kind):
    """The network with the block and with the plain one, with the same weights."""
    return [randomize(Net(block(16, 8, 8)).double()) for block in KINDS[kind]]


def core(module):
    return next(m for m in module.modules() if isinstance(m, (DoubleAttention, PlainBlock)))


def images(channels=3):
    return torch.randn(2, channels, 5, 6, dtype=torch.float64)


def check_sizes(layer):
    """Sizes that the layer reports, and that all its parts run with them."""
    assert layer.in_channels == layer.convA.in_channels == layer.convA.weight.shape[1]
    assert layer.c_m == layer.convA.out_channels == layer.convA.weight.shape[0]
    assert layer.c_n == layer.convB.out_channels == layer.convB.weight.shape[0]
    text = f"{layer.in_channels}, c_m={layer.c_m}, c_n={layer.c_n},"
    assert layer.extra_repr().startswith(text)
    x = images(layer.in_channels)
    for found in layer.attention_maps(x):
        assert found.shape == (2, layer.heads, layer.c_n // layer.heads, 5, 6)
    torch.testing.assert_close(StreamingDoubleAttention(layer)(x), layer(x))
    with pytest.raises(ValueError, match=f"must have {layer.in_channels} channels"):
        layer(images(layer.in_channels + 1))


IGNORED = {
    "nothing": lambda net: [],
    "block": lambda net: [net.block],
    "children": lambda net: list(core(net).children()),
    "B and V": lambda net: [core(net).convB, core(net).convV],
    "inside": lambda net: [core(net).conv_reconstruct, net.stem],
}


def cut(net, ignored, ratio=0.5, **options):
    """The network after torch_pruning has taken channels from all but ``ignored``."""
    pruning = pytest.importorskip("torch_pruning")
    pruner = pruning.pruner.BasePruner(
        net, images(), importance=pruning.importance.MagnitudeImportance(), pruning_ratio=ratio,
        ignored_layers=[net.head, *ignored], **options,
    )  # fmt: skip
    pruner.step()
    return net


@each_kind
@pytest.mark.parametrize("ignored", IGNORED.values(), ids=IGNORED.keys())
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_channels_cut_by_torch_pruning(kind, ignored, training):
    ours, plain = (cut(net, ignored(net)) for net in nets(kind))
    shapes = [{name: p.shape for name, p in net.named_parameters()} for net in (ours, plain)]
    assert shapes[0] == shapes[1]
    assert shapes[0] != {name: p.shape for name, p in nets(kind)[0].named_parameters()}
    x = images()
    found, expected = (net.train(training)(x) for net in (ours, plain))
    torch.testing.assert_close(found, expected)
    for out in (found, expected):
        out.square().sum().backward()
    for (name, p), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        if not name.endswith("convB.bias"):  # no effect: rounding, or zero
            torch.testing.assert_close(p.grad, other.grad)
    check_sizes(core(ours))


def test_several_steps_of_pruning():
    """The dependencies are found again in a block that was pruned before."""
    ours, plain = nets("residual")
    for _ in range(2):
        for net in (ours, plain):
            cut(net, [], 0.3)
        x = images()
        torch.testing.assert_close(ours(x), plain(x))
    assert core(ours).in_channels < 9


def test_copies_and_weights_of_a_pruned_block():
    net, x = cut(nets("residual")[0], []).eval(), images()
    expected = net(x)
    twin = copy.deepcopy(net)
    torch.testing.assert_close(twin(x), expected)
    narrow = DoubleAttention(*(getattr(core(net), n) for n in ("in_channels", "c_m", "c_n")))
    narrow.double().load_state_dict(core(net).state_dict())
    x = images(8)
    torch.testing.assert_close(narrow(x), core(net)(x))
    torch._dynamo.reset()
    compiled = torch.compile(core(net), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), core(net)(x))


def test_a_resnet_with_blocks():
    pruning = pytest.importorskip("torch_pruning")
    from torchvision.models import resnet18

    from da_triton.integrations import insert_double_attention

    net = insert_double_attention(resnet18(num_classes=7), ["layer1.0", "layer2.1"], c_m=8, c_n=8)
    net, x = randomize(net).double().eval(), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    pruner = pruning.pruner.BasePruner(
        net, x, importance=pruning.importance.MagnitudeImportance(), pruning_ratio=0.5,
        ignored_layers=[net.fc],
    )  # fmt: skip
    pruner.step()
    assert net(x).shape == (1, 7)
    for name, channels in (("layer1.0", 32), ("layer2.1", 64)):
        layer = net.get_submodule(name).double_attention.attention
        assert (layer.in_channels, layer.c_m, layer.c_n) == (channels, 4, 4)
        check_sizes(layer)
    net.train()(torch.cat([x, -x])).sum().backward()


# --- masks and parametrisations of torch.nn.utils -------------------------------------------------


def by_magnitude(conv):
    prune.l1_unstructured(conv, "weight", amount=0.5)


def by_channel(conv):
    prune.ln_structured(conv, "weight", amount=2, n=2, dim=0)


def weight_norm(conv):
    parametrizations.weight_norm(conv)
    nn.init.constant_(conv.parametrizations.weight.original0, 0.7)


def spectral_norm(conv):
    parametrizations.spectral_norm(conv)


def older_weight_norm(conv):
    nn.utils.weight_norm(conv)
    nn.init.constant_(conv.weight_g, 0.7)


def older_spectral_norm(conv):
    nn.utils.spectral_norm(conv)


CHANGES = [
    by_magnitude, by_channel, weight_norm, spectral_norm,
    pytest.param(older_weight_norm, marks=pytest.mark.filterwarnings("ignore::FutureWarning")),
    older_spectral_norm,
]  # fmt: skip


def changed(module, change):
    torch.manual_seed(7)  # spectral_norm starts from random vectors
    for conv in core(module).children():
        change(conv)
    return module


@each_kind
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_masks_and_parametrisations(kind, change, training):
    ours, plain = (changed(net, change).train(training) for net in nets(kind))
    before = nets(kind)[0].train(training)
    x = images()
    for _ in range(2):  # a power iteration per step
        results = []
        for net in (ours, plain):
            net.zero_grad()
            y = net(x)
            y.square().sum().backward()
            results.append(
                (y, [p.grad for n, p in net.named_parameters() if "convB.bias" not in n])
            )
        torch.testing.assert_close(*results)
    assert not torch.allclose(results[0][0], before(x), rtol=1e-2)
    check_sizes(core(ours.eval()))


@pytest.mark.parametrize("change", [by_magnitude, weight_norm, spectral_norm, older_spectral_norm])
@pytest.mark.parametrize("positions", RANKS, ids=["1d", "2d", "3d"])
def test_masks_and_parametrisations_with_any_number_of_position_axes(change, positions):
    pair = (randomize(cls(16, 8, 8).double()).eval() for cls in KINDS["layer"])
    ours, plain = (changed(block, change) for block in pair)
    x = torch.randn(16, 16, *positions, dtype=torch.float64)
    torch.testing.assert_close(ours(x), plain(x))


@each_kind
def test_masks_made_permanent_leave_one_operation(kind, monkeypatch):
    net = changed(nets(kind)[0], by_magnitude).eval()
    x = images(16)
    expected = net.block(x)
    for conv in core(net).children():
        prune.remove(conv, "weight")
    assert (core(net).convA.weight == 0).float().mean() == 0.5
    monkeypatch.setattr(nn.Conv2d, "forward", None)
    torch.testing.assert_close(net.block(x), expected)
