"""Calls of a layer, which are prepared once per signature: what later ones must notice and cost."""

import concurrent.futures
import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import da_triton
from da_triton import DoubleAttention, calls, functional, signatures
from da_triton.ops.aten import cpu_small
from support.numerics import DEVICE

each_backend = pytest.mark.parametrize("backend", ["torch", "triton"])


def make(backend, **options):
    torch.manual_seed(3)
    return DoubleAttention(16, 8, 8, residual=True, backend=backend, **options).to(DEVICE)


def activations(*shape):
    return torch.randn(shape or (2, 16, 4, 5), device=DEVICE)


def truth(layer, x, mask=None):
    """The definition, in a layer without prepared calls."""
    twin = copy.deepcopy(layer)
    twin.backend = "eager"
    with torch.no_grad():
        return twin(x, mask)


def warm(layer, x, *, grad=False):
    for _ in range(2):
        with torch.set_grad_enabled(grad):
            layer(x)
    return layer


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


@each_backend
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("shape", [(2, 16, 4, 5), (1, 16, 7), (2, 16, 2, 3, 2), (0, 16, 4, 5)])
def test_the_second_call_gives_the_first_ones_bits(backend, grad, shape):
    layer, x = make(backend), activations(*shape)
    with torch.set_grad_enabled(grad):
        first, second = layer(x), layer(x)
    assert torch.equal(first, second)
    close(second, truth(layer, x))


@each_backend
def test_gradients_of_a_prepared_call_are_those_of_the_first(backend):
    layer, x = make(backend), activations().requires_grad_()
    given = [x, *layer.parameters()]
    first = torch.autograd.grad(layer(x).square().sum(), given)
    second = torch.autograd.grad(layer(x).square().sum(), given)
    assert all(map(torch.equal, first, second))
    assert torch.equal(first[4], torch.zeros_like(layer.convB.bias)), "of the bias of B"


@each_backend
def test_frozen_weights_and_inputs_get_no_gradient(backend):
    layer, x = make(backend), activations()
    warm(layer, x, grad=True)
    layer.requires_grad_(False)
    assert not layer(x).requires_grad
    layer.convV.weight.requires_grad_()
    layer(x).sum().backward()
    assert layer.convV.weight.grad is not None
    assert layer.convA.weight.grad is None


@each_backend
def test_the_grad_mode_is_seen(backend):
    layer, x = make(backend), activations()
    warm(layer, x, grad=True)
    with torch.no_grad():
        assert layer(x).grad_fn is None
    with torch.inference_mode():
        assert layer(x).is_inference()
    assert layer(x).grad_fn is not None


@each_backend
def test_a_replaced_child_is_seen(backend):
    layer, x = make(backend), activations()
    warm(layer, x)
    layer.convA = nn.Conv2d(16, 8, 1, bias=False).to(DEVICE)
    close(layer(x).detach(), truth(layer, x))
    layer.convV = nn.Sequential(nn.Conv2d(16, 8, 1)).to(DEVICE)
    close(layer(x).detach(), truth(layer, x))


@each_backend
def test_hooks_on_a_child_run(backend):
    layer, x = make(backend), activations()
    warm(layer, x)
    seen = []
    layer.convB.register_forward_hook(lambda *_: seen.append(1))
    close(layer(x).detach(), truth(layer, x))
    assert seen


@each_backend
def test_a_bias_that_is_a_buffer_or_an_attribute_is_used(backend):
    layer, x = make(backend), activations()
    expected = truth(layer, x)
    for conv in (layer.convA, layer.convV, layer.conv_reconstruct):
        bias = conv.bias.detach()
        del conv.bias
        conv.register_buffer("bias", bias)
    close(layer(x).detach(), expected)
    bias = layer.convA.bias
    del layer.convA.bias
    layer.convA.bias = bias
    close(layer(x).detach(), expected)


@each_backend
@pytest.mark.parametrize("name", ["convA", "convB", "convV", "conv_reconstruct"])
def test_a_child_may_be_a_property(backend, name):
    layer, x = make(backend), activations()
    expected = truth(layer, x)
    child = layer._modules.pop(name)
    layer.__class__ = type("Subclass", (DoubleAttention,), {name: property(lambda _: child)})
    for _ in range(2):
        close(layer(x).detach(), expected)


@each_backend
def test_bias_b_alone_may_be_trained(backend):
    layer, x = make(backend), activations()
    layer.requires_grad_(False)
    bias = layer.convB.bias.requires_grad_()
    for create_graph in (False, True):
        (found,) = torch.autograd.grad(layer(x).sum(), bias, create_graph=create_graph)
        assert torch.equal(found, torch.zeros_like(bias))


@each_backend
def test_options_of_numpy(backend):
    layer, x = make(backend), activations()
    expected = truth(layer, x)
    layer.heads, layer.scale, layer.logit_scale = np.int64(1), np.float32(1), np.float16(1)
    layer.softmax_v = np.True_
    for _ in range(2):
        close(layer(x).detach(), expected)


