"""Kernels and routes: tensors with elements beyond 2^31, and with 2^21 positions.

Memory that is never touched costs nothing on a CPU: activations are stored in a sparse file, a few
pages of which are real, and their strides spread them so that along one axis the offset exceeds
2^31. They begin 2^31 behind its start: an offset that has wrapped around, as in int32, finds a
hole.
"""

import functools
import pathlib
import re

import pytest
import torch
import triton.language as tl

import da_triton
from da_triton.kernels import distribute, gather, gather_backward
from da_triton.ops.triton import routes
from da_triton.planning.costs import AH, AZ, XH
from da_triton.planning.planner import Route
from da_triton.runtime import launch, tiles
from support import launches
from support.numerics import AS_ON_A_GPU, DEVICE, TOLERANCE, check, peaky, relative_rms

HALF = torch.float16
AXES = ("samples", "channels", "positions")
SPREAD = 2**31  # elements between the first and the last of a tensor, at least


class Far:
    """Makes activations ``(N, …, channels, L)`` that are spread over the memory along one axis."""

    def __init__(self, storage: torch.Tensor, axis: str):
        self.storage, self.axis, self.start = storage, axis, SPREAD

    def empty(self, *shape):
        batch, length = shape[0], shape[-1]
        channels = torch.Size(shape[1:-1]).numel()
        steps = {"samples": batch, "channels": shape[-2], "positions": length}[self.axis] - 1
        step = -(-SPREAD // steps // 64) * 64  # the largest alignment of rows
        strides = {
            "samples": (step, length, 1),
            "channels": (length, step, 1),
            "positions": (length * step, 1, step),
        }[self.axis]
        x = self.storage.as_strided((batch, channels, length), strides, self.start)
        self.start += 2**17  # tensors are interleaved, further apart than steps were rounded
        return x.unflatten(1, shape[1:-1])

    def copy(self, x):
        return self.empty(*x.shape).copy_(x)

    def empty_activations_like(self, x, channels=None):
        """Replaces ``launch.empty_activations_like``: outputs of kernels are as far apart."""
        batch, heads, c, length = x.shape
        return self.empty(batch, heads, c if channels is None else channels, length)

    def empty_rows_like(self, x, channels):
        return self.empty_activations_like(x[:, None], channels)[:, 0]

    def free(self):
        """Frees a GPU's memory even if views of it are still held."""
        memory, self.storage = self.storage.untyped_storage(), None
        if memory.resizable():
            memory.resize_(0)


@pytest.fixture(params=AXES)
def far(request, tmp_path, memory):
    size = 5 * SPREAD
    if DEVICE == "cuda":
        storage = torch.empty(size, dtype=HALF, device=DEVICE)
    else:
        path = tmp_path / "sparse"
        storage = torch.from_file(str(path), shared=True, size=size, dtype=HALF)
        path.unlink()  # the mapping stays
    activations = Far(storage, request.param)
    del storage
    yield activations
    activations.free()  # before ``memory`` lets the next worker in


def test_memory_is_given_back_while_there_are_views():
    """For example, views in the traceback of a failed test."""
    storage = torch.empty(64, dtype=HALF, device=DEVICE)
    view = storage[:3]
    Far(storage, "samples").free()
    assert view.untyped_storage().nbytes() == 0


LENGTH = 36
CORE = {  # heads, m, n
    "one tile": (2, 5, 9), "full n": (2, 130, 9), "blocks": (1, 5, 514),
    "shared rows": (2, 130, 40),  # of P, with statistics in a launch of their own
}  # fmt: skip
FUSED = Route(XH, "fused", "fused", "fused", XH, 2)
BLOCK = {  # the route; C, c_m, c_n
    "fused": (FUSED, (20, 6, 4)),
    "fused from A": (FUSED._replace(order=AH), (20, 6, 4)),
    "fused by channel blocks": (Route(XH, "fused", "fused", "unfused", AZ, 2), (130, 6, 68)),
    "unfused AZ": (Route(AZ, "unfused", "unfused", "unfused", AZ, 2), (20, 6, 4)),
    "unfused XH": (Route(XH, "unfused", "unfused", "unfused", XH, 2), (20, 6, 4)),
}
# These take descriptors, partials and weights, which are contiguous.
WITHOUT_ACTIVATIONS = {
    "delta", "combine", "combine_backward", "gather_combine", "add", "product", "sums",
    "weight_gradients",
}  # fmt: skip


def core_run(place, case):
    """Results and gradients of the core with its activations where ``place`` puts them."""
    torch.manual_seed(0)
    heads, m, n = CORE[case]
    a, b, v, dz = (peaky(3, heads, c, LENGTH, dtype=HALF) for c in (m, n, n, m))
    mask = (torch.rand(3, LENGTH, device=DEVICE) > 0.3).view(torch.uint8)
    a, b, v, dz = map(place, (a, b, v, dz))
    g, lse = gather.gather_forward([(a, b, mask)], 0.5)
    z = distribute.distribute_forward(g, v, 1.0, True, 1.0)
    dg, dv = distribute.distribute_backward(dz, g, v, 1.0, True, 1.0, True, True)
    return g, z, dg, dv, *gather_backward.gradients(dg, a, b, mask, g, lse, None, 0.5, True, True)


def block_run(place, case):
    """The same for the block; its activations are X, the upstream gradient and its outputs."""
    torch.manual_seed(0)
    route, (channels, c_m, c_n) = BLOCK[case]
    shapes = (
        (c_m, channels), (c_m,), (c_n, channels), (c_n, channels), (c_n,), (channels, c_m),
        (channels,),
    )  # fmt: skip
    w = routes.Weights(*(torch.randn(s, device=DEVICE).to(HALF) / s[-1] ** 0.5 for s in shapes))
    x, dout = (place(peaky(2, 1, channels, LENGTH, dtype=HALF)[:, 0]) for _ in range(2))
    mask = (torch.rand(2, LENGTH, device=DEVICE) > 0.3).view(torch.uint8)
    options = routes.Options(2, 0.5, 1.0, 1.0, True, True)
    out, lse, g, v = routes.forward(x, w, mask, options, route, True)
    return out, g, *routes.backward(dout, x, w, mask, lse, g, v, options, route)


RUNS = [(core_run, case) for case in CORE] + [(block_run, case) for case in BLOCK]
each_run = pytest.mark.parametrize(("run", "case"), RUNS, ids=[case for _, case in RUNS])


@functools.cache
def beside(run, case, channels_last):
    """The run with contiguous activations, in the order in which vendor GEMMs find those apart."""
    return run(lambda x: x.mT.contiguous().mT if channels_last else x, case)


def both(run, case, far, monkeypatch):
    """Results with activations adjacent and far apart; outputs of kernels are as far apart."""
    near = beside(run, case, far.axis == "positions")
    monkeypatch.setattr(launch, "empty_activations_like", far.empty_activations_like)
    monkeypatch.setattr(launch, "empty_rows_like", far.empty_rows_like)
    return zip(near, run(far.copy, case), strict=True)


@each_run
def test_offsets_beyond_int32(run, case, far, monkeypatch):
    for here, there in both(run, case, far, monkeypatch):
        # Vendor GEMMs take another path for other strides, and round in between.
        assert relative_rms(there, here) < 2 * TOLERANCE[HALF]


@pytest.mark.long
@pytest.mark.skipif(DEVICE == "cuda", reason="changes what is interpreted, not kernels on a GPU")
@pytest.mark.parametrize(
    ("run", "case", "far"),
    [
        pytest.param(run, case, axis, id=f"{axis}-{case}")
        for run, case in RUNS
        for axis in AXES
        if run is core_run or axis != "samples"  # of two: a stride of 2^31 is int64 by itself
    ],
    indirect=["far"],
)
def test_offsets_in_int32_would_show(run, case, far, monkeypatch):
    widening = tl.tensor.to

    @functools.wraps(widening)
    def to(x, dtype, *args, **kwargs):
        same = dtype is tl.int64 and x.dtype is tl.int32
        return x if same else widening(x, dtype, *args, **kwargs)

    beside(run, case, far.axis == "positions")  # before anything is wrong
    monkeypatch.setattr(tl.tensor, "to", to)
    errors = [relative_rms(there, here) for here, there in both(run, case, far, monkeypatch)]
    assert not all(error < 100 * TOLERANCE[HALF] for error in errors)  # NaN is an error, too


@pytest.mark.skipif(DEVICE == "cuda", reason="counted in the interpreter, not on a GPU")
def test_every_kernel_that_takes_activations_is_among_them():
    folder = pathlib.Path(da_triton.__file__).parent / "kernels"
    sources = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    defined = {*re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE)}
    with launches.count() as names:
        for run, case in RUNS:
            run(lambda x: x, case)
        core_run(lambda x: x.mT.contiguous().mT, "shared rows")
    assert defined - {f"{name}_kernel" for name in WITHOUT_ACTIVATIONS} == defined & {*names} - {
        f"{name}_kernel" for name in WITHOUT_ACTIVATIONS
    }


