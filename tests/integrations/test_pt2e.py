"""PT2E quantisation of exported networks: the block's convolutions become int8 as plain ones do."""

import pytest
import torch

from da_triton import DoubleAttention
from da_triton.integrations import ResidualDoubleAttention, insert_double_attention
from support.cases import RANKS
from support.numerics import relative_rms
from support.plain import PlainBlock, PlainResidual, randomize

pytest.importorskip("torchao")
if torch.__version__ < (2, 12):
    pytest.skip(
        "torchao's quantisers find no convolutions with PyTorch < 2.12", allow_module_level=True
    )

from torchao.quantization.pt2e import move_exported_model_to_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import arm_inductor_quantizer as arm
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
from torchao.quantization.pt2e.quantizer import xpu_inductor_quantizer as xpu


def for_x86(qat):
    config = x86.get_default_x86_inductor_quantization_config(is_qat=qat)
    return x86.X86InductorQuantizer().set_global(config)


def for_arm(qat):
    config = arm.get_default_arm_inductor_quantization_config(is_qat=qat)
    return arm.ArmInductorQuantizer().set_global(config)


def for_xpu(qat):
    config = xpu.get_default_xpu_inductor_quantization_config()
    return xpu.XPUInductorQuantizer().set_global(config)


each_quantiser = pytest.mark.parametrize("quantiser", [for_x86, for_arm, for_xpu])
each_rank = pytest.mark.parametrize("positions", RANKS, ids=["1d", "2d", "3d"])
each_kind = pytest.mark.parametrize("kind", ["layer", "residual"])


def blocks(kind, axes=2):
    """The block and the plain one, with the same weights."""
    if kind == "layer":
        pair = DoubleAttention(16, 8, 6, heads=2), PlainBlock(16, 8, 6, heads=2)
    else:
        pair = (
            ResidualDoubleAttention(16, 8, 6, heads=2, position_axes=axes),
            PlainResidual(16, 8, 6, heads=2, position_axes=axes),
        )
    return [randomize(block).eval() for block in pair]


def images(positions=(5, 6)):
    return torch.randn(2, 16, *positions, generator=torch.Generator().manual_seed(1))


def quantised(module, *inputs, quantiser=for_x86, qat=False):
    exported = torch.export.export(module, inputs).module()
    prepared = (prepare_qat_pt2e if qat else prepare_pt2e)(exported, quantiser(qat))
    prepared(*inputs)
    if qat:
        move_exported_model_to_eval(prepared)
    return convert_pt2e(prepared)


def int8_weights(program):
    """How many of its convolutions take int8 weights, through a dequantisation."""
    found = 0
    for node in program.graph.nodes:
        if node.target == torch.ops.aten.conv2d.default and node.args[1].op == "call_function":
            source = node.args[1].args[0]
            found += source.op == "get_attr" and getattr(program, source.target).dtype == torch.int8
    return found


def norms(program):
    return sum("batch_norm" in str(node.target) for node in program.graph.nodes)


def check(kind, x, bound, **options):
    ours, plain = blocks(kind, x.dim() - 2)
    exact = plain(x)
    found, expected = (quantised(block, x, **options) for block in (ours, plain))
    assert int8_weights(found) == int8_weights(expected) == 4
    assert norms(found) == norms(expected) == 0
    error, usual = (relative_rms(program(x), exact) for program in (found, expected))
    assert 1e-4 < error < max(bound, 1.5 * usual)


@each_kind
@each_quantiser
def test_after_training(kind, quantiser):
    check(kind, images(), 0.03, quantiser=quantiser)


@each_rank
def test_any_number_of_position_axes(positions):
    check("layer", images(positions), 0.03)


def test_a_mask():
    block, x = blocks("layer")[0], images()
    mask = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(2)) > 0.3
    program = quantised(block, x, mask)
    assert int8_weights(program) == 4
    assert relative_rms(program(x, mask), block(x, mask)) < 0.03
    assert relative_rms(program(x, mask), block(x)) > 0.05


@each_quantiser
def test_during_training(quantiser):
    ours, plain = blocks("layer")
    x, exact = images(), plain(images())
    for block in (ours, plain):
        program = quantised(block.train(), x, quantiser=quantiser, qat=True)
        assert int8_weights(program) == 4
        assert 1e-4 < relative_rms(program(x), exact) < 0.03


def test_gradients_during_training():
    """Weights learn through fake quantisation like the plain block's."""
    grads, x = [], images()
    for block in blocks("layer"):
        exported = torch.export.export(block.train(), (x,)).module()
        prepared = prepare_qat_pt2e(exported, for_x86(True))
        prepared(x).square().mean().backward()
        grads.append({name: p.grad for name, p in prepared.named_parameters()})
    for name, expected in grads[1].items():
        if name != "convB.bias":  # no effect: rounding, or zero
            assert relative_rms(grads[0][name], expected) < 0.02, name


def test_a_norm_is_folded_during_training():
    block, x = blocks("residual")[0].train(), images()
    block.norm.momentum = 1.0
    block(x)  # the statistics of these images
    exact = block.eval()(x)
    program = quantised(block.train(), x, qat=True)
    assert (int8_weights(program), norms(program)) == (4, 0)
    assert 1e-4 < relative_rms(program(x), exact) < 0.05


def test_a_resnet_with_blocks():
    from torchvision.models import resnet18

    net = insert_double_attention(resnet18(num_classes=7), ["layer1.1", "layer2.1"], c_m=8, c_n=8)
    net = randomize(net).eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    program = quantised(net, x, quantiser=for_arm)  # the others fail on torchvision's own network
    assert (int8_weights(program), norms(program)) == (20 + 2 * 4, 0)
    assert 1e-4 < relative_rms(program(x), net(x)) < 0.1


def test_a_quantised_program_is_exported_again():
    x = images()
    program = quantised(blocks("residual")[0], x)
    again = torch.export.export(program, (x,)).module()
    assert int8_weights(again) == 4
    torch.testing.assert_close(again(x), program(x))