def test_the_number_of_threads_is_asked_at_each_call(monkeypatch):
    monkeypatch.setattr(cpu_small, "CONVOLVED_MULTIPLICATIONS", 0)
    monkeypatch.setattr(cpu_small, "NARROW", 0)
    layer, x = make("torch", order="AZ").cpu(), activations(1, 16, 8, 8).cpu()

    def convolutions():
        with torch.no_grad(), torch.profiler.profile() as profile:
            layer(x)
        names = "aten::conv2d", "aten::conv_transpose2d"
        return sum(event.name in names for event in profile.events())

    assert convolutions() == (0 if torch.get_num_threads() == 1 else 6)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert convolutions() == 6
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert convolutions() == 0


@each_backend
def test_a_convolution_that_gets_a_stride_is_called(backend):
    layer, x = make(backend), activations(1, 16, 4, 4)
    warm(layer, x)
    for conv in (layer.convA, layer.convB, layer.convV):
        conv.stride = (2, 2)
    layer.residual, layer.conv_reconstruct = False, nn.Identity()
    layer.conv_reconstruct.kernel_size = (1, 1)
    assert layer(x).shape == (1, 8, 2, 2)


@each_backend
@pytest.mark.parametrize(
    ("name", "value"),
    [("scale", 0.5), ("logit_scale", 2.0), ("logit_scale_v", 3), ("heads", 2), ("softmax_v", False),
     ("residual", False), ("order", "XH"), ("recompute", True)],
)  # fmt: skip
def test_a_changed_option_is_seen(backend, name, value):
    layer, x = make(backend), activations()
    warm(layer, x)
    setattr(layer, name, value)
    close(layer(x).detach(), truth_of(layer, x))


def truth_of(layer, x):
    twin = copy.deepcopy(layer)
    twin.order = twin.recompute = "auto"
    return truth(twin, x)


@each_backend
@pytest.mark.parametrize(
    ("name", "value", "error"),
    [("softmax_v", 1, TypeError), ("heads", True, ValueError), ("heads", 1.0, ValueError),
     ("residual", 1, TypeError), ("scale", torch.tensor(1.0), TypeError), ("scale", [1], TypeError),
     ("backend", "gpu", ValueError), ("order", "ZA", ValueError), ("recompute", 0, ValueError)],
)  # fmt: skip
def test_wrong_options_raise_where_right_ones_that_are_equal_were_prepared(
    backend, name, value, error
):
    layer, x = make(backend), activations()
    warm(layer, x)
    setattr(layer, name, value)
    with pytest.raises(error, match=name):
        layer(x)


@each_backend
def test_wrong_tensors_raise_after_right_ones(backend):
    layer, x = make(backend), activations()
    warm(layer, x)
    with pytest.raises(ValueError, match="x must have 16 channels"):
        layer(activations(2, 8, 4, 5))
    with pytest.raises(TypeError, match="x must be a torch"):
        layer(x.tolist())
    layer(activations(1).expand(2, 16, 4, 5))
    with pytest.raises(TypeError, match="x must be dense"):
        layer(x.to_sparse())  # whose strides are 0, too
    with pytest.raises(TypeError, match="must not be a nested tensor"):
        layer(torch.nested.nested_tensor([x[0], x[1]]))
    with pytest.raises(TypeError, match="mask must be bool"):
        layer(x, torch.ones(2, 4, 5, device=DEVICE))
    with pytest.raises(TypeError, match="must share one dtype"):
        layer(x.double())


@each_backend
def test_other_dtypes_strides_and_masks_are_other_calls(backend):
    layer, x = make(backend), activations()
    warm(layer, x)
    close(layer(x.to(memory_format=torch.channels_last)).detach(), truth(layer, x))
    crop = activations(2, 16, 6, 9)[..., 1:5, 2:7]
    close(layer(crop).detach(), truth(layer, crop))
    mask = torch.rand(2, 4, 5, device=DEVICE) > 0.4
    for given in (mask, mask[:, None], mask.flip(1)):
        close(layer(x, given).detach(), truth(layer, x, given))
    layer.double()
    assert layer(x.double()).dtype == torch.float64
    close(layer(x.double()).detach(), truth(layer, x.double()))


@each_backend
def test_a_tensor_that_is_negated_lazily_is_read_with_its_sign(backend):
    layer, x = make(backend), activations()
    warm(layer, x)
    negated = torch._neg_view(x)
    assert negated.is_neg()
    close(layer(negated).detach(), truth(layer, -x))
    a, b, v = activations(2, 8, 5), activations(2, 6, 5), activations(2, 6, 5)
    found = da_triton.double_attention(a, torch._neg_view(b), v, backend=backend)
    close(found, da_triton.double_attention(a, -b, v, backend="eager"))


