"""The block's operators at PyTorch's boundary, on the fused and on the unfused route."""

import functools
import itertools
from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from da_triton import double_attention_block
from da_triton.kernels import project_gather
from da_triton.ops.triton import block as triton_block
from da_triton.ops.triton import routes as kernels
from da_triton.planning.costs import AZ, ORDERS, XH, order_cost
from da_triton.planning.planner import Route
from da_triton.runtime import launch, tiles
from support import launches
from support.compare import check_against_reference
from support.numerics import AS_ON_A_GPU, DEVICE, route_dtype

C, C_M, C_N, LENGTH = 12, 8, 6, 20
ROUTES = {
    "fused": Route(XH, "fused", "fused", "fused", XH, 2),
    "unfused": Route(AZ, "unfused", "unfused", "unfused", AZ, 2),
    "copied": Route(AZ, "unfused", "unfused", "unfused", AZ, 2, True, True),
}
each_route = pytest.mark.parametrize("route", ROUTES)
# No tile of a fused kernel is as wide as float64 needs.
in_float64 = ["unfused", "copied"] if AS_ON_A_GPU else [*ROUTES]
layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])


@pytest.fixture
def taking(monkeypatch):
    """Makes the operators take a route."""

    def take(route):
        monkeypatch.setattr(triton_block, "_route", lambda *_: ROUTES[route])

    return take


def arguments(dtype=torch.float32, channels_last=False, masked=False, batch=2, out=C):
    """Arguments of the forward operator: tensors, then options."""
    x = torch.randn(batch, C, LENGTH, dtype=dtype, device=DEVICE)
    x = x.mT.contiguous().mT if channels_last else x
    shapes = ((C_M, C), (C_M,), (C_N, C), (C_N, C), (C_N,), (out, C_M), (out,))
    weights = [torch.randn(s, dtype=dtype, device=DEVICE) / s[-1] ** 0.5 for s in shapes]
    mask = torch.rand(batch, LENGTH, device=DEVICE) > 0.4 if masked else None
    return [x, *weights, mask], [2, 0.7, 0.9, 1.3, True, out == C, "auto"]


@layouts
@each_route
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("save_v", [False, True])
def test_opcheck(route, channels_last, masked, save_v, taking):
    taking(route)
    tensors, options = arguments(route_dtype(ROUTES[route]), channels_last, masked)
    for need in (False, True):
        leaves = [
            t if t is None or t.dtype == torch.bool else t.requires_grad_(need) for t in tensors
        ]
        torch.library.opcheck(triton_block.block_op, (*leaves, *options, save_v))
    tensors = [None if t is None else t.detach() for t in tensors]
    out, *saved = triton_block.block_op(*tensors, *options, save_v)
    for needs in (8 * [True], [False] + 7 * [True], [True] + 7 * [False], 4 * [False, True]):
        torch.library.opcheck(
            triton_block.block_backward_op,
            (torch.randn_like(out), *tensors, *saved, *options, needs),
        )


@layouts
@each_route
@pytest.mark.parametrize("out", [C, 5])
def test_fakes_have_the_true_strides(route, channels_last, out, taking):
    """Checked here, because opcheck of torch 2.11 does not look at strides."""
    taking(route)
    tensors, options = arguments(torch.bfloat16, channels_last, out=out)

    def both(tensors):
        out, lse, g, v = triton_block.block_op(*tensors, *options, True)
        grads = triton_block.block_backward_op(out, *tensors, lse, g, v, *options, 8 * [True])
        return out, lse, g, v, *grads

    real = both(tensors)
    mode = torch._subclasses.FakeTensorMode()
    with mode:
        fakes = both([None if t is None else mode.from_tensor(t) for t in tensors])
    for x, fake in zip(real, fakes, strict=True):
        assert (x.shape, x.stride(), x.dtype) == (fake.shape, fake.stride(), fake.dtype)


def block_function(options, save_v, mask=None):
    def function(*leaves):
        return triton_block.Block.apply(*leaves, mask, *options, save_v)[0]

    return function


@layouts
@pytest.mark.parametrize("route", in_float64)
def test_gradcheck_of_the_real_kernels(route, channels_last, taking):
    taking(route)
    tensors, options = arguments(torch.float64, channels_last, batch=1)
    leaves = [t.requires_grad_() for t in tensors[:-1]]
    assert torch.autograd.gradcheck(
        block_function(options, False), leaves, nondet_tol=0.0, fast_mode=True
    )


