"""Blocks after modules that concatenate, loop over their children, or return something else."""

import copy
import functools
from collections import OrderedDict

import pytest
import timm
import torch
import torchvision
from torch import nn

from da_triton.integrations import ResidualDoubleAttention, insert_double_attention
from support.copies import WAYS

models = torchvision.models

googlenet = functools.partial(models.googlenet, init_weights=False, aux_logits=False)
vit = functools.partial(timm.create_model, "vit_tiny_patch16_224", img_size=32, depth=1)
densenet = functools.partial(
    models.DenseNet, growth_rate=4, block_config=(2, 3), num_init_features=8, num_classes=5
)
timm_densenet = functools.partial(
    timm.models.densenet.DenseNet, growth_rate=4, block_config=(2, 3), num_classes=5
)


def image(size=32):
    return torch.randn(2, 3, size, size)


def inserted(model):
    return [n for n, m in model.named_modules() if isinstance(m, ResidualDoubleAttention)]


@pytest.mark.parametrize(
    ("make", "place", "guess", "channels"),
    [
        (models.shufflenet_v2_x0_5, "stage2.1", 24, 48),
        (googlenet, "inception3a", 32, 256),
        (models.squeezenet1_1, "features.3", 64, 128),
        (densenet, "features.denseblock1", 4, 16),
        (timm_densenet, "features.denseblock1", 4, 16),
        (functools.partial(timm.create_model, "dpn48b"), "features.conv2_1", 16, 112),
    ],
)
def test_modules_that_concatenate_need_their_channels(make, place, guess, channels):
    model, x = make().eval(), image(64)
    expected = model(x)
    wrong = insert_double_attention(copy.deepcopy(model), [place])
    message = (
        rf"after '{place}' cannot take .*must have {guess} channels .*"
        rf"positions=\{{'{place}': {channels}\}}"
    )
    with pytest.raises(ValueError, match=message):
        wrong(x)
    insert_double_attention(model, {place: channels})
    assert torch.equal(model(x), expected)
    nn.init.ones_(model.get_submodule(inserted(model)[0]).norm.bias)
    assert not torch.allclose(model(x), expected, rtol=1e-3)


class Returning(nn.Module):
    """A convolution, then a function."""

    def __init__(self, change):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.change = change

    def forward(self, x):
        return self.change(self.conv(x))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda y: (y, y), TypeError, "got tuple. Name a module that returns one tensor"),
        (lambda y: [y], TypeError, "got list. Name a module that returns one tensor"),
        (lambda y: OrderedDict(out=y), TypeError, "got OrderedDict. Name a module that returns"),
        (lambda y: None, TypeError, "got NoneType. Name a module that returns one tensor"),
        (lambda y: y.mean((2, 3)), ValueError, r"must be \(N, channels, \*positions\)"),
        (lambda y: y.flatten(2), ValueError, r"\(2, 8, 12\).*position_axes=1"),
        (lambda y: y.flatten(2).mT, ValueError, r"\(2, 12, 8\).*the last axis.*returns \(N, ch"),
        (lambda y: y.permute(0, 2, 3, 1), ValueError, r"\(2, 3, 4, 8\).*axis 1.*: 3\}.*last axis"),
        (lambda y: y[:, :5], ValueError, r"must have 8 channels .*positions=\{'0.0': 5\}\.$"),
        (lambda y: y > 0, TypeError, r"torch.bool"),
    ],
)
def test_other_results_name_the_place(change, kind, message):
    model = nn.Sequential(nn.Sequential(Returning(change), nn.Identity()))
    insert_double_attention(model, ["0.0"])
    for training in (True, False):
        with pytest.raises(kind, match=rf"(?s)after '0.0' cannot take .*{message}"):
            model.train(training)(torch.randn(2, 3, 3, 4))


def test_tokens_and_features_of_a_real_network():
    for place in ("blocks.0", "fc_norm"):
        model = insert_double_attention(vit(), {place: 192})
        with pytest.raises(ValueError, match=f"after '{place}' cannot take"):
            model(image())


def test_a_block_that_a_sequential_runs_names_the_place_too():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 1), nn.PixelShuffle(2)))
    insert_double_attention(model, ["0"])
    with pytest.raises(ValueError, match=r"after '0' cannot take .*positions=\{'0': 2\}"):
        model(image())


def test_an_error_of_another_kind_passes_unchanged():
    model = insert_double_attention(nn.Sequential(nn.Conv2d(3, 8, 1)), ["0"])
    model[0].double_attention.double()
    with pytest.raises((RuntimeError, TypeError), match=r"(?i)double|float64"):
        model(image())


