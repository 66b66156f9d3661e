"""torch.compile: one graph, forward and backward, not compiled again for each size."""

import copy
import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

import da_triton
from da_triton import DoubleAttention
from support.numerics import DEVICE, check, peaky


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(function, x, *args):
    x = x.detach().requires_grad_()
    out = function(x, *args)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    return out.detach(), grad


@pytest.mark.parametrize(
    ("order", "recompute"),
    [("auto", False), ("auto", True), ("AZ", False), ("XZ", True), ("AH", False), ("XH", True)],
)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_new_size_is_not_a_new_compilation(backend, order, recompute):
    block = DoubleAttention(
        16, 8, 6, heads=2, residual=True, order=order, recompute=recompute, backend=backend
    ).to(DEVICE)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    for batch, height, width in ((2, 5, 6), (3, 7, 4), (4, 3, 11)):
        x = torch.randn(batch, 16, height, width, device=DEVICE)
        exact = step(copy.deepcopy(block).double(), x.double())
        for ours, uncompiled, expected in zip(
            step(compiled, x), step(block, x), exact, strict=True
        ):
            # The operator is the same in both; the torch backend has a path of its own on a CPU.
            assert backend == "torch" or torch.equal(ours, uncompiled)
            check(ours, expected, torch.float32)
            assert ours.stride() == uncompiled.stride()
    assert counter.frame_count <= 2, "one compilation for the first size, one for all others"


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_inductor(backend):
    block = DoubleAttention(16, 8, 6, residual=True, backend=backend).to(DEVICE)
    compiled = torch.compile(block, fullgraph=True)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 16, 6, 10, device=DEVICE).to(memory_format=memory_format)
        results = zip(step(compiled, x), step(block.double(), x.double()), strict=True)
        for ours, expected in results:
            check(ours, expected, torch.float32)
            assert ours.is_contiguous(memory_format=memory_format)
        block.float()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_whole_model_with_autocast_and_mask(backend):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = torch.nn.Conv2d(3, 16, 3, padding=1)
            self.block = DoubleAttention(16, residual=True, backend=backend)
            self.head = torch.nn.Linear(16, 4)

        def forward(self, x, mask):
            return self.head(self.block(self.stem(x).relu(), mask).mean((2, 3)))

    net = Net().to(DEVICE)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 6, 8, device=DEVICE)
    mask = torch.rand(2, 6, 8, device=DEVICE) > 0.3
    for enabled in (True, False):
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=enabled):
            for ours, expected in zip(step(compiled, x, mask), step(net, x, mask), strict=True):
                check(ours, expected, torch.bfloat16 if enabled else torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, mask), net(x, mask))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_functions_with_every_option(backend):
    def function(a, b, v, mask, extra_a, extra_b):
        return da_triton.double_attention(
            a, b, v, heads=2, logit_scale=0.5, scale=2.0, softmax_v=False, mask=mask,
            extra=(extra_a, extra_b), backend=backend,
        )  # fmt: skip

    a, b, v = (peaky(2, 1, c, 30, dtype=torch.float32)[:, 0] for c in (6, 8, 8))
    v = v.reshape(2, 8, 5, 6).contiguous(memory_format=torch.channels_last)
    args = (b, v, torch.rand(2, 30, device=DEVICE) > 0.5)
    args += (torch.randn(1, 6, 2, device=DEVICE), torch.randn(1, 8, 2, device=DEVICE))
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for ours, expected in zip(step(compiled, a, *args), step(function, a, *args), strict=True):
        assert torch.equal(ours, expected)
        assert ours.stride() == expected.stride()


PACKINGS = [
    [5, 3, 0, 7], [4, 4, 4, 2], [12, 1], [1, 2, 3, 9, 2], [9, 1, 9, 1, 9], [3] * 7, [2, 1, 30],
    [0, 6, 6, 0], [1, 1], [7, 5, 3, 1],
]  # fmt: skip


def packed_inputs(lengths):
    """a, b, v, tokens, a mask and offsets."""
    total, channels = sum(lengths), (6, 8, 8)
    activations = [peaky(1, 1, c, total, dtype=torch.float32)[:, 0] for c in channels]
    tokens = [peaky(len(lengths), 1, c, 2, dtype=torch.float32)[:, 0] for c in channels[:2]]
    mask = torch.rand(1, total, device=DEVICE) > 0.3
    return [*activations, *tokens, mask, torch.tensor([0, *itertools.accumulate(lengths)])]


