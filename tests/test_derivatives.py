"""Derivatives of the public functions and layers, of every kind, eager and compiled."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, linearize, vjp
from torch.utils._pytree import tree_leaves

import da_triton
from da_triton import DoubleAttention
from support.numerics import DEVICE, check

each_backend = pytest.mark.parametrize("backend", ["triton", "torch"])
SHAPES = (4, 6), (4,), (4, 6), (4,), (4, 6), (4,), (6, 4), (6,)
GENERATOR = torch.Generator().manual_seed(5)
WEIGHTS = [torch.randn(shape, generator=GENERATOR) for shape in SHAPES]


def gather(x, backend):
    return da_triton.gather(x[:, :2], x[:, 2:4], logit_scale=0.7, backend=backend)


def distribute(x, backend):
    return da_triton.distribute(x[:, None, :2, :2], x[:, 2:4], scale=1.3, backend=backend)


def core(x, backend):
    return da_triton.double_attention(x[:, :2], x[:, 2:4], x[:, 4:], heads=2, backend=backend)


def masked(x, backend):
    mask = torch.tensor([[True, False, True, True]], device=DEVICE)
    a, b, v = x.split(2, 1)
    extra = a[..., :1].flip(1), b[..., :1].flip(1)
    return da_triton.double_attention(a, b, v, mask=mask, extra=extra, backend=backend)


def block(x, backend, **options):
    """Weights and biases, bias_b too, depend on x."""
    weights = [w.to(x.device, x.dtype) * (1 + x.mean() / 9) for w in WEIGHTS]
    return da_triton.double_attention_block(
        x, *weights, heads=2, residual=True, backend=backend, **options
    )


def recomputing(x, backend):
    return block(x, backend, **({} if backend == "eager" else {"recompute": True}))


each_function = pytest.mark.parametrize(
    "function", [gather, distribute, core, masked, block, recomputing]
)


def loss(f):
    return lambda x: f(x).square().sum()


def two(x):
    return torch.stack([x, -x])


def pulled(f, x):
    """A pulled-back vector, and its derivative with respect to the vector."""
    y, pull = vjp(f, x)
    return jvp(pull, (y.detach(),), (torch.ones_like(y),))


def batched(f, x):
    x = x.clone().requires_grad_()
    y = f(x)
    return torch.autograd.grad(y, x, two(y.detach()), is_grads_batched=True)


def batched_of_a_graph(f, x):
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(f)(x), x, create_graph=True)
    return torch.autograd.grad(first, x, two(first.detach()), is_grads_batched=True)


def vmap_of_autograd(f, x):
    x = x.clone().requires_grad_()
    y = f(x)
    pull = torch.vmap(lambda u: torch.autograd.grad(y, x, u, retain_graph=True))
    return pull(two(y.detach()))


def penalty_with_hooks(f, x):
    x = x.clone().requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        (first,) = torch.autograd.grad(loss(f)(x), x, create_graph=True)
        penalty = first.square().sum()
    return torch.autograd.grad(penalty, x)


def tangent(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.flip(-1)))).tangent


def tangent_of_a_gradient(f, x):
    """Forward pass outside, backward inside the level."""
    x = x.clone().requires_grad_()
    y = f(x)
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.ones_like(y), y.detach())
        (found,) = torch.autograd.grad(y, x, upstream)
        return forward_ad.unpack_dual(found).tangent


DERIVATIVES = {
    "jacrev": lambda f, x: jacrev(f)(x),
    "vmap_of_grad": lambda f, x: torch.vmap(grad(loss(f)))(two(x)),
    "vmap_of_jacrev": lambda f, x: torch.vmap(jacrev(f))(two(x)),
    "jacrev_of_grad": lambda f, x: jacrev(grad(loss(f)))(x),
    "vmap_of_autograd": vmap_of_autograd,
    "jacobian": lambda f, x: jacobian(f, x, vectorize=True),
    "hessian": lambda f, x: hessian(loss(f), x, vectorize=True),
    "batched": batched,
    "batched_of_a_graph": batched_of_a_graph,
    "penalty_with_hooks": penalty_with_hooks,
    # forward mode
    "jvp": lambda f, x: jvp(f, (x,), (x.flip(-1),)),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "hessian_by_forward": lambda f, x: torch.func.hessian(loss(f))(x),
    "reverse_of_forward": lambda f, x: jacrev(jacfwd(loss(f)))(x),
    "forward_of_forward": lambda f, x: jacfwd(jacfwd(loss(f)))(x),
    "linearize": lambda f, x: linearize(f, x)[1](x.flip(-1)),
    "vmap_of_jacfwd": lambda f, x: torch.vmap(jacfwd(f))(two(x)),
    "jacobian_by_forward": lambda f, x: jacobian(f, x, vectorize=True, strategy="forward-mode"),
    "pulled": pulled,
    "tangent": tangent,
    "tangent_of_a_gradient": tangent_of_a_gradient,
}


def compare(ours, truth):
    ours, truth = tree_leaves(ours), tree_leaves(truth)
    assert len(ours) == len(truth)
    for x, expected in zip(ours, truth, strict=True):
        expected = expected.masked_fill(expected.abs() < 1e-12, 0)  # that of bias_b
        check(x, expected, torch.float32, slack=4)


@each_backend
@each_function
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch's own operators
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_derivatives(derivative, function, backend):
    x = torch.randn(1, 6, 4, device=DEVICE)
    take = DERIVATIVES[derivative]
    ours = take(lambda x: function(x, backend), x)
    compare(ours, take(lambda x: function(x, "eager"), x.double()))


def layers(backend):
    """A layer and the definition in float64, with the same weights."""
    ours = DoubleAttention(6, 4, 10, heads=2, residual=True, backend=backend, device=DEVICE)
    truth = DoubleAttention(6, 4, 10, heads=2, residual=True, backend="eager", device=DEVICE)
    truth.load_state_dict(ours.state_dict())
    return ours, truth.double()


def per_sample(layer, x):
    def of_one(parameters, x):
        return functional_call(layer, parameters, (x[None],)).square().sum()

    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    return torch.vmap(grad(of_one), (None, 0))(parameters, x)


def gradients(layer, x):
    return torch.autograd.grad(layer(x).square().sum(), [*layer.parameters()])


OF_LAYERS = {
    "vmap": lambda layer, x: torch.vmap(lambda x: layer(x[None]))(x),
    "per_sample": per_sample,
    "grad": lambda layer, x: grad(loss(layer))(x),
    "jvp": lambda layer, x: jvp(layer, (x,), (x.flip(-1),)),
    "hessian": lambda layer, x: torch.func.hessian(loss(layer))(x[:1, :, :1]),
}


@each_backend
@pytest.mark.parametrize("compiler", [None, "aot_eager"])
@pytest.mark.parametrize("derivative", OF_LAYERS)
def test_of_a_layer(derivative, compiler, backend):
    torch._dynamo.reset()
    ours, truth = layers(backend)
    x = torch.randn(3, 6, 2, 3, device=DEVICE)
    take = OF_LAYERS[derivative]
    found = take
    if compiler is not None:
        found = torch.compile(take, backend=compiler, fullgraph=True)
    compare(found(ours, x), take(truth, x.double()))


@each_backend
def test_a_layer_compiled_on_its_own_inside_and_outside_of_transforms(backend):
    """Each transform gets a graph of its own; none is used in the place of another."""
    torch._dynamo.reset()
    ours, truth = layers(backend)
    x = torch.randn(3, 6, 2, 3, device=DEVICE)
    compiled = torch.compile(ours, backend="aot_eager")
    for derivative in ("vmap", "jvp", "grad", "vmap"):
        check(compiled(x).detach(), truth(x.double()), torch.float32)
        take = OF_LAYERS[derivative]
        compare(take(compiled, x), take(truth, x.double()))


@each_backend
@pytest.mark.parametrize("compiler", [None, "aot_eager"])
@pytest.mark.parametrize("take", [gradients, per_sample])
def test_bias_b_has_a_zero_gradient_and_no_other_effect(take, compiler, backend):
    """NaN in it stays there."""
    torch._dynamo.reset()
    ours, _ = layers(backend)
    x = torch.randn(3, 6, 2, 3, device=DEVICE)
    used = ours
    if compiler is not None and take is gradients:
        used = torch.compile(ours, backend=compiler, fullgraph=True)
    elif compiler is not None:
        take = torch.compile(take, backend=compiler, fullgraph=True)
    found = []
    for value in (1.0, float("nan")):
        torch.nn.init.constant_(ours.convB.bias, value)
        found.append(tree_leaves(take(used, x)))
    for y, same in zip(*found, strict=True):
        assert torch.equal(y, same)
    names = [name for name, _ in ours.named_parameters()]
    bias = found[0][names.index("convB.bias")]
    assert bias.shape[-1] == 10
    assert not bias.any()
