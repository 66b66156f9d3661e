"""The operators for packed sequences: opcheck, fakes, launches, padding, derivatives, FLOP."""

import functools
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import da_triton
from da_triton.ops import varlen as varlen_ops
from da_triton.ops.aten import core as aten
from da_triton.ops.aten import varlen as aten_varlen
from da_triton.ops.triton import varlen as triton_varlen
from support import launches
from support.compare import check_against_reference
from support.numerics import DEVICE, check, peaky

HEADS, M, N = 2, 3, 4
UNEVEN = [1, 30, 2, 0, 17, 9, 9, 10, 40, 1, 8, 0]
each_layout = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
each_kernels = pytest.mark.parametrize("kernels", [False, True], ids=["torch", "triton"])
each_backend = pytest.mark.parametrize("backend", ["torch", "triton"])


def offsets_of(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)])


def activations(*channels, lengths=UNEVEN, dtype=torch.float64, channels_last=False, heads=HEADS):
    """``(1, heads, c, total)``."""
    layout = {"dtype": dtype, "channels_last": channels_last}
    return [peaky(1, heads, c, sum(lengths), **layout) for c in channels]


def tokens(lengths=UNEVEN, dtype=torch.float64):
    return [peaky(len(lengths), HEADS, c, 2, dtype=dtype) for c in (M, N)]


@pytest.fixture
def small(monkeypatch):
    """Runs of 18 positions are views; groups of 12 positions; sums over 25 are made in parts."""
    monkeypatch.setattr(triton_varlen, "LONG", 18)
    monkeypatch.setattr(aten_varlen, "WORK", 12 * HEADS * N)
    monkeypatch.setattr(aten_varlen, "FEW", 20)
    monkeypatch.setattr(aten, "POSITIONS_PER_PRODUCT", 25)
    triton_varlen.plan.cache_clear()
    yield
    triton_varlen.plan.cache_clear()


def arguments(channels_last, optional, lengths):
    a, b, v = activations(
        M, N, N, lengths=lengths, dtype=torch.float32, channels_last=channels_last
    )
    mask = torch.rand(1, sum(lengths), device=DEVICE) > 0.4 if optional else None
    extra = tokens(lengths, torch.float32) if optional else [None, None]
    return a, b, v, mask, extra, offsets_of(lengths)


@each_layout
@each_kernels
@pytest.mark.parametrize("optional", [False, True], ids=["plain", "mask and tokens"])
def test_opcheck(kernels, optional, channels_last):
    a, b, v, mask, extra, offsets = arguments(channels_last, optional, [1, 0, 2])
    for need in (False, True):
        inputs = (a.requires_grad_(need), b.requires_grad_(need), mask, *extra, offsets)
        torch.library.opcheck(varlen_ops.gather_op, (*inputs, 0.7, kernels))
    a, b = a.detach(), b.detach()
    g, lse = varlen_ops.gather_op(a, b, mask, *extra, offsets, 0.7, kernels)
    dg = peaky(*g.shape[:2], g.shape[3], g.shape[2], dtype=g.dtype).mT
    for needs in ([True] * 4, [True, False] * 2, [False, True] * 2):
        needs = needs if optional else [*needs[:2], False, False]
        inputs = (dg, a, b, mask, *extra, g, lse, offsets, 0.7, kernels, needs)
        torch.library.opcheck(varlen_ops.gather_backward_op, inputs)
    for need in (False, True):
        inputs = (g.requires_grad_(need), v.requires_grad_(need), offsets)
        torch.library.opcheck(varlen_ops.distribute_op, (*inputs, 1.3, not optional, 0.7, kernels))
    dz = torch.ones((), device=DEVICE).expand(1, HEADS, M, 3)
    for needs in ((True, True), (True, False), (False, True)):
        inputs = (dz, g.detach(), v.detach(), offsets, 1.3, not optional, 0.7, kernels, *needs)
        torch.library.opcheck(varlen_ops.distribute_backward_op, inputs)


def test_cuda_graphs_do_not_keep_the_lengths_of_the_call_that_was_recorded():
    operators = [name for name in dir(torch.ops.da_triton) if "packed" in name]
    assert len(operators) == 8
    for name in operators:
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.da_triton, name).default.tags


@each_layout
@each_kernels
@pytest.mark.parametrize("lengths", [UNEVEN, [1], [0, 0]], ids=["uneven", "one", "none"])
def test_fakes_have_the_true_strides(kernels, lengths, channels_last):
    kind = {"lengths": lengths, "dtype": torch.bfloat16, "channels_last": channels_last}

    def run(a, b, v, offsets):
        g, lse = varlen_ops.gather_op(a, b, None, None, None, offsets, 1.0, kernels)
        z = varlen_ops.distribute_op(g, v, offsets, 1.0, True, 1.0, kernels)
        options = (offsets, 1.0, True, 1.0, kernels, True, True)
        needs = [True, True, False, False]
        return (
            g,
            lse,
            z,
            *varlen_ops.distribute_backward_op(z, g, v, *options),
            *(
                varlen_ops.gather_backward_op(
                    g, a, b, None, None, None, g, lse, offsets, 1.0, kernels, needs
                )
            ),
        )

    inputs = [*activations(M, N, N, **kind), offsets_of(lengths)]
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = run(*(mode.from_tensor(x) for x in inputs))
    for x, fake in zip(run(*inputs), fakes, strict=True):
        assert (x.shape, x.stride(), x.dtype) == (fake.shape, fake.stride(), fake.dtype)


