"""``DoubleAttention``: parameters, checkpoints, copies, children that must be called as modules."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from da_triton import DoubleAttention, double_attention, double_attention_block, reference
from support.numerics import DEVICE, HALVES, check


def definition(block, x, mask=None):
    """The block's own parameters through the paper's formula in float64."""
    weights = []
    for conv in (block.convA, block.convB, block.convV, block.conv_reconstruct):
        none = conv is None
        weights += [None, None] if none else [conv.weight.double().flatten(1), conv.bias.double()]
    flat = x.double().flatten(2)
    out = reference.block(
        flat, *weights, heads=block.heads, logit_scale=block.logit_scale,
        logit_scale_v=block.logit_scale_v, scale=block.scale, softmax_v=block.softmax_v,
        residual=flat if block.residual else None, mask=None if mask is None else mask.flatten(1),
    )  # fmt: skip
    return out.unflatten(2, x.shape[2:])


def make(**options):
    torch.manual_seed(5)
    options.setdefault("backend", "triton")
    return DoubleAttention(16, 8, 12, **options).to(DEVICE)


def image(*positions, channels=16):
    return torch.randn(2, channels, *(positions or (5, 6)), device=DEVICE)


def test_defaults():
    assert (DoubleAttention(64).c_m, DoubleAttention(64).c_n) == (32, 32)
    assert DoubleAttention(1).c_m == 1
    assert DoubleAttention(30, heads=4).c_m == 12
    assert DoubleAttention(4, heads=4).c_m == 4


def test_parameter_names_and_shapes():
    shapes = {name: tuple(p.shape) for name, p in make().named_parameters()}
    assert shapes == {
        "convA.weight": (8, 16, 1, 1), "convA.bias": (8,),
        "convB.weight": (12, 16, 1, 1), "convB.bias": (12,),
        "convV.weight": (12, 16, 1, 1), "convV.bias": (12,),
        "conv_reconstruct.weight": (16, 8, 1, 1), "conv_reconstruct.bias": (16,),
    }  # fmt: skip
    assert not any("bias" in name for name, _ in make(bias=False).named_parameters())
    assert not any("reconstruct" in name for name, _ in make(reconstruct=False).named_parameters())


@pytest.mark.parametrize("positions", [(30,), (5, 6), (2, 3, 5)])
def test_forward(positions):
    block, x = make(heads=2, residual=True, scale=0.5), image(*positions)
    mask = torch.rand(2, *positions, device=DEVICE) > 0.3
    check(block(x), definition(block, x), torch.float32)
    check(block(x, mask), definition(block, x, mask), torch.float32)
    check(block(x, mask=mask[:, None]), definition(block, x, mask), torch.float32)


def test_without_reconstruction():
    block, x = make(reconstruct=False), image()
    assert block(x).shape == (2, 8, 5, 6)
    check(block(x), definition(block, x), torch.float32)


def test_every_parameter_gets_a_gradient():
    """bias of B too: a missing gradient would stop distributed training. It is zero."""
    block = make(residual=True)
    block(image()).square().sum().backward()
    assert all(p.grad is not None for p in block.parameters())
    assert not block.convB.bias.grad.any()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_torch_func(backend):
    """The gradient of a functional call, as meta-learning takes it."""
    block, x = make(residual=True, backend=backend), image()
    parameters = dict(block.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(block, parameters, (x,)).square().sum()

    grads = torch.func.grad(loss)(parameters)
    loss(parameters).backward()
    for name, p in parameters.items():
        torch.testing.assert_close(grads[name], p.grad)


def test_per_sample_gradients():
    block, x = make(residual=True, backend="torch"), image()
    parameters = {k: p.detach() for k, p in block.named_parameters()}

    def loss(parameters, sample):
        return torch.func.functional_call(block, parameters, (sample[None],)).square().sum()

    grads = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    block(x[1:]).square().sum().backward()
    for name, p in block.named_parameters():
        torch.testing.assert_close(grads[name][1], p.grad)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", ["triton", "torch", "eager"])
def test_the_result_may_be_changed_in_place(backend, layout):
    """As ``nn.ReLU(inplace=True)`` and the sums of residual blocks do."""
    block = make(backend=backend)
    for size in (5, 16):
        x = image(size, size).to(memory_format=layout)
        grads = []
        for add in (torch.add, torch.Tensor.add_):
            out = add(block(x), x)
            grads.append(torch.autograd.grad(out.square().sum(), block.convV.weight)[0])
        assert torch.equal(*grads)


@pytest.mark.parametrize("backend", ["triton", "torch", "eager"])
def test_the_result_of_the_core_may_be_changed_in_place(backend):
    a, b, v = (
        torch.randn(2, 5, 4, dtype=torch.float64, device=DEVICE).mT.requires_grad_()
        for _ in range(3)
    )
    expected = double_attention(a, b, v, backend=backend).relu()
    out = double_attention(a, b, v, backend=backend).relu_()
    assert torch.equal(out, expected)
    grads = [torch.autograd.grad(y.square().sum(), (a, b, v)) for y in (out, expected)]
    assert all(map(torch.equal, *grads))


def test_copies_and_pickles():
    block, x = make(heads=2, residual=True, backend="torch", order="XZ"), image()
    expected = block(x)
    assert torch.equal(copy.deepcopy(block)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(block))(x), expected)
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)
    other = make(heads=2, residual=True, backend="torch", order="XZ")
    nn.init.zeros_(other.convA.weight)
    other.load_state_dict(block.state_dict())
    assert torch.equal(other(x), block(x))


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
def test_dtypes(convert):
    block = convert(make(residual=True))
    dtype = block.convA.weight.dtype
    x = image().to(dtype)
    out = block(x)
    assert out.dtype == dtype
    check(out, definition(block, x), dtype, slack=2)


def test_device_and_dtype_arguments():
    block = DoubleAttention(8, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in block.parameters()} == {("meta", torch.float16)}


def test_extra_repr():
    assert repr(make(backend="auto")).startswith(
        "DoubleAttention(\n  16, c_m=8, c_n=12, reconstruct=True\n"
    )
    text = make(heads=4, residual=True, backend="torch", scale=0.5).extra_repr()
    assert text.endswith("heads=4, scale=0.5, residual=True, backend='torch'")


def hooked(block):
    block.convA.register_forward_hook(lambda module, args, out: out + 1)


def pre_hooked(block):
    block.convV.register_forward_pre_hook(lambda module, args: args[0] * 2)


def parametrized(block):
    class Half(nn.Module):
        def forward(self, w):
            return w / 2

    parametrize.register_parametrization(block.convB, "weight", Half())


def pruned(block):
    prune.random_unstructured(block.conv_reconstruct, "weight", amount=0.5)


def replaced(block):
    block.convA = nn.Sequential(nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8)).to(DEVICE).eval()


def overridden(block):
    conv = block.convV
    conv.forward = lambda x: 3 * nn.Conv2d.forward(conv, x)


def strided(block):
    for name, channels in (("convA", 8), ("convB", 12)):
        setattr(block, name, nn.Conv2d(16, channels, 1, stride=2).to(DEVICE))


def wider(block):
    block.convV = nn.Conv2d(16, 12, 3, padding=1).to(DEVICE)


CHANGES = [strided, wider, hooked, pre_hooked, parametrized, pruned, replaced, overridden]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("residual", [False, True])
def test_changed_children_are_called(change, residual):
    block, x = make(heads=2, residual=residual), image()
    before = block(x)
    change(block)
    a, b, v = (conv(x).double() for conv in (block.convA, block.convB, block.convV))
    a, b, v = (t.flatten(2).unflatten(1, (2, -1)) for t in (a, b, v))
    z = reference.distribute(reference.gather(a, b), v).flatten(1, 2).unflatten(2, (5, 6))
    expected = block.conv_reconstruct(z.float()).double() + (x if residual else 0)
    check(block(x), expected, torch.float32)
    assert not torch.allclose(block(x), before)


def test_changed_children_on_videos_with_mask():
    block, x = make(), image(2, 3, 5)
    mask = torch.rand(2, 2, 3, 5, device=DEVICE) > 0.3
    expected = block(x, mask)
    block.convA.register_forward_hook(lambda module, args, out: out)
    check(block(x, mask), expected, torch.float32)


@pytest.mark.parametrize("positions", [(30,), (2, 3, 5)])
def test_parametrized_children_take_any_number_of_position_axes(positions):
    block, x = make(), image(*positions)
    parametrized(block)
    flat = block(x.flatten(2)[..., None])
    torch.testing.assert_close(block(x).flatten(2), flat.flatten(2))


def test_global_hooks_see_the_children():
    block, seen = make(), []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.append(module)
    )
    block(image())
    handle.remove()
    assert [m for m in seen if isinstance(m, nn.Conv2d)] == [
        block.convA, block.convB, block.convV, block.conv_reconstruct
    ]  # fmt: skip


@pytest.mark.parametrize("positions", [(30,), (5, 6), (2, 3, 5)])
def test_attention_maps(positions):
    block, x = make(heads=2), image(*positions)
    mask = torch.rand(2, *positions, device=DEVICE) > 0.3
    p, q = block.attention_maps(x, mask)
    assert p.shape == q.shape == (2, 2, 6, *positions)
    torch.testing.assert_close(p.flatten(3).sum(-1), torch.ones(2, 2, 6, device=DEVICE))
    torch.testing.assert_close(q.sum(2), torch.ones(2, 2, *positions, device=DEVICE))
    assert not p[~mask[:, None, None].expand_as(p)].any()
    a = block.convA.weight.flatten(1) @ x.flatten(2) + block.convA.bias[:, None]
    g = a.unflatten(1, (2, -1)) @ p.flatten(3).mT
    z = (g @ q.flatten(3)).flatten(1, 2)
    out = block.conv_reconstruct.weight.flatten(1) @ z + block.conv_reconstruct.bias[:, None]
    check(block(x, mask).flatten(2), out.double(), torch.float32)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_attention_maps_of_logits_that_half_precision_cannot_scale(dtype):
    """Twice 40,000 overflows float16; bfloat16 rounds 0.3 times a hundred by up to 1/16."""
    block = DoubleAttention(2, 2, 2, logit_scale=2.0, logit_scale_v=0.3).to(DEVICE, dtype)
    with torch.no_grad():
        for conv in (block.convB, block.convV):
            conv.weight.copy_(torch.eye(2)[..., None, None])
            conv.bias.zero_()
    x = torch.linspace(-4e4, 4e4, 40, device=DEVICE).view(1, 2, 20).to(dtype)
    activations = (100 + torch.arange(40, device=DEVICE).view(1, 20, 2).mT % 7 / 2).to(dtype)
    p, _ = block.attention_maps(x)
    _, q = block.attention_maps(activations)
    check(p, (2 * x.double()).softmax(-1)[:, None], dtype)
    check(q, (0.3 * activations.double()).softmax(1)[:, None], dtype)


def test_the_layer_is_the_function():
    block, x = make(residual=True), image()
    convs = (block.convA, block.convB, block.convV, block.conv_reconstruct)
    weights = [p for conv in convs for p in (conv.weight, conv.bias)]
    out = double_attention_block(x, *weights, residual=True, backend="triton")
    assert torch.equal(block(x), out)