def test_position_axes_can_be_given_where_nothing_shows_them():
    model = nn.Sequential(nn.ReLU())
    insert_double_attention(model, {"0": 8}, position_axes=1)
    assert model(torch.randn(2, 8, 5)).shape == (2, 8, 5)


# -- containers with a forward of their own --------------------------------------------------------


class Loop(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = layer(x)
        return 2 * x


class ListLoop(nn.ModuleList):
    def forward(self, x):
        for layer in self:
            x = layer(x)
        return 2 * x


class DictLoop(nn.ModuleDict):
    def forward(self, x):
        for layer in self.values():
            x = layer(x)
        return 2 * x


class Called(nn.Sequential):
    def __call__(self, x):
        return 1 * super().__call__(x)


def layers():
    return [nn.Sequential(nn.Conv2d(3, 8, 3)), nn.ReLU()]


CONTAINERS = {
    "sequential": lambda: Loop(*layers()),
    "list": lambda: ListLoop(layers()),
    "dict": lambda: DictLoop(dict(zip("ab", layers(), strict=True))),
    "nested": lambda: Loop(ListLoop(layers()), nn.Identity()),
    "called": lambda: Called(*layers()),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_after_a_container_with_a_forward_the_block_runs_once_and_last(kind):
    model = nn.Sequential(CONTAINERS[kind](), nn.Identity()).eval()
    x = image(6)
    expected, keys = model(x), set(model.state_dict())
    insert_double_attention(model, {"0": 8}, zero_init=False)
    (name,) = inserted(model)
    block, seen = model.get_submodule(name), []
    block.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    result = model(x)
    ((given, out),) = seen
    assert torch.equal(given, expected)
    assert torch.equal(result, out)
    torch.testing.assert_close(out, given + block.norm(block.attention(given)))
    assert keys < set(model.state_dict())
    with pytest.raises(ValueError, match="'0' has a double attention block already"):
        insert_double_attention(model, {"0": 8})


def test_a_container_whose_forward_was_set_on_the_instance():
    model = nn.Sequential(nn.Sequential(*layers()))
    model[0].forward = lambda x: model[0][0](x)
    x = image(6)
    expected = model(x)
    insert_double_attention(model, ["0"])
    nn.init.ones_(model.get_submodule(inserted(model)[0]).norm.bias)
    torch.testing.assert_close(model.eval()(x), expected + 1)


@pytest.mark.parametrize("make", [nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.Module])
def test_what_has_no_forward_is_never_called(make):
    with pytest.raises(ValueError, match=f"'a' is a {make.__name__}, which is never called"):
        insert_double_attention(nn.ModuleDict({"a": make()}), {"a": 8})


@pytest.mark.parametrize("make", [densenet, timm_densenet])
def test_dense_blocks_and_the_layers_in_them(make):
    model, x = make().eval(), image(64)
    expected, state = model(x), model.state_dict()
    places = {"features.denseblock1": 16, "features.denseblock1.denselayer1": 4}
    insert_double_attention(model, places)
    insert_double_attention(model, ["features.denseblock1.denselayer2", "features.transition1"])
    layer = "features.denseblock1.denselayer"
    assert inserted(model) == [
        f"{layer}1.double_attention_1",
        f"{layer}1.double_attention",
        f"{layer}2.double_attention",
        "features.transition1.double_attention",
    ]
    assert torch.equal(model(x), expected)
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    again = insert_double_attention(make(), {"features.denseblock1": 16})
    channels = again.get_submodule(f"{layer}1.double_attention_1").attention.in_channels
    insert_double_attention(again, [f"{layer}1"])  # its channels are its own convolution's
    assert channels == 16
    assert again.get_submodule(f"{layer}1.double_attention").attention.in_channels == 4


def test_a_pooling_branch_that_loops_and_interpolates():
    """torchvision's ASPPPooling is a Sequential with a forward of its own."""
    pooling = models.segmentation.deeplabv3.ASPPPooling(6, 8).eval()
    x = torch.randn(2, 6, 5, 4)
    expected = pooling(x)
    model = insert_double_attention(nn.Sequential(pooling), ["0"]).eval()
    assert torch.equal(model(x), expected)
    assert model(x).shape == (2, 8, 5, 4)


def test_copies_files_and_compilation_of_a_container_with_a_block():
    model = insert_double_attention(
        densenet(), {"features.denseblock1": 16}, zero_init=False
    ).eval()
    x = image(64)
    with torch.no_grad():
        expected = model(x)
        for duplicate in WAYS:
            assert torch.equal(duplicate(model)(x), expected)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), expected)