@each_backend
def test_autocast_is_seen(backend):
    layer, x = make(backend), activations()
    warm(layer, x)
    with torch.autocast(DEVICE, torch.float16):
        assert layer(x).dtype == torch.float32, "the sum with x"
        layer.residual = False
        for _ in range(2):
            assert layer(x).dtype == torch.float16
        g = da_triton.gather(x, x, backend=backend)
        assert g.dtype == torch.float16
    assert layer(x).dtype == torch.float32
    layer.residual = True
    for _ in range(2):
        given = x.clone().requires_grad_()
        with torch.autocast(DEVICE, torch.float16):
            y = layer(given)
        y.sum().backward()
        assert given.grad.dtype == layer.convA.weight.grad.dtype == torch.float32


@each_backend
def test_whatever_watches_sees_operations_after_a_prepared_call(backend):
    layer, x = make(backend), activations()
    warm(layer, x, grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() > 0
    with torch.profiler.profile() as profile:
        layer(x)
    names = {event.key for event in profile.key_averages()}
    assert ("da_triton::block" in names) == (backend == "triton")
    _, tangent = torch.func.jvp(layer, (x,), (x,))
    assert torch.isfinite(tangent).all()
    each = torch.func.vmap(layer)(x[:, None])
    close(each.squeeze(1).detach(), truth(layer, x))


def test_a_counter_around_the_backward_pass_alone_sees_it():
    layer, x = make("triton"), activations().requires_grad_()
    y = layer(x)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() > 0
    expected = torch.autograd.grad(layer(x).sum(), x)[0]
    close(x.grad, expected)


@each_backend
def test_gradients_of_gradients(backend):
    layer, x = make(backend).double(), activations().double().requires_grad_()

    def second(layer):
        (g,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), [x, *layer.parameters()], allow_unused=True)

    twin = copy.deepcopy(layer)
    twin.backend = "eager"
    for _ in range(2):
        for found, expected in zip(second(layer), second(twin), strict=True):
            if found is not None:
                torch.testing.assert_close(found, torch.zeros_like(found) if expected is None
                                           else expected, atol=1e-8, rtol=1e-6)  # fmt: skip


@each_backend
def test_what_follows_may_change_the_result_in_place(backend):
    layer, x = make(backend), activations().requires_grad_()
    for memory in (torch.contiguous_format, torch.channels_last):
        y = layer(x.to(memory_format=memory))
        y.mul_(2).relu_().sum().backward()


@each_backend
def test_nothing_prepared_keeps_tensors_alive(backend):
    layer, x = make(backend), activations().requires_grad_()
    layer(x).sum().backward()
    da_triton.double_attention(x, x, x, backend=backend)
    kept = [weakref.ref(t) for t in (x, *layer.parameters())]
    del layer, x
    gc.collect()
    assert not any(ref() is not None for ref in kept)


def test_the_table_is_bounded(monkeypatch):
    monkeypatch.setattr(signatures, "LIMIT", 4)
    layer = make("torch")
    for length in range(3, 12):
        layer(activations(1, 16, length))
        da_triton.gather(activations(1, 16, length), activations(1, 16, length), backend="torch")
    assert len(calls._table.found) == len(functional._table.found) == 4
    signatures.forget()
    assert len(calls._table.found) == len(functional._table.found) == 0


@each_backend
def test_threads_share_what_is_prepared(backend):
    layer = make(backend)
    given = [activations(1, 16, length) for length in (3, 4, 5, 6)] * 6

    def run(x):
        with torch.no_grad():
            return layer(x)

    expected = [truth(layer, x) for x in given]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(run, given), expected, strict=True):
            close(found, wanted)


@each_backend
def test_copies_are_prepared_on_their_own_weights(backend):
    layer, x = make(backend), activations()
    warm(layer, x)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.convA.weight.mul_(2)
        close(twin(x), truth(twin, x))
        assert not torch.allclose(twin(x), layer(x))


@each_backend
def test_the_functions_give_the_same_bits_again_and_the_same_errors(backend):
    a, b, v = activations(2, 8, 3, 3), activations(2, 6, 3, 3), activations(2, 6, 4)
    first = da_triton.double_attention(a, b, v, backend=backend)
    assert torch.equal(da_triton.double_attention(a, b, v, backend=backend), first)
    g = da_triton.gather(a, b, backend=backend)
    assert torch.equal(da_triton.gather(a, b, backend=backend), g)
    z = da_triton.distribute(g, v, backend=backend)
    assert torch.equal(da_triton.distribute(g, v, backend=backend), z)
    close(z, first)
    with pytest.raises(ValueError, match="heads"):
        da_triton.gather(a, b, heads=True, backend=backend)
    with pytest.raises(TypeError, match="softmax"):
        da_triton.distribute(g, v, softmax=1, backend=backend)
    with pytest.raises(TypeError, match="extra must be a pair"):
        da_triton.double_attention(a, b, v, extra=a, backend=backend)
