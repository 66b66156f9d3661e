"""x + norm(attention(x)): initially the identity, one operation in evaluation, else the sum."""

import copy
import functools

import pytest
import torch
from torch import nn

from da_triton.integrations import ResidualDoubleAttention
from support.numerics import relative_rms

SHAPES = {1: (4, 16, 30), 2: (4, 16, 5, 6), 3: (2, 16, 3, 4, 5)}
GROUP = functools.partial(nn.GroupNorm, 4)
NORMS = {
    "batch": "batch",
    "group": GROUP,
    "none": None,
    "no_affine": functools.partial(nn.BatchNorm2d, affine=False),
    "no_statistics": functools.partial(nn.BatchNorm2d, track_running_stats=False),
}


def trained(norm="batch", axes=2, dtype=torch.float64, **options):
    """A block that is not the identity, with its own running statistics."""
    block = ResidualDoubleAttention(
        16, 6, 4, norm=norm, position_axes=axes, zero_init=False, dtype=dtype, **options
    )
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn(p.shape) * (2 / 4 if p.dim() > 1 else 1))
        for _ in range(3):
            block(torch.randn(SHAPES[axes], dtype=dtype))
    return block


def definition(block, x, mask=None):
    y = block.attention(x, mask)
    return x + (y if block.norm is None else block.norm(y))


@pytest.mark.parametrize("axes", SHAPES)
@pytest.mark.parametrize("training", [True, False])
def test_starts_as_the_identity(axes, training):
    block = ResidualDoubleAttention(16, position_axes=axes).train(training)
    x = torch.randn(SHAPES[axes])
    assert torch.equal(block(x), x)
    assert torch.equal(ResidualDoubleAttention(16, norm=None)(x), x)


def test_gradients_reach_the_block_from_the_second_step_on():
    block = ResidualDoubleAttention(16)
    optimizer = torch.optim.SGD(block.parameters(), lr=1.0)
    x = torch.randn(SHAPES[2])
    for step in range(2):
        optimizer.zero_grad()
        (block(x) * torch.randn(x.shape)).sum().backward()
        assert block.norm.weight.grad.abs().sum() > 0
        assert bool(block.attention.convA.weight.grad.abs().sum() > 0) == (step > 0)
        optimizer.step()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_the_definition(norm, training, masked):
    block = trained(NORMS[norm]).train(training)
    x = torch.randn(SHAPES[2], dtype=torch.float64)
    mask = torch.rand(4, 5, 6) > 0.5 if masked else None
    assert relative_rms(block(x, mask), definition(block, x, mask)) < 1e-14


@pytest.mark.parametrize("axes", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_evaluation_is_one_operation(axes, bias, monkeypatch):
    block = trained(axes=axes, bias=bias).eval()
    x = torch.randn(SHAPES[axes], dtype=torch.float64)
    expected = definition(block, x)
    monkeypatch.setattr(type(block.norm), "forward", None)  # would fail where it is called
    monkeypatch.setattr(type(block.attention), "forward", None)
    assert relative_rms(block(x), expected) < 1e-14


def test_gradients_of_frozen_statistics():
    block = trained().eval()
    x = torch.randn(SHAPES[2], dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(x.shape, dtype=torch.float64)
    wanted = [x, *block.parameters()]
    found = torch.autograd.grad(block(x), wanted, upstream)
    for g, expected in zip(
        found, torch.autograd.grad(definition(block, x), wanted, upstream), strict=True
    ):
        assert (g - expected).norm() <= 1e-12 * (1 + expected.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_in_evaluation(dtype):
    block = trained().eval()
    x = torch.randn(SHAPES[2]).to(dtype)
    expected = definition(block, x.double())
    low = copy.deepcopy(block).to(dtype)
    assert low(x).dtype == dtype
    assert relative_rms(low(x), expected) < 2 * relative_rms(definition(low, x), expected) + 1e-3
    with torch.autocast("cpu", dtype):
        out = block.float()(x.float())
    assert out.dtype == torch.float32
    assert relative_rms(out, expected) < 0.03


@pytest.mark.parametrize(
    "where", ["attention", "attention.convB", "attention.conv_reconstruct", "norm"]
)
def test_whoever_watches_a_child_sees_it_run(where):
    block = trained().eval()
    x = torch.randn(SHAPES[2], dtype=torch.float64)
    expected, seen = block(x), []
    block.get_submodule(where).register_forward_hook(lambda *_: seen.append(where))
    assert relative_rms(block(x), expected) < 1e-14
    assert seen == [where]


def test_replaced_norm_and_attention_are_called():
    block = trained().eval()
    x = torch.randn(SHAPES[2], dtype=torch.float64)
    block.norm = nn.Sequential(block.norm, nn.Tanh())
    assert relative_rms(block(x), definition(block, x)) < 1e-14
    block.attention = nn.Conv2d(16, 16, 1, dtype=torch.float64)
    assert relative_rms(block(x), x + block.norm(block.attention(x))) < 1e-14


def test_statistics_across_processes():
    block = nn.SyncBatchNorm.convert_sync_batchnorm(trained()).eval()
    assert type(block.norm) is nn.SyncBatchNorm
    assert block._last_convolution() is not None


def test_compiles_in_one_graph_in_both_modes():
    block = trained(dtype=torch.float32)
    for training in (True, False):
        block.train(training)
        x = torch.randn(SHAPES[2])
        expected = copy.deepcopy(block)(x)
        compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="aot_eager")
        assert relative_rms(compiled(x), expected) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "layer"}, "norm must be"),
        ({"norm": 3}, "norm must be"),
        ({"position_axes": 4}, "position_axes must be 1, 2 or 3, got 4"),
        ({"residual": True}, "residual cannot be set"),
        ({"reconstruct": False}, "reconstruct cannot be set"),
        ({"norm": functools.partial(nn.BatchNorm2d, affine=False)}, "zero_init needs a norm with"),
        ({"heads": 3}, "heads"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        ResidualDoubleAttention(16, 8, 8, **options)


def test_wrong_input_is_rejected_in_both_modes():
    for training in (True, False):
        with pytest.raises(ValueError, match="16"):
            ResidualDoubleAttention(16).train(training)(torch.randn(2, 8, 3, 3))
