"""Scales that change from call to call of a compiled program, as an annealed temperature does."""

import functools

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import da_triton
from da_triton import DoubleAttention
from da_triton.ops.triton import block as triton_block
from da_triton.ops.triton import core as triton
from support.numerics import DEVICE, check

STEPS = [1.0 - 0.07 * step for step in range(10)]  # begins with the default
# Graphs of ATen operations may add in another order than what runs without the compiler.
WIDTH = {"triton": torch.float32, "torch": torch.float64}
each_backend = pytest.mark.parametrize("backend", ["triton", "torch"])


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def activations(dtype=torch.float32):
    return [torch.randn(2, channels, 7, device=DEVICE).to(dtype) for channels in (6, 4, 4)]


def gather(a, b, v, **options):
    return da_triton.gather(a, b, **options)


def gather_partial(a, b, v, **options):
    return da_triton.functional.gather_partial(a, b, **options)[0]


def distribute(a, b, v, **options):
    return da_triton.distribute(a[:, None, :, :4], v, **options)


def block(a, b, v, **options):
    weights = v[0, :, :6], v[0, :, 0], b[0, :, :6], None, v[1, :, :6], b[1, :, 0]
    return da_triton.double_attention_block(a, *weights, v[1, :, :6].mT, heads=2, **options)


def packed(a, b, v, **options):
    cu_seqlens = torch.tensor([0, 3, 3, 7])
    rows = (x.movedim(0, -1).flatten(1)[None] for x in (a, b, v))
    return da_triton.double_attention(*rows, cu_seqlens=2 * cu_seqlens, **options)


CALLS = [
    (gather, "logit_scale"),
    (gather_partial, "logit_scale"),
    (distribute, "scale"),
    (distribute, "logit_scale"),
    (da_triton.double_attention, "scale"),
    (da_triton.double_attention, "logit_scale"),
    (da_triton.double_attention, "logit_scale_v"),
    (block, "scale"),
    (block, "logit_scale"),
    (block, "logit_scale_v"),
    (packed, "scale"),
    (packed, "logit_scale"),
]
each_call = pytest.mark.parametrize(
    ("function", "name"), CALLS, ids=[f"{function.__name__}-{name}" for function, name in CALLS]
)


def trained(function, tensors, *args):
    """The result and the gradients."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves, *args)
    found = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
    return [out.detach(), *(x for x in found if x is not None)]


def compare(compiled, function, tensors, *args, backend):
    pairs = zip(trained(compiled, tensors, *args), trained(function, tensors, *args), strict=True)
    for ours, expected in pairs:
        if backend == "triton":  # the same operators in both
            assert torch.equal(ours, expected)
        else:
            check(ours, expected, ours.dtype)


def compilations(function, steps, tensors, *, backend="triton", compiler="aot_eager", **options):
    """How often ``function(*tensors, step)`` is compiled. Each step is compared with eager's."""
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(function, backend=counter, fullgraph=True, **options)
    for step in steps:
        compare(compiled, function, tensors, step, backend=backend)
    return counter.frame_count


@each_backend
@each_call
def test_a_scale_that_changes_at_each_step_is_compiled_twice(function, name, backend):
    def call(a, b, v, step):
        return function(a, b, v, backend=backend, **{name: step})

    assert compilations(call, STEPS, activations(WIDTH[backend]), backend=backend) == 2


@each_backend
@pytest.mark.parametrize("children", ["plain", "called"])
@pytest.mark.parametrize("name", ["scale", "logit_scale", "logit_scale_v"])
def test_an_attribute_that_a_training_loop_assigns(name, children, backend):
    layer = DoubleAttention(6, 4, 8, heads=2, residual=True, backend=backend)
    layer.to(DEVICE, WIDTH[backend])
    if children == "called":
        layer.convA = torch.nn.Sequential(layer.convA)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(2, 6, 3, 4, device=DEVICE, dtype=WIDTH[backend])
    for step in STEPS[:5]:
        setattr(layer, name, step)
        compare(
            lambda x, *_: compiled(x), lambda x, *_: layer(x), [x, *layer.parameters()],
            backend=backend,
        )  # fmt: skip
    assert counter.frame_count == 2


needs_computed_scales = pytest.mark.skipif(
    torch.__version__ < (2, 12),
    reason="torch 2.11 makes constants of some numbers that are computed from one that changes",
)


def several(a, b, v, step):
    options = {"logit_scale": 2 * step + 1, "logit_scale_v": 1 / step, "scale": 0.5}
    return da_triton.double_attention(a, b, v, **options, backend="triton")


@needs_computed_scales
def test_scales_that_are_computed_from_one_that_changes():
    assert compilations(several, STEPS, activations()) == 2


def test_whole_numbers_change_too():
    assert compilations(several, range(1, 11), activations()) == 2


@needs_computed_scales
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_other_compilers(compiler):
    assert compilations(several, STEPS[:4], activations(), compiler=compiler) == 2


@needs_computed_scales
def test_what_is_dynamic_from_the_first_call_is_compiled_once():
    assert compilations(several, STEPS[:4], activations(), dynamic=True) == 1