@each_layout
@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optional", [False, True], ids=["plain", "mask and tokens"])
@pytest.mark.usefixtures("small")
def test_uneven_lengths(backend, optional, dtype, channels_last):
    """Views beside buckets, long sums beside short ones; against the definition in float64."""
    a, b, v = activations(M, N, N, dtype=dtype, channels_last=channels_last)
    mask = torch.rand(1, sum(UNEVEN), device=DEVICE) > 0.4 if optional else None
    extra = tokens(dtype=dtype) if optional else []
    options = {
        "heads": HEADS, "mask": mask, "logit_scale": 0.6, "logit_scale_v": 0.7, "scale": 1.3,
        "softmax_v": not optional, "cu_seqlens": offsets_of(UNEVEN),
    }  # fmt: skip

    def attention(a, b, v, extra_a=None, extra_b=None, backend="eager"):
        a, b, v, *extra = (x.flatten(1, 2) for x in (a, b, v, extra_a, extra_b) if x is not None)
        return da_triton.double_attention(a, b, v, extra=extra or None, backend=backend, **options)

    ours = functools.partial(attention, backend=backend)
    check_against_reference(ours, attention, (a, b, v, *extra))


@pytest.mark.parametrize("scale", [-0.7, 0.0])
@each_backend
@pytest.mark.usefixtures("small")
def test_padding_has_no_weight_whatever_the_scale(backend, scale):
    a, b = (x.flatten(1, 2) for x in activations(M, N))
    options = {"heads": HEADS, "logit_scale": scale, "cu_seqlens": offsets_of(UNEVEN)}
    check(
        da_triton.gather(a, b, backend=backend, **options),
        da_triton.gather(a, b, backend="eager", **options),
        a.dtype,
    )


@each_backend
@pytest.mark.usefixtures("small")
def test_values_that_are_not_finite_stay_in_their_sequence(backend):
    a, b, v = (x.flatten(1, 2) for x in activations(M, N, N))
    end = sum(UNEVEN[:8])  # the last position of a sequence, which padding repeats
    for x in (a, b, v):
        x[..., end - 1] = torch.inf
        x.requires_grad_()
    options = {"heads": HEADS, "cu_seqlens": offsets_of(UNEVEN)}
    z = da_triton.double_attention(a, b, v, backend=backend, **options)
    gradients = torch.autograd.grad(z.sum(), (a, b, v))
    others = torch.ones(sum(UNEVEN), dtype=torch.bool)
    others[end - UNEVEN[7] : end] = False
    for x in (z, *gradients):
        assert x[..., others].isfinite().all()
        assert not x[..., ~others].isfinite().all()


def test_launches_do_not_grow_with_the_number_of_sequences():
    """Lengths of 50 to 60 are one bucket; those of 10 to 40 are six."""

    def count(lengths):
        a, b, v = (
            x.flatten(1, 2) for x in activations(M, N, N, lengths=lengths, dtype=torch.float32)
        )
        tensors = [x.requires_grad_() for x in (a, b, v)]
        options = {"cu_seqlens": offsets_of(lengths), "heads": HEADS, "backend": "triton"}
        with launches.count() as forward:
            z = da_triton.double_attention(*tensors, **options)
        with launches.count() as backward:
            torch.autograd.grad(z, tensors, torch.ones_like(z))
        return [len([x for x in names if "::" not in x]) for names in (forward, backward)]

    for lengths, most in ((list(range(50, 61)), 1), (list(range(10, 41)), 6)):
        forward, backward = count(lengths * 8)
        assert [forward, backward] == count(lengths * 16)
        assert forward <= 3 * most  # the gather's parts are added by a launch
        assert backward <= 4 * most


@pytest.mark.parametrize(
    ("lengths", "copied"),
    [
        (UNEVEN, sum(UNEVEN)),
        ([10, 11] * 150 + [100_000] + [9, 12] * 150, 6300),
        ([1, 2, 3, 5, 8, 13, 21, 34] * 20, 87 * 20),
        ([4000] * 3 + [1, 2], 3),
        ([7, 7, 0, 7], 21),
        ([5, 5, 5], 0),
        ([50], 0),
        ([0, 0], 0),
    ],
)
def test_padding_is_bounded_and_long_runs_are_not_copied(lengths, copied):
    parts = triton_varlen.plan(tuple(lengths), torch.device("cpu"))
    padded = [part for part in parts if not isinstance(part.positions, slice)]
    assert sum(len(part.positions.target) for part in padded) == copied
    assert sum(part.batch * part.length for part in padded) <= triton_varlen.PADDING * copied
    total, seen = sum(lengths), torch.zeros(sum(lengths), dtype=torch.int64)
    for part in parts:
        positions = torch.arange(total)[None]
        part.put(part.take(positions), out := torch.full_like(positions, -1))
        assert torch.equal(out[out >= 0], positions[out >= 0])
        seen += out[0] >= 0
        ends = torch.tensor(lengths).cumsum(0)[part.sequences]
        assert torch.equal(part.take(positions)[..., -1], ends - 1)
    assert (seen == 1).all()


