"""The public functions and layers under torch.func, inference mode, views, streams and graphs."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import da_triton
from da_triton import DoubleAttention
from support.cases import each_backend
from support.numerics import DEVICE, TOLERANCE, check, relative_rms

on_a_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")


def gather(inputs, backend):
    a, b, *_ = inputs
    return da_triton.gather(a, b, heads=2, backend=backend)


def distribute(inputs, backend):
    _, b, v, *_ = inputs
    g = b[:, :3, :].reshape(2, 2, 3, 5)[..., :3]
    return da_triton.distribute(g, v, backend=backend)


def core(inputs, backend):
    a, b, v, *_ = inputs
    return da_triton.double_attention(a, b, v, heads=2, backend=backend)


def block(inputs, backend):
    _, _, x, *weights = inputs
    weight_a, weight_b, weight_v, weight_out = weights
    return da_triton.double_attention_block(
        x, weight_a, None, weight_b, None, weight_v, None, weight_out, None, heads=2,
        residual=True, backend=backend,
    )  # fmt: skip


each_function = pytest.mark.parametrize("function", [gather, distribute, core, block])


def inputs():
    torch.manual_seed(0)
    shapes = ((2, 4, 10), (2, 6, 10), (2, 6, 10), (4, 6), (6, 6), (6, 6), (6, 4))
    return [torch.randn(shape, device=DEVICE) for shape in shapes]


def definition(function, given, wanted):
    """Gradients of ``wanted`` inputs through the definition, in float64."""
    wide = [x.detach().double().requires_grad_() for x in given]
    function(wide, "eager").square().sum().backward()
    return [wide[i].grad for i in wanted]


def used(function, given):
    """Inputs that the function reads."""
    leaves = [x.detach().requires_grad_() for x in given]
    function(leaves, "eager").sum().backward()
    return [i for i, x in enumerate(leaves) if x.grad is not None]


@each_backend
@each_function
def test_gradients_reach_the_base_of_views(function, backend):
    """Inputs that are slices, transposes or a diagonal of leaves; all of one leaf, too."""
    given = inputs()
    wanted = used(function, given)
    expected = definition(function, given, wanted)
    wider = [torch.randn(*x.shape[:-1], 2 * x.shape[-1], device=DEVICE) for x in given]
    for base, x in zip(wider, given, strict=True):
        base[..., ::2] = x
    leaves = [base.requires_grad_() for base in wider]
    function([leaf[..., ::2] for leaf in leaves], backend).square().sum().backward()
    for i, truth in zip(wanted, expected, strict=True):
        check(leaves[i].grad[..., ::2], truth, torch.float32, slack=2)
        assert not leaves[i].grad[..., 1::2].any()
    joined = torch.cat([x.flatten() for x in given]).requires_grad_()
    parts = joined.split([x.numel() for x in given])
    views = [p.view_as(x) for p, x in zip(parts, given, strict=True)]
    function(views, backend).square().sum().backward()
    parts = joined.grad.split([x.numel() for x in given])
    for i, truth in zip(wanted, expected, strict=True):
        check(parts[i].view_as(given[i]), truth, torch.float32, slack=2)


@each_backend
@each_function
def test_changes_in_place_are_noticed(function, backend):
    """In-place changes before backward: an error if backward reads the tensor, else the same
    gradients."""
    wanted = used(function, inputs())
    noticed = []
    for place in (*wanted, "result"):
        leaves = [x.requires_grad_() for x in inputs()]
        given = [x + 0 for x in leaves]
        out = function(given, backend)
        total = out.sum()
        chosen = [leaves[i] for i in wanted]
        expected = torch.autograd.grad(total, chosen, retain_graph=True)
        with torch.no_grad():
            (out if place == "result" else given[place]).mul_(2)
        try:
            found = torch.autograd.grad(total, chosen)
        except RuntimeError as error:
            noticed.append(str(error))
        else:
            for ours, truth in zip(found, expected, strict=True):
                assert torch.equal(ours, truth)
    assert all("modified by an inplace operation" in message for message in noticed)
    assert noticed or backend != "triton"  # the kernels save their inputs


@each_backend
@each_function
def test_inference_mode(function, backend):
    given = inputs()
    expected = function(given, backend)
    with torch.inference_mode():
        out = function(given, backend)
        made_inside = function([x.clone() for x in given], backend)
    assert out.is_inference()
    assert torch.equal(out, expected)
    assert torch.equal(made_inside, expected)
    leaf = torch.ones(out.shape, device=DEVICE, requires_grad=True)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        torch.mul(leaf, out)


@each_backend
@each_function
def test_vmap(function, backend):
    given = inputs()
    many = [torch.stack([x, 2 * x, -x]) for x in given]
    expected = torch.stack([function([x[i] for x in many], "eager") for i in range(3)])
    out = torch.vmap(lambda *x: function(x, backend))(*many)
    assert relative_rms(out, expected) < 1e-6
    shared = torch.vmap(lambda x, *rest: function((x, *rest), backend), (0, *[None] * 6))(
        many[0], *given[1:]
    )
    assert relative_rms(shared[0], expected[0]) < 1e-6


class Launches(TorchDispatchMode):
    """Operators of this package that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "da_triton":
            self.names.append(op._opname)
        return op(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("error:There is a performance drop")
@pytest.mark.parametrize("of_weights", [False, True])
@pytest.mark.parametrize("function", [core, block])
def test_vmap_joins_the_batch(function, of_weights):
    """One run for all; with differing weights, and for their gradients, one each."""
    many = [torch.stack([x, 2 * x, -x]) for x in inputs()]
    here = (0,) * 7 if of_weights else (0,) * 3 + (None,) * 4
    given = [x if dim == 0 else x[0] for x, dim in zip(many, here, strict=True)]
    leaves = [given[i].requires_grad_() for i in used(function, inputs())]
    with Launches() as forward:
        out = torch.vmap(lambda *x: function(x, "triton"), here)(*given)
    with Launches() as backward:
        found = torch.autograd.grad(out.square().sum(), leaves)
    expected = torch.vmap(lambda *x: function(x, "eager"), here)(*given)
    for ours, truth in zip(
        found, torch.autograd.grad(expected.square().sum(), leaves), strict=True
    ):
        check(ours, truth, torch.float32, slack=2)
    if function is core:
        assert forward.names == ["gather", "distribute"]
        assert backward.names == ["distribute_backward", "gather_backward"]
    else:
        assert forward.names == ["block"] * (3 if of_weights else 1)
        assert backward.names == ["block_backward"] * 3


@each_backend
@each_function
def test_torch_func(function, backend):
    """Gradients, Jacobian-vector products in reverse, and gradients of each sample."""
    given = inputs()
    wanted = used(function, given)
    expected = definition(function, given, wanted)

    def loss(*x):
        return function(x, backend).square().sum()

    for found, truth in zip(torch.func.grad(loss, tuple(wanted))(*given), expected, strict=True):
        check(found, truth, torch.float32, slack=2)
    _, pull = torch.func.vjp(lambda *x: function(x, backend), *given)
    upstream = 2 * function(given, backend)
    for i, truth in zip(wanted, expected, strict=True):
        check(pull(upstream)[i], truth, torch.float32, slack=2)
    many = [torch.stack([x, x]) for x in given]
    each = torch.vmap(torch.func.grad(loss, tuple(wanted)))(*many)
    for found, truth in zip(each, expected, strict=True):
        check(found[1], truth, torch.float32, slack=2)


def scaled(a, b, v, weight, backend):
    z = da_triton.double_attention(
        a, b, v, logit_scale=0.7, logit_scale_v=0.9, scale=1.3, backend=backend
    )
    return da_triton.double_attention_block(
        z, weight, weight[:, 0], weight, None, weight, None, weight, None, logit_scale=0.7,
        logit_scale_v=0.9, scale=1.3, residual=True, backend=backend,
    )  # fmt: skip


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_torch_func_of_one_argument_beside_others_that_it_captures(dtype, backend):
    _, b, v, _, weight, *_ = inputs()
    given = [x.to(dtype) for x in (b, b, v, weight)]
    for i in range(4):
        x = given[i].clone().requires_grad_()
        z = scaled(*given[:i], x, *given[i + 1 :], backend)
        (expected,) = torch.autograd.grad(z.float().square().sum(), x)

        def loss(x, i=i):
            return scaled(*given[:i], x, *given[i + 1 :], backend).float().square().sum()

        assert relative_rms(torch.func.grad(loss)(given[i]), expected) < 2 * TOLERANCE[dtype]


@each_backend
def test_layer_as_a_function(backend):
    layer = DoubleAttention(6, heads=1, residual=True, backend=backend, device=DEVICE)
    x = torch.randn(2, 6, 10, device=DEVICE)
    # torch.matmul chooses by requires_grad how it multiplies, and so the last bits.
    double = {k: (2 * p.detach()).requires_grad_() for k, p in layer.named_parameters()}
    out = torch.func.functional_call(layer, double, (x,))
    before = layer(x)
    layer.load_state_dict(double)
    assert torch.equal(out, layer(x))
    assert not torch.equal(out, before)


@on_a_gpu
@each_function
def test_on_another_stream(function):
    given = inputs()
    wanted = used(function, given)
    expected = definition(function, given, wanted)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        leaves = [x.detach().requires_grad_() for x in given]
        function(leaves, "triton").square().sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    for i, truth in zip(wanted, expected, strict=True):
        check(leaves[i].grad, truth, torch.float32, slack=2)


@on_a_gpu
def test_on_many_streams_at_once():
    given = inputs()
    expected = core(given, "triton")
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for _ in range(8):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(core(given, "triton"))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in results)


@on_a_gpu
@each_function
def test_captured_and_replayed(function):
    """A CUDA graph of forward and backward, replayed with other numbers in the same memory."""
    leaves = [x.requires_grad_() for x in inputs()]
    wanted = used(function, leaves)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function(leaves, "triton").square().sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    for leaf in leaves:
        leaf.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(leaves, "triton")
        out.square().sum().backward()
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    expected = definition(function, leaves, wanted)
    for i, truth in zip(wanted, expected, strict=True):
        check(leaves[i].grad, truth, torch.float32, slack=2)
    assert relative_rms(out, function([x.detach().double() for x in leaves], "eager")) < 2e-6


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
@each_function
def test_on_another_device_than_the_current_one(function):
    given = [x.to("cuda:1") for x in inputs()]
    wanted = used(function, given)
    leaves = [x.detach().requires_grad_() for x in given]
    out = function(leaves, "triton")
    out.square().sum().backward()
    assert out.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    for i, truth in zip(wanted, definition(function, given, wanted), strict=True):
        check(leaves[i].grad, truth, torch.float32, slack=2)