# Recorded as on a GPU but interpreted, their tiles are of the usual length.
MANY = 2**12 if AS_ON_A_GPU and DEVICE == "cpu" else 2**21


def long_activations(length):
    """a, b, v and an upstream gradient of few channels, with peaks: without any, G is noise."""
    a, b, v = (peaky(1, 1, c, length, dtype=HALF) for c in (3, 2, 2))
    return a[:, 0], b[:, 0], v[:, 0], peaky(1, 1, 3, length, dtype=HALF, deviation=1.0)[:, 0]


def compare_with_the_definition(function, inputs, upstream, backend):
    results = []
    for kind, name in ((torch.float64, "eager"), (HALF, "eager"), (HALF, backend)):
        leaves = [x.to(kind).requires_grad_() for x in inputs]
        out = function(*leaves, backend=name)
        results.append([out, *torch.autograd.grad(out, leaves, upstream.to(kind))])
    for expected, own, actual in zip(*results, strict=True):
        slack = 1.0
        if backend == "torch":  # it rounds between products, as the definition does
            slack = max(2.0, relative_rms(own, expected) / TOLERANCE[HALF])
        check(actual, expected, HALF, own, slack=slack)


@pytest.fixture
def long_tiles(monkeypatch):
    """Tiles of 4 channels and 2^14 positions: few steps, of no more than is needed."""
    if AS_ON_A_GPU:
        return
    monkeypatch.setattr(tiles, "tile", functools.partial(_longer, tiles.tile))