class Operations(TorchDispatchMode):
    """Names of all operations, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name().split(".")[0])
        return function(*args, **(kwargs or {}))


@each_layout
def test_a_run_of_equal_lengths_is_not_copied(channels_last):
    lengths = (6, 6, 6)
    a, b, v = activations(
        M, N, N, lengths=lengths, dtype=torch.float32, channels_last=channels_last
    )
    with Operations() as seen:
        g, _ = triton_varlen.gather(a, b, None, None, None, lengths, 1.0)
        triton_varlen.distribute(g, v, lengths, 1.0, True, 1.0)
    assert seen.names.count("da_triton::gather") == seen.names.count("da_triton::distribute") == 1
    assert seen.names.count("aten::copy_") == 3  # G, lse and Z
    assert not {"aten::gather", "aten::index_select", "aten::clone"} & set(seen.names)


def test_a_sequence_costs_two_products_and_a_softmax():
    lengths = tuple(range(1, 33))
    a, b, v = activations(M, N, N, lengths=lengths, dtype=torch.float32)
    with Operations() as seen:
        g, _ = aten_varlen.gather(a, b, None, None, None, lengths, 1.0)
        aten_varlen.distribute(g, v, lengths, 1.0, True, 1.0)
    computed = [x for x in seen.names if x in ("aten::bmm", "aten::_softmax", "aten::copy_")]
    assert seen.names.count("aten::bmm") == 2 * len(lengths)
    assert len(computed) <= 3 * len(lengths) + 2  # a softmax of V, and B transposed
    with Operations() as seen:
        needs = [True, True, False, False]
        aten_varlen.gather_backward(g, a, b, None, None, None, g, None, lengths, 1.0, needs)
        aten_varlen.distribute_backward(v[:, :, :M], g, v, lengths, 1.0, True, 1.0, True, True)
    products = [x for x in seen.names if x in ("aten::bmm", "aten::baddbmm")]
    assert len(products) == 4 * len(lengths)


@each_backend
def test_derivatives_of_derivatives(backend):
    lengths = [1, 0, 2]
    inputs = [x.flatten(1, 2) for x in activations(M, N, N, lengths=lengths)]
    extra = [x.flatten(1, 2) for x in tokens(lengths)]
    mask = torch.rand(1, sum(lengths), device=DEVICE) > 0.3

    def function(a, b, v, extra_a, extra_b):
        return da_triton.double_attention(
            a, b, v, heads=HEADS, cu_seqlens=offsets_of(lengths), mask=mask,
            extra=(extra_a, extra_b), backend=backend,
        )  # fmt: skip

    leaves = [x.requires_grad_() for x in (*inputs, *extra)]
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@each_backend
@pytest.mark.parametrize("transform", ["grad", "vmap", "vmap of grad", "hessian", "jvp"])
def test_transforms(backend, transform):
    lengths = [2, 0, 3, 2]
    a, b, v = (x.flatten(1, 2) for x in activations(M, N, N, lengths=lengths))

    def function(backend):
        def loss(b):
            z = da_triton.double_attention(
                a, b, v, heads=HEADS, cu_seqlens=offsets_of(lengths), backend=backend
            )
            return z.square().sum()

        return {
            "grad": lambda b: torch.func.grad(loss)(b),
            "vmap": lambda b: torch.vmap(loss)(torch.stack([b, 2 * b])),
            "vmap of grad": lambda b: torch.vmap(torch.func.grad(loss))(torch.stack([b, 2 * b])),
            "hessian": lambda b: torch.func.jacrev(torch.func.grad(loss))(b),
            "jvp": lambda b: torch.func.jvp(loss, (b,), (b,))[1],
        }[transform]

    check(function(backend)(b), function("eager")(b), b.dtype)


@each_kernels
def test_flop_counts_leave_padding_out(kernels):
    a, b, v, _, extra, offsets = arguments(False, True, UNEVEN)
    a, b, v = (x.requires_grad_() for x in (a, b, v))
    with FlopCounterMode(display=False) as counter:
        g, _ = varlen_ops.gather_op(a, b, None, *extra, offsets, 1.0, kernels)
        z = varlen_ops.distribute_op(g, v, offsets, 1.0, True, 1.0, kernels)
        forward = counter.get_total_flops()
        z.sum().backward()
    positions, joined = sum(UNEVEN), 2 * len(UNEVEN)
    product = 2 * HEADS * M * N
    assert forward == product * (2 * positions + joined)
    assert counter.get_total_flops() - forward == product * 4 * positions