def test_gradgradcheck(taking):
    taking(in_float64[0])
    tensors, options = arguments(torch.float64, batch=1)
    leaves = [t.requires_grad_() for t in tensors[:-1]]
    assert torch.autograd.gradgradcheck(block_function(options, False), leaves, fast_mode=True)


@each_route
def test_some_inputs_that_need_no_gradient(route, taking):
    taking(route)
    tensors, options = arguments(route_dtype(ROUTES[route]))
    function = block_function(options, False)
    leaves = [t.requires_grad_() for t in tensors[:-1]]
    every = torch.autograd.grad(function(*leaves).square().sum(), leaves)
    for wanted in itertools.chain(([i] for i in range(8)), ([0, 3], [1, 5, 7])):
        some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(leaves)]
        grads = torch.autograd.grad(function(*some).square().sum(), [some[i] for i in wanted])
        for i, grad in zip(wanted, grads, strict=True):
            assert torch.equal(grad, every[i])


@pytest.mark.skipif(AS_ON_A_GPU, reason="no tile of a fused kernel is as wide as float64")
@layouts
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("save_v", [False, True])
@pytest.mark.parametrize(("heads", "c_n"), [(1, 70), (4, 68)])
def test_versions_of_the_fused_backward_pass_agree(
    heads, c_n, save_v, masked, channels_last, monkeypatch
):
    """X of the next tile loaded ahead or not; all channels in a program or blocks of them."""
    length, route = 70, ROUTES["fused"]
    x, dout = torch.randn(2, 2, C, length, dtype=torch.float64)
    if channels_last:
        x, dout = x.mT.contiguous().mT, dout  # whose strides then differ
    shapes = ((4 * heads, C), (4 * heads,), (c_n, C), (c_n, C), (c_n,), (C, 4 * heads), (C,))
    w = kernels.Weights(*(torch.randn(s, dtype=torch.float64) / s[-1] ** 0.5 for s in shapes))
    mask = (torch.rand(2, length) > 0.4).to(torch.uint8) if masked else None
    o = kernels.Options(heads, 0.7, 0.9, 1.3, True, True)
    _, lse, g, v = kernels.forward(x, w, mask, o, route, save_v)

    def gradients(new):
        found = {}
        with monkeypatch.context() as patch, launch.forgetting():
            fits = tiles.fits
            patch.setattr(tiles, "wants_64_rows", lambda device: new)
            patch.setattr(
                tiles, "fits", lambda kernel, *a: new if "full_c" in kernel else fits(kernel, *a)
            )
            original = launch.Launch.__call__

            def call(self, *args):
                found.update(self.constants)
                return original(self, *args)

            patch.setattr(launch.Launch, "__call__", call)
            grads = kernels.backward(dout, x, w, mask, lse, g, v, o, route)
        assert (found["X_AHEAD"], found["CHANNELS_FIT"]) == (new and not save_v, new)
        assert found["SAME_STEPS"] == (not channels_last)
        return grads

    for one, other in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.skipif(AS_ON_A_GPU, reason="no tile of a fused kernel is as wide as float64")