def _longer(tile, *given):
    return tile(*given)._replace(block_m=4, block_n=4, block_l=2**14)


@pytest.mark.usefixtures("long_tiles")
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_core_with_two_million_positions(backend):
    *inputs, upstream = long_activations(MANY)
    compare_with_the_definition(da_triton.double_attention, inputs, upstream, backend)


@pytest.mark.long
@pytest.mark.usefixtures("long_tiles")
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_block_with_two_million_positions(backend):
    x, *_, upstream = long_activations(MANY)
    weights = [torch.randn(s, device=DEVICE).to(HALF) for s in ((2, 3), (2, 3), (2, 3), (3, 2))]

    def function(x, a, b, v, out, backend):
        return da_triton.double_attention_block(
            x, a, None, b, None, v, None, out, residual=True, backend=backend
        )

    compare_with_the_definition(function, [x, *weights], upstream, backend)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU: memory that is filled")
@pytest.mark.usefixtures("memory")
def test_a_batch_of_more_than_two_billion_numbers():
    """The last sample of the batch, alone and in place, where its offset exceeds 2^31."""
    x = torch.randn(2**11 + 1, 64, 2**14, device=DEVICE, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    layer = da_triton.DoubleAttention(64, residual=True, device=DEVICE, dtype=torch.bfloat16)
    results = []
    for given in (x, x[-1:]):
        leaf = given.detach().requires_grad_()
        out = layer(leaf)
        out.backward(torch.ones_like(out))
        results.append((out[-1:].detach(), leaf.grad[-1:]))
    for whole, alone in zip(*results, strict=True):
        assert relative_rms(whole, alone) < TOLERANCE[torch.bfloat16]
