"""torchao's weight-only quantisation of the convolutions: the same effect as on the plain block."""

import copy

import pytest
import torch
from torch import nn

from da_triton import DoubleAttention
from da_triton.integrations import ResidualDoubleAttention
from da_triton.streaming import StreamingDoubleAttention
from support.cases import RANKS
from support.numerics import DEVICE, relative_rms
from support.plain import PlainBlock, PlainResidual, randomize

pytest.importorskip("torchao")

from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis

each_rank = pytest.mark.parametrize("positions", RANKS, ids=["1d", "2d", "3d"])
each_kind = pytest.mark.parametrize("kind", ["layer", "residual"])
each_mode = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def blocks(kind, axes=2, **options):
    """The block and the plain one, with the same weights."""
    if kind == "layer":
        pair = DoubleAttention(16, 8, 6, heads=2, **options), PlainBlock(16, 8, 6, heads=2)
    else:
        pair = (
            ResidualDoubleAttention(16, 8, 6, heads=2, position_axes=axes, **options),
            PlainResidual(16, 8, 6, heads=2, position_axes=axes),
        )
    return [randomize(block).to(DEVICE).eval() for block in pair]


def is_convolution(module, name):
    return isinstance(module, nn.Conv2d)


def quantised(module, bits=8, which=is_convolution):
    dtype = {8: torch.int8, 4: torch.int4}[bits]
    config = IntxWeightOnlyConfig(weight_dtype=dtype, granularity=PerAxis(0))
    quantize_(module, config, filter_fn=which)
    return module


def images(positions=(5, 6), batch=2, **options):
    return torch.randn(batch, 16, *positions, device=DEVICE, **options)


def core(module):
    return next(m for m in module.modules() if isinstance(m, DoubleAttention))


@each_kind
@each_rank
@each_mode
@pytest.mark.parametrize("batch", [2, 16], ids=["two", "as_channels"])
def test_quantised_convolutions(kind, positions, training, batch):
    x = images(positions, batch, requires_grad=True)
    given = blocks(kind, len(positions))
    exact = given[0](x)
    if training:
        exact = given[1].train()(x)
    results = []
    for block in given:
        quantised(block.train(training))
        y = block(x)
        results.append((y, torch.autograd.grad(y.cos().sum(), x)[0]))
    (y, grad), (expected, gradient) = results
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(grad, gradient)
    assert 1e-4 < relative_rms(y, exact) < 0.03


@each_kind
@pytest.mark.parametrize("name", ["convA", "convB", "convV", "conv_reconstruct"])
def test_one_quantised_convolution(kind, name):
    ours, plain = (quantised(b, 4, lambda _, fqn: fqn.endswith(name)) for b in blocks(kind))
    x = images()
    torch.testing.assert_close(ours(x), plain(x))
    assert relative_rms(ours(x), blocks(kind)[0](x)) > 1e-3


@pytest.mark.parametrize("backend", ["torch", "triton", "eager"])
def test_backends_and_masks(backend):
    ours, plain = (quantised(b) for b in blocks("layer", backend=backend))
    x = images()
    torch.testing.assert_close(ours(x), plain(x))
    mask = torch.ones(2, 5, 6, dtype=torch.bool, device=DEVICE)
    torch.testing.assert_close(ours(x, mask), plain(x))


@each_rank
def test_attention_maps_and_streams(positions):
    """As with weights that were dequantised."""
    ours = core(quantised(blocks("layer")[0]))
    dense = blocks("layer")[0]
    with torch.no_grad():
        for found, child in zip(dense.children(), ours.children(), strict=True):
            found.weight.copy_(child.weight.dequantize())
    x = images(positions, 16)
    for found, expected in zip(ours.attention_maps(x), dense.attention_maps(x), strict=True):
        torch.testing.assert_close(found, expected)
    streams = [StreamingDoubleAttention(layer) for layer in (ours, dense)]
    for frame in (x, images(positions, 16)):
        torch.testing.assert_close(*(stream(frame) for stream in streams))


def test_the_layer_knows_its_sizes():
    layer = quantised(blocks("layer")[0])
    assert (layer.in_channels, layer.c_m, layer.c_n) == (16, 8, 6)
    assert layer.extra_repr().startswith("16, c_m=8, c_n=6,")


@each_kind
def test_copies_and_state_dicts(kind):
    ours, x = quantised(blocks(kind)[0]), images()
    expected = ours(x)
    torch.testing.assert_close(copy.deepcopy(ours)(x), expected)
    other = blocks(kind)[0]
    nn.init.zeros_(core(other).convV.weight)
    other.load_state_dict(ours.state_dict(), assign=True)
    assert type(core(other).convA.weight) is type(core(ours).convA.weight) is not nn.Parameter
    torch.testing.assert_close(other(x), expected)


@each_kind
def test_saved_quantised_weights(kind, tmp_path):
    ours, x = quantised(blocks(kind)[0]), images()
    torch.save(ours.state_dict(), tmp_path / "weights.pt")
    again = quantised(blocks(kind)[0], 4)
    assert not torch.allclose(again(x), ours(x), atol=1e-3)
    again.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True), assign=True)
    torch.testing.assert_close(again(x), ours(x))


@each_kind
def test_compiled(kind):
    torch._dynamo.reset()
    ours, plain = (quantised(b) for b in blocks(kind))
    x = images()
    with torch.no_grad():
        expected = torch.compile(plain, backend="aot_eager", fullgraph=True)(x)
        found = torch.compile(ours, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(found, expected)


def test_low_precision():
    ours, plain = (quantised(b.to(torch.bfloat16)) for b in blocks("residual"))
    x = images().to(torch.bfloat16)
    assert ours(x).dtype == torch.bfloat16
    exact = quantised(blocks("residual")[1])(x.float())
    assert relative_rms(ours(x), exact) < 2 * relative_rms(plain(x), exact) + 1e-3