@layouts
@pytest.mark.parametrize("masked", [False, True])
def test_gathering_from_a_with_all_channels_at_once_or_in_blocks(
    masked, channels_last, monkeypatch
):
    channels = 40
    x = torch.randn(2, channels, 70, dtype=torch.float64)
    x = x.mT.contiguous().mT if channels_last else x
    weight_a, weight_b = (
        torch.randn(rows, channels, dtype=torch.float64) / channels**0.5 for rows in (12, 8)
    )
    mask = (torch.rand(2, 70) > 0.4).to(torch.uint8) if masked else None

    def partials(block_c):
        constants = {}
        original = launch.Launch.__call__

        def call(self, *args):
            constants.update(self.constants)
            return original(self, *args)

        with monkeypatch.context() as patch, launch.forgetting():
            patch.setattr(project_gather, "BLOCK_C", block_c)
            patch.setattr(launch.Launch, "__call__", call)
            found = project_gather.gather_from_a(x, weight_a, weight_b, mask, 2, 0.9)
        assert constants["CHANNELS_FIT"] == (block_c > channels)
        return found

    for one, other in zip(partials(64), partials(16), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(DEVICE == "cuda", reason="counted without a GPU, which would run")
@pytest.mark.parametrize(
    ("route", "wanted", "spared"),
    [
        # sums of dV Xᵀ and dB Xᵀ, and those of the descriptors
        ("fused", ("x",), ["outer_product_kernel", "weight_gradients_kernel"]),
        ("fused", ("v", "out"), ["block_bwd_gather_kernel"]),
        ("fused", ("a", "b", "v", "out"), []),
        ("unfused", ("out",), ["delta_kernel", "gather_backward_kernel"]),
    ],
)
def test_what_frozen_weights_spare(route, wanted, spared, taking):
    """Launches of the backward pass, and the library's products for dX."""
    taking(route)
    names = "x", "a", "bias_a", "b", "v", "bias_v", "out", "bias_out"
    tensors, options = arguments()
    options[5] = False  # no residual

    def launched(wanted):
        leaves = [
            t.detach().requires_grad_(n in wanted) for n, t in zip(names, tensors[:-1], strict=True)
        ]
        with launches.count() as backward:
            out = block_function(options, False)(*leaves)
            backward.clear()
            out.backward(torch.ones_like(out))
        return Counter(backward)

    every, some = launched(names), launched(wanted)
    saved = every - some
    assert sorted(n for n in saved.elements() if n.endswith("_kernel")) == sorted(spared)
    assert not some - every


@pytest.mark.parametrize(("wanted", "spared"), [("x", 4), ("b", 2), ("a", 2)])
def test_the_librarys_products_that_frozen_weights_spare(wanted, spared):
    """On the unfused route, of seven: for A, B and V, dZ, dX, dWo, and dWa, dWb, dWv together."""
    (x, *tensors, _), (heads, *scalars) = arguments()
    w, route = kernels.Weights(*tensors), ROUTES["unfused"]
    o = kernels.Options(heads, *scalars[:-1])
    _, lse, g, _ = kernels.forward(x, w, None, o, route, False)

    def products(*need):
        with launches.count() as names:
            kernels.backward(x, x, w, None, lse, g, None, o, route, kernels.Gradients(*need))
        return sum(name in ("aten::bmm", "aten::baddbmm", "aten::convolution") for name in names)

    some = (name == wanted for name in ("x", "a", "bias_a", "b", "v", "bias_v", "out", "bias_out"))
    assert products(*8 * [True]) - products(*some) == spared


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize(
    ("route", "reconstruct"), [("fused", True), ("unfused", True), ("unfused", False)]
)
def test_without_biases_and_without_reconstruction(route, biases, reconstruct, taking):
    taking(route)
    tensors, _ = arguments(route_dtype(ROUTES[route]))
    x, a, bias_a, b, v, bias_v, out, bias_out, _ = tensors
    if not biases:
        bias_a = bias_v = bias_out = None
    if not reconstruct:
        out = bias_out = None
    inputs = (x, a, bias_a, b, None, v, bias_v, out, bias_out)
    triton, eager = (
        functools.partial(double_attention_block, heads=2, backend=backend)
        for backend in ("triton", "eager")
    )
    found = check_against_reference(triton, eager, inputs)
    assert len(found) == 1 + sum(t is not None for t in inputs)


def test_empty_batch():
    tensors, options = arguments(batch=0)
    leaves = [t.requires_grad_() for t in tensors[:-1]]
    out = block_function(options, True)(*leaves)
    assert out.shape == (0, C, LENGTH)
    grads = torch.autograd.grad(out.sum(), leaves)
    for grad, leaf in zip(grads, leaves, strict=True):
        assert grad.shape == leaf.shape
        assert not grad.any()


@pytest.mark.parametrize("order", [*ORDERS, "auto"])
def test_flop_formulas(order):
    tensors, options = arguments()
    leaves = [t.requires_grad_() for t in tensors[:-1]]
    options[-1] = order
    with FlopCounterMode(display=False) as forward:
        out = block_function(options, False)(*leaves)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    cost = order_cost(ORDERS.get(order, AZ), C, C_M, C_N, 2, LENGTH)
    expected = 2 * 2 * (cost.macs + cost.small_macs)
    assert forward.get_total_flops() == expected
    assert backward.get_total_flops() == 2 * expected


@each_route
@pytest.mark.parametrize("save_v", [False, True])
def test_what_autograd_saves(route, save_v, taking):
    """Inputs, lse and G; V if requested; nothing else."""
    taking(route)
    tensors, options = arguments(torch.bfloat16)
    leaves = [t.requires_grad_() for t in tensors[:-1]]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        block_function(options, save_v)(*leaves)
    given = {t.data_ptr() for t in leaves}
    sizes = sorted(t.numel() for t in saved if t.data_ptr() not in given and t.numel())
    assert sizes == sorted([2 * C_N, 2 * C_M * C_N // 2] + save_v * [2 * C_N * LENGTH])
