"""``double_attention_block`` in every association order, against the definition in float64."""

import functools

import pytest
import torch

import da_triton
from da_triton.projection import project
from support.cases import ORDERS
from support.compare import check_against_reference, step, widened
from support.numerics import DEVICE, check, peaky, relative_rms

C, C_M, C_N, POSITIONS = 20, 12, 8, (5, 7)
eager = functools.partial(da_triton.double_attention_block, backend="eager")


def parameters(dtype, bias=True, reconstruct=True):
    """Weights that give logits of deviation about 3."""
    shapes = [(C_M, C), (C_N, C), (C_N, C), (C, C_M)]
    result = []
    for i, (o, c) in enumerate(shapes):
        gain = 3 if i in (1, 2) else 1
        weight = gain * torch.randn(o, c, dtype=torch.float64) / c**0.5
        result += [weight, torch.randn(o, dtype=torch.float64) if bias else None]
    if not reconstruct:
        result[6:] = [None, None]
    return [None if p is None else p.to(device=DEVICE, dtype=dtype) for p in result]


def compare(x, weights, slack=1, order="auto", backend="triton", **options):
    block = functools.partial(da_triton.double_attention_block, order=order, backend=backend)
    channels = C if weights[6] is not None else C_M
    upstream = torch.randn(x.shape[0], channels, *x.shape[2:], dtype=torch.float64)
    found = check_against_reference(
        block, eager, (x, *weights), upstream, slack=slack, left_out=["bias_b"], **options
    )
    if weights[3] is not None:
        assert not found["bias_b"].any(), "a softmax over positions removes bias_b"


def features(dtype, batch=2, channels_last=False):
    x = peaky(batch, 1, C, 35, dtype=dtype, deviation=1)[:, 0].reshape(batch, C, *POSITIONS)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("order", ORDERS)
def test_matches_the_definition(order, backend, heads, channels_last):
    x = features(torch.float32, channels_last=channels_last)
    weights = parameters(torch.float32)
    options = {"heads": heads, "backend": backend, "residual": True}
    compare(x, weights, order=order, **options)
    out = da_triton.double_attention_block(x, *weights, order=order, **options)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert out.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_dtypes(order, dtype):
    compare(features(dtype), parameters(dtype), slack=2, order=order, residual=True)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("order", ORDERS)
def test_every_option_at_once(order, backend):
    mask = torch.rand(2, *POSITIONS, device=DEVICE) > 0.4
    compare(
        features(torch.float32), parameters(torch.float32), order=order, backend=backend, heads=2,
        logit_scale=0.5, logit_scale_v=0.7, scale=1.3, softmax_v=False, mask=mask,
    )  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
def test_a_sample_with_every_position_masked(order):
    """G is zero there: no bias of A either."""
    mask = torch.ones(2, *POSITIONS, dtype=torch.bool, device=DEVICE)
    mask[0] = False
    compare(features(torch.float32), parameters(torch.float32), order=order, mask=mask)


@pytest.mark.parametrize("order", ORDERS)
def test_without_biases(order):
    compare(features(torch.float32), parameters(torch.float32, bias=False), order=order)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("order", ["AZ", "XZ", "auto"])
def test_without_reconstruction(order, residual):
    weights = parameters(torch.float32, reconstruct=False)
    if residual:
        weights[:2] = [torch.randn(C, C, device=DEVICE) / C**0.5, torch.randn(C, device=DEVICE)]
        x, upstream = features(torch.float32), torch.randn(2, C, *POSITIONS, device=DEVICE)
        block = functools.partial(da_triton.double_attention_block, order=order, backend="triton")
        expected = step(eager, widened((x, *weights)), upstream, residual=True)
        actual = step(block, (x, *weights), upstream, residual=True)
        for name in set(actual) - {"bias_b"}:
            check(actual[name], expected[name], torch.float32)
    else:
        compare(features(torch.float32), weights, order=order)


@pytest.mark.parametrize("positions", [(35,), (3, 4, 3)])
def test_other_numbers_of_position_axes(positions):
    size = torch.Size(positions).numel()
    x = torch.randn(2, C, size, device=DEVICE).reshape(2, C, *positions)
    weights = parameters(torch.float32)
    compare(x, weights)
    flat = da_triton.double_attention_block(x.flatten(2), *weights)
    shaped = da_triton.double_attention_block(x, *weights)
    assert torch.equal(shaped.flatten(2), flat)


