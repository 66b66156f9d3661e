"""timm's ``attn_layer``: the block inside every residual branch of a ResNet."""

from functools import partial

import pytest
import timm
import torch
from timm.models.resnet import BasicBlock
from torch import nn

from da_triton import DoubleAttention
from da_triton.integrations import ResidualDoubleAttention

SMALL = partial(ResidualDoubleAttention, c_m=8, c_n=12, heads=2)


def network(attn_layer=None, name="resnet18", **options):
    if attn_layer is not None:
        options["block_args"] = {"attn_layer": attn_layer}
    return timm.create_model(name, num_classes=5, **options)


def trained(name="resnet18"):
    """timm's own network as after some training: no parameter or statistic at its start."""
    model = network(name=name)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for values in (norm.weight, norm.running_var):
                nn.init.uniform_(values, 0.5, 1.0)
            for values in (norm.bias, norm.running_mean):
                nn.init.normal_(values, std=0.1)
    return model


def blocks(model, kind=ResidualDoubleAttention):
    return [module for module in model.modules() if isinstance(module, kind)]


def image():
    return torch.randn(2, 3, 64, 64)


@pytest.mark.parametrize("layer", [ResidualDoubleAttention, SMALL])
@pytest.mark.parametrize(("name", "expansion"), [("resnet18", 1), ("resnet26", 4)])
def test_a_block_in_every_residual_block(layer, name, expansion):
    found = blocks(network(layer, name))
    channels = [64, 64, 128, 128, 256, 256, 512, 512]
    assert [block.attention.in_channels for block in found] == [expansion * c for c in channels]
    if layer is SMALL:
        options = {(b.attention.c_m, b.attention.c_n, b.attention.heads) for b in found}
        assert options == {(8, 12, 2)}


@pytest.mark.parametrize(("name", "norm"), [("resnet18", None), ("resnet26", "batch")])
def test_weights_of_the_network_without_blocks_give_its_exact_outputs(name, norm):
    """timm initialises every convolution again after it has built the network, and then calls
    ``zero_init_last``."""
    plain = trained(name).eval()
    model = network(partial(SMALL, norm=norm), name).eval()
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert {key.split(".")[2] for key in missing} == {"se"}
    x = image()
    assert torch.equal(model(x), plain(x))
    first = blocks(model)[0]
    nn.init.ones_((first.norm or first.attention.conv_reconstruct).weight)
    assert not torch.allclose(model(x), plain(x))


def test_gradients_reach_the_blocks():
    model = network(SMALL)
    model.load_state_dict(trained().state_dict(), strict=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(image()), torch.tensor([1, 2])).backward()
        optimizer.step()
    for block in blocks(model):
        assert all(p.grad is not None for p in block.parameters())
        for conv in (block.attention.convA, block.attention.convB, block.attention.convV):
            assert conv.weight.grad.any()
        assert block.norm.weight.any()


def test_the_block_without_a_normalisation():
    model = network(partial(DoubleAttention, c_m=8, residual=True))
    assert len(blocks(model, DoubleAttention)) == 8
    model(image()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_device_and_dtype():
    assert {p.device.type for p in network(SMALL, device="meta").parameters()} == {"meta"}
    model = network(SMALL, dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(image().double()).dtype == torch.float64


def test_channels_last():
    model = network(partial(SMALL, zero_init=False)).double().eval()
    x = image().double()
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    activations = []
    for block in blocks(model):
        block.register_forward_hook(lambda module, args, out: activations.append((args[0], out)))
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected)
    assert len(activations) == 8
    for given, result in activations:
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert given.is_contiguous(memory_format=torch.channels_last)


def test_compile():
    block = BasicBlock(16, 16, attn_layer=partial(SMALL, zero_init=False)).eval()
    x = torch.randn(2, 16, 9, 8)
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x))