def packed_core(a, b, v, extra_a, extra_b, mask, offsets, backend):
    return da_triton.double_attention(
        a, b, v, heads=2, mask=mask, extra=(extra_a, extra_b), cu_seqlens=offsets, backend=backend
    )


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_packed_sequences_of_other_lengths_are_not_a_new_compilation(backend):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(packed_core, backend=counter, fullgraph=True)
    count = 4 if backend == "triton" else None  # interpreted: seconds each
    for lengths in PACKINGS[:count]:
        *inputs, mask, offsets = packed_inputs(lengths)
        leaves = [x.requires_grad_() for x in inputs]
        results = []
        for function in (compiled, packed_core):
            z = function(*leaves, mask, offsets, backend)
            results.append((z, *torch.autograd.grad(z.square().sum(), leaves)))
        for ours, uncompiled in zip(*results, strict=True):
            assert torch.equal(ours, uncompiled)
            assert ours.stride() == uncompiled.stride()
    assert counter.frame_count <= 3, "a compilation for new lengths, one for another number of them"


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_compiled_packed_offsets_are_checked(backend):
    compiled = torch.compile(packed_core, backend="aot_eager", fullgraph=True)
    *inputs, offsets = packed_inputs([4, 5])
    for wrong, message in (
        ([0, 9, 4], "must be non-decreasing, got 4 after 9"),
        ([1, 4, 9], "must begin with 0, got 1"),
        ([0, 4, 8], "must end with the 9 positions of a, got 8"),
    ):
        with pytest.raises(ValueError, match=message):
            compiled(*inputs, torch.tensor(wrong), backend)
    assert compiled(*inputs, offsets, backend).shape == (1, 6, 9)


def test_packed_with_inductor():
    compiled = torch.compile(packed_core, fullgraph=True)
    for lengths in ([5, 3, 0, 7], [4, 4, 4, 2]):
        inputs = packed_inputs(lengths)
        torch.testing.assert_close(compiled(*inputs, "torch"), packed_core(*inputs, "torch"))


def test_changed_children():
    block = DoubleAttention(16, 8, 6).to(DEVICE)
    block.convA = torch.nn.Sequential(block.convA, torch.nn.ReLU())
    x = torch.randn(2, 16, 5, 6, device=DEVICE)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for ours, expected in zip(step(compiled, x), step(block, x), strict=True):
        assert torch.equal(ours, expected)


def test_strided_upstream_gradients():
    """Through a concatenation (narrow views) and a sum (stride 0)."""

    def function(a, b, v):
        z = da_triton.double_attention(a, b, v, backend="triton")
        return torch.cat([z, z.sum(1, keepdim=True)], 1)[:, 1:]

    a, b, v = (peaky(2, 1, c, 30, dtype=torch.float32)[:, 0] for c in (6, 8, 8))
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for ours, expected in zip(step(compiled, a, b, v), step(function, a, b, v), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: CUDA graphs")
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs(mode):
    block = DoubleAttention(64, residual=True).to(DEVICE)
    compiled = torch.compile(block, mode=mode, fullgraph=True)
    for _ in range(3):
        x = torch.randn(2, 64, 14, 14, device=DEVICE)
        torch.testing.assert_close(compiled(x), block(x), rtol=1e-4, atol=1e-4)


def test_a_symbolic_trace_has_no_guards_on_positions():
    """Outside the compiler, too: the trace for "auto" has the guards of an order that is named."""

    def traced(order):
        block = DoubleAttention(16, 8, 6, order=order, backend="torch", device=DEVICE)
        block.requires_grad_(False)
        options = {"tracing_mode": "symbolic", "_allow_non_fake_inputs": True}
        return block, make_fx(lambda x: block(x), **options)(torch.randn(2, 16, 5, 7).to(DEVICE))

    block, free = traced("auto")
    assert len(free.shape_env.guards) == len(traced("AZ")[1].shape_env.guards)
    other = torch.randn(3, 16, 9, 40, device=DEVICE)
    torch.testing.assert_close(free(other), block(other))