@needs_computed_scales
def test_half_precision():
    """Scaled logits are in float32, as they are when the scale is a constant."""
    assert compilations(several, STEPS[:4], activations(torch.float16)) == 2


def test_a_block_that_is_checkpointed_inside():
    def call(a, b, v, step):
        options = {"logit_scale": step, "backend": "triton"}
        recomputed = functools.partial(da_triton.double_attention, **options)
        return torch.utils.checkpoint.checkpoint(recomputed, a, b, v, use_reentrant=False)

    assert compilations(call, STEPS[:4], activations()) == 2


@pytest.mark.parametrize("take", [torch.func.grad, torch.func.jacrev, torch.func.jacfwd])
def test_derivatives_inside(take):
    def call(a, b, v, step):
        return take(lambda v: several(a, b, v, step).square().sum())(v)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    tensors = activations(torch.float64)
    for step in STEPS[:4]:
        check(compiled(*tensors, step), call(*tensors, step), torch.float64)


def operators(function, steps):
    """The operators over kernels in the graphs of the last compilation, and its inputs' axes."""
    found = {}

    def looks(which):
        def compiler(graph, inputs):
            calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
            names = [name.split(".")[1] for name in calls if name.startswith("da_triton.")]
            found[which] = names, {x.dim() for x in inputs if isinstance(x, torch.Tensor)}
            return graph

        return compiler

    compiler = aot_autograd(fw_compiler=looks("forward"), bw_compiler=looks("backward"))
    compiled = torch.compile(function, backend=compiler, fullgraph=True)
    for step in steps:
        trained(compiled, activations(), step)
    return found


def test_a_scale_that_does_not_change_is_a_constant():
    found = operators(several, [0.7, 0.7, 0.7])
    assert found["forward"][0] == ["gather", "distribute"]
    assert found["backward"][0] == ["distribute_backward", "gather_backward"]
    assert not any(0 in axes for _, axes in found.values()), "a scale is an input"
    assert compilations(several, [0.7, 0.7, 0.7], activations()) == 1


@needs_computed_scales
def test_a_scale_that_changes_is_an_input():
    found = operators(several, [0.7, 0.8])
    assert found["forward"][0] == ["gather_of_tensors", "distribute_of_tensors"]
    assert found["backward"][0] == [
        "distribute_backward_of_tensors", "gather_backward_of_tensors"
    ]  # fmt: skip
    assert all(0 in axes for _, axes in found.values())


def scale(value):
    return torch.tensor(value, dtype=torch.float64)


def operands(name):
    """Arguments of an operator, with numbers for scales."""
    a, b, v = (x[:, None] for x in activations())
    g, lse = triton.gather_op(a, b, None, None, None, 0.7)
    if name == "gather":
        return [a, b, None, None, None, 0.7]
    if name == "gather_backward":
        return [torch.ones_like(g), a, b, None, g, lse, None, 0.7, True, True]
    if name == "distribute":
        return [g, v, 1.3, True, 0.7]
    if name == "distribute_backward":
        return [torch.ones_like(a), g, v, 1.3, True, 0.7, True, True]
    shapes = ((4, 6), (4,), (8, 6), (8, 6), (8,), (6, 4), (6,))
    weights = [torch.randn(shape, device=DEVICE) for shape in shapes]
    options = [2, 0.7, 0.9, 1.3, True, True, "auto"]
    given = [a[:, 0], *weights, None]
    if name == "block":
        return [*given, *options, True]
    out, *saved = triton_block.block_op(*given, *options, True)
    return [torch.ones_like(out), *given, *saved, *options, [True] * 8]


@pytest.mark.parametrize(
    "name",
    ["gather", "gather_backward", "distribute", "distribute_backward", "block", "block_backward"],
)
def test_operators_that_take_tensors_compute_the_same(name):
    packet = getattr(torch.ops.da_triton, f"{name}_of_tensors")
    with_numbers = operands(name)
    with_tensors = [scale(x) if isinstance(x, float) else x for x in with_numbers]
    with FlopCounterMode(display=False) as flops:
        found = packet(*with_tensors)
    with FlopCounterMode(display=False) as same_flops:
        expected = getattr(torch.ops.da_triton, name)(*with_numbers)
    assert flops.get_total_flops() == same_flops.get_total_flops() > 0
    pairs = [(found, expected)] if torch.is_tensor(found) else zip(found, expected, strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)
    torch.library.opcheck(packet.default, tuple(with_tensors))
    # Its launches would be recorded with the scales of one call.
    assert torch.Tag.cudagraph_unsafe in packet.default.tags


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: CUDA graphs")
def test_cuda_graphs_do_not_keep_the_scale_of_the_call_that_was_recorded():
    layer = DoubleAttention(64, residual=True, backend="triton").to(DEVICE)
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    x = torch.randn(2, 64, 14, 14, device=DEVICE)
    for step in STEPS:
        layer.logit_scale = step
        for _ in range(3):
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)