def test_weights_with_trailing_axes():
    x, weights = features(torch.float32), parameters(torch.float32)
    flat = da_triton.double_attention_block(x, *weights)
    for axes in ((1,), (1, 1), (1, 1, 1)):
        shaped = [w.reshape(*w.shape, *axes) if w.dim() == 2 else w for w in weights]
        assert torch.equal(da_triton.double_attention_block(x, *shaped), flat)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("order", ORDERS)
def test_recomputation_gives_the_same_and_saves_less(order, backend):
    x, weights = features(torch.float32), parameters(torch.float32)
    upstream = torch.randn(2, C, *POSITIONS, device=DEVICE)
    results = []
    for recompute in (True, False):
        options = {"order": order, "backend": backend, "recompute": recompute, "residual": True}
        block = functools.partial(da_triton.double_attention_block, **options)
        results.append(step(block, (x, *weights), upstream))
        saved = []
        leaves = [x.requires_grad_(), *(w.requires_grad_() for w in weights)]
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t) or t, lambda t: t
        ):
            da_triton.double_attention_block(*leaves, **options)
        given = {leaf.untyped_storage().data_ptr() for leaf in leaves}
        large = [t for t in saved if t.untyped_storage().data_ptr() not in given and 35 in t.shape]
        assert bool(large) != recompute
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name


def test_no_order_and_no_backend_disagree_by_more_than_rounding():
    x, weights = features(torch.float64), parameters(torch.float64)
    outs = [
        da_triton.double_attention_block(x, *weights, order=order, backend=backend)
        for order in ORDERS
        for backend in ("triton", "torch")
    ]
    for out in outs[1:]:
        assert relative_rms(out, outs[0]) < 1e-13


@pytest.mark.parametrize("order", ORDERS)
def test_second_derivatives(order):
    small = [p.detach() for p in parameters(torch.float64)]
    x = features(torch.float64, batch=1)
    grads = []
    for options in ({"order": order, "backend": "triton"}, {"backend": "eager"}):
        leaves = [p.clone().requires_grad_() for p in (x, *small)]
        out = da_triton.double_attention_block(*leaves, residual=True, **options)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        penalty = sum(f.square().sum() for f in first)
        grads.append(torch.autograd.grad(penalty, [leaves[i] for i in (0, 1, 3, 5, 7)]))
    for ours, theirs in zip(*grads, strict=True):
        check(ours, theirs, torch.float64, slack=100)  # fourth powers of the activations


def test_bias_b_has_a_zero_gradient_under_vmap_too():
    """As in an ensemble, whose parameters are stacked: none may be without a gradient."""
    x = torch.randn(2, 6, 9, device=DEVICE)
    shapes = ((4, 6), (3, 6), (3, 6), (6, 4))
    wa, wb, wv, wo = (torch.randn(s, device=DEVICE) for s in shapes)
    biases = torch.randn(5, 3, device=DEVICE, requires_grad=True)

    def block(bias):
        weights = (wa, None, wb, bias, wv, None, wo, None)
        return da_triton.double_attention_block(x, *weights, backend="torch")

    (grad,) = torch.autograd.grad(torch.vmap(block)(biases).sum(), biases)
    assert torch.equal(grad, torch.zeros_like(biases))


@pytest.mark.parametrize("residual", [False, True])
def test_autocast(residual):
    x, weights = features(torch.float32).requires_grad_(), parameters(torch.float32)
    weights = [w.requires_grad_() for w in weights]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = da_triton.double_attention_block(x, *weights, residual=residual, backend="triton")
    assert out.dtype == (torch.float32 if residual else torch.bfloat16)
    out.sum().backward()
    assert all(w.grad.dtype == torch.float32 for w in weights)
    expected = da_triton.double_attention_block(
        x.double(), *(w.double() for w in weights), residual=residual, backend="eager"
    )
    check(out, expected, torch.bfloat16, slack=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("add", [False, True])
def test_project(layout, bias, add, dtype):
    kind = {"dtype": dtype, "device": DEVICE}
    x = torch.randn(2, 9, 11, **kind) if layout == "nchw" else torch.randn(2, 11, 9, **kind).mT
    w, c = torch.randn(5, 9, **kind), torch.randn(5, **kind) if bias else None
    y = torch.randn(2, 5, 11, **kind) if add else None
    expected = torch.nn.functional.conv1d(x, w[..., None], c) + (y if add else 0)
    torch.testing.assert_close(project(x, w, c, y), expected)
